"""Several processes that work together, started by torchrun or Slurm: ranks, world size and communication.

A single process is a `World` of size 1, whose methods cost nothing and change nothing. Nothing here imports torch
before there are other processes, so the command line can use this early.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dsu.errors import DsuError, UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

    from dsu.progress import Task

T = TypeVar("T")

_TORCHRUN_RENDEZVOUS: Final = "env://"
"""torchrun's variables define the rendezvous."""
_GRACE_SECONDS: Final = 5.0
"""Seconds in which a process that gets SIGTERM ends by itself, unless it waits for one that is gone."""
_PORTS: Final = range(10_000, 30_000)
"""Below the range of ports that systems assign automatically."""


class LostError(DsuError, RuntimeError):
    """Another process is gone, or this one has to end."""

    def __init__(self) -> None:
        super().__init__(
            "A process of this run ended, so all of them end (its message, if any, is above): run the same command "
            "again; train-head with --resume continues from the last checkpoint."
        )


@dataclass(frozen=True)
class World:
    """The processes that work together, from the point of view of one of them.

    Attributes:
        rank: this process's number, from 0.
        size: number of processes (world size).
        local_rank: its number among those on its machine.
        rendezvous: the rendezvous address, as torch names it.
        connected: whether the processes are connected, so that work is divided.
        store: torch's key-value store, shared by all, once connected.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    rendezvous: str = _TORCHRUN_RENDEZVOUS
    connected: bool = False
    store: "Store | None" = field(default=None, compare=False, repr=False)

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> "World":
        """The world defined by torchrun's variables, or by those that Slurm's srun sets for a step; else a single
        process.

        Raises `UsageError` if variables are incomplete or no numbers.
        """
        try:
            if "WORLD_SIZE" in environment and "RANK" in environment:
                rank, size, local_rank = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
                return cls(rank, size, local_rank)
            if "SLURM_STEP_NUM_TASKS" in environment:
                names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
                rank, size, local_rank = (int(environment[name]) for name in names)
                return cls(rank, size, local_rank, _slurm_rendezvous(environment))
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"The environment variables of torchrun or Slurm are incomplete or no numbers ({error}): start with "
                "torchrun or srun, or unset RANK, WORLD_SIZE and SLURM_STEP_NUM_TASKS."
            ) from error
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, the only one that writes and prints."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's part of `count` things: a consecutive range; sizes differ by at most one."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def device(self, asked: str) -> str:
        """This process's device, given the one `asked` for all; makes a GPU the current one.

        Raises `UsageError` if processes would have to share a GPU.
        """
        import torch

        if not self.connected or asked == "cpu" or not torch.cuda.is_available():
            return asked
        count = torch.cuda.device_count()
        # With --gpus-per-task=1, Slurm shows each process only its own GPU.
        index = 0 if count == 1 and self.rendezvous != _TORCHRUN_RENDEZVOUS else self.local_rank
        if ":" in asked or index >= count:
            raise UsageError(
                f"The device {asked!r} is not enough for all processes on this machine, which has {count} GPUs: "
                f"start at most {count} processes on it (--nproc-per-node {count}) with --device cuda, or give "
                "--device cpu."
            )
        torch.cuda.set_device(index)  # otherwise every process would also use memory of the first GPU
        return f"cuda:{index}"

    def all_reduce(self, tensor: "Tensor") -> None:
        """Replace a contiguous tensor by the sum over all processes, which is bit-identical in each."""
        if self.connected:
            with _communication() as distributed:
                distributed.all_reduce(tensor)

    def broadcast(self, tensor: "Tensor") -> None:
        """Replace a tensor by the first process's."""
        if self.connected:
            whole = tensor.flatten()  # in the same order in all processes
            with _communication() as distributed:
                distributed.broadcast(whole, 0)
            tensor.copy_(whole.view(tensor.shape))

    def broadcast_object(self, find: Callable[[], T]) -> T:
        """The first process's result of `find`; the others wait for it."""
        found = [find() if self.is_main else None]
        if self.connected:
            with _communication() as distributed:
                distributed.broadcast_object_list(found, 0)
        return found[0]  # type: ignore[return-value]

    def add_to_counter(self, name: str, units: int) -> int:
        """Add to a named counter shared by all processes and return its sum, without waiting for others."""
        if self.store is None:
            return units
        with _communication():
            return self.store.add(f"dsu/{name}", units)

    def shared_progress(self, task: "Task", label: str) -> Callable[[int], None]:
        """A function that counts this process's units and reports all processes' units to the task."""
        reported = 0

        def advance(units: int) -> None:
            nonlocal reported
            done = self.add_to_counter(label, units)
            task.advance(done - reported)
            reported = done

        return task.advance if self.store is None else advance

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if not self.connected:
            return [value]
        found: list[Any] = [None] * self.size
        with _communication() as distributed:
            distributed.all_gather_object(found, value)
        return found


ALONE: Final = World()


@contextmanager
def connect(patience: timedelta | None = None) -> Iterator[World]:
    """Connect to the other processes, if there are any, inside a `with`; reuses an existing connection.

    `patience` is how long a process waits for another one that is alive (None: torch's default).

    If one process fails, all end, and only the first to fail prints the reason. In the others, the error becomes a
    silent `SystemExit`. Raises `DsuError` if the others do not connect.
    """
    world = World.of_environment()
    if world.size == 1:
        yield world
        return
    import torch.distributed as distributed

    if distributed.is_initialized():
        yield replace(world, connected=True)
        return
    store = _connect(world, patience)
    undo = _end_on_sigterm(store)
    try:
        yield replace(world, connected=True, store=store)
        distributed.destroy_process_group()
        undo()
    except BaseException as error:
        _set_sigterm_handler(_ignore_signal)
        if _is_first_to_fail(store):
            raise
        raise SystemExit(1) from error


def _connect(world: World, patience: timedelta | None) -> "Store":
    """Create the process group: gloo for CPU tensors and objects, nccl for GPU tensors."""
    import torch
    import torch.distributed as distributed
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store: Store = next(rendezvous(world.rendezvous, world.rank, world.size))[0]
        distributed.init_process_group(backend, timeout=patience, store=store, rank=world.rank, world_size=world.size)
    except (RuntimeError, ValueError) as error:
        raise DsuError(
            f"Process {world.rank} can't connect to the others at {world.rendezvous} "
            f"({str(error).splitlines()[0][:160]}): start all {world.size} with torchrun or srun, on machines that "
            "can reach each other."
        ) from error
    return store


def _is_first_to_fail(store: "Store") -> bool:
    try:
        return store.add("dsu/failed", 1) == 1
    except RuntimeError:  # its host process is gone
        return True


def _end_on_sigterm(store: "Store") -> Callable[[], None]:
    """End this process on SIGTERM, which launchers send if another process has died.

    Raises `LostError` in the main thread. If that is blocked in torch, waiting for a process that is gone, another
    thread prints the message and ends the process. Returns a function that undoes all this.
    """
    if threading.current_thread() is not threading.main_thread():  # the only thread that can
        return lambda: None
    numbers, written = socket.socketpair()
    written.setblocking(False)
    descriptor = written.detach()  # open until it is undone: a process that fails may get the signal again
    before = _set_sigterm_handler(_raise_lost), signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
    threading.Thread(target=_watch_signals, args=(numbers, store), name="ending", daemon=True).start()

    def undo() -> None:
        _set_sigterm_handler(before[0])
        signal.set_wakeup_fd(before[1])
        socket.close(descriptor)

    return undo


def _watch_signals(numbers: socket.socket, store: "Store") -> None:
    """Wait for the signal's number; `numbers` ends when signals no longer matter."""
    while number := numbers.recv(1):
        if number[0] == signal.SIGTERM:
            time.sleep(_GRACE_SECONDS)
            if _is_first_to_fail(store):
                print(f"error: {LostError()}", file=sys.__stderr__, flush=True)
            os._exit(1)


def _raise_lost(number: int, frame: object) -> None:
    _set_sigterm_handler(_ignore_signal)
    raise LostError


def _ignore_signal(number: int, frame: object) -> None:
    """Ignore a second signal: the process is ending already."""


def _set_sigterm_handler(handler: Any) -> Any:
    in_main_thread = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGTERM, handler) if in_main_thread else None


@contextmanager
def _communication() -> Iterator[ModuleType]:
    """Communicate with the others. Raises `LostError` if one no longer responds."""
    import torch.distributed as distributed

    try:
        yield distributed
    except RuntimeError as error:
        raise LostError from error


def _slurm_rendezvous(environment: Mapping[str, str]) -> str:
    """The rendezvous address of a Slurm step: the first machine, with a port derived from the job's number."""
    # `gpu[03-07,11],login` to `gpu03`.
    first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", environment["SLURM_STEP_NODELIST"]).split(",")[0]
    number = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    return f"tcp://{first}:{_PORTS[number % len(_PORTS)]}"
