"""`dsu visualize`: figures of features and predictions, for print."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsu.errors import UsageError
from dsu.progress import Progress, counted
from dsu.settings import EncoderWeights, NetworkSettings, RuntimeSettings
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, fail

if TYPE_CHECKING:
    from dsu.visualization.comparison import ComparisonFigure
    from dsu.visualization.figures import FeatureFigure

visualize = typer.Typer(no_args_is_help=True, help="Figures for print: features (PCA, t-SNE) and predictions.")

_Out = Annotated[Path, typer.Option("-o", "--out", help="The figure to write, .png (300 dpi) or .pdf.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing figure.")]


@visualize.command()
@options.with_settings(NetworkSettings, RuntimeSettings)
def features(
    given: Mapping[str, Any],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="Image files, folders or benchmarks (default: what the head was trained on).",
            show_default=False,
        ),
    ] = None,
    out: _Out = Path("features.png"),
    head: Annotated[
        str | None,
        typer.Option(
            "--head",
            help="A run folder or head; adds Hiera after its adapters (default: the newest run; only the encoders "
            "if there is no run or a network option is given).",
        ),
    ] = None,
    masks: Annotated[
        Path | None, typer.Option("--masks", help="Folder of masks (default: those that belong to the images).")
    ] = None,
    dino_blocks: Annotated[
        str | None,
        typer.Option(
            "--dino-blocks",
            help="DINOv2's blocks to show, such as 6,12,18,24 (default: one at each quarter of the depth).",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="Number of images of a folder or benchmark, evenly spaced.")] = 4,
    no_tsne: Annotated[bool, typer.Option("--no-tsne", help="Show principal components only: much faster.")] = False,
    tokens: Annotated[int, typer.Option(help="Number of tokens for t-SNE, over all images.")] = 1500,
    seed: Annotated[int, typer.Option(help="Seed of t-SNE.")] = 0,
    overwrite: _Overwrite = False,
    data_root: options.DataRoot = Path("data"),
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    random_weights: options.RandomWeights = False,
    quiet: options.Quiet = False,
) -> None:
    """Show the encoders' features, as in the paper's Figures 1 and 2, for your own images.

    Shows Hiera's levels S1 to S4 and some of DINOv2's blocks: the first three principal components as colours, fitted
    over all images together, and t-SNE of their tokens, coloured by the masks if there are any. With a head, each Hiera
    level is shown before and after the adapters, side by side.
    """
    from dsu.data.datasets import Paths
    from dsu.pictures import page_files
    from dsu.runtime import choose_runtime
    from dsu.settings_file import read_settings

    progress = ConsoleProgress(quiet=quiet)
    options.new_file("--out", *page_files(out), overwrite=overwrite)
    asked = read_settings(RuntimeSettings, given)
    options.one_of("--seed", seed, range(2**32))
    options.one_of("--tokens", tokens, range(4, 100_001))
    from dsu.visualization.features import (
        MAX_IMAGES,
        choose_blocks,
        choose_network,
        compute_features,
        find_head,
        find_shown,
        images_of_head,
        open_network,
    )

    most = options.one_of("--count", count, range(1, MAX_IMAGES + 1))
    network_asked = read_settings(NetworkSettings, given).model_dump()
    alone = random_weights or any(value is not None for value in network_asked.values())
    head = head if alone else find_head(head, progress)
    named, paths = images_of_head(sources or [], head, Paths(data_root))
    shown, broken = find_shown(named, masks, most, paths, progress)
    for line in broken:
        fail(line)
    given_weights = EncoderWeights(hiera_weights, dino_weights, random_weights)
    config, weights = choose_network(head, given_weights, network_asked)
    blocks = choose_blocks(config, _numbers(dino_blocks))
    from dsu.visualization.figures import FeatureFigure

    runtime, random = choose_runtime(asked.device, asked.precision), weights.random_of(config)
    network = open_network(head, config, weights)
    progress.say(f"features on {runtime.describe()}")
    if random:
        progress.say(
            "random encoders: the figure only shows that the pipeline works, not what pretrained features look like"
        )
    groups = compute_features(
        runtime.place(network),
        runtime,
        [one.image for one in shown],
        blocks,
        adapted=head is not None and config.adapt_last > 0,
        random=random,
        progress=progress,
    )
    figure = FeatureFigure(shown, groups, tokens=None if no_tsne else tokens, seed=seed)
    _draw(figure, f"features of {counted(len(shown), 'images')}", out, progress, overwrite=overwrite)
    if broken:
        raise typer.Exit(1)


@visualize.command()
def predictions(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGES",
            help="A benchmark, a set that was predicted, or a folder (default: everything that the run has predicted).",
            show_default=False,
        ),
    ] = None,
    predictions: Annotated[
        list[str] | None,
        typer.Option(
            "--predictions",
            metavar="[NAME=]FOLDER",
            help="Run folder or folder of masks, shown as one column; may be given several times (default: the "
            "newest run).",
            show_default=False,
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            "--truth",
            help="Folder of ground-truth masks (default: those that belong to the images).",
            show_default=False,
        ),
    ] = None,
    out: _Out = Path("predictions.png"),
    names: Annotated[str | None, typer.Option("--names", help="Names of the images to show, such as a,b.")] = None,
    worst: Annotated[
        int | None,
        typer.Option("--worst", help="Number of images to show: those with the worst scores in the first column."),
    ] = None,
    by: Annotated[str, typer.Option("--by", help="Metric for --worst: S, MAE, IoU, ...")] = "S",
    first: Annotated[
        int,
        typer.Option(
            "--first", help="Number of images to show, starting with the first, unless --names or --worst is given."
        ),
    ] = 8,
    width: Annotated[
        float | None,
        typer.Option(
            "--width",
            metavar="INCHES",
            help="Width of the figure in inches (default: 1.13 per column, at most 7.16, the text width of a "
            "printed page).",
            min=1,
            max=40,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", help="Rows per page (default: as many as fit into 9.2 inches).", min=1, max=100),
    ] = None,
    labels: Annotated[bool, typer.Option("--labels", help="Print each image's name above its row.")] = False,
    overwrite: _Overwrite = False,
    data_root: options.DataRoot = Path("data"),
    quiet: options.Quiet = False,
) -> None:
    """Show image, ground truth and predictions side by side, as in the paper's Figures 5 and 6.

    `dsu visualize predictions --predictions Ours=runs/DUTS-TR-large` shows the predictions of that run. If there is no
    ground truth, one more column shows each prediction as an overlay on its image.
    """
    from dsu.data.datasets import Paths
    from dsu.evaluation.ground_truth import named_predictions
    from dsu.pictures import page_files
    from dsu.prediction.verdicts import threshold_of
    from dsu.visualization.compared import (
        choose_worst,
        find_compared,
        pick_names,
        used_random_encoders,
    )

    progress = ConsoleProgress(quiet=quiet)
    options.new_file("--out", *page_files(out), overwrite=overwrite)
    if names is not None and worst is not None:
        raise UsageError("--names and --worst can't be combined: give one of them.")
    options.one_of("--first", first, range(1, 10_001))
    if worst is not None:
        options.one_of("--worst", worst, range(1, 10_001))
    methods = named_predictions(predictions or [], with_truth=False)
    for name, folder in methods.items():
        if name != str(folder):
            progress.say(f"{name}: {folder}")
    shown, lacking = find_compared(source, methods, Paths(data_root), truth)
    for what, missing in lacking.items():
        progress.say(f"left out: {missing:,} without {what}")
    if names is not None:
        shown = pick_names(shown, [name.strip() for name in names.split(",")])
    elif worst is not None:
        shown = choose_worst(shown, worst, by, progress)
    elif first < len(shown):
        progress.say(f"the first {first} of {len(shown):,} images: choose by --first, --names or --worst")
        shown = shown[:first]
    random = [name for name, folder in methods.items() if used_random_encoders(folder)]
    note = f"{', '.join(random)}: random encoders, so these are not the results of pretrained ones" if random else ""
    # Without ground truth, predictions are shown as overlays on their images.
    laid = [threshold_of(folder) for folder in methods.values()] if any(row.truth is None for row in shown) else []
    from dsu.visualization.comparison import ComparisonFigure

    comparison = ComparisonFigure(
        shown,
        list(methods),
        named=labels or worst is not None,
        note=note,
        overlays=laid,
        width=width,
        per_page=rows,
    )
    _draw(comparison, counted(len(shown), "images"), out, progress, overwrite=overwrite)


def _draw(
    figure: "ComparisonFigure | FeatureFigure", what: str, out: Path, progress: "Progress", *, overwrite: bool
) -> None:
    """Print the number of pages, draw them unless other files are in the way, and print their names."""
    from dsu.pictures import page_files

    pages = len(figure.pages())
    for file in page_files(out, pages):
        options.new_file("--out", file, overwrite=overwrite)
    progress.say(f"{what} on {counted(pages, 'pages')}")
    for file in figure.draw(out, progress):
        progress.say(f"Written: {file}")


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--dino-blocks can't be {text!r}: give numbers such as 6,12,18,24.") from error
