"""`dsu head`: what a trained head is, and giving it to others."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsu_cli import options

if TYPE_CHECKING:
    from dsu.head_facts import HeadFacts

__all__ = ["head"]

head = typer.Typer(no_args_is_help=True, help="Look at a trained head, and give it to others.")

_Head = Annotated[
    Path | None,
    typer.Argument(
        metavar="HEAD|RUN",
        help="A run folder, head.safetensors or OWNER/NAME on the hub (default: the newest run).",
        show_default=False,
    ),
]


@head.command()
def info(
    head: _Head = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What a head is: network, encoders and their licences, data, settings, metrics."""
    from dsu.head_facts import head_facts
    from dsu.heads import resolve_head
    from dsu_cli.cache_reports import print_json
    from dsu_cli.console import key_table, out

    facts = head_facts(resolve_head(head))
    if json:
        print_json(facts.to_json())
    else:
        out.print(key_table(_rows(facts)))


@head.command()
def export(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="The folder to write.")],
    head: _Head = None,
    name: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="What the card calls it (default: after the folder).")
    ] = None,
    licence: Annotated[
        str, typer.Option("--license", metavar="ID", help="Of the head, by its identifier on the hub.")
    ] = "apache-2.0",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over an earlier export.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a folder that the Hugging Face hub takes: the head, config.json and a model card.

    Nothing is uploaded. Where your images lie and what they are called is left out.
    """
    from dsu.heads import resolve_head
    from dsu.model_card import export_folder
    from dsu_cli.console import bytes_text, key_table
    from dsu_cli.console import out as console

    files = export_folder(resolve_head(head), out, name=name, licence=licence, overwrite=overwrite)
    if quiet:
        return
    rows = [(file.name, bytes_text(file.stat().st_size)) for file in files]
    console.print(key_table([("folder", str(out)), *rows, ("licence", f"{licence} (--license chooses another)")]))
    console.print(f"Try it: `dsu predict IMAGE --head {out}`. Give it: `hf upload {name or 'OWNER/NAME'} {out}`.")


_SHOWN = ("S", "F_adaptive", "E_mean", "MAE", "IoU", "Dice")
"""Metrics that the table has room for; `--json` has all."""

_DIGITS = 12
"""Of a digest, that are enough to tell weights apart; `--json` has all."""


def _rows(facts: "HeadFacts") -> list[tuple[str, str]]:
    from dsu_cli.console import bytes_text

    info, network = facts.info, facts.info.architecture
    rows = [
        ("head", f"{facts.path} ({bytes_text(facts.nbytes)})"),
        ("written by", f"dsu {info.version}, after epoch {info.epoch}"),
        ("network", f"{network.preset}: {', '.join(f'{e.name} at {e.size} px' for e in facts.encoders)}"),
        ("trains", f"{facts.parameters / 1e6:.3f} M parameters"),
        ("adapters", facts.adapters),
    ]
    if network.ablation != "none":
        rows.append(("ablation", network.ablation))
    rows.append(("stored type", info.stored or "none: nothing is rounded"))
    for encoder in facts.encoders:
        of = "random weights"
        if encoder.source and not encoder.random:
            of = f"{encoder.source.repository}, {encoder.source.licence}"
        digest = f", sha256 {encoder.sha256[:_DIGITS]}" if encoder.sha256 else ""
        rows.append((encoder.name, f"{of}{digest}"))
    kind = "a benchmark" if facts.benchmark else "own data"
    held = f", {facts.held_out:,} images held out" if facts.held_out else ""
    rows.append(("data", f"{facts.data_name} ({kind}){held}" if facts.data_name else "not noted"))
    rows.append(("settings", ", ".join(f"{key} {value}" for key, value in facts.recipe.items()) or "not noted"))
    if facts.held_out_metrics:
        rows.append(("held out", "  ".join(f"{key} {value:.4f}" for key, value in facts.held_out_metrics.items())))
    for name, found in facts.evaluated.items():
        figures = [f"{key} {found[key]:.4f}" for key in _SHOWN if key in found]
        rows.append((name, f"{'  '.join(figures)}  ({found['images']:,} images)"))
    return rows
