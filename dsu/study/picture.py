"""A study's picture for print: a panel a figure, a dot a run, mean and spread where runs are repeated."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsu.drawing import DPI, INK, PAGE_WIDTH, dress, save_figures
from dsu.metrics.figures import arrow, figure_name
from dsu.progress import counted
from dsu.study.plan import FOLDER_STARTS, Kind, Study
from dsu.study.results import Finished, Spread, groups, set_names, spread

__all__ = ["draw_study"]

_ACROSS: Final = 3
"""Panels side by side."""
_PANEL_HEIGHT: Final = 1.8
"""Inches."""
_LEAST_SPAN: Final = 0.1
"""Of a scale from 0 to 1: on a finer one chance looks like a difference."""
_DOT: Final = "#08519c"
_MEAN: Final = "#e8590c"
_X_LABELS: Final[dict[Kind, str]] = {
    "folds": "fold",
    "seeds": "seed",
    "depth": "adapted blocks N",
    "ablations": "ablation",
}

Value = Callable[[Finished], float]


def draw_study(study: Study, finished: Sequence[Finished], figures: Sequence[str], path: Path) -> None:
    """Write a PNG as wide as a printed page.

    Folds and seeds have a dot a run, the mean as a line and one standard deviation (n - 1) as a band; of depth and
    ablations each case has its dots, and where it has several runs its mean and spread beside them. Depth has a
    panel more: seconds an epoch.

    Args:
        study: what was varied.
        finished: members with their results.
        figures: a panel each, a set of images at a time.
        path: the file to write.
    """
    names = set_names(finished)
    panels: list[tuple[str, Value, bool]] = []  # title, value, whether it lives in 0 to 1
    for name in names:
        of = f", {name}" if len(names) > 1 else ""
        panels += [
            (f"{figure_name(figure)} {arrow(figure)}{of}", partial(_figure, name=name, figure=figure), True)
            for figure in figures
        ]
    if study.kind == "depth":
        panels.append(("seconds an epoch ↓", _epoch_seconds, False))
    panels = [panel for panel in panels if any(not math.isnan(panel[1](one)) for one in finished)]
    down = -(-len(panels) // _ACROSS)
    page = Figure(figsize=(PAGE_WIDTH, _PANEL_HEIGHT * down + 0.3), dpi=DPI, layout="constrained")
    cells = list(page.subplots(down, _ACROSS, squeeze=False).flat)
    repeats = study.kind in ("folds", "seeds")
    for axes, (title, value, is_share) in zip(cells, panels, strict=False):
        dress(axes, _X_LABELS[study.kind])
        axes.grid(visible=False, axis="x")
        # Folds and seeds have mean and spread on a line of their own below the name, which may be long.
        axes.set_title(title, fontsize=8, color=INK, loc="left", pad=15 if repeats else 3)
        (_draw_repeats if repeats else _draw_cases)(axes, study.kind, finished, value)
        low, high = axes.get_ylim()
        axes.set_ylim(_share_limits(low, high) if is_share else (0, high * 1.1))
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    for axes in cells[len(panels) :]:
        axes.set_visible(False)
    page.suptitle(f"{study.source.split}: {_words(study, finished)}", fontsize=8, color=INK, x=0.01, ha="left")
    save_figures([page], [path], DPI)


def _figure(one: Finished, name: str, figure: str) -> float:
    found = one.result.sets.get(name)
    return math.nan if found is None else found.figures.get(figure, math.nan)


def _epoch_seconds(one: Finished) -> float:
    return one.result.epoch_seconds


def _words(study: Study, finished: Sequence[Finished]) -> str:
    """What is varied and what the marks mean."""
    if study.kind in ("folds", "seeds"):
        return f"{counted(len(finished), study.kind)}, mean (line) and standard deviation (band)"
    what = "adapters in front of Hiera's last N blocks" if study.kind == "depth" else "ablations of the paper"
    repeats = max(len(members) for members in groups(finished).values())
    return what if repeats == 1 else f"{what}, {repeats} seeds each, mean and standard deviation"


def _draw_repeats(axes: Axes, kind: Kind, finished: Sequence[Finished], value: Value) -> None:
    """A dot a run in order, over the band that they span."""
    values = [value(one) for one in finished]
    found = _spread(values)
    sd = ""
    if found.count > 1:
        sd = f" ± {found.sd:.4f}"
        axes.axhspan(found.mean - found.sd, found.mean + found.sd, color=_MEAN, alpha=0.15, linewidth=0)
    axes.axhline(found.mean, color=_MEAN, linewidth=1)
    axes.plot(range(len(values)), values, "o", color=_DOT, markersize=4, zorder=3, clip_on=False)
    axes.text(0, 1.05, f"{found.mean:.4f}{sd}", fontsize=7, color=_MEAN, transform=axes.transAxes)
    _label(axes, kind, [one.member.name for one in finished])


def _draw_cases(axes: Axes, kind: Kind, finished: Sequence[Finished], value: Value) -> None:
    """The dots of each case above its name; of repeated cases mean and spread beside them."""
    cases = groups(finished)
    means = []
    for place, members in enumerate(cases.values()):
        values = [value(one) for one in members]
        found = _spread(values)
        means.append(found.mean)
        axes.plot([place] * len(values), values, "o", color=_DOT, markersize=4, alpha=0.8, zorder=3, clip_on=False)
        if found.count > 1:
            axes.errorbar(
                place + 0.15, found.mean, found.sd, fmt="_", color=_MEAN, capsize=2.5, linewidth=1, markersize=6
            )
    if kind == "depth":  # an order, so that a line means something
        axes.plot(range(len(means)), means, color=_DOT, linewidth=1, alpha=0.5)
    _label(axes, kind, list(cases))


def _spread(values: Sequence[float]) -> Spread:
    return spread([value for value in values if not math.isnan(value)])


def _label(axes: Axes, kind: Kind, folders: Sequence[str]) -> None:
    """As many names below the places as there is room for."""
    step = -(-len(folders) // 10)
    names = [folder.removeprefix(FOLDER_STARTS[kind]) for folder in folders[::step]]
    axes.set_xticks(range(0, len(folders), step), names)
    axes.set_xlim(-0.5, len(folders) - 0.5)


def _share_limits(low: float, high: float) -> tuple[float, float]:
    """Limits around `low` to `high` with some room, within 0 to 1 (a band may reach beyond) and not too near."""
    span = min(max((high - low) * 1.1, _LEAST_SPAN), 1)
    bottom = min(max((low + high - span) / 2, 0), 1 - span)
    return bottom, bottom + span
