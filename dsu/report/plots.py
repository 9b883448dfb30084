"""Curves and histograms as SVG: coloured by the page's style sheet, readable without any script."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Axis", "histogram", "line_chart", "style_class"]

Floats = NDArray[np.float64]

# Room for the tick labels and the axes' names, in the drawing's own units.
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 42
_MOST_BINS: Final = 5
"""In fives, which the ticks divide the axis into: so that bins end where ticks stand."""
_STYLES: Final = 6
"""How many line styles the style sheet knows."""


@dataclass(frozen=True)
class Axis:
    """What an axis shows, and from where to where; ticks are labelled with `places` decimals."""

    title: str
    low: float
    high: float
    steps: int = 5
    places: int = 1

    def ticks(self) -> list[tuple[float, str]]:
        """Values and their labels."""
        values = np.linspace(self.low, self.high, self.steps + 1)
        return [(float(value), f"{value:,.{self.places}f}") for value in values]


def line_chart(lines: Mapping[int, tuple[Floats, Floats]], x: Axis, y: Axis, summary: str) -> str:
    """Draw lines, each in the style of its number; `summary` is what a screen reader says of the drawing."""
    frame = _Frame(400, 280, x, y)
    drawn = [
        f'<polyline class="line {style_class(number)}" points="{frame.points(xs, ys)}"/>'
        for number, (xs, ys) in lines.items()
    ]
    return frame.svg([*frame.axes(), *drawn], summary)


def histogram(scores: Mapping[int, Floats], title: str, high: float, summary: str) -> str:
    """Draw how many images score what over 0..`high` (what lies beyond is in the last bin), styled as `line_chart`."""
    bins = _bins(max(values.size for values in scores.values()))
    counts = {
        number: np.histogram(np.clip(values, 0, high), bins=bins, range=(0, high))[0]
        for number, values in scores.items()
    }
    most = _rounded_up(max(int(count.max()) for count in counts.values()))
    frame = _Frame(
        300, 190, Axis(title, 0, high, places=1 if high >= 0.5 else 2), Axis("images", 0, most, steps=2, places=0)
    )
    edges = np.linspace(0, high, bins + 1)
    drawn = []
    for number, count in counts.items():
        corners = frame.points(np.repeat(edges, 2), np.concatenate(([0], np.repeat(count, 2), [0])))
        drawn.append(f'<polygon class="bars {style_class(number)}" points="{corners}"/>')
    return frame.svg([*frame.axes(), *drawn], summary)


def style_class(number: int) -> str:
    """The style sheet's name for the line style of a number, any number."""
    return f"run-{number % _STYLES}"


class _Frame:
    """A drawing of `width` x `height` units with a plot inside."""

    def __init__(self, width: int, height: int, x: Axis, y: Axis) -> None:
        self._width, self._height, self._x, self._y = width, height, x, y

    def points(self, xs: Sequence[float] | Floats, ys: Sequence[float] | Floats) -> str:
        """Values as an SVG's `x,y x,y`, without repeats of a place."""
        places = [f"{self._across(x):.1f},{self._down(y):.1f}" for x, y in zip(xs, ys, strict=True)]
        return " ".join(place for place, before in zip(places, ["", *places], strict=False) if place != before)

    def axes(self) -> list[str]:
        """Grid, tick labels and titles."""
        left, right, bottom = _LEFT, self._width - _RIGHT, self._height - _BOTTOM
        parts = []
        for value, label in self._x.ticks():
            at = self._across(value)
            parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
            parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
        for value, label in self._y.ticks():
            at = self._down(value)
            parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
        middle = (_TOP + bottom) / 2
        title = 'class="title" text-anchor="middle"'
        parts.append(f'<text {title} x="{(left + right) / 2}" y="{self._height - 6}">{escape(self._x.title)}</text>')
        turned = f'transform="rotate(-90 11 {middle})"'
        return [*parts, f'<text {title} x="11" y="{middle}" {turned}>{escape(self._y.title)}</text>']

    def svg(self, parts: Sequence[str], summary: str) -> str:
        """The whole drawing."""
        label = escape(summary)
        view = f"0 0 {self._width} {self._height}"
        return f'<svg viewBox="{view}" role="img" aria-label="{label}">{"".join(parts)}</svg>'

    def _across(self, value: float) -> float:
        share = (float(value) - self._x.low) / (self._x.high - self._x.low)
        return _LEFT + share * (self._width - _LEFT - _RIGHT)

    def _down(self, value: float) -> float:
        share = (float(value) - self._y.low) / (self._y.high - self._y.low)
        return self._height - _BOTTOM - share * (self._height - _TOP - _BOTTOM)


def _bins(values: int) -> int:
    """Rice's rule, twice the cube root, in fives: few values are not drawn as lone spikes."""
    return 5 * min(max(round(2 * math.cbrt(values) / 5), 1), _MOST_BINS)


def _rounded_up(count: int) -> int:
    """The least of 2, 4, 6, 10, 20, 40, ... that is not below: halves of it are whole numbers."""
    scale = 1
    while True:
        for step in (2, 4, 6, 10):
            if step * scale >= count:
                return step * scale
        scale *= 10
