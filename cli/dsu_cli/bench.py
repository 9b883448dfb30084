"""`dsu bench`: measure this machine's speed in one run, as ratios."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dsu.errors import UsageError
from dsu.settings import EncoderWeights, NetworkSettings, RuntimeSettings
from dsu_cli import options
from dsu_cli.console import ConsoleProgress


@options.with_settings(NetworkSettings, RuntimeSettings)
def bench(
    given: Mapping[str, Any],
    parts: Annotated[
        str, typer.Option("--parts", help="Which of steps,reading,stages,eval,scale to run.")
    ] = "steps,reading,stages,eval",
    batch_size: Annotated[
        int | None,
        typer.Option(help="Batch size of a training step (default: 8 on a GPU, 2 on a CPU).", show_default=False),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="Number of rounds for each case (default: 5 on a GPU, 3 on a CPU).", show_default=False),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            help="Number of images for stage one and prediction (default: 512 on a GPU, 8 on a CPU).",
            show_default=False,
        ),
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Add a step with torch.compile.")] = False,
    memory_limit: Annotated[
        float | None, typer.Option(help="Limit on GPU memory in GB, such as 24.", show_default=False)
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write all measurements to this file (JSON).", show_default=False)
    ] = None,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    random_weights: options.RandomWeights = False,
    cache_root: options.CacheRoot = Path("features"),
    quiet: options.Quiet = False,
) -> None:
    """Measure this machine: training end to end and from the store, stage one, the reader, the disk, eval.

    The part `scale` simulates stores of up to a million samples and takes several minutes.

    Cases take turns, and a speedup is the median of the ratios within a round: only ratios are comparable between runs.
    Random weights (`--random-weights`) run as fast as real ones. Prints Markdown.
    """
    from dsu.bench import PARTS
    from dsu.encoders.sources import check_given
    from dsu.settings_file import read_settings
    from dsu_cache import url_of

    if url_of(cache_root) is not None:
        raise UsageError(
            "`dsu bench` needs a --cache-root on a disk: give a folder, or copy the store to one with `dsu cache pull`."
        )
    options.file_to_write("--json", json)
    runtime, config = read_settings(RuntimeSettings, given), read_settings(NetworkSettings, given).config()
    counts = {
        option: None if value is None else options.one_of(option, value, range(1, most + 1))
        for option, value, most in (
            ("--batch-size", batch_size, 1024),
            ("--rounds", rounds, 1000),
            ("--images", images, 100_000),
        )
    }
    chosen = options.names_of("--parts", parts, PARTS) or PARTS
    weights = EncoderWeights(hiera_weights, dino_weights, random_weights)
    check_given(config, weights, hiera=True, dino=True)
    from dsu.bench.measure import bench as measure

    report = measure(
        config,
        weights,
        cache_root=cache_root,
        device=runtime.device,
        precision=runtime.precision,
        parts=chosen,
        batch_size=counts["--batch-size"],
        rounds=counts["--rounds"],
        images=counts["--images"],
        compiled=compile,
        memory_limit=memory_limit,
        progress=ConsoleProgress(quiet=quiet),
    )
    typer.echo(report.to_markdown())
    options.write_json(json, report.to_json())
