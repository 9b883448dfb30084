"""What `dsu datasets` prints: which benchmarks are here, images in common, figures of a check and what will bite."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsu_cli.console import key_table
from dsu_cli.console import table as empty_table

if TYPE_CHECKING:
    from dsu.data.benchmarks import SplitState
    from dsu.data.overlaps import Overlap, Overlaps
    from dsu.dataset_check import DatasetCheck, Finding, Severity, SplitCheck

__all__ = ["dataset_check_report", "overlaps_report", "states_table"]

_STYLES: Final[dict["Severity", str]] = {"will stop": "bold red", "will hurt": "yellow", "good to know": "cyan"}
_VALUES_SHOWN: Final = 4


def states_table(states: Sequence["SplitState"], data_root: Path) -> Table:
    """A row a split of a benchmark: how many pairs of it are here, and where."""
    table = empty_table(["split", "for", "pairs", "official", "where"], right=("pairs", "official"))
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
        table.add_row(state.sought.name, kind, pairs, f"{state.sought.official_count:,}", where)
    return table


def overlaps_report(result: "Overlaps") -> RenderableType:
    """How many images training and test have in common, and which."""
    compared = ", ".join(f"{name} {count:,}" for name, count in result.images.items()) or "nothing"
    found = {"The same pixels": result.exact, "Almost the same": result.near}
    counts = [(title.lower(), f"{len(pairs):,}") for title, pairs in found.items()]
    parts: list[RenderableType] = [key_table([("compared", compared), *counts])]
    for title, pairs in found.items():
        if pairs:
            parts += ["", Text(title, style="bold"), _pairs_table(pairs)]
    return Group(*parts)


def _pairs_table(pairs: Sequence["Overlap"]) -> Table:
    table = empty_table(["training", "", "test", "", "likeness"], right=["likeness"])
    for pair in pairs:
        table.add_row(pair.train.split, pair.train.name, pair.test.split, pair.test.name, f"{pair.likeness:.4f}")
    return table


def dataset_check_report(found: "DatasetCheck") -> RenderableType:
    """The whole page."""
    parts: list[RenderableType] = [_figures(found), "", _files(found.splits), "", Text("What will bite", style="bold")]
    parts.append(_findings(found.findings) if found.findings else "Nothing was found that will bite.")
    return Group(*parts)


def _figures(found: "DatasetCheck") -> Table:
    """A row a figure, a column a split."""
    columns = {check.name: _column(check) for check in found.splits}
    table = empty_table(["", *columns], right=columns)
    masked = any(check.split.masks for check in found.splits)
    for label in next(iter(columns.values())):
        if masked or label in _WITHOUT_MASKS:
            table.add_row(label.format(side=found.side), *(column[label] for column in columns.values()))
    return table


_WITHOUT_MASKS: Final = ("images", "unreadable files", "smallest image", "median image", "largest image")
"""Figures that are of use where no split has masks."""


def _column(check: "SplitCheck") -> dict[str, str]:
    """The figures of one split, as they are shown."""
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
    """The most frequent raw values with their share of all pixels, a line each."""
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
    """Three digits that say something: 25.1, 2.51, 0.251."""
    return f"{100 * share:.3g}" if share >= 1e-5 or share == 0 else "<0.001"


def _files(checks: Sequence["SplitCheck"]) -> Table:
    """A row a kind of file, a column a split, and what is made of it."""
    from dsu.dataset_check import file_counts

    names = [check.name for check in checks]
    table = empty_table(["files", "", *names, "read as"], right=names)
    before = None
    for entry in file_counts(checks):
        counts = [f"{entry.count[name]:,}" if name in entry.count else "" for name in names]
        table.add_row(entry.what if entry.what != before else "", entry.kind, *counts, entry.read_as)
        before = entry.what
    return table


def _findings(findings: Sequence["Finding"]) -> Table:
    """A line each, the worst first."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        where = f"{finding.split}: " if finding.split else ""
        table.add_row(Text(finding.severity, style=_STYLES[finding.severity]), Text(where + finding.sentence()))
    return table
