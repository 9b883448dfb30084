"""`dsu datasets`: which benchmarks are here, and their overlaps; `check`: problems of one data set."""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsu.errors import UsageError
from dsu.settings import ExtractionSettings
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, fail, key_table, out, print_json, say, table

if TYPE_CHECKING:
    from dsu.data.benchmarks import SplitState
    from dsu.data.groups import Overlap, Overlaps
    from dsu.dataset_check import DatasetCheck, Finding, Severity, SplitCheck

datasets = typer.Typer(
    short_help="List benchmarks, and check any data set before training.",
    subcommand_metavar="[check NAME|FOLDER]",
)

_SHARED = ("data_root", "images", "masks", "foreground", "hiera_size")
"""Options that `check` shares with `cache-features`."""


@datasets.callback(invoke_without_command=True)
def look(
    context: typer.Context,
    data_root: options.DataRoot = Path("data"),
    overlaps: Annotated[
        bool, typer.Option("--overlaps", help="List images that are in both a training and a test split.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List the benchmarks below the data root, how complete they are, and where to get them.

    Compares the number of image-mask pairs with the official number, without opening images.

    `--overlaps` decodes every image and compares pixels, whatever the file names: it lists exact copies, and separately
    near-duplicates (re-saved, resized).

    `dsu datasets check NAME|FOLDER` reads one data set, a benchmark or your own folder, and lists its problems.
    """
    if context.invoked_subcommand is not None:
        command = context.invoked_subcommand
        for option, _ in _typed(context, context.params):  # it would be ignored silently
            raise UsageError(
                f"{option} is an option of {command}: put it after, `dsu datasets {command} ... {option}`."
            )
        return
    from dsu.data.benchmarks import PAGES, survey

    if not data_root.is_dir() and not quiet:
        say(f"There is no folder {data_root}: give the benchmark folder with --data-root or DSU_DATA.")
    states = survey(data_root)
    if overlaps:
        _overlaps(states, json=json, quiet=quiet)
    elif json:
        print_json([state.to_json() for state in states])
    else:
        out.print(states_table(states, data_root))
        incomplete = dict.fromkeys(state.sought.dataset for state in states if not state.complete)
        if incomplete:
            out.print("\nWhere to get incomplete benchmarks", style="bold")
        for dataset in incomplete:  # no table, which would break the URLs
            out.print(f"{dataset:<10} {PAGES[dataset]}")


def _overlaps(states: Iterable["SplitState"], *, json: bool, quiet: bool) -> None:
    from dsu.data.benchmarks import COD_TRAIN
    from dsu.data.groups import find_overlaps

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
    """A command's options from the command line, as typed, with their values."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            yield f"--{name.replace('_', '-')}", context.params[name]


@datasets.command()
def check(
    context: typer.Context,
    dataset: Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="A benchmark's name or your own folder.")],
    data_root: options.DataRoot = Path("data"),
    images: options.Images = None,
    masks: options.Masks = None,
    foreground: Annotated[list[int] | None, options.option_of(ExtractionSettings.model_fields["foreground"])] = None,
    hiera_size: Annotated[
        int | None,
        typer.Option(
            "--hiera-size", help="The network's input size, to find objects that vanish there (default: 352)."
        ),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option("--sheet", metavar="FILE", help="Draw sample pairs, problems and histograms as a .png or .pdf."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing sheet.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables, with all names.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Find problems in a data set before you train: a benchmark, or a folder of images and masks.

    Reads every image and mask. Prints counts, sizes, file types, how files and masks are read, and foreground; then the
    problems, worst first: each *will stop* training, *will hurt* it, or is *good to know*.

    Writes nothing but `--sheet FILE`.

    Exit status: 1 if something will stop training, 2 if images and masks can't be told apart, else 0.
    """
    from dsu.config import build_config
    from dsu.data.datasets import Paths
    from dsu.dataset_check import check_dataset

    progress = ConsoleProgress(quiet=quiet)
    if sheet is not None:  # before minutes of work: check that the sheet can be drawn and no file is in its place
        from dsu.pictures import page_files

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
        from dsu.dataset_check.sheet import draw_sheet

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


# ---- what is printed ----

_STYLES: Final[dict["Severity", str]] = {"will stop": "bold red", "will hurt": "yellow", "good to know": "cyan"}
_VALUES_SHOWN: Final = 4


def states_table(states: Sequence["SplitState"], data_root: Path) -> Table:
    """One row per split: how many of its pairs are here, and where."""
    shown = table(["split", "for", "pairs", "official", "where"], ("pairs", "official"))
    for state in states:
        pairs, where = Text("-"), Text(state.problem or "not found", style="red" if state.problem else "dim")
        if state.found:
            pairs = Text(f"{state.pairs:,}", style="green" if state.complete else "yellow")
            folder, root = state.found.images.absolute(), data_root.absolute()
            below = folder.relative_to(root) if folder.is_relative_to(root) else state.found.images
            unpaired = (
                ("images without mask", state.found.images_without_mask),
                ("masks without image", state.found.masks_without_image),
            )
            lost = ", ".join(f"{len(files):,} {what}" for what, files in unpaired if files)
            where = Text(f"{below} ({lost})" if lost else str(below))
        kind = "training" if state.sought.kind == "train" else "test"
        shown.add_row(state.sought.name, kind, pairs, f"{state.sought.official_count:,}", where)
    return shown


def overlaps_report(result: "Overlaps") -> RenderableType:
    """How many images, and which ones, are in both training and test."""
    compared = ", ".join(f"{name} {count:,}" for name, count in result.images.items()) or "nothing"
    found = {"Identical pixels": result.exact, "Near-duplicates": result.near}
    counts = [(title.lower(), f"{len(pairs):,}") for title, pairs in found.items()]
    parts: list[RenderableType] = [key_table([("compared", compared), *counts])]
    for title, pairs in found.items():
        if pairs:
            parts += ["", Text(title, style="bold"), _pairs_table(pairs)]
    return Group(*parts)


def _pairs_table(pairs: Sequence["Overlap"]) -> Table:
    rows = (
        (pair.train.split, pair.train.name, pair.test.split, pair.test.name, f"{pair.likeness:.4f}") for pair in pairs
    )
    return table(["training", "", "test", "", "likeness"], ["likeness"], rows)


def dataset_check_report(found: "DatasetCheck") -> RenderableType:
    """The whole output."""
    parts: list[RenderableType] = [_figures(found), "", _files(found.splits), "", Text("Problems", style="bold")]
    parts.append(_findings(found.findings) if found.findings else "No problems found.")
    return Group(*parts)


def _figures(found: "DatasetCheck") -> Table:
    """One row per property, one column per split."""
    columns = {check.name: _column(check) for check in found.splits}
    masked = any(check.split.masks for check in found.splits)
    labels = [label for label in next(iter(columns.values())) if masked or label in _WITHOUT_MASKS]
    rows = ((label.format(side=found.side), *(column[label] for column in columns.values())) for label in labels)
    return table(["", *columns], columns, rows)


_WITHOUT_MASKS: Final = ("images", "unreadable files", "smallest image", "median image", "largest image")
"""Properties that apply if no split has masks."""


def _column(check: "SplitCheck") -> dict[str, str]:
    """The properties of one split, as text."""
    from dsu.dataset_check import summary

    row = summary(check)
    official, shares = row["official_pairs"], row["foreground_quartiles"]
    sizes = {which: "{}x{}".format(*row[which]) if row[which] else "-" for which in ("smallest", "median", "largest")}
    return {
        "images": f"{row['images']:,}",
        "pairs": f"{row['pairs']:,}{f' of {official:,}' if official not in (None, row['pairs']) else ''}",
        "images without a mask": f"{row['images_without_mask']:,}",
        "masks without an image": f"{row['masks_without_image']:,}",
        "unreadable files": f"{row['unreadable']:,}",
        **{f"{which} image": size for which, size in sizes.items()},
        "masks of another size": f"{row['masks_of_another_size']:,}",
        "masks without foreground": f"{row['empty_masks']:,}",
        "masks with grey pixels": f"{row['soft_masks']:,}",
        "foreground, quartiles": f"{' | '.join(map(_percent, shares))} %" if shares else "-",
        "objects lost at {side}x{side}": f"{row['vanishing_objects']:,} of {row['objects']:,}",
        "mask values": _values(check),
    }


def _values(check: "SplitCheck") -> str:
    """The most frequent raw values and their share of all pixels, one per line."""
    total, ordered = check.values.total(), check.values.most_common()
    coloured = any(facts.kind == "colours" for facts in check.masks)
    shown = [
        f"{f'#{value:06X}' if coloured else value}: {_percent(pixels / total)} %"
        for value, pixels in ordered[:_VALUES_SHOWN]
    ]
    if rest := [pixels for _, pixels in ordered[_VALUES_SHOWN:]]:
        shown.append(f"{len(rest)} others: {_percent(sum(rest) / total)} %")
    return "\n".join(shown) or "-"


def _percent(share: float) -> str:
    """Three significant digits: 25.1, 2.51, 0.251."""
    return f"{100 * share:.3g}" if share >= 1e-5 or share == 0 else "<0.001"


def _files(checks: Sequence["SplitCheck"]) -> Table:
    """One row per file type, one column per split, and how it is read."""
    from dsu.dataset_check import file_counts

    names = [check.name for check in checks]
    shown = table(["files", "", *names, "read as"], names)
    before = None
    for entry in file_counts(checks):
        what, count = entry["what"], entry["count"]
        counts = [f"{count[name]:,}" if name in count else "" for name in names]
        shown.add_row(what if what != before else "", entry["kind"], *counts, entry["read_as"])
        before = what
    return shown


def _findings(findings: Sequence["Finding"]) -> Table:
    """One line each, worst first."""
    rows = (
        (
            Text(finding.severity, style=_STYLES[finding.severity]),
            Text(f"{finding.split}: {finding.sentence()}" if finding.split else finding.sentence()),
        )
        for finding in findings
    )
    return key_table(rows, style="", whole=True)
