"""Progress reporting for library functions, and a threaded map over files.

Library functions take a `Progress` and open one task per phase. The command line shows bars with rate and remaining
time; `SILENT`, the default, shows nothing.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_MAX_THREADS: Final = 16
"""Default maximum: more threads decode no faster, and each keeps an image in memory."""


def few(names: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """The first names of a list, and the number of further ones."""
    return separator.join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def counted(count: int, things: str) -> str:
    """A number and a noun given in the plural: `1 image`, `2,064 images`."""
    return f"{count:,} {things.removesuffix('s') if count == 1 else things}"


def clock(seconds: float) -> str:
    """A duration as `0:05`, `12:30`, `3:02:10` or `2 d 4 h`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Task(Protocol):
    """A phase of a long computation: `advance` counts finished units, `note` sets a short remark (a loss, a name)."""

    def advance(self, units: int = 1) -> None:
        """Count `units` more as done."""

    def note(self, text: str) -> None:
        """Replace the remark next to the bar."""


class Progress(Protocol):
    """Shows progress bars and permanent lines."""

    def task(self, label: str, total: int, unit: str = "images") -> AbstractContextManager[Task]:
        """Open a phase of `total` units, inside a `with`."""

    def say(self, text: str) -> None:
        """Print one permanent line."""


class _Silent:
    def advance(self, units: int = 1) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""

    @contextmanager
    def task(self, label: str, total: int, unit: str = "images") -> Iterator[Task]:
        yield self


SILENT: Progress = _Silent()


def in_threads(
    function: Callable[[T], R],
    items: Sequence[T],
    label: str,
    progress: Progress = SILENT,
    workers: int | None = None,
    unit: str = "images",
) -> Iterator[R]:
    """Yield the results of `function` for all items, in order, computed in advance by threads.

    All results that are not consumed yet stay in memory, so they should be small.

    Args:
        function: called with each item in a thread; its exceptions are raised here.
        items: the items.
        label, unit: label and unit of the phase shown by `progress`.
        progress: receives messages.
        workers: number of threads; by default one per core, at most 16.
    """
    pool = ThreadPoolExecutor(workers or min(_MAX_THREADS, os.cpu_count() or 1))
    try:
        with progress.task(label, len(items), unit) as task:
            for result in pool.map(function, items):
                yield result
                task.advance()
    finally:
        # After an interruption, do not wait for the remaining items.
        pool.shutdown(cancel_futures=True)
