"""A study's picture for print: a panel a figure, a dot a run, mean and spread where runs are repeated."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dsu.files import atomic_write
from dsu.metrics.figures import arrow, figure_name
from dsu.progress import counted
from dsu.study.plan import FOLDER_STARTS, Kind, Study
from dsu.study.results import Finished, Spread, groups, set_names, spread
from dsu.visualization.page import DPI, INK, PAGE_WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_study"]

_ACROSS: Final = 3
"""Panels side by side."""
_PANEL_HEIGHT: Final = 1.8
"""Inches."""
_LEAST_SPAN: Final = 0.1
"""Of a scale from 0 to 1: on a finer one chance looks like a difference."""
_DOT: Final = "#08519c"
_MEAN: Final = "#e8590c"
_FAINT: Final = "#5f6368"
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = set_names(finished)
    panels: list[tuple[str, Value, bool]] = []  # title, value, whether it lives in 0 to 1
    for name in names:
        of = f", {name}" if len(names) > 1 else ""
        panels += [(f"{figure_name(figure)} {arrow(figure)}{of}", _figure(name, figure), True) for figure in figures]
    if study.kind == "depth":
        panels.append(("seconds an epoch ↓", lambda one: one.result.epoch_seconds, False))
    panels = [panel for panel in panels if any(not math.isnan(panel[1](one)) for one in finished)]
    down = -(-len(panels) // _ACROSS)
    page = Figure(figsize=(PAGE_WIDTH, _PANEL_HEIGHT * down + 0.3), dpi=DPI, layout="constrained")
    FigureCanvasAgg(page)
    cells = list(page.subplots(down, _ACROSS, squeeze=False).flat)
    for axes, (title, value, is_share) in zip(cells, panels, strict=False):
        _dress(axes, title, study.kind)
        _draw(axes, study.kind, finished, value)
        _scale(axes, is_share=is_share)
    for axes in cells[len(panels) :]:
        axes.set_visible(False)
    page.suptitle(f"{study.source.split}: {_words(study, finished)}", fontsize=8, color=INK, x=0.01, ha="left")
    drawn = io.BytesIO()
    page.savefig(drawn, format="png")
    atomic_write(path, drawn.getvalue())


def _figure(name: str, figure: str) -> Value:
    def value(one: Finished) -> float:
        found = one.result.sets.get(name)
        return math.nan if found is None else found.figures.get(figure, math.nan)

    return value


def _words(study: Study, finished: Sequence[Finished]) -> str:
    """What is varied and what the marks mean."""
    if study.kind in ("folds", "seeds"):
        return f"{counted(len(finished), study.kind)}, mean (line) and standard deviation (band)"
    what = "adapters in front of Hiera's last N blocks" if study.kind == "depth" else "ablations of the paper"
    repeats = max(len(members) for members in groups(finished).values())
    return what if repeats == 1 else f"{what}, {repeats} seeds each, mean and standard deviation"


def _draw(axes: "Axes", kind: Kind, finished: Sequence[Finished], value: Value) -> None:
    if kind in ("folds", "seeds"):
        _draw_repeats(axes, kind, finished, value)
    else:
        _draw_cases(axes, kind, finished, value)


def _draw_repeats(axes: "Axes", kind: Kind, finished: Sequence[Finished], value: Value) -> None:
    """A dot a run in order, over the band that they span."""
    values = [value(one) for one in finished]
    found = _spread(values)
    if found.count > 1:
        axes.axhspan(found.mean - found.sd, found.mean + found.sd, color=_MEAN, alpha=0.15, linewidth=0)
    axes.axhline(found.mean, color=_MEAN, linewidth=1)
    axes.plot(range(len(values)), values, "o", color=_DOT, markersize=4, zorder=3, clip_on=False)
    _label(axes, [one.member.name.removeprefix(FOLDER_STARTS[kind]) for one in finished])
    sd = f" ± {found.sd:.4f}" if found.count > 1 else ""
    axes.text(0, 1.05, f"{found.mean:.4f}{sd}", fontsize=7, color=_MEAN, transform=axes.transAxes)


def _draw_cases(axes: "Axes", kind: Kind, finished: Sequence[Finished], value: Value) -> None:
    """The dots of each case above its name; of repeated cases mean and spread beside them."""
    cases = list(groups(finished).items())
    means = []
    for place, (_, members) in enumerate(cases):
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
    _label(axes, [name.removeprefix(FOLDER_STARTS[kind]) for name, _ in cases])


def _spread(values: Sequence[float]) -> Spread:
    return spread([value for value in values if not math.isnan(value)])


def _label(axes: "Axes", names: Sequence[str]) -> None:
    """As many names below the places as there is room for."""
    step = -(-len(names) // 10)
    axes.set_xticks(range(0, len(names), step), names[::step])
    axes.set_xlim(-0.5, len(names) - 0.5)


def _scale(axes: "Axes", *, is_share: bool) -> None:
    """A figure's scale stays where the figure can be; any other begins at 0."""
    low, high = axes.get_ylim()
    axes.set_ylim(_share_limits(low, high) if is_share else (0, high * 1.1))
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)


def _share_limits(low: float, high: float) -> tuple[float, float]:
    """Limits around `low` to `high` with some room, within 0 to 1 (a band may reach beyond) and not too near."""
    span = min(max((high - low) * 1.1, _LEAST_SPAN), 1)
    bottom = min(max((low + high - span) / 2, 0), 1 - span)
    return bottom, bottom + span


def _dress(axes: "Axes", title: str, kind: Kind) -> None:
    axes.grid(visible=True, axis="y", color="#e8eaed", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7, length=2, colors=INK)
    # Folds and seeds have mean and spread on a line of their own below the name, which may be long.
    axes.set_title(title, fontsize=8, color=INK, loc="left", pad=15 if kind in ("folds", "seeds") else 3)
    axes.set_xlabel(_X_LABELS[kind], fontsize=7, color=_FAINT, labelpad=2)
