"""What was looked at, and what was found."""

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: the thing.
        text: what was found, for people.
        state: broken where it keeps one from working.
        remedy: the way out, a whole sentence, where it is not fine.
        value: what was found, for programs; None takes the text.
    """

    what: str
    text: str
    state: Literal["fine", "note", "broken"] = "fine"
    remedy: str | None = None
    value: Any = None
