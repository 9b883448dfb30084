"""Progress reporting for library functions, and a threaded map over files.

Library functions take a `Progress` and open one task a phase; the command line draws bars with rate and
ETA, and `SILENT` is for everyone else.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol, TypeVar

__all__ = ["SILENT", "Progress", "Task", "clock", "counted", "few", "in_threads"]

T = TypeVar("T")
R = TypeVar("R")

_MOST_THREADS: Final = 16
"""By default: more decode no faster, and each holds an image."""


def few(names: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """The first names of a list, and how many more there are."""
    return separator.join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def counted(count: int, things: str) -> str:
    """`1 image`, `2,064 images`: a number and what is counted, given in the plural."""
    return f"{count:,} {things.removesuffix('s') if count == 1 else things}"


def clock(seconds: float) -> str:
    """`0:05`, `12:30`, `3:02:10` or `2 d 4 h`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Task(Protocol):
    """One phase of long work: `advance` as units are done, `note` for a short live remark (a loss, a name)."""

    def advance(self, units: int = 1) -> None:
        """Count `units` more as done."""

    def note(self, text: str) -> None:
        """Replace the remark beside the bar."""


class Progress(Protocol):
    """Shows progress, and lines that stay readable afterwards."""

    def task(self, label: str, total: int, unit: str = "images") -> AbstractContextManager[Task]:
        """Open a phase of `total` units; closing the context closes the bar."""

    def say(self, text: str) -> None:
        """Print one line that stays."""


class _Silence:
    def advance(self, units: int = 1) -> None:
        """Nobody counts."""

    def note(self, text: str) -> None:
        """Nobody reads it."""

    def say(self, text: str) -> None:
        """Nobody listens."""

    @contextmanager
    def task(self, label: str, total: int, unit: str = "images") -> Iterator[Task]:
        yield self


SILENT: Progress = _Silence()


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
    pool = ThreadPoolExecutor(workers or min(_MOST_THREADS, os.cpu_count() or 1))
    try:
        with progress.task(label, len(items), unit) as task:
            for result in pool.map(function, items):
                yield result
                task.advance()
    finally:
        # So that an interrupted user does not wait for the rest.
        pool.shutdown(cancel_futures=True)
