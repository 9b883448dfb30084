"""How long work reports itself, without knowing who listens.

Library functions take a `Progress` and open one task a phase; the command line draws bars with rate and
ETA, and `SILENT` is for everyone else.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["SILENT", "Progress", "Task", "counted"]


def counted(count: int, things: str) -> str:
    """`1 image`, `2,064 images`: a number and what is counted, given in the plural."""
    return f"{count:,} {things.removesuffix('s') if count == 1 else things}"


class Task(Protocol):
    """One phase of long work: `advance` as units are done, `note` for a short live remark (a loss, a name)."""

    def advance(self, units: int = 1) -> None:
        """Count `units` more as done."""

    def note(self, text: str) -> None:
        """Replace the remark beside the bar."""


class Progress(Protocol):
    """Whoever shows progress and remarks that must stay readable after the work is over."""

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
