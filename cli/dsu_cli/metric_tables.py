"""The tables that `dsu eval` prints."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dsu.evaluation.evaluate import Evaluation
    from dsu.report import Comparison, Line, Results

__all__ = ["as_text", "comparison_tables", "metrics_table"]

_PAPERS_OWN = "DSU-Net"

_WIDTH = 160
"""Of plain text in a file, in characters: a table of several runs has room."""


def metrics_table(sets: Mapping[str, "Evaluation"], metrics: Sequence[str] | None = None) -> RenderableType:
    """One row a figure, one column a set, beside it the paper's figures of DSU-Net where there are any."""
    from dsu.report import Comparison, compare

    columns: list[tuple[str, Line]] = []
    notes: list[str] = []
    for name, found in sets.items():
        [comparison] = compare({name: {name: found}})
        *paper, own = comparison.lines
        columns += [(name, own), *(("paper", line) for line in paper if line.label == _PAPERS_OWN)]
        notes += own.notes(comparison.shown(metrics))
    together = Comparison("", tuple(line for _, line in columns))
    # Of several sets no figure is the best.
    table = _figures(together, columns, metrics, lambda line, figure: False)
    return Group(table, *(Text(note, style="dim") for note in notes))


def comparison_tables(results: "Results", *, with_paper: bool, metrics: Sequence[str] | None = None) -> RenderableType:
    """A table a set: a row a figure, a column a run or published method, the best of each row bold."""
    from dsu.metrics.paper import published
    from dsu.report import compare

    parts: list[RenderableType] = []
    for comparison in compare(results, published if with_paper else None):
        columns = [
            (line.label + (f"\npaper{' ≈' if line.approximate else ''}" if line.published else ""), line)
            for line in comparison.lines
        ]
        table = _figures(comparison, columns, metrics, comparison.is_best)
        parts += [table, *(Text(note, style="dim") for note in comparison.notes(metrics)), ""]
    return Group(*parts)


def as_text(shown: RenderableType) -> str:
    """What is printed, as plain text for a file."""
    console = Console(file=io.StringIO(), width=_WIDTH, highlight=False, soft_wrap=True, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(shown)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def _figures(
    comparison: "Comparison",
    columns: Sequence[tuple[str, "Line"]],
    metrics: Sequence[str] | None,
    is_best: Callable[["Line", str], bool],
) -> Table:
    """The figures asked for; else all metrics and, in parts of their own, what images without an object call for."""
    from dsu.metrics.figures import IMAGE_LEVEL, METRICS

    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(comparison.name, no_wrap=True)
    for heading, line in columns:
        style = "dim" if line.published else ""
        table.add_column(Text(heading, style=style, overflow="fold"), justify="right", style=style)
    lines = [line for _, line in columns]
    _add_rows(table, lines, metrics or METRICS, is_best)
    _add_counts(table, lines, "images", lambda line: line.images or 0)
    if metrics is None and comparison.with_empties:
        table.add_row()
        _add_counts(table, lines, "images without an object", lambda line: line.without_object)
        _add_rows(table, lines, IMAGE_LEVEL, is_best)
        table.add_row()
        _add_counts(table, lines, "images with an object", lambda line: (line.images or 0) - line.without_object)
        _add_rows(table, lines, [name for name in comparison.shown() if name not in (*METRICS, *IMAGE_LEVEL)], is_best)
    return table


def _add_rows(
    table: Table, lines: Sequence["Line"], figures: Sequence[str], is_best: Callable[["Line", str], bool]
) -> None:
    from dsu.metrics.figures import arrow, figure_name

    for figure in figures:
        cells = []
        for line in lines:
            absent = "" if line.published else "–"
            text = f"{line.figures[figure]:.{3 if line.published else 4}f}" if figure in line.figures else absent
            cells.append(Text(text, style="bold not dim" if is_best(line, figure) else ""))
        table.add_row(f"{figure_name(figure)} {arrow(figure)}", *cells)


def _add_counts(table: Table, lines: Sequence["Line"], what: str, count: Callable[["Line"], int]) -> None:
    cells = ("" if line.published else f"{count(line):,}" for line in lines)
    table.add_row(Text(what, style="dim"), *cells)
