"""Options that several commands share and that are no settings (those: `settings_options`), and checks of them."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from dsu.errors import UsageError, did_you_mean
from dsu.settings import MACHINE, NETWORK, WHERE

__all__ = [
    "CacheRoot",
    "Config",
    "DataRoot",
    "DinoWeights",
    "HieraWeights",
    "Images",
    "Masks",
    "Quiet",
    "RandomWeights",
    "file_to_write",
    "names_of",
    "new_file",
    "one_of",
]

T = TypeVar("T")

DataRoot = Annotated[
    Path, typer.Option("--data-root", envvar="DSU_DATA", help="Folder of the benchmarks.", rich_help_panel=WHERE)
]
CacheRoot = Annotated[
    Path, typer.Option("--cache-root", envvar="DSU_CACHE", help="Folder of the stores.", rich_help_panel=WHERE)
]
Images = Annotated[
    str | None,
    typer.Option("--images", help="Image subfolder of your own folder, if it is not found.", rich_help_panel=WHERE),
]
Masks = Annotated[
    str | None,
    typer.Option("--masks", help="Mask subfolder of your own folder, if it is not found.", rich_help_panel=WHERE),
]
Config = Annotated[Path | None, typer.Option("--config", help="Settings in YAML; options override it.")]
HieraWeights = Annotated[
    Path | None,
    typer.Option(
        "--hiera-weights", envvar="DSU_HIERA", help="SAM 2.1 checkpoint (else from the hub).", rich_help_panel=NETWORK
    ),
]
DinoWeights = Annotated[
    Path | None,
    typer.Option(
        "--dino-weights", envvar="DSU_DINO", help="DINOv2 checkpoint (else from the hub).", rich_help_panel=NETWORK
    ),
]
RandomWeights = Annotated[
    bool,
    typer.Option("--random-weights", help="Random encoders, to try things out: no results.", rich_help_panel=NETWORK),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no remarks.", rich_help_panel=MACHINE)]


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


def names_of(option: str, text: str | None, known: Collection[str]) -> list[str] | None:
    """Names separated by commas, each among `known` and once; None for None. Raises `UsageError` naming the option."""
    if text is None:
        return None
    return list(dict.fromkeys(one_of(option, name.strip(), known) for name in text.split(",")))


def file_to_write(option: str, path: Path | None) -> None:
    """Check that a file can be written: in a folder that is there, or in one that is made where its own is.

    More than one folder that is not there is taken for a slip of the pen. Raises `UsageError` naming the option, and
    `DsuError` where a file stands in a folder's place.
    """
    from dsu.files import make_folder

    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder: give a name for the file in it.")
    if path.parent.exists():
        make_folder(path.parent)
    elif not path.parent.parent.is_dir():
        raise UsageError(f"{option} can't be {path}: there is no folder {path.parent}; make it, or mend the path.")
