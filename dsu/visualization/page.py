"""A page for print: cells and text at places in inches from its top left."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

T = TypeVar("T")

__all__ = ["DPI", "INK", "PAGE_HEIGHT", "PAGE_WIDTH", "Page", "fill_pages"]

DPI: Final = 300
INK: Final = "#202124"

PAGE_WIDTH: Final = 7.16
"""Inches: the text of a printed page, over both of its columns."""
PAGE_HEIGHT: Final = 9.2

_FRAME: Final = 2
"""Pixels around a picture: without them white at its border would go over into the paper."""
_FRAME_INK: Final = "#9aa0a6"

_LEAST_POINTS: Final = 5.0
"""Below this no one reads a line; one that is still too long then is shortened."""


class Page:
    """A figure of `DPI` pixels an inch. Places and sizes are in inches; cells fall on whole pixels.

    Attributes:
        width, height: in inches.
        figure: matplotlib's.
    """

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = _whole(width), _whole(height)
        self.figure = Figure(figsize=(self.width, self.height), dpi=DPI)
        self._canvas = FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float) -> "Axes":
        """A cell without ticks and frame."""
        left, top, width, height = map(_whole, (left, top, width, height))
        place = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    def picture(self, picture: Image.Image, left: float, top: float, width: float, height: float) -> None:
        """Fit a picture into a cell, in its own proportions, and frame it from outside.

        Where it does not fill the cell the paper shows.
        """
        cell = (max(1, round(width * DPI)), max(1, round(height * DPI)))
        fitted = ImageOps.contain(picture, cell, Image.Resampling.LANCZOS)
        framed = ImageOps.expand(fitted, _FRAME, _FRAME_INK)
        across, down = framed.width / DPI, framed.height / DPI
        axes = self.axes(left + (width - across) / 2, top + (height - down) / 2, across, down)
        # Without interpolation a PNG has the pixels one to one, and a PDF keeps them as they are.
        axes.imshow(np.asarray(framed), interpolation="none", aspect="auto")

    def write(self, text: str, x: float, y: float, points: float, *, room: float | None = None, **style: Any) -> None:
        """Write one line whose baseline is at `y`: smaller where `room` is short, then shortened in its middle.

        `style` is that of matplotlib's text (`ha`, `weight`, `color`, ...).
        """
        place = (x / self.width, 1 - y / self.height)
        written = self.figure.text(
            *place, text, fontsize=points, va="baseline", parse_math=False, **{"color": INK, **style}
        )
        if room is None or (wide := self._width(written)) <= room:
            return
        # Letters do not shrink quite evenly, hence a little less.
        written.set_fontsize(max(_LEAST_POINTS, 0.96 * points * room / wide))
        keep = len(text)
        while self._width(written) > room and keep > 2:
            keep -= 1
            written.set_text(f"{text[: keep // 2]}…{text[-(keep - keep // 2) :]}")

    def _width(self, text: "Text") -> float:
        renderer = self._canvas.get_renderer()  # type: ignore[no-untyped-call]
        return float(text.get_window_extent(renderer).width) / DPI


def fill_pages(items: Sequence[T], heights: Sequence[float], room: float) -> list[list[T]]:
    """Items of these heights on as few pages as have room for them, in order; one at least on each."""
    pages: list[list[T]] = []
    left = 0.0
    for item, height in zip(items, heights, strict=True):
        if height > left:
            pages.append([])
            left = room
        pages[-1].append(item)
        left -= height
    return pages


def _whole(inches: float) -> float:
    """Rounded to a pixel: a picture between two would be blurred."""
    return max(1, round(inches * DPI)) / DPI
