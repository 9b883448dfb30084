"""The paper's Figures 1 and 2 from one's own images: features as principal components and as t-SNE."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.errors import UsageError
from dsu.progress import SILENT, Progress, Task
from dsu.sheets import page_files, save_figures
from dsu.visualization.features import FeatureGroup, FeatureLevel
from dsu.visualization.page import DPI, INK, PAGE_HEIGHT, Page, fill_pages
from dsu.visualization.projections import choose_tokens, mask_of_tokens, plane, principal_colours
from dsu.visualization.shown import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FeatureFigure"]

TOKENS: Final = 1500

_LEVELS: Final = 4
"""Side by side: with images and masks, as wide as a printed page's text. Further ones go on below."""

_CELL: Final = 1.1
_GAP: Final = 0.04
_TITLE: Final = 0.34
_GROUP_TITLE: Final = 0.26
_BETWEEN: Final = 0.12
"""Inches, as all sizes here."""

_ASPECTS: Final = (0.3, 1.5)
"""Heights of a row, in widths."""

_OBJECT: Final = "#d6336c"
_GROUND: Final = "#8fa3b5"
_WARNING: Final = "#b3261e"


@dataclass(frozen=True)
class _Plane:
    """t-SNE of one level: places (N, 2), and their colours (N,)."""

    places: NDArray[np.float32]
    colours: NDArray[Any]


@dataclass(frozen=True)
class FeatureFigure:
    """A block for every four levels of a group: a row an image (image, mask, each level's first three principal
    components as colours), and below them each level's t-SNE.

    Components are fitted over all images together, each level for itself. In t-SNE a dot is a token, coloured by
    the mask where every image has one, else by image; then the images' frames say which colour is whose.

    Attributes:
        shown: The images, in the order of the groups' maps.
        groups: Their features.
        tokens: How many tokens, of all images together, t-SNE places; None leaves t-SNE out.
        seed: Of the choice of tokens and of t-SNE.

    Raises `UsageError` for no images, or fewer than four tokens.
    """

    shown: Sequence[Shown]
    groups: Sequence[FeatureGroup]
    tokens: int | None = TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.shown:
            raise UsageError("there is no image whose features could be drawn: give one or more.")
        if self.tokens is not None and self.tokens < 4:
            raise UsageError(f"t-SNE can't place {self.tokens} tokens: ask for 4 or more.")

    def pages(self) -> list[list[FeatureGroup]]:
        """The blocks of each page: groups of four levels at most."""
        blocks = [
            replace(group, levels=group.levels[start : start + _LEVELS])
            for group in self.groups
            for start in range(0, len(group.levels), _LEVELS)
        ]
        return fill_pages(blocks, [self._block_height] * len(blocks), PAGE_HEIGHT)

    def draw(self, path: Path, progress: Progress = SILENT) -> list[Path]:
        """Draw all pages.

        Args:
            path: .png (300 dpi; further pages beside it as `-2.png`, ...) or .pdf (text as text); its folder is made.
            progress: Told of every level placed and drawn.

        Returns:
            The files written, those of `dsu.sheets.page_files`.

        Raises:
            UsageError: Another ending than .png and .pdf.
            DsuError: Features that are not finite, or a file that can't be written.
        """
        pages = self.pages()
        files = page_files(path, len(pages))
        planes = None if self.tokens is None else iter(self._place_tokens(self.tokens, progress))
        with progress.task("drawing", self._level_count, "levels") as task:
            return save_figures((self._page(page, planes, task) for page in pages), files, DPI)

    @property
    def _level_count(self) -> int:
        return sum(len(group.levels) for group in self.groups)

    @cached_property
    def _heights(self) -> list[float]:
        """Of the rows, in their images' proportions as far as they are not extreme."""
        aspects = [one.image.height / one.image.width for one in self.shown]
        return [_CELL * min(max(aspect, _ASPECTS[0]), _ASPECTS[1]) for aspect in aspects]

    @property
    def _block_height(self) -> float:
        return self._row_top(0, len(self.shown)) + (0 if self.tokens is None else _CELL) + _BETWEEN

    @property
    def _masked(self) -> bool:
        """Whether there is a column of masks."""
        return any(one.mask is not None for one in self.shown)

    @property
    def _by_mask(self) -> bool:
        """Whether tokens can be coloured by the masks."""
        return all(one.mask is not None for one in self.shown)

    @property
    def _first(self) -> int:
        """The first column of features."""
        return 2 if self._masked else 1

    def _place_tokens(self, tokens: int, progress: Progress) -> list[_Plane]:
        """t-SNE of every level: by far what takes longest."""
        planes = []
        with progress.task("placing tokens (t-SNE)", self._level_count, "levels") as task:
            for group in self.groups:
                for level in group.levels:
                    on_object, colours = self._mark_tokens(level)
                    chosen = choose_tokens(on_object, tokens, self.seed)
                    planes.append(_Plane(plane(level.maps, chosen, self.seed), colours[chosen]))
                    task.advance()
        return planes

    def _mark_tokens(self, level: FeatureLevel) -> tuple[NDArray[np.bool_], NDArray[Any]]:
        """Of all images' tokens, (N,): which lie on an object (none, where some image has no mask), and a colour."""
        if self._by_mask:
            pairs = zip(self.shown, level.maps, strict=True)
            marks = [mask_of_tokens(one.mask, tokens).ravel() for one, tokens in pairs if one.mask is not None]
            on_object = np.concatenate(marks)
            return on_object, np.where(on_object, _OBJECT, _GROUND)
        sizes = [one.shape[0] * one.shape[1] for one in level.maps]
        return np.zeros(sum(sizes), np.bool_), np.repeat([_colour_of(index) for index in range(len(sizes))], sizes)

    def _page(self, blocks: Sequence[FeatureGroup], planes: Iterator[_Plane] | None, task: Task) -> "Figure":
        """Takes as many of the planes as its blocks have levels."""
        widest = max(len(block.levels) for block in blocks)
        page = Page(_left(self._first + widest), len(blocks) * self._block_height)
        for index, block in enumerate(blocks):
            top = index * self._block_height
            _draw_title(page, block, top)
            self._draw_inputs(page, top)
            colours: list[NDArray[np.float32]] = []
            for column, level in enumerate(block.levels, self._first):
                colours = principal_colours(level.maps, like=colours if level.adapted else None)
                self._draw_level(page, column, top, level, colours)
                if planes is not None:
                    self._draw_plane(page, column, top, next(planes))
                task.advance()
        return page.figure

    def _draw_inputs(self, page: Page, top: float) -> None:
        """Images and masks, and what t-SNE's colours mean."""
        _draw_head(page, "image", 0, top)
        if self._masked:
            _draw_head(page, "truth", 1, top)
        for row, one in enumerate(self.shown):
            axes = self._axes(page, 0, top, row)
            _picture(axes, np.asarray(one.image), one.image)
            if self.tokens is not None and not self._by_mask and len(self.shown) > 1:
                axes.spines[:].set(visible=True, color=_colour_of(row), linewidth=2)
            if one.mask is not None:
                _picture(self._axes(page, 1, top, row), one.mask, one.image, cmap="gray", vmin=0, vmax=255)
        if self.tokens is not None:
            self._draw_legend(page, top)

    def _draw_legend(self, page: Page, top: float) -> None:
        right = _left(self._first) - 3 * _GAP
        y = self._row_top(top, len(self.shown)) + 0.45 * _CELL
        page.write("t-SNE", right, y, 7.5, ha="right")
        if self._by_mask:
            meanings = [("● object", _OBJECT), ("● background", _GROUND)]
        else:
            meanings = [("by image", INK)] if len(self.shown) > 1 else []
        for line, (text, colour) in enumerate(meanings, 1):
            page.write(text, right, y + 0.13 * line, 6.5, ha="right", color=colour)

    def _draw_level(
        self, page: Page, column: int, top: float, level: FeatureLevel, colours: Sequence[NDArray[np.float32]]
    ) -> None:
        """One column: the components of every image."""
        _draw_head(page, level.title, column, top)
        for row, (one, coloured) in enumerate(zip(self.shown, colours, strict=True)):
            _picture(self._axes(page, column, top, row), coloured, one.image, interpolation="nearest")

    def _draw_plane(self, page: Page, column: int, top: float, placed: _Plane) -> None:
        """t-SNE, below a column."""
        axes = page.axes(_left(column), self._row_top(top, len(self.shown)), _CELL, _CELL)
        # Points are pixels in a PDF too: thousands of them as vectors open slowly.
        axes.scatter(placed.places[:, 0], placed.places[:, 1], s=2.2, c=placed.colours, linewidths=0, rasterized=True)
        axes.margins(0.04)
        axes.spines[:].set(visible=True, color="#dadce0", linewidth=0.6)

    def _row_top(self, top: float, row: int) -> float:
        """Of an image's row in a block, or of the t-SNE's below the last; `top` is the block's."""
        return top + _GROUP_TITLE + _TITLE + sum(self._heights[:row]) + row * _GAP

    def _axes(self, page: Page, column: int, top: float, row: int) -> "Axes":
        return page.axes(_left(column), self._row_top(top, row), _CELL, self._heights[row])


def _draw_title(page: Page, block: FeatureGroup, top: float) -> None:
    """A block's name, and what its reader must know at the other end of the line."""
    room = page.width - 2 * _GAP
    page.write(block.title, _GAP, top + 0.18, 9, weight="bold", room=room / 2 if block.remark else room)
    if block.remark:
        page.write(block.remark, _GAP + room, top + 0.18, 6.5, ha="right", color=_WARNING, room=room / 2)


def _draw_head(page: Page, title: str, column: int, top: float) -> None:
    """What stands above a column: its name, and smaller below it the shape."""
    name, _, shape = title.partition("\n")
    middle = _left(column) + _CELL / 2
    page.write(name, middle, top + _GROUP_TITLE + 0.14, 8, ha="center")
    page.write(shape, middle, top + _GROUP_TITLE + 0.27, 5.5, ha="center")


def _left(column: int) -> float:
    return _GAP + column * (_CELL + _GAP)


def _colour_of(index: int) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["tab10"](index % 10))


def _picture(axes: "Axes", picture: NDArray[Any], image: Image.Image, **style: Any) -> None:
    """A picture of any size, in the image's own proportions."""
    axes.imshow(picture, extent=(0, image.width, image.height, 0), **style)
    axes.set_anchor("C")
