"""`dsu datasets`: which benchmarks are here, and what they have in common; `check`: what of a data set will bite."""

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsu.errors import UsageError
from dsu.settings import ExtractionSettings
from dsu_cli import options
from dsu_cli.cache_reports import print_json
from dsu_cli.console import ConsoleProgress, fail, out, say
from dsu_cli.dataset_reports import dataset_check_report, overlaps_report, states_table
from dsu_cli.settings_options import option_of

if TYPE_CHECKING:
    from dsu.data.benchmarks import SplitState

__all__ = ["datasets"]

datasets = typer.Typer(
    short_help="Which benchmarks are here, and a check of any data set before work.",
    subcommand_metavar="[check NAME|FOLDER]",
)

_SHARED = ("data_root", "images", "masks", "foreground", "hiera_size")
"""Options of `check` that are options of `cache-features`, too."""


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
        command = context.invoked_subcommand
        for option, _ in _typed(context, context.params):  # it would be lost without a word
            raise UsageError(
                f"{option} stands before {command}: write it behind, `dsu datasets {command} ... {option}`."
            )
        return
    from dsu.data.benchmarks import survey

    if not data_root.is_dir() and not quiet:
        say(f"There is no folder {data_root}: give the one that the benchmarks lie in with --data-root or DSU_DATA.")
    states = survey(data_root)
    if overlaps:
        _overlaps(states, json=json, quiet=quiet)
    elif json:
        print_json([state.to_json() for state in states])
    else:
        out.print(states_table(states, data_root))
        pages = {state.sought.dataset: state.page for state in states if not state.complete}
        if pages:
            out.print("\nWhere to get what is not complete", style="bold")
        for dataset, page in pages.items():  # no table: it would break addresses that are to be copied
            out.print(f"{dataset:<10} {page}")


def _overlaps(states: Iterable["SplitState"], *, json: bool, quiet: bool) -> None:
    from dsu.data.benchmarks import COD_TRAIN
    from dsu.data.overlaps import find_overlaps

    # COD's training split is CAMO's and COD10K's, which are here under their own names.
    splits = [state.found for state in states if state.found and state.sought is not COD_TRAIN]
    result = find_overlaps(splits, ConsoleProgress(quiet=quiet))
    for line in result.broken:
        fail(line)
    if json:
        print_json(result.to_json())
    else:
        out.print(overlaps_report(result))
    if result.broken:
        raise typer.Exit(1)


def _typed(context: typer.Context, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Those of a command's options that were given on the command line, as they are typed, with their values."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            yield f"--{name.replace('_', '-')}", context.params[name]


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

    progress = ConsoleProgress(quiet=quiet)
    if sheet is not None:  # before minutes of work: that it can be drawn, and that nothing stands there
        from dsu.dataset_check.sheet import draw_sheet
        from dsu.drawing import page_files

        page_files(sheet, 1)
        options.new_file("--sheet", sheet, overwrite=overwrite)
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
        draw_sheet(found, sheet, progress)
        if not quiet:
            say(f"Drawn: {sheet}")
    if found.stops:
        raise typer.Exit(1)
    if json or quiet:
        return
    again = ["dsu", "cache-features", dataset]
    for option, value in _typed(context, _SHARED):
        for one in value if isinstance(value, list) else [value]:
            again += [option, str(one)]
    out.print(f"Next: `{shlex.join(again)}`")
