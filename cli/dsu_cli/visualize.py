"""`dsu visualize`: figures of features and of predictions, for print."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dsu_cli import options

__all__ = ["visualize"]

visualize = typer.Typer(no_args_is_help=True, help="Figures for print: features (PCA, t-SNE) and predictions.")

_Out = Annotated[Path, typer.Option("-o", "--out", help="The figure to write, .png (300 dpi) or .pdf.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over an existing figure.")]


@visualize.command()
def features(
    sources: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files or folders.")],
    out: _Out = Path("features.png"),
    head: Annotated[
        str | None, typer.Option("--head", help="A run folder or head: Hiera also after its adapters.")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option("--masks", help="Folder of masks (default: those of a folder of images and masks).")
    ] = None,
    dino_blocks: Annotated[
        str | None,
        typer.Option(
            "--dino-blocks", help="DINOv2's blocks, such as 6,12,18,24 (default: the quarters).", show_default=False
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="How many images of a folder, evenly spread.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens that t-SNE places, of all images together.")] = 1500,
    seed: Annotated[int, typer.Option(help="Of t-SNE.")] = 0,
    overwrite: _Overwrite = False,
    preset: options.Preset = None,
    hiera: options.Hiera = None,
    dino: options.Dino = None,
    hiera_size: options.HieraSize = None,
    dino_size: options.DinoSize = None,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    random_weights: options.RandomWeights = False,
    device: options.Device = "auto",
    precision: options.PrecisionOption = "auto",
    quiet: options.Quiet = False,
) -> None:
    """What the encoders see: the paper's Figures 1 and 2 from your own images.

    Every Hiera level S1 to S4 and some of DINOv2's blocks: the first three principal components as colours, fitted
    over all images together, and t-SNE of their tokens, coloured by the masks where there are any. With a head each
    Hiera level stands before and after the adapters, side by side.
    """
    from dsu.encoders.weights import EncoderWeights
    from dsu.runtime import Precision, choose_runtime
    from dsu.visualization.features import choose_blocks, compute_features, open_network
    from dsu.visualization.figures import draw_features
    from dsu.visualization.shown import MOST, find_shown
    from dsu_cli.console import ConsoleProgress
    from dsu_cli.console import out as console
    from dsu_cli.parsing import one_of

    progress = ConsoleProgress(quiet=quiet)
    target = _new_figure(out, overwrite=overwrite)
    asked: Precision = one_of("--precision", precision, ("auto", "fp32", "bf16"))
    one_of("--seed", seed, range(2**32))
    one_of("--tokens", tokens, range(4, 100_001))
    runtime = choose_runtime(device, asked)
    shown = find_shown(sources, masks, one_of("--count", count, range(1, MOST + 1)), progress)
    network, random = open_network(
        head,
        EncoderWeights(hiera_weights, dino_weights, random_weights),
        {"preset": preset, "hiera": hiera, "dino": dino, "hiera_size": hiera_size, "dino_size": dino_size},
    )
    blocks = choose_blocks(network.architecture, _numbers(dino_blocks))
    progress.say(f"features on {runtime.describe()}")
    if random:
        progress.say("random encoders: this shows the way, not what pretrained features look like")
    adapted = head is not None and network.architecture.adapt_last > 0
    groups = compute_features(
        runtime.place(network), runtime, [one.image for one in shown], blocks, adapted=adapted, progress=progress
    )
    for file in draw_features(shown, groups, target, tokens=tokens, seed=seed, progress=progress):
        console.print(str(file), markup=False)


@visualize.command()
def predictions(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder of the images.")],
    truth: Annotated[Path, typer.Option("--truth", help="Folder of the masks.")],
    predictions: Annotated[
        list[str], typer.Option("--predictions", metavar="NAME=FOLDER", help="A column; may be given several times.")
    ],
    out: _Out = Path("predictions.png"),
    names: Annotated[str | None, typer.Option("--names", help="The images to show, such as a,b.")] = None,
    worst: Annotated[
        int | None, typer.Option("--worst", help="Show those on which the first column does worst.")
    ] = None,
    by: Annotated[str, typer.Option("--by", help="What --worst goes by: S, MAE, IoU, ...")] = "S",
    first: Annotated[int, typer.Option("--first", help="Else: so many from the first.")] = 8,
    labels: Annotated[bool, typer.Option("--labels", help="Write each image's name above its row.")] = False,
    overwrite: _Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Image, truth and predictions side by side: the paper's Figures 5 and 6."""
    from dsu.errors import UsageError
    from dsu.visualization.comparison import choose_worst, draw_comparison, find_compared, pick_names
    from dsu_cli.console import ConsoleProgress
    from dsu_cli.console import out as console
    from dsu_cli.parsing import one_of

    progress = ConsoleProgress(quiet=quiet)
    target = _new_figure(out, overwrite=overwrite)
    if names is not None and worst is not None:
        raise UsageError("--names and --worst choose the images in two ways: give one of them.")
    methods = _methods(predictions)
    rows, lacking = find_compared(images, truth, methods)
    for what, missing in lacking.items():
        progress.say(f"left out: {missing:,} without {what}")
    if names is not None:
        rows = pick_names(rows, [name.strip() for name in names.split(",")])
    elif worst is not None:
        rows = choose_worst(rows, one_of("--worst", worst, range(1, 10_001)), by, progress)
    else:
        if one_of("--first", first, range(1, 10_001)) < len(rows):
            progress.say(f"the first {first} of {len(rows):,} images: choose by --first, --names or --worst")
        rows = rows[:first]
    for file in draw_comparison(rows, list(methods), target, named=labels or worst is not None):
        console.print(str(file), markup=False)


def _new_figure(path: Path, *, overwrite: bool) -> Path:
    """`path`, if it has an ending that can be drawn and nothing is there, further pages included."""
    from dsu.sheets import page_files
    from dsu_cli.parsing import new_file

    page_files(path, 1)
    new_file("-o", path, overwrite=overwrite)
    pages = [
        page
        for page in path.parent.glob(f"*{path.suffix}")
        if re.fullmatch(rf"{re.escape(path.stem)}-\d+", page.stem) and path.suffix.lower() == ".png"
    ]
    for page in pages:
        new_file("-o", page, overwrite=overwrite)
    return path


def _numbers(text: str | None) -> list[int] | None:
    from dsu.errors import UsageError

    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--dino-blocks can't be {text!r}: give numbers such as 6,12,18,24.") from error


def _methods(given: Sequence[str]) -> dict[str, Path]:
    """Columns by name; a folder alone is called like itself."""
    from dsu.errors import UsageError

    methods: dict[str, Path] = {}
    for text in given:
        name, _, folder = text.partition("=") if "=" in text else (Path(text).name, "", text)
        if not name or not folder or name in methods:
            raise UsageError(f"--predictions can't be {text!r}: give NAME=FOLDER, each name once.")
        methods[name] = Path(folder)
    return methods
