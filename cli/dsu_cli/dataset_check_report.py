"""What `dsu datasets check` prints: figures by split, kinds of files, and what will bite."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsu.dataset_check import file_counts, summary
from dsu_cli.console import table as empty_table

if TYPE_CHECKING:
    from dsu.dataset_check import DatasetCheck, Finding, Severity, SplitCheck

__all__ = ["dataset_check_report"]

_STYLES: Final[dict["Severity", str]] = {"will stop": "bold red", "will hurt": "yellow", "good to know": "cyan"}
_VALUES_SHOWN: Final = 4

Row = Mapping[str, Any]


def dataset_check_report(found: "DatasetCheck") -> RenderableType:
    """The whole page."""
    parts: list[RenderableType] = [_figures(found), "", _files(found.splits), "", Text("What will bite", style="bold")]
    parts.append(_findings(found.findings) if found.findings else "Nothing was found that will bite.")
    return Group(*parts)


def _figures(found: "DatasetCheck") -> Table:
    """A row a figure, a column a split."""
    names = [check.name for check in found.splits]
    table = empty_table(["", *names], right=names)
    rows = [summary(check) for check in found.splits]
    masked = any(row["masks_folder"] for row in rows)
    for label, show, wants_masks in _FIGURES:
        if masked or not wants_masks:
            table.add_row(label.format(side=found.side), *(show(row) for row in rows))
    if masked:
        table.add_row("mask values", *(_values(check) for check in found.splits))
    return table


def _count(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:,}"


def _size(key: str) -> Callable[[Row], str]:
    return lambda row: "-" if row[key] is None else "{}x{}".format(*row[key])


def _pairs(row: Row) -> str:
    official = row["official_pairs"]
    officially = f" of {official:,}" if official not in (None, row["pairs"]) else ""
    return f"{row['pairs']:,}{officially}"


def _shares(row: Row) -> str:
    shares = row["foreground_quartiles"]
    return "-" if shares is None else f"{' | '.join(_percent(share) for share in shares)} %"


def _objects(row: Row) -> str:
    return f"{row['vanishing_objects']:,} of {row['objects']:,}"


_FIGURES: Final[tuple[tuple[str, Callable[[Row], str], bool], ...]] = (
    ("images", _count("images"), False),
    ("pairs", _pairs, True),
    ("images without a mask", _count("images_without_mask"), True),
    ("masks without an image", _count("masks_without_image"), True),
    ("unreadable files", _count("unreadable"), False),
    ("smallest image", _size("smallest"), False),
    ("median image", _size("median"), False),
    ("largest image", _size("largest"), False),
    ("masks of another size", _count("masks_of_another_size"), True),
    ("masks without foreground", _count("empty_masks"), True),
    ("masks with grey pixels", _count("soft_masks"), True),
    ("foreground, quartiles", _shares, True),
    ("objects lost at {side}x{side}", _objects, True),
)
"""What stands in a row, how it is shown, and whether it is of any use without masks."""


def _values(check: "SplitCheck") -> str:
    """The most frequent raw values with their share of all pixels, a line each."""
    total = check.values.total()
    if not total:
        return "-"
    coloured = any(facts.kind == "colours" for facts in check.masks)
    shown = [
        f"{f'#{value:06X}' if coloured else value}: {_percent(pixels / total)} %"
        for value, pixels in check.values.most_common(_VALUES_SHOWN)
    ]
    rest = Counter(dict(check.values.most_common()[_VALUES_SHOWN:]))
    if rest:
        shown.append(f"{len(rest)} others: {_percent(rest.total() / total)} %")
    return "\n".join(shown)


def _percent(share: float) -> str:
    """Three digits that say something: 25.1, 2.51, 0.251."""
    return f"{100 * share:.3g}" if share >= 1e-5 or share == 0 else "<0.001"


def _files(checks: Sequence["SplitCheck"]) -> Table:
    """A row a kind of file, a column a split, and what is made of it."""
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
