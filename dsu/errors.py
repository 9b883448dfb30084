"""The one kind of failure that is the user's to mend."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = ["DsuError", "UsageError", "validation_reasons"]


class DsuError(Exception):
    """Something the user can mend. The message is one sentence: the thing, the reason, the way out.

    The command line prints it without a traceback and exits with status 1.
    """


class UsageError(DsuError):
    """A request that cannot be carried out as given (an option, a name, a settings field): exit status 2."""


def validation_reasons(error: "ValidationError") -> str:
    """What a failed validation found, as `field: reason` joined by semicolons (for settings and heads)."""
    reasons = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        reason = item["msg"].removeprefix("Value error, ")
        reasons.append(f"{field}: {reason}" if field else reason)
    return "; ".join(reasons)
