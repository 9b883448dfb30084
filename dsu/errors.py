"""Errors that the user can fix, and their wording."""

import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, Final, Protocol


class DsuError(Exception):
    """An error that the user can fix. The message is one sentence: the thing, the reason, the fix.

    The command line prints it without a traceback and exits with status 1.
    """


class UsageError(DsuError):
    """An invalid request (an option, a name, a settings field): exit status 2."""


def check_installed(doing: str, *packages: str) -> None:
    """Raise `UsageError` with the `pip` command if packages for an optional feature are not installed."""
    missing = [name for name in packages if find_spec(name.replace("-", "_")) is None]
    if missing:
        raise UsageError(f"{doing} needs {', '.join(missing)}: run `pip install {' '.join(missing)}`.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause for the end of a message, "; did you mean 'epochs'?", or "" if no known name is similar."""
    by_small = {item.casefold(): item for item in known}
    near = get_close_matches(name.casefold(), by_small, n=1)
    return f"; did you mean {by_small[near[0]]!r}?" if near else ""


class _ValidationError(Protocol):
    """pydantic's `ValidationError`, or FastAPI's with the same format."""

    def errors(self) -> Sequence[Any]:
        """One dict per invalid value."""


def validation_reasons(
    error: _ValidationError, known: Collection[str] = (), spell: Callable[[str], str] = lambda field: field
) -> str:
    """A failed validation's reasons as plain clauses joined by semicolons.

    Args:
        error: pydantic's error.
        known: the names of all fields, for hints on unknown ones.
        spell: turns a field's name into what the user writes, such as an option.
    """
    return "; ".join(_reason(item, known, spell) for item in error.errors())


_EXPECTED: Final = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "fields with values"),
    "finite_number": "a finite number",
    "string_type": "text",
    "string_pattern_mismatch": "a name of letters, digits, '.', '_' and '-'",
    "literal_error": "{expected}",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_long": "a list of {max_length}",
    "too_short": "a list of {min_length}",
}
"""The expected value for each type of pydantic error."""


def _reason(item: Mapping[str, Any], known: Collection[str], spell: Callable[[str], str]) -> str:
    first, *rest = (str(part) for part in item["loc"]) if item["loc"] else ("",)
    field = ".".join((spell(first), *rest))
    context: dict[str, Any] = item.get("ctx", {})
    if item["type"] == "missing":
        return f"{field} is missing"
    if item["type"] == "extra_forbidden":
        near = did_you_mean(first, known) if not rest else ""
        listed = f"; known fields are {', '.join(known)}" if known and not near and not rest else ""
        return f"{field} is not a known field{near}{listed}"
    if item["type"] in _EXPECTED:
        # reprlib shortens values from files, which may have any length and depth.
        # pydantic gives the bounds of integers as floats.
        context = {n: int(v) if isinstance(v, float) and v.is_integer() else v for n, v in context.items()}
        expected = _EXPECTED[item["type"]].format(**context)
        near = did_you_mean(str(item["input"]), expected.split("'")[1::2]) if item["type"] == "literal_error" else ""
        return f"{field or 'it'} must be {expected}, not {reprlib.repr(item['input'])}{near}"
    return f"{field} {item['msg'].removeprefix('Value error, ')}".strip()
