"""`dsu datasets`: which benchmarks are here, and what they have in common; `check`: what of a data set will bite."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsu.errors import UsageError
from dsu.settings import ExtractionSettings
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, fail, key_table, out, say
from dsu_cli.settings_options import option_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dsu.data.benchmarks import SplitState
    from dsu.data.overlaps import Overlap, Overlaps

__all__ = ["datasets"]

datasets = typer.Typer(
    short_help="Which benchmarks are here, and a check of any data set before work.",
    subcommand_metavar="[check NAME|FOLDER]",
)


@datasets.callback(invoke_without_command=True)
def look(
    context: typer.Context,
    data_root: options.DataRoot = Path("data"),
    overlaps: Annotated[
        bool, typer.Option("--overlaps", help="Name images that are in both a training and a test split.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Which benchmarks are below the data root, how complete, and where to get them.

    Pairs of image and mask are counted against the official numbers; no image is opened for it.

    `--overlaps` decodes every image that is found and compares pixels, whatever the files are called: exact copies,
    and apart from them near ones (saved anew, resized).

    `dsu datasets check NAME|FOLDER` reads one data set, a benchmark or a folder of yours, and says what will bite.
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context, context.invoked_subcommand)
        return
    from dsu.data.benchmarks import survey
    from dsu_cli.cache_reports import print_json

    if not data_root.is_dir() and not quiet:
        say(f"There is no folder {data_root}: give the one that the benchmarks lie in with --data-root or DSU_DATA.")
    states = survey(data_root)
    if overlaps:
        _overlaps(states, json=json, quiet=quiet)
    elif json:
        print_json([state.to_json() for state in states])
    else:
        out.print(_states_table(states, data_root))
        pages = {state.sought.dataset: state.page for state in states if not state.complete}
        if pages:
            out.print("\nWhere to get what is not complete", style="bold")
        for dataset, page in pages.items():  # no table: it would break addresses that are to be copied
            out.print(f"{dataset:<10} {page}")


@datasets.command()
def check(
    context: typer.Context,
    dataset: Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="A benchmark's name or a folder of yours.")],
    data_root: options.DataRoot = Path("data"),
    images: options.Images = None,
    masks: options.Masks = None,
    foreground: Annotated[list[int] | None, option_of(ExtractionSettings.model_fields["foreground"])] = None,
    hiera_size: Annotated[
        int | None,
        typer.Option("--hiera-size", help="The network's input, at which objects are looked for (default: 352)."),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option("--sheet", metavar="FILE", help="Draw pairs, odd ones and histograms, as a .png or .pdf."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over an existing sheet.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables, with all names.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """What of a data set will bite, before any work: for a benchmark, or a folder of images and masks.

    Every image and mask is read. Counts, sizes, kinds of files, how they and the masks are read, foreground; then what
    was found, the worst first: it *will stop* training, *will hurt* it, or is *good to know*.

    Nothing is written but `--sheet FILE`.

    Exit status: 1 where something will stop `dsu` from training, 2 where images and masks cannot be told apart, else 0.
    """
    from dsu.config import build_config
    from dsu.data.datasets import Paths
    from dsu.dataset_check import check_dataset
    from dsu_cli.cache_reports import print_json
    from dsu_cli.dataset_check_report import dataset_check_report

    progress = ConsoleProgress(quiet=quiet)
    if sheet is not None:
        _new_sheet(sheet, overwrite=overwrite)
    found = check_dataset(
        dataset,
        Paths(data_root, images=images, masks=masks),
        foreground=foreground or None,
        side=build_config(hiera_size=hiera_size).hiera_size,
        progress=progress,
    )
    if json:
        print_json(found.to_json())
    else:
        out.print(dataset_check_report(found))
    if sheet is not None:
        from dsu.dataset_check.sheet import draw_sheet

        draw_sheet(found, sheet, progress)
        if not quiet:
            say(f"Drawn: {sheet}")
    if found.stops:
        raise typer.Exit(1)
    if not (json or quiet):
        out.print(f"Next: `{_caching_command(context)}`")


_SHARED = ("data_root", "images", "masks", "foreground", "hiera_size")
"""Options of `check` that are options of `cache-features`, too."""


def _caching_command(context: typer.Context) -> str:
    """What stores the features of what was checked, read in the same way."""
    import shlex

    words = ["dsu", "cache-features", str(context.params["dataset"])]
    for name in _SHARED:
        source, value = context.get_parameter_source(name), context.params[name]
        if source is not None and source.name == "COMMANDLINE":
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [f"--{name.replace('_', '-')}", str(one)]
    return shlex.join(words)


def _refuse_options(context: typer.Context, command: str) -> None:
    """Options before a command's name would be lost without a word."""

    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{option} stands before {command}: write it behind, `dsu datasets {command} ... {option}`."
            )


def _new_sheet(path: Path, *, overwrite: bool) -> None:
    """Before minutes of work: that it can be drawn, and that nothing stands there."""
    from dsu.drawing import page_files

    page_files(path, 1)
    options.new_file("--sheet", path, overwrite=overwrite)


def _overlaps(states: Sequence["SplitState"], *, json: bool, quiet: bool) -> None:
    from dsu.data.benchmarks import COD_TRAIN
    from dsu.data.overlaps import find_overlaps
    from dsu_cli.cache_reports import print_json

    # COD's training split is CAMO's and COD10K's, which are here under their own names.
    splits = [state.found for state in states if state.found and state.sought is not COD_TRAIN]
    result = find_overlaps(splits, ConsoleProgress(quiet=quiet))
    for line in result.broken:
        fail(line)
    if json:
        print_json(result.to_json())
    else:
        out.print(_overlaps_report(result))
    if result.broken:
        raise typer.Exit(1)


def _states_table(states: Sequence["SplitState"], data_root: Path) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, right in (("split", False), ("for", False), ("pairs", True), ("official", True), ("where", False)):
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for state in states:
        if state.found is None:
            pairs, where = Text("-"), Text(state.problem or "not found", style="red" if state.problem else "dim")
        else:
            pairs = Text(f"{state.pairs:,}", style="green" if state.complete else "yellow")
            where = Text(f"{_below(state.found.images, data_root)}{_unpaired(state)}")
        kind = "training" if state.sought.kind == "train" else "test"
        table.add_row(state.sought.name, kind, pairs, f"{state.sought.official_count:,}", where)
    return table


def _below(folder: Path, data_root: Path) -> Path:
    root = data_root.absolute()
    return folder.absolute().relative_to(root) if folder.absolute().is_relative_to(root) else folder


def _unpaired(state: "SplitState") -> str:
    if state.found is None:
        return ""
    lost = [
        f"{len(files):,} {what}"
        for files, what in (
            (state.found.images_without_mask, "images without mask"),
            (state.found.masks_without_image, "masks without image"),
        )
        if files
    ]
    return f" ({', '.join(lost)})" if lost else ""


def _overlaps_report(result: "Overlaps") -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    compared = ", ".join(f"{name} {count:,}" for name, count in result.images.items()) or "nothing"
    parts: list[RenderableType] = [
        key_table(
            (
                ("compared", compared),
                ("the same pixels", f"{len(result.exact):,}"),
                ("almost the same", f"{len(result.near):,}"),
            )
        )
    ]
    for title, pairs in (("The same pixels", result.exact), ("Almost the same", result.near)):
        if pairs:
            parts += ["", Text(title, style="bold"), _pairs_table(pairs)]
    return Group(*parts)


def _pairs_table(pairs: Sequence["Overlap"]) -> "RenderableType":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("training", "", "test", ""):
        table.add_column(heading, overflow="fold")
    table.add_column("likeness", justify="right")
    for pair in pairs:
        table.add_row(pair.train.split, pair.train.name, pair.test.split, pair.test.name, f"{pair.likeness:.4f}")
    return table
