"""Options that several commands share and that are no settings (those: `settings_options`)."""

from pathlib import Path
from typing import Annotated

import typer

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
]

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
