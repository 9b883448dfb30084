"""Run members of a study in parallel, each in its own process: on its own GPU, or with its part of the threads."""

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

__all__ = ["places_for", "side_by_side"]

R = TypeVar("R")

_PATIENCE: Final = 10.0
"""Seconds in which a process that is told to end does so by itself."""


def places_for(count: int, device: str) -> list[dict[str, str]]:
    """The environment of each of `count` processes: which GPU it sees, and with how many threads it computes.

    Raises `UsageError` if there are fewer GPUs, or `device` names one of them.
    """
    import torch

    places = [{"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))} for _ in range(count)]
    if device == "cpu" or not torch.cuda.is_available():
        return places
    gpus = 1 if ":" in device else torch.cuda.device_count()
    if count > gpus:
        raise UsageError(
            f"--parallel {count} needs a GPU for each run, but --device {device} has {gpus}: give a smaller K, "
            "--device cuda for all GPUs, or --device cpu."
        )
    shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    return [{**place, "CUDA_VISIBLE_DEVICES": gpu} for place, gpu in zip(places, shown.split(","), strict=False)]


def side_by_side(
    work: Callable[[str, Progress], R],
    names: Sequence[str],
    places: Sequence[Mapping[str, str]],
    progress: Progress,
    epochs: int,
) -> Iterator[tuple[str, R | DsuError]]:
    """What `work` gives for each name, as it is done, by processes at as many places.

    Where one fails the others go on, and a `DsuError` is what it gives. Whoever stops asking ends them all.

    Args:
        work: of a name; it is told where to report. It can be pickled, as what it gives.
        names: of what is to be done, which begins in this order.
        places: the environments of processes that run at once.
        progress: who is told what all of them do.
        epochs: that are to be trained in all.
    """
    free, to_do, running = list(places), list(names), dict[Connection, _Running]()
    try:
        with progress.task(f"{len(places)} in parallel", epochs, "epochs") as task:
            while to_do or running:
                while to_do and free:
                    one = _start(work, to_do.pop(0), free.pop(0))
                    running[one.pipe] = one
                for pipe in wait(list(running)):
                    assert isinstance(pipe, Connection)
                    one = running[pipe]
                    found = one.heard(progress, task)
                    if found is not None:
                        del running[pipe]
                        free.append(one.place)
                        yield one.name, found[0]
                task.note(" · ".join(f"{one.name} {one.remark}" for one in running.values()))
    finally:
        for one in running.values():
            one.process.terminate()
        for one in running.values():
            one.process.join(_PATIENCE)
            one.process.kill()


@dataclass
class _Running:
    """A process at its place, what it works on, the pipe that it talks through, and what it is doing."""

    name: str
    place: Mapping[str, str]
    process: "SpawnProcess"
    pipe: Connection
    remark: str = "starts"

    def heard(self, progress: Progress, task: Task) -> tuple[Any] | None:
        """Take the next thing that it says; what it gives at its end."""
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            self.process.join(_PATIENCE)
            kind, value = "given", DsuError(f"its process was killed (status {self.process.exitcode})")
        if kind == "given":
            self.process.join(_PATIENCE)
            self.pipe.close()
            return (value,)
        if kind == "said":
            progress.say(value)
        elif kind == "epochs":
            task.advance(value)
        else:
            self.remark = value
        return None


def _start(work: Callable[[str, Progress], Any], name: str, place: Mapping[str, str]) -> _Running:
    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_be_one, args=(work, name, there), name=name)
    before = {variable: os.environ.get(variable) for variable in place}
    os.environ.update(place)  # which a process takes with it, before it loads torch
    try:
        process.start()
    finally:
        for variable, value in before.items():
            os.environ.pop(variable) if value is None else os.environ.update({variable: value})
    there.close()  # so that its end is noticed
    return _Running(name, place, process, here)


def _be_one(work: Callable[[str, Progress], Any], name: str, pipe: Connection) -> None:
    """What a process does. Ctrl-C is its starter's to hear, who then ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    try:
        found = work(name, _Relayed(pipe))
    except (DsuError, CacheError) as error:
        found = DsuError(str(error))
    except Exception as error:  # a defect, or a full disk: the others go on
        traceback.print_exc()
        found = DsuError(f"{type(error).__name__}: {error}")
    pipe.send(("given", found))


def _leave(number: int, frame: object) -> None:
    raise SystemExit(1)  # so that its own processes end, too


class _Relayed:
    """The progress of one process, told through a pipe to the one that started it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._label, self._remark, self._noted = pipe, "", "", 0.0

    def say(self, text: str) -> None:
        self._pipe.send(("said", text))

    @contextmanager
    def task(self, label: str, total: int, unit: str = "images") -> Iterator[Task]:
        self._label, self._remark, self._noted = label, "", 0.0
        self.note("")
        yield self
        if self._remark:  # of an epoch, what is to be read afterwards
            self.say(f"{label}: {self._remark}")
            self._pipe.send(("epochs", 1))

    def advance(self, units: int = 1) -> None:
        """All of them are counted in epochs."""

    def note(self, text: str) -> None:
        self._remark, now = text, time.monotonic()
        if now - self._noted > 1:
            self._noted = now
            # Without the member's name, which stands before it.
            self._pipe.send(("noted", f"{self._label.rpartition(', ')[2]} {text.partition(' · ')[0]}".rstrip()))
