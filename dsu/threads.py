"""Threads: many files looked at by a few of them, and what holds threads in each of several processes."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Generic, TypeVar

from dsu.progress import SILENT, Progress

__all__ = ["PerProcess", "in_threads"]

MOST: Final = 16
"""Threads by default: more decode no faster, and each holds an image."""

T = TypeVar("T")
R = TypeVar("R")


def in_threads(
    function: Callable[[T], R],
    items: Sequence[T],
    label: str,
    progress: Progress = SILENT,
    workers: int | None = None,
    unit: str = "images",
) -> Iterator[R]:
    """Yield `function` of every item, in the items' order, while threads work ahead.

    All results that have not been taken yet are held: return little.

    Args:
        function: what a thread does with one item; what it raises is raised here.
        items: what it is done with.
        label, unit: of the phase that `progress` is told of.
        progress: who is told.
        workers: how many items are worked on at once; by default as many as there are processors, at most 16.
    """
    pool = ThreadPoolExecutor(workers or min(MOST, os.cpu_count() or 1))
    try:
        with progress.task(label, len(items), unit) as task:
            for result in pool.map(function, items):
                yield result
                task.advance()
    finally:
        # So that an interrupted user does not wait for the rest.
        pool.shutdown(cancel_futures=True)


class PerProcess(Generic[T]):
    """Something that every process makes for itself, since neither threads nor locks pass into another one.

    Args:
        make: makes it. Called at once, and in each other process that a copy of this gets into.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._process, self._made = os.getpid(), make()

    def __call__(self) -> T:
        """What this process has made."""
        if self._process != os.getpid():  # forked since
            self._process, self._made = os.getpid(), self._make()
        return self._made

    def __reduce__(self) -> tuple[type["PerProcess[T]"], tuple[Callable[[], T]]]:
        return type(self), (self._make,)
