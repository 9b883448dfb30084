"""Turning what was typed into what the library takes, with errors that name the option."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dsu.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from dsu.settings import TrainingSettings

__all__ = ["new_file", "one_of", "settings_from"]

T = TypeVar("T")


def one_of(option: str, value: object, allowed: Collection[T]) -> T:
    """`value`, if it is among `allowed`. Raises `UsageError` naming the option and the choices."""
    for item in allowed:
        if item == value:
            return item
    if isinstance(allowed, range):
        choices = f"a number from {allowed[0]} to {allowed[-1]}"
    else:
        named = [str(item) for item in allowed if item is not None]
        choices = f"{', '.join(named)}{did_you_mean(str(value), named)}"
    raise UsageError(f"{option} can't be {value}: give {choices}{'' if choices.endswith('?') else '.'}")


def new_file(option: str, path: Path, *, overwrite: bool) -> Path:
    """`path`, if nothing stands there or it may be written over. Raises `UsageError` naming the option."""
    if path.exists() and not (overwrite and path.is_file()):
        raise UsageError(f"{path} stands already: give another {option}, or --overwrite for a file.")
    return path


def settings_from(config: Path | None, given: Mapping[str, Any]) -> "TrainingSettings":
    """Settings of a file with a command's options on top: those that are called like a field and were given.

    An option that was not given is None, or False for a switch. Raises `UsageError` naming the file and the field.
    """
    from dsu.settings import TrainingSettings, read_settings

    fields = TrainingSettings.model_fields
    return read_settings(config, {n: v for n, v in given.items() if n in fields and v is not False})
