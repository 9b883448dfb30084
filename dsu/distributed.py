"""Several processes that do one thing together, as torchrun or Slurm starts them: who this one is, and how they talk.

A process alone is a `World` of one, whose methods cost nothing and change nothing. Nothing here imports torch before
there is somebody to talk to, so that the command line may ask early.
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

__all__ = ["ALONE", "LostError", "World", "joined"]

T = TypeVar("T")

_TORCHRUN: Final = "env://"
"""torchrun's own variables say where the processes meet."""
_PATIENCE: Final = 5.0
"""Seconds in which a process that is told to end does so by itself, unless it waits for one that is gone."""
_PORTS: Final = range(10_000, 30_000)
"""Below those that systems give out by themselves."""


class LostError(DsuError, RuntimeError):
    """Another process is gone, or this one is told to end."""

    def __init__(self) -> None:
        super().__init__(
            "A process of this run was ended, and so all of them end: what it said, if anything, stands above; go on "
            "with the same command, and train-head with --resume from the last checkpoint."
        )


@dataclass(frozen=True)
class World:
    """The processes that do one thing together, seen by one of them.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        local_rank: its number among those on its machine.
        meets: where they meet, as torch names it.
        together: whether they have met, so that work is divided.
        store: what all of them may read and change at any time, once they have met.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    meets: str = _TORCHRUN
    together: bool = False
    store: "Store | None" = field(default=None, compare=False, repr=False)

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> "World":
        """As torchrun's variables say, or those that Slurm's srun sets for a step; else one process alone.

        Raises `UsageError` for variables that are no numbers, or that lack one.
        """
        try:
            if "WORLD_SIZE" in environment and "RANK" in environment:
                rank, size, local_rank = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
                return cls(rank, size, local_rank)
            if "SLURM_STEP_NUM_TASKS" in environment:
                names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
                rank, size, local_rank = (int(environment[name]) for name in names)
                return cls(rank, size, local_rank, _slurm_place(environment))
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"The variables by which torchrun or Slurm numbers its processes are incomplete or no numbers "
                f"({error}): start with torchrun or srun, or unset RANK, WORLD_SIZE and SLURM_STEP_NUM_TASKS."
            ) from error
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this is the one process that writes and speaks."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's part of so many things: consecutive ones, as many as each other process's, or one more."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def device(self, asked: str) -> str:
        """The device of this process, where `asked` names one for all; a GPU becomes the current one.

        Raises `UsageError` where processes would have to share a GPU.
        """
        import torch

        if not self.together or asked == "cpu" or not torch.cuda.is_available():
            return asked
        count = torch.cuda.device_count()
        # Slurm may show each process its own GPU alone (--gpus-per-task=1).
        index = 0 if count == 1 and self.meets != _TORCHRUN else self.local_rank
        if ":" in asked or index >= count:
            raise UsageError(
                f"The device {asked!r} can't serve all processes on this machine, which shows {count} GPUs: start no "
                f"more processes on it than that (--nproc-per-node {count}) with --device cuda, or give --device cpu."
            )
        torch.cuda.set_device(index)  # else every process would take memory of the first for itself
        return f"cuda:{index}"

    def add_up(self, tensor: "Tensor") -> None:
        """Replace a contiguous tensor by the sum of all processes', the same to the last bit in each."""
        if self.together:
            with _others() as distributed:
                distributed.all_reduce(tensor)

    def spread(self, tensor: "Tensor") -> None:
        """Replace a tensor by the leading process's."""
        if self.together:
            whole = tensor.flatten()  # in the order in which all have it
            with _others() as distributed:
                distributed.broadcast(whole, 0)
            tensor.copy_(whole.view(tensor.shape))

    def told(self, find: Callable[[], T]) -> T:
        """What the leading process finds, while the others wait for it."""
        found = [find() if self.leads else None]
        if self.together:
            with _others() as distributed:
                distributed.broadcast_object_list(found, 0)
        return found[0]  # type: ignore[return-value]

    def counted(self, name: str, units: int) -> int:
        """Add to a counter of this name that all processes share, and return its sum, waiting for no one."""
        if self.store is None:
            return units
        with _others():
            return self.store.add(f"dsu/{name}", units)

    def counting(self, task: "Task", label: str) -> Callable[[int], None]:
        """A function that counts units of this process, and tells the task of those of all."""
        told = 0

        def advance(units: int) -> None:
            nonlocal told
            done = self.counted(label, units)
            task.advance(done - told)
            told = done

        return task.advance if self.store is None else advance

    def gathered(self, value: T) -> list[T]:
        """Every process's value, in their order."""
        if not self.together:
            return [value]
        found: list[Any] = [None] * self.size
        with _others() as distributed:
            distributed.all_gather_object(found, value)
        return found


ALONE: Final = World()


@contextmanager
def joined(patience: timedelta | None = None) -> Iterator[World]:
    """Meet the other processes, if there are any, inside a `with`; whoever has met them already is met again.

    `patience` says how long one may wait for another that lives (None: as long as torch does by itself).

    Where one fails, all end, and one alone says why: the first to fail. In the others, which only lose it, what was
    raised becomes a silent `SystemExit`. Raises `DsuError` where the others do not come.
    """
    world = World.of_environment()
    if world.size == 1:
        yield world
        return
    import torch.distributed as distributed

    if distributed.is_initialized():
        yield replace(world, together=True)
        return
    store = _meet(world, patience)
    heed_no_more = _heed(store)
    try:
        yield replace(world, together=True, store=store)
        distributed.destroy_process_group()
        heed_no_more()
    except BaseException as error:
        _on_term(_pass)
        if _is_first_to_fail(store):
            raise
        raise SystemExit(1) from error


def _meet(world: World, patience: timedelta | None) -> "Store":
    """Make the group of processes: CPU tensors and objects travel by gloo, those on GPUs by nccl."""
    import torch
    import torch.distributed as distributed
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store: Store = next(rendezvous(world.meets, world.rank, world.size))[0]
        distributed.init_process_group(backend, timeout=patience, store=store, rank=world.rank, world_size=world.size)
    except (RuntimeError, ValueError) as error:
        raise DsuError(
            f"Process {world.rank} can't meet the others at {world.meets} ({str(error).splitlines()[0][:160]}): start "
            f"all {world.size} with torchrun or srun, on machines that reach each other."
        ) from error
    return store


def _is_first_to_fail(store: "Store") -> bool:
    try:
        return store.add("dsu/failed", 1) == 1
    except RuntimeError:  # it was kept by a process that is gone
        return True


def _heed(store: "Store") -> Callable[[], None]:
    """End where this process is told to (SIGTERM), as those who started it do where another has died.

    `LostError` is raised in the main thread. Where that does not run, since it waits in torch for one that is gone, a
    thread says the same and ends the process. Returns what undoes all this.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone can
        return lambda: None
    numbers, written = socket.socketpair()
    written.setblocking(False)
    before = _on_term(_end), signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(numbers, store), name="ending", daemon=True).start()

    def undo() -> None:
        _on_term(before[0])
        signal.set_wakeup_fd(before[1])
        written.close()

    return undo


def _watch(numbers: socket.socket, store: "Store") -> None:
    """Wait for the number of the signal; `numbers` ends where nothing is to be heeded any more."""
    while number := numbers.recv(1):
        if number[0] == signal.SIGTERM:
            time.sleep(_PATIENCE)
            if _is_first_to_fail(store):
                print(f"error: {LostError()}", file=sys.__stderr__, flush=True)
            os._exit(1)


def _end(number: int, frame: object) -> None:
    _on_term(_pass)
    raise LostError


def _pass(number: int, frame: object) -> None:
    """It is ending already."""


def _on_term(handler: Any) -> Any:
    in_main_thread = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGTERM, handler) if in_main_thread else None


@contextmanager
def _others() -> Iterator[ModuleType]:
    """Talk to the others. Raises `LostError` where one does not answer any more."""
    import torch.distributed as distributed

    try:
        yield distributed
    except RuntimeError as error:
        raise LostError from error


def _slurm_place(environment: Mapping[str, str]) -> str:
    """Where the processes of a Slurm step meet: at the machine of the first, at a port by the job's number."""
    # `gpu[03-07,11],login` to `gpu03`.
    first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", environment["SLURM_STEP_NODELIST"]).split(",")[0]
    number = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    return f"tcp://{first}:{_PORTS[number % len(_PORTS)]}"
