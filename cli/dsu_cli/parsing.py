"""Turning what was typed into what the library takes, with errors that name the option."""

from collections.abc import Collection
from typing import TypeVar

from dsu.errors import UsageError

__all__ = ["one_of"]

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
