"""`dsu predict`: masks for benchmarks, folders and files."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dsu.settings import PredictionSettings, RuntimeSettings
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, fail
from dsu_cli.console import out as console
from dsu_cli.settings_options import with_settings


@with_settings(PredictionSettings, RuntimeSettings)
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
    from dsu.choices import Precision
    from dsu.data.datasets import Paths
    from dsu.encoders.weights import EncoderWeights
    from dsu.heads.head_file import predictions_folder, read_head_info, resolve_head
    from dsu.hub import is_hub_name
    from dsu.prediction.predict import predict
    from dsu.prediction.targets import prepare_jobs
    from dsu.runtime import choose_runtime
    from dsu.settings_file import read_settings

    progress = ConsoleProgress(quiet=quiet)
    if head is not None and is_hub_name(head):
        progress.say(f"looking for {head} on the Hugging Face hub")
    head_file = resolve_head(head, revision=revision)
    info = read_head_info(head_file)
    folder = out or predictions_folder(head, head_file)
    settings, asked = read_settings(PredictionSettings, given), read_settings(RuntimeSettings, given)
    trained: Precision = options.one_of(
        f"The precision in {head_file}", info.training.get("precision", "auto"), ("auto", "fp32", "bf16")
    )
    precision = trained if asked.precision == "auto" else asked.precision
    because = "asked for" if precision == asked.precision else "of training"
    runtime = choose_runtime(asked.device, precision, because)
    progress.say(f"{head_file} on {runtime.describe()}")
    jobs = prepare_jobs(
        sources or [],
        head_file,
        folder,
        settings,
        runtime,
        paths=Paths(data_root, cache_root, images, masks),
        end_to_end=end_to_end,
        progress=progress,
    )
    for job in jobs:
        origin = f"features ({' + '.join(job.point.features)})" if job.store is not None else "images"
        cut = f" in tiles of {job.tiling.size} px that share {job.tiling.overlap}" if job.tiling else ""
        progress.say(
            f"{job.name or 'files'}: {len(job.targets):,} from {origin}{cut}, normalisation {job.normalization}"
        )
    weights = EncoderWeights(hiera_weights, dino_weights, info.random_weights)
    outcome = predict(jobs, head_file, folder, settings, runtime, weights, progress)
    for line in outcome.broken:
        fail(line)
    if not quiet:
        already = f", {outcome.kept:,} stood already" if outcome.kept else ""
        console.print(f"{outcome.written:,} written to {folder}{already}, {len(outcome.broken):,} skipped")
        if settings.kind == "mask" and any(job.source is not None for job in jobs):
            # The newest predictions below runs/ are found without being named.
            named = [] if folder in Path("runs").glob("*/predictions") else ["--predictions", str(folder)]
            console.print(f"Next: `{shlex.join(['dsu', 'eval', *named])}`")
    if outcome.broken:
        raise typer.Exit(1)
