"""Options that several commands share, each with its help, so that they mean and read the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AdaptLast",
    "CacheRoot",
    "DataRoot",
    "Device",
    "Dino",
    "DinoSize",
    "DinoWeights",
    "Foreground",
    "Hiera",
    "HieraSize",
    "HieraWeights",
    "Images",
    "Masks",
    "Overlap",
    "PrecisionOption",
    "Preset",
    "Quiet",
    "RandomWeights",
    "Tile",
]

_WHERE = "Where things are"
_NETWORK = "Network"
_MACHINE = "Machine"

DataRoot = Annotated[
    Path, typer.Option("--data-root", envvar="DSU_DATA", help="Folder of the benchmarks.", rich_help_panel=_WHERE)
]
CacheRoot = Annotated[
    Path, typer.Option("--cache-root", envvar="DSU_CACHE", help="Folder of the stores.", rich_help_panel=_WHERE)
]
Images = Annotated[
    str | None,
    typer.Option("--images", help="Image subfolder of your own folder, if it is not found.", rich_help_panel=_WHERE),
]
Masks = Annotated[
    str | None,
    typer.Option("--masks", help="Mask subfolder of your own folder, if it is not found.", rich_help_panel=_WHERE),
]
Tile = Annotated[
    int | None,
    typer.Option("--tile", help="Cut images into tiles of this side in pixels, for large images.", min=1),
]
Overlap = Annotated[
    int | None, typer.Option("--overlap", help="Pixels that tiles share (default: an eighth of --tile).", min=0)
]
Foreground = Annotated[
    list[int] | None,
    typer.Option("--foreground", help="Mask value that is foreground; may be given several times."),
]
Preset = Annotated[
    str | None,
    typer.Option("--preset", help="large (the paper), base, small, tiny or toy.", rich_help_panel=_NETWORK),
]
Hiera = Annotated[
    str | None,
    typer.Option("--hiera", help="Another Hiera: large, base_plus, small, tiny, toy.", rich_help_panel=_NETWORK),
]
Dino = Annotated[
    str | None, typer.Option("--dino", help="Another DINOv2: vitl14, vitb14, vits14, toy.", rich_help_panel=_NETWORK)
]
HieraSize = Annotated[
    int | None,
    typer.Option("--hiera-size", help="Hiera's input in pixels, a multiple of 32.", rich_help_panel=_NETWORK),
]
DinoSize = Annotated[
    int | None,
    typer.Option("--dino-size", help="DINOv2's input in pixels, a multiple of 14.", rich_help_panel=_NETWORK),
]
HieraWeights = Annotated[
    Path | None,
    typer.Option(
        "--hiera-weights", envvar="DSU_HIERA", help="SAM 2.1 checkpoint (else from the hub).", rich_help_panel=_NETWORK
    ),
]
DinoWeights = Annotated[
    Path | None,
    typer.Option(
        "--dino-weights", envvar="DSU_DINO", help="DINOv2 checkpoint (else from the hub).", rich_help_panel=_NETWORK
    ),
]
RandomWeights = Annotated[
    bool,
    typer.Option("--random-weights", help="Random encoders, to try things out: no results.", rich_help_panel=_NETWORK),
]
AdaptLast = Annotated[
    int | None,
    typer.Option(
        "--adapt-last",
        help="How many of Hiera's blocks, from the end, carry adapters (default: all).",
        rich_help_panel=_NETWORK,
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=_MACHINE)]
PrecisionOption = Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16.", rich_help_panel=_MACHINE)]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no remarks.", rich_help_panel=_MACHINE)]
