"""`dsu head`: inspect and share a trained head; convert heads from and to the authors' file format."""

import io
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dsu.errors import UsageError
from dsu.files import atomic_write, make_folder
from dsu.metrics.figures import figure_name
from dsu.progress import counted
from dsu.settings import EncoderWeights
from dsu.thresholds import DEFAULT_THRESHOLD
from dsu_cli import options
from dsu_cli.console import age_text, bytes_text, fail, key_table, out as console, print_json, say, table

if TYPE_CHECKING:
    from dsu.sharing.head_facts import HeadFacts

head = typer.Typer(no_args_is_help=True, help="Inspect a trained head and share it.")


@head.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to search recursively.")] = Path("runs"),
    json: options.Json = False,
) -> None:
    """List all heads below a folder, newest first: data, epochs, scores, age.

    N is the number of Hiera's last blocks with adapters. S, MAE and IoU are measured on the held-out images, or on
    their tiles if the head was trained on tiles. Exit status 1 if a head can't be read, 0 if there are none.
    """
    from dsu.sharing.head_facts import find_heads

    heads = find_heads(folder)
    if json:
        print_json(heads)
    elif heads:
        console.print(_heads_table(heads))
        tiled = any(head["tiled"] for head in heads)
        instead = ", for (tiles) its tiles" if tiled else ""
        say(
            f"N: Hiera's last N blocks have adapters. S, MAE, IoU: on each head's own held-out images{instead}; to "
            "compare heads, dsu predict and dsu eval --common."
        )
    else:
        say(f"There are no heads below {folder}: train one with `dsu train-head`.")
    damage = [head["damage"] for head in heads if head["damage"]]
    for reason in damage:
        fail(reason)
    if damage:
        raise typer.Exit(1)


@head.command()
def info(
    head: options.Head = None,
    json: options.Json = False,
) -> None:
    """Describe a head: network, encoders and their licences, data, settings, metrics."""
    from dsu.heads.head_file import resolve_head
    from dsu.sharing.head_facts import head_facts

    facts = head_facts(resolve_head(head))
    if json:
        print_json(facts.to_json())
    else:
        console.print(key_table(_rows(facts)))


@head.command()
def threshold(
    value: Annotated[
        str | None,
        typer.Argument(metavar="VALUE|none", help="Above 0, up to 1; none removes it.", show_default=False),
    ] = None,
    head: options.Head = None,
) -> None:
    """Show or store the threshold for alarms, overlays and cutouts.

    `dsu eval` proposes thresholds. Existing masks stay valid: the next `dsu predict` only updates the verdicts.
    Existing overlays and cutouts need --overwrite.
    """
    from dsu.heads.head_file import read_head_info, resolve_head, set_threshold

    file = resolve_head(head)
    if value is not None:
        try:
            number = None if value == "none" else float(value)
        except ValueError as error:
            raise UsageError(f"VALUE can't be {value!r}: give a number above 0, up to 1, or none.") from error
        if number is not None and not 0 < number <= 1:
            raise UsageError(f"VALUE can't be {value!r}: give a number above 0, up to 1, or none.")
        set_threshold(file, number)
    stored = read_head_info(file).threshold
    default = f"none, so {DEFAULT_THRESHOLD} applies"
    console.print(f"{file}: threshold {default if stored is None else f'{stored:g}'}", markup=False)


@head.command()
def export(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="The folder to write.")],
    head: options.Head = None,
    name: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Name on the model card (default: the folder's).")
    ] = None,
    licence: options.Licence = "apache-2.0",
    overwrite: options.OverwriteExport = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a folder for the Hugging Face hub: the head, config.json and a model card.

    Nothing is uploaded. Paths and names of your images are left out.
    """
    from dsu.heads.head_file import resolve_head
    from dsu.sharing.model_card import export_folder

    files = export_folder(resolve_head(head), out, name=name, licence=licence, overwrite=overwrite)
    if quiet:
        return
    rows = [(file.name, bytes_text(file.stat().st_size)) for file in files]
    console.print(key_table([("folder", str(out)), *rows, ("licence", f"{licence} (--license chooses another)")]))
    console.print(f"Try it: `dsu predict IMAGE --head {out}`. Share it: `hf upload {name or 'OWNER/NAME'} {out}`.")


# ---- the authors' file format ----


def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE.pth", help="A checkpoint from the authors' program.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The head to write.")] = Path("head.safetensors"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing file.")] = False,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
) -> None:
    """Convert a published checkpoint to a head.

    Prints whether the encoders inside are the official ones, if those are available locally.
    """
    from dsu.encoders.sources import check_checkpoint
    from dsu.heads.head_file import save_head

    target = options.new_file("--out", out, overwrite=overwrite)
    check_checkpoint(checkpoint)
    from dsu.sharing.published import import_head

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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing file.")] = False,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
) -> None:
    """Write a head and its encoders with the authors' key names, for their program."""
    from dsu.heads.head_file import read_head_info, resolve_head

    target = options.new_file("--out", out, overwrite=overwrite)
    file = resolve_head(head)
    random = read_head_info(file).random_weights
    import torch

    from dsu.sharing.published import export_head

    state = export_head(file, EncoderWeights(hiera_weights, dino_weights, random))
    buffer = io.BytesIO()
    torch.save({name: tensor.contiguous() for name, tensor in state.items()}, buffer)
    make_folder(target.parent)
    atomic_write(target, buffer.getvalue())
    console.print(f"{target}: {len(state):,} tensors", markup=False)


# ---- what is printed ----


_SHOWN = ("S", "F_adaptive", "E_mean", "MAE", "IoU", "Dice", "false_alarms", "misses", "AUROC", "IoU_object")
"""Metrics that fit into the table; `--json` has all."""


def _rows(facts: "HeadFacts") -> list[tuple[str, str]]:
    info, network = facts.info, facts.info.config
    rows = [
        ("head", f"{facts.path} ({bytes_text(facts.path.stat().st_size)})"),
        ("written by", f"dsu {info.version}, after epoch {info.epoch}"),
        ("network", f"{network.preset}: {', '.join(f'{e.name} at {e.size} px' for e in facts.encoders)}"),
        ("trains", f"{facts.parameters / 1e6:.3f} M parameters"),
        ("adapters", facts.adapters),
    ]
    if network.ablation != "none":
        rows.append(("ablation", network.ablation))
    rows.append(("stored type", info.feature_dtype or "none (nothing is rounded)"))
    for encoder in facts.encoders:
        source = encoder.source
        unknown = "random weights" if encoder.random else "from a file, not known to be the published ones"
        of = f"{source.repository}, {source.licence}" if source and not encoder.random else unknown
        digest = f", sha256 {encoder.sha256[:12]}" if encoder.sha256 else ""
        rows.append((encoder.name, f"{of}{digest}"))
    kind = "a benchmark" if facts.benchmark else "own data"
    held = f", {counted(facts.held_out, facts.unit)} held out" if facts.held_out else ""
    rows.append(("data", f"{facts.data_name} ({kind}){held}" if facts.data_name else "not recorded"))
    rows.append(("settings", ", ".join(f"{key} {value}" for key, value in facts.recipe.items()) or "not recorded"))
    if info.threshold is not None:
        rows.append(("threshold", f"{info.threshold:g}" + "".join(f"; {text}" for text in facts.at_threshold)))
    if facts.held_out_metrics:
        rows.append(("held out", "  ".join(f"{key} {value:.4f}" for key, value in facts.held_out_metrics.items())))
    for name, found in facts.evaluated.items():
        figures = [f"{figure_name(key)} {found[key]:.4f}" for key in _SHOWN if key in found]
        rows.append((name, f"{'  '.join(figures)}  ({_images(found)})"))
    return rows


def _heads_table(heads: Sequence[dict[str, Any]]) -> Table:
    figures = ("S", "MAE", "IoU")
    shown = table(("head", "data", "network", "N", "epoch", *figures, "age"), {"N", "epoch", *figures, "age"})
    for head in heads:
        cells = ["damaged"]
        if not head["damage"]:
            data = f"{head['data'] or 'not recorded'}{' (tiles)' if head['tiled'] else ''}"
            cells = [data, head["preset"] or "", str(head["adapt_last"])]
            cells.append(f"{head['epoch']}/{head['epochs']}" if head["epochs"] else "")
            cells += [f"{head['held_out'][name]:.4f}" if name in head["held_out"] else "" for name in figures]
        cells += [""] * (len(shown.columns) - 2 - len(cells))
        written = datetime.fromisoformat(head["written"]).timestamp()
        shown.add_row(head["path"], *cells, age_text(time.time() - written))
    return shown


def _images(found: dict[str, Any]) -> str:
    """The number of images that a set was evaluated on, and why its scores are not comparable with published ones."""
    without = f", {found['images_without_object']:,} without an object" if "images_without_object" in found else ""
    remark = f"; {found['missing']:,} more without a prediction" if "missing" in found else ""
    if "not_comparable" in found:
        remark = f"; not comparable with the paper, {found['not_comparable']}"
    return f"{counted(found['images'], 'images')}{without}{remark}"
