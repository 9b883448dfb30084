"""`dsu predict`: masks for benchmarks, folders and files."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dsu.settings import EncoderWeights, PredictionSettings, RuntimeSettings
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, fail
from dsu_cli.console import out as console


@options.with_settings(PredictionSettings, RuntimeSettings)
def predict(
    given: Mapping[str, Any],
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="SOURCE", help="Benchmarks, folders or image files.", show_default=False),
    ] = None,
    head: Annotated[
        Path | None,
        typer.Option(
            "--head",
            metavar="PATH|OWNER/NAME",
            help="A run folder, an exported folder, head.safetensors, or a head on the hub (default: the newest run).",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a head on the hub.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where masks go (default: predictions/ in the run folder).")
    ] = None,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="From the images even where features are stored.")
    ] = False,
    data_root: options.DataRoot = Path("data"),
    cache_root: options.CacheRoot = Path("features"),
    images: options.Images = None,
    masks: options.Masks = None,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    quiet: options.Quiet = False,
) -> None:
    """Predict 8-bit masks at the images' own sizes.

    Without a SOURCE: the test splits of the head's data set, or the share of it that was held out. No ground truth is
    needed.
    """
    from dsu.api import predict_with
    from dsu.data.datasets import Paths
    from dsu.settings_file import read_settings

    outcome = predict_with(
        sources or [],
        head,
        read_settings(PredictionSettings, given),
        read_settings(RuntimeSettings, given),
        EncoderWeights(hiera_weights, dino_weights),
        Paths(data_root, cache_root, images, masks),
        revision=revision,
        out=out,
        end_to_end=end_to_end,
        progress=ConsoleProgress(quiet=quiet),
    )
    for line in outcome.broken:
        fail(line)
    if not quiet:
        already = f", {outcome.kept:,} stood already" if outcome.kept else ""
        console.print(f"{outcome.written:,} written to {outcome.folder}{already}, {len(outcome.broken):,} skipped")
        if outcome.judgeable:
            # The newest predictions below runs/ are found without being named.
            found = outcome.folder in Path("runs").glob("*/predictions")
            named = [] if found else ["--predictions", str(outcome.folder)]
            console.print(f"Next: `{shlex.join(['dsu', 'eval', *named])}`")
    if outcome.broken:
        raise typer.Exit(1)
