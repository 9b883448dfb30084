"""A study's table, as cells: a row a member, then means and spreads; for the terminal and for Markdown alike."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dsu.metrics.figures import IMAGE_LEVEL, SPOILT, arrow, figure_name, over_objects
from dsu.study.members import Kind
from dsu.study.summary import Finished, groups, pooled, spread, spreads

__all__ = ["POOLED", "Row", "StudyTable", "default_figures", "set_names", "study_tables"]

POOLED: Final = "all images"
"""The row of a cross-validation in which every image counts once."""

_USUAL: Final = ("S", "F_adaptive", "E_mean", "MAE", "IoU")
_PLACES: Final = 4


@dataclass(frozen=True)
class Row:
    """A line of a table: of a member, or a summary of several."""

    cells: tuple[str, ...]
    summary: bool = False


@dataclass(frozen=True)
class StudyTable:
    """What a study found on one set: `name` of the set, its headings and rows."""

    name: str
    headings: tuple[str, ...]
    rows: tuple[Row, ...]

    def to_markdown(self) -> str:
        """Ready to paste."""
        lines = [self.headings, ("---", *("--:" for _ in self.headings[1:])), *(row.cells for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def set_names(finished: Sequence[Finished]) -> list[str]:
    """The sets that members were judged on, in order."""
    return list(dict.fromkeys(name for one in finished for name in one.result.sets))


def default_figures(finished: Sequence[Finished]) -> tuple[str, ...]:
    """What is told unless asked otherwise: the paper's S, F, E and MAE, and IoU.

    Where there are images without an object, those that they spoil are over the images with one, and the figures of
    whole images come on top.
    """
    if not any(found.without_object for one in finished for found in one.result.sets.values()):
        return _USUAL
    usual = [over_objects(figure) if over_objects(figure) in SPOILT else figure for figure in _USUAL]
    return (*usual, *IMAGE_LEVEL)


def study_tables(kind: Kind, finished: Sequence[Finished], figures: Sequence[str]) -> list[StudyTable]:
    """A table a set.

    Args:
        kind: of study: depth also tells costs, folds all images together.
        finished: members with their results.
        figures: which to tell, in order, of `dsu.metrics.figures.FIGURES`.
    """
    heads = (*(f"{figure_name(figure)} {arrow(figure)}" for figure in figures), "time")
    costs = ("s/epoch", "s/step", "MB/image", "store GB") if kind == "depth" else ()
    tables = []
    for name in set_names(finished):
        members = [one for one in finished if name in one.result.sets]
        rows = [
            Row(
                (
                    one.member.name,
                    *_cells(one.result.sets[name].figures, figures),
                    _time(one.seconds),
                    *_costs(kind, one),
                )
            )
            for one in members
        ]
        rows += _summaries(members, name, figures, len(costs))
        if kind == "folds" and len(members) > 1:
            rows.append(Row((POOLED, *_cells(pooled(members, name), figures), "", *[""] * len(costs)), summary=True))
        tables.append(StudyTable(name, (name, *heads, *costs), tuple(rows)))
    return tables


def _summaries(members: Sequence[Finished], name: str, figures: Sequence[str], empty: int) -> list[Row]:
    rows = []
    by_group = groups(members)
    for group, found in spreads(members, name, figures).items():
        label = f"{group} " if len(by_group) > 1 else ""
        seconds = spread([one.seconds for one in by_group[group]])
        for what, values, time in (
            ("mean", {figure: one.mean for figure, one in found.items()}, seconds.mean),
            ("sd", {figure: one.sd for figure, one in found.items()}, seconds.sd),
        ):
            rows.append(Row((f"{label}{what}", *_cells(values, figures), _time(time), *[""] * empty), summary=True))
    return rows


def _cells(found: Mapping[str, float], figures: Sequence[str]) -> list[str]:
    return [_number(found.get(figure, math.nan)) for figure in figures]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.{_PLACES}f}"


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _costs(kind: Kind, one: Finished) -> list[str]:
    if kind != "depth":
        return []
    cost, result = one.member.cost, one.result
    return [
        f"{result.epoch_seconds:.3g}",
        f"{result.step_seconds:.3g}",
        f"{cost.image_bytes / 1e6:.2f}",
        f"{cost.store_bytes / 1e9:.3g}",
    ]
