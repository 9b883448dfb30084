"""Run members of a study in parallel processes, each on its own GPU or with its part of the processor's threads."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dsu.errors import DsuError, UsageError
from dsu.progress import Progress, Task
from dsu_cache.files import CacheError

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

R = TypeVar("R")

_EXIT_SECONDS: Final = 10.0
"""Seconds that a process has to exit after SIGTERM, or after its result, before it is killed."""


def worker_environments(count: int, device: str) -> list[dict[str, str]]:
    """Environment variables for each of `count` processes: its number of threads and its GPU.

    Raises `UsageError` if there are fewer than `count` GPUs, or if `device` selects a single one.
    """
    import torch

    environments = [{"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))} for _ in range(count)]
    if device == "cpu" or not torch.cuda.is_available():
        return environments
    gpus = 1 if ":" in device else torch.cuda.device_count()
    if count > gpus:
        raise UsageError(
            f"--parallel {count} needs a GPU for each run, but --device {device} has {gpus}: give a smaller K, "
            "--device cuda for all GPUs, or --device cpu."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    return [{**own, "CUDA_VISIBLE_DEVICES": gpu} for own, gpu in zip(environments, visible.split(","), strict=False)]


def run_parallel(
    work: Callable[[str, Progress], R],
    names: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    progress: Progress,
    epochs: int,
) -> Iterator[tuple[str, R | DsuError]]:
    """Run `work` for each name in parallel processes, and yield the results as they finish.

    If a process fails, its result is a `DsuError`, and the others continue. Closing the iterator terminates all
    processes.

    Args:
        work: called with a name and the progress to report to; it and its result must be picklable.
        names: the work's names, started in this order.
        environments: environment variables of the processes, one mapping for each that runs at once.
        progress: receives the messages of all processes.
        epochs: total number of epochs to train.
    """
    free, to_do, running = list(environments), list(names), dict[Connection, _Worker]()
    try:
        with progress.task(f"{len(environments)} in parallel", epochs, "epochs") as task:
            while to_do or running:
                while to_do and free:
                    worker = _start(work, to_do.pop(0), free.pop(0))
                    running[worker.pipe] = worker
                for pipe in wait(list(running)):
                    assert isinstance(pipe, Connection)
                    worker = running[pipe]
                    result = worker.receive(progress, task)
                    if result is not None:
                        del running[pipe]
                        free.append(worker.environment)
                        yield worker.name, result[0]
                task.note(" · ".join(f"{worker.name} {worker.remark}" for worker in running.values()))
    finally:
        for worker in running.values():
            worker.process.terminate()
        for worker in running.values():
            worker.process.join(_EXIT_SECONDS)
            worker.process.kill()


@dataclass
class _Worker:
    """A running process: the name of its work, its environment variables, the pipe from it, and its latest remark."""

    name: str
    environment: Mapping[str, str]
    process: "SpawnProcess"
    pipe: Connection
    remark: str = "starts"

    def receive(self, progress: Progress, task: Task) -> tuple[Any] | None:
        """Receive its next message; returns its result, in a tuple, once it is finished."""
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            self.process.join(_EXIT_SECONDS)
            kind, value = "result", DsuError(f"its process was killed (status {self.process.exitcode})")
        if kind == "result":
            self.process.join(_EXIT_SECONDS)
            self.pipe.close()
            return (value,)
        if kind == "message":
            progress.say(value)
        elif kind == "epochs":
            task.advance(value)
        else:
            self.remark = value
        return None


def _start(work: Callable[[str, Progress], Any], name: str, environment: Mapping[str, str]) -> _Worker:
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_worker, args=(work, name, sender), name=name)
    before = {variable: os.environ.get(variable) for variable in environment}
    os.environ.update(environment)  # inherited by the process before it loads torch
    try:
        process.start()
    finally:
        for variable, value in before.items():
            os.environ.pop(variable) if value is None else os.environ.update({variable: value})
    sender.close()  # then only the process has it open, and the pipe reports EOF when the process ends
    return _Worker(name, environment, process, receiver)


def _run_worker(work: Callable[[str, Progress], Any], name: str, pipe: Connection) -> None:
    """Main function of a worker process. It ignores Ctrl-C: the parent process handles it, and sends SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit)
    try:
        result = work(name, _PipedProgress(pipe))
    except (DsuError, CacheError) as error:
        result = DsuError(str(error))
    except Exception as error:  # a bug, or a full disk: the other workers continue
        traceback.print_exc()
        result = DsuError(f"{type(error).__name__}: {error}")
    pipe.send(("result", result))


def _exit(number: int, frame: object) -> None:
    raise SystemExit(1)  # an exception lets the worker end its own subprocesses


class _PipedProgress:
    """The progress of a worker process, sent through a pipe to its parent process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._label, self._remark, self._sent = pipe, "", "", 0.0

    def say(self, text: str) -> None:
        self._pipe.send(("message", text))

    @contextmanager
    def task(self, label: str, total: int, unit: str = "images") -> Iterator[Task]:
        self._label, self._remark, self._sent = label, "", 0.0
        self.note("")
        yield self
        if self._remark:  # a finished epoch: its last remark stays in the log
            self.say(f"{label}: {self._remark}")
            self._pipe.send(("epochs", 1))

    def advance(self, units: int = 1) -> None:
        """Ignore units: the parent process counts epochs."""

    def note(self, text: str) -> None:
        self._remark, now = text, time.monotonic()
        if now - self._sent > 1:
            self._sent = now
            # Without the member's name: the parent process adds it.
            self._pipe.send(("remark", f"{self._label.rpartition(', ')[2]} {text.partition(' · ')[0]}".rstrip()))
