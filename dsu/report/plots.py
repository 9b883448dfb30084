"""Curves and histograms as places on a drawing, which the page's template draws as SVG, readable without any script."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import ClassVar, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Axis", "Chart", "histogram", "line_chart"]

Floats = NDArray[np.float64]

_MOST_BINS: Final = 5
"""In fives, which the ticks divide the axis into: so that bins end where ticks stand."""


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
        return [(value, f"{value:,.{self.places}f}") for value in np.linspace(self.low, self.high, self.steps + 1)]

    def share(self, value: ArrayLike) -> Floats:
        """Where on the axis a value lies, from 0 to 1."""
        return (np.asarray(value, np.float64) - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Chart:
    """A drawing of `width` x `height` units with a plot inside.

    Attributes:
        width, height: in the drawing's own units, as all places here.
        x, y: the axes.
        summary: what a screen reader says of the drawing.
        bars: whether the shapes are areas, not lines.
        shapes: the points of each as an SVG has them, by the number of the line style in which it is drawn.
    """

    width: int
    height: int
    x: Axis
    y: Axis
    summary: str
    bars: bool = False
    shapes: dict[int, str] = field(default_factory=dict)

    # Room for the tick labels and the axes' names.
    left: ClassVar = 46
    top: ClassVar = 10

    @property
    def right(self) -> int:
        """The plot's right edge."""
        return self.width - 12

    @property
    def bottom(self) -> int:
        """Its lower edge."""
        return self.height - 42

    def across(self, x: ArrayLike) -> Floats:
        """Where values lie from left to right."""
        return self.left + self.x.share(x) * (self.right - self.left)

    def down(self, y: ArrayLike) -> Floats:
        """Where values lie from top to bottom."""
        return self.bottom - self.y.share(y) * (self.bottom - self.top)

    def add(self, number: int, xs: ArrayLike, ys: ArrayLike) -> None:
        """Add a shape in the line style of that number, without repeats of a place."""
        places = (f"{x:.1f},{y:.1f}" for x, y in zip(self.across(xs), self.down(ys), strict=True))
        self.shapes[number] = " ".join(place for place, _ in groupby(places))


def line_chart(lines: Mapping[int, tuple[Floats, Floats]], x: Axis, y: Axis, summary: str) -> Chart:
    """Draw lines, each in the style of its number."""
    chart = Chart(400, 280, x, y, summary)
    for number, (xs, ys) in lines.items():
        chart.add(number, xs, ys)
    return chart


def histogram(scores: Mapping[int, Floats], title: str, high: float, summary: str) -> Chart:
    """Draw how many images score what over 0..`high` (what lies beyond is in the last bin), styled as `line_chart`."""
    # Rice's rule, twice the cube root, in fives: few values are not drawn as lone spikes.
    bins = 5 * min(max(round(2 * math.cbrt(max(values.size for values in scores.values())) / 5), 1), _MOST_BINS)
    edges = np.linspace(0, high, bins + 1)
    counts = {number: np.histogram(np.clip(values, 0, high), edges)[0] for number, values in scores.items()}
    greatest = max(found.max() for found in counts.values())
    # Halves of these are whole numbers.
    ends = (step * 10**power for power in count() for step in (2, 4, 6, 10))
    images = Axis("images", 0, next(end for end in ends if end >= greatest), steps=2, places=0)
    chart = Chart(300, 190, Axis(title, 0, high, places=1 if high >= 0.5 else 2), images, summary, bars=True)
    for number, found in counts.items():
        chart.add(number, np.repeat(edges, 2), np.concatenate(([0], np.repeat(found, 2), [0])))
    return chart
