"""`dsu check-equivalence`: training from the store is end-to-end training."""

import json as json_library
from pathlib import Path
from typing import Annotated

import typer

from dsu_cli import options


def check_equivalence(
    dataset: Annotated[
        str | None, typer.Argument(metavar="[NAME|FOLDER]", help="Default: what was cached last.", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps to compare.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Of training.")] = 8,
    adapt_last: options.AdaptLast = None,
    ablation: Annotated[str | None, typer.Option(help="A, B or C.", rich_help_panel="Network")] = None,
    start_feature: Annotated[
        str | None, typer.Option("--start-feature", help="Stored point to check (default: the latest that can serve).")
    ] = None,
    views: Annotated[str | None, typer.Option(help="Views drawn: flips, width, none or flips+K.")] = None,
    tile: options.Tile = None,
    overlap: options.Overlap = None,
    seed: Annotated[int, typer.Option(help="Of the head and of what is drawn.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write every row here.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Settings in YAML; options override it.")] = None,
    preset: options.Preset = None,
    hiera: options.Hiera = None,
    dino: options.Dino = None,
    hiera_size: options.HieraSize = None,
    dino_size: options.DinoSize = None,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    random_weights: options.RandomWeights = False,
    data_root: options.DataRoot = Path("data"),
    cache_root: options.CacheRoot = Path("features"),
    device: Annotated[
        str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel="Machine")
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="Default: the store's.", rich_help_panel="Machine")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="On a GPU too, ask for equal gradients and weights.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Train some steps from the store and end to end, and compare every number on the way.

    Stored features, first logits, first masks and first loss must be equal to the last bit. So must all losses,
    gradients and weights, on a CPU and with --deterministic; without it a GPU may differ by as much as training live
    differs from itself, run twice. Exit status 1 if a row fails.
    """
    given = dict(locals())
    from dsu.encoders.weights import EncoderWeights
    from dsu.equivalence import check_equivalence
    from dsu.files import atomic_write, make_folder
    from dsu_cli.console import ConsoleProgress, fail, out
    from dsu_cli.parsing import one_of, settings_from
    from dsu_cli.reports import equivalence_report

    settings = settings_from(config, given)
    report = check_equivalence(
        settings,
        data_root=data_root,
        cache_root=cache_root,
        weights=EncoderWeights(hiera_weights, dino_weights, random_weights),
        steps=one_of("--steps", steps, range(1, 100_001)),
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
