"""`dsu check-equivalence`: verify that training from the store equals training end to end."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from dsu.progress import SILENT
from dsu.settings import EncoderWeights, TrainingSettings
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, fail, key_table, out, table

if TYPE_CHECKING:
    from dsu.equivalence import Difference, Report


@options.with_settings(
    TrainingSettings,
    without=(  # set by the check itself, or not part of the compared steps
        *("end_to_end", "epochs", "freeze_adapter_epochs", "val_fraction", "test_fraction", "fold", "group"),
        *("val_every", "keep", "checkpoint_steps", "sheet_every", "track", "compile"),
    ),
)
def check_equivalence(
    given: Mapping[str, Any],
    steps: Annotated[int, typer.Option(help="Number of optimiser steps to compare.")] = 20,
    json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file (JSON).")] = None,
    config: options.Config = None,
    data_root: options.DataRoot = Path("data"),
    cache_root: options.CacheRoot = Path("features"),
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    random_weights: options.RandomWeights = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a few steps from the store and end to end, and compare every number.

    Stored features, first logits, first masks and first loss must be equal to the last bit. On a CPU and with
    --deterministic, so must all losses, gradients and weights; otherwise a GPU may differ by as much as two end-to-end
    runs differ from each other. Exit status 1 if a row fails.
    """
    from dsu.data.datasets import Paths
    from dsu.settings_file import read_settings
    from dsu.training.training_data import find_training_data

    settings = read_settings(TrainingSettings, given, config)
    options.one_of("--steps", steps, range(1, 100_001))
    options.file_to_write("--json", json)
    paths = Paths(data_root, cache_root)
    find_training_data(settings, paths, SILENT)  # before torch, which takes seconds to load
    from dsu.equivalence import check_equivalence

    report = check_equivalence(
        settings,
        paths=paths,
        weights=EncoderWeights(hiera_weights, dino_weights, random_weights),
        steps=steps,
        progress=ConsoleProgress(quiet=quiet),
    )
    out.print(_report(report))
    options.write_json(json, report.to_json())
    if not report.passed:
        stale = [row for row in report.rows if not row.passed and row.stage == "stored"]
        for row in stale:
            fail(f"{row.what} differs from what the encoders compute now: worst at {row.where}.")
        if stale:
            fail(f"Training from this store does not equal training end to end: run {report.again}.")
        else:
            fail(
                "The stored features are correct, but training from them differs by more than two end-to-end runs "
                "differ: run again with --deterministic, which requires equality."
            )
        raise typer.Exit(1)


def _report(report: "Report") -> RenderableType:
    """One row each for stored tensors, logits and loss; gradients and weights by part, naming the worst."""
    numbers = ("difference", "relative", "allowance")
    differs = any(row.absolute for row in report.rows)
    shown = table(("", *numbers, "", *(["worst at"] if differs else [])), numbers)
    for column in shown.columns[:5]:
        column.no_wrap = True
    for label, rows in _equivalence_groups(report):
        worst = max(rows, key=lambda row: (not row.passed, row.absolute))
        where = (worst.where or (worst.what if len(rows) > 1 else "")) if worst.absolute else ""
        verdict = Text("pass", style="green") if worst.passed else Text("FAIL", style="bold red")
        sizes = [f"{size:.3g}" for size in (worst.absolute, worst.relative, worst.allowance)]
        cells: list[str | Text] = [label, *sizes, verdict, where]
        shown.add_row(*cells[: len(shown.columns)])
    rounding = report.rounding
    facts = key_table(
        (
            ("compared", f"{report.steps} steps of {report.batch_size}, from {' + '.join(report.features)}"),
            ("device", report.runtime),
            (
                "float16 store",
                f"against float32: logits {rounding.logits:.3g}, masks {rounding.grey_levels} grey levels, "
                f"MAE {rounding.mae:.3g} (initial head, first batch)",
            ),
        )
    )
    return Group(shown, facts)


def _equivalence_groups(report: "Report") -> list[tuple[str, list["Difference"]]]:
    groups: dict[str, list[Difference]] = {}
    for row in report.rows:
        part = row.what.partition(".")[0]
        label = row.what if row.stage in ("stored", "logits", "masks", "loss") else f"{row.stage}s of {part}"
        groups.setdefault(label, []).append(row)
    return [(f"{label} ({len(rows)})" if len(rows) > 1 else label, rows) for label, rows in groups.items()]
