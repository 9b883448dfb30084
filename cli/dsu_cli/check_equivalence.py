"""`dsu check-equivalence`: training from the store is end-to-end training."""

import json as json_library
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from dsu.settings import TrainingSettings
from dsu_cli import options
from dsu_cli.settings_options import with_settings

_NOT_HERE: Final = (
    *("end_to_end", "epochs", "freeze_adapter_epochs", "val_fraction", "fold", "val_every", "keep"),
    *("checkpoint_steps", "sheet_every", "track"),
)
"""What the check sets itself, or what is no part of the steps that it compares."""


@with_settings(TrainingSettings, without=_NOT_HERE)
def check_equivalence(
    given: Mapping[str, Any],
    steps: Annotated[int, typer.Option(help="Optimiser steps to compare.")] = 20,
    json: Annotated[Path | None, typer.Option("--json", help="Write every row here.")] = None,
    config: options.Config = None,
    data_root: options.DataRoot = Path("data"),
    cache_root: options.CacheRoot = Path("features"),
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    random_weights: options.RandomWeights = False,
    quiet: options.Quiet = False,
) -> None:
    """Train some steps from the store and end to end, and compare every number on the way.

    Stored features, first logits, first masks and first loss must be equal to the last bit. So must all losses,
    gradients and weights, on a CPU and with --deterministic; without it a GPU may differ by as much as training live
    differs from itself, run twice. Exit status 1 if a row fails.
    """
    from dsu.data.datasets import Paths
    from dsu.encoders.weights import EncoderWeights
    from dsu.equivalence import check_equivalence
    from dsu.files import atomic_write, make_folder
    from dsu.settings_file import read_settings
    from dsu_cli.console import ConsoleProgress, fail, out
    from dsu_cli.reports import equivalence_report

    report = check_equivalence(
        read_settings(TrainingSettings, given, config),
        paths=Paths(data_root, cache_root),
        weights=EncoderWeights(hiera_weights, dino_weights, random_weights),
        steps=options.one_of("--steps", steps, range(1, 100_001)),
        progress=ConsoleProgress(quiet=quiet),
    )
    if json is not None:
        make_folder(json.parent)
        atomic_write(json, (json_library.dumps(report.to_json(), indent=1) + "\n").encode())
    out.print(equivalence_report(report))
    if not report.passed:
        for row in report.rows:
            if not row.passed and row.stage == "stored":
                fail(f"{row.what} is not what the encoders give now: worst at {row.where}.")
        fail("Training from this store is not end-to-end training: run `dsu cache-features` again with --rebuild.")
        raise typer.Exit(1)
