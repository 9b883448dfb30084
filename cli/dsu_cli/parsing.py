"""Turning what was typed into what the library takes, with errors that name the option."""

from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

from dsu.errors import UsageError

__all__ = ["new_file", "one_of"]

T = TypeVar("T")


def one_of(option: str, value: object, allowed: Collection[T]) -> T:
    """`value`, if it is among `allowed`. Raises `UsageError` naming the option and the choices."""
    for item in allowed:
        if item == value:
            return item
    if isinstance(allowed, range):
        choices = f"a number from {allowed[0]} to {allowed[-1]}"
    else:
        choices = ", ".join(str(item) for item in allowed if item is not None)
    raise UsageError(f"{option} can't be {value}: give {choices}.")


def new_file(option: str, path: Path, *, overwrite: bool) -> Path:
    """`path`, if nothing stands there or it may be written over. Raises `UsageError` naming the option."""
    if path.exists() and not (overwrite and path.is_file()):
        raise UsageError(f"{path} stands already: give another {option}, or --overwrite for a file.")
    return path
