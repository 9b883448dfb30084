"""What can go wrong with a store, as one family of exceptions."""

from __future__ import annotations

from dsu_cache.fingerprints import FieldDifference


class CacheError(Exception):
    """Something about a store that its user can act on; the message says what and how."""


class CorruptError(CacheError):
    """Stored bytes are missing or are not the bytes that were written."""


class BusyError(CacheError):
    """Another process is writing to the store."""


class StaleError(CacheError):
    """Stored arrays were made with other settings than the ones wanted.

    Args:
        differences: every field that differs.
        advice: the way out, as the caller's user would type it; ends the message.
    """

    def __init__(self, differences: tuple[FieldDifference, ...], advice: str = "") -> None:
        # Both go to the base class as they are: exceptions are pickled by their arguments.
        super().__init__(differences, advice)
        self.differences = differences
        self.advice = advice

    def __str__(self) -> str:
        listed = "; ".join(str(difference) for difference in self.differences)
        return f"the store was made with other settings: {listed}" + (f". {self.advice}" if self.advice else "")
