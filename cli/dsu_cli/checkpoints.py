"""`dsu import-checkpoint` and `dsu export-checkpoint`: the authors' file format."""

import io
from pathlib import Path
from typing import Annotated

import typer

from dsu_cli import options
from dsu_cli.console import out as console


def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE.pth", help="A checkpoint of the authors' program.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The head to write.")] = Path("head.safetensors"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over an existing file.")] = False,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
) -> None:
    """Make a head of a published checkpoint, to predict with.

    Says whether the encoders inside are the official ones, where those are at hand.
    """
    from dsu.encoders.weights import EncoderWeights
    from dsu.files import make_folder
    from dsu.heads.head_file import save_head
    from dsu.sharing.published import import_head

    target = options.new_file("--out", out, overwrite=overwrite)
    state, info, notes = import_head(checkpoint, EncoderWeights(hiera_weights, dino_weights))
    make_folder(target.parent)
    save_head(target, state, info)
    for note in notes:
        console.print(note, markup=False)
    console.print(f"{target}: Hiera {info.config.hiera.name}, DINOv2 {info.config.dino.name}", markup=False)


def export_checkpoint(
    head: Annotated[
        Path, typer.Argument(metavar="HEAD", help="A run folder, head.safetensors or OWNER/NAME on the hub.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")] = Path("checkpoint.pth"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over an existing file.")] = False,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
) -> None:
    """Write a head and its encoders under the authors' key names, as their program loads them."""
    import torch

    from dsu.encoders.weights import EncoderWeights
    from dsu.files import atomic_write, make_folder
    from dsu.heads.head_file import read_head_info, resolve_head
    from dsu.sharing.published import export_head

    target = options.new_file("--out", out, overwrite=overwrite)
    file = resolve_head(head)
    random = read_head_info(file).random_weights
    state = export_head(file, EncoderWeights(hiera_weights, dino_weights, random))
    buffer = io.BytesIO()
    torch.save({name: tensor.contiguous() for name, tensor in state.items()}, buffer)
    make_folder(target.parent)
    atomic_write(target, buffer.getvalue())
    console.print(f"{target}: {len(state):,} tensors", markup=False)
