"""The paper's Figures 1 and 2 from one's own images: features as principal components and as t-SNE."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.errors import UsageError
from dsu.progress import SILENT, Progress
from dsu.sheets import page_files, save_figures
from dsu.visualization.features import FeatureGroup, FeatureLevel
from dsu.visualization.projections import choose_tokens, mask_of_tokens, plane, principal_colours
from dsu.visualization.shown import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_features"]

DPI: Final = 300
TOKENS: Final = 1500

_CELL: Final = 1.1
_GAP: Final = 0.04
_TITLE: Final = 0.34
_GROUP_TITLE: Final = 0.26
_BETWEEN: Final = 0.12
"""Sizes in inches: with six columns the figure is as wide as a printed page's text."""

_ASPECTS: Final = (0.3, 1.3)
"""Heights of a row, in widths."""

_INK: Final = "#202124"
_OBJECT: Final = "#d6336c"
_GROUND: Final = "#8fa3b5"


def draw_features(
    shown: Sequence[Shown],
    groups: Sequence[FeatureGroup],
    path: Path,
    *,
    tokens: int = TOKENS,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[Path]:
    """Draw a block a group: a row an image (image, mask, each level's first three principal components as colours),
    and below them each level's t-SNE.

    Components are fitted over all images together, each level for itself. In t-SNE a dot is a token, coloured by
    the mask where every image has one, else by image; then the images' frames say which colour is whose.

    Args:
        shown: The images, in the order of the groups' maps.
        groups: Their features.
        path: .png (300 dpi) or .pdf (text as text); its folder is made.
        tokens: How many tokens, of all images together, t-SNE places.
        seed: Of the choice of tokens and of t-SNE.
        progress: Told of every level drawn.

    Returns:
        The file written.

    Raises:
        UsageError: No images, fewer than four tokens, or another ending than .png and .pdf.
        DsuError: Features that are not finite, or a file that can't be written.
    """
    files = page_files(path, 1)
    if not shown:
        raise UsageError("there is no image whose features could be drawn: give one or more.")
    if tokens < 4:
        raise UsageError(f"t-SNE can't place {tokens} tokens: ask for 4 or more.")
    layout = _Layout(shown, groups)
    with progress.task("drawing", sum(len(group.levels) for group in groups), "levels") as task:

        def figures() -> Iterator["Figure"]:
            figure = layout.figure()
            top = 0.0
            for group in groups:
                _draw_inputs(layout, figure, group, top)
                colours = None
                for column, level in enumerate(group.levels, layout.first):
                    colours = principal_colours(level.maps, like=colours if level.adapted else None)
                    _draw_level(layout, figure, level, colours, top, column)
                    _draw_plane(layout, figure, level, top, column, tokens, seed)
                    task.advance()
                top += layout.group_height
            yield figure

        return save_figures(figures(), files, DPI)


@dataclass(frozen=True)
class _Layout:
    """Places in inches from the top left."""

    shown: Sequence[Shown]
    groups: Sequence[FeatureGroup]

    @property
    def masked(self) -> bool:
        """Whether there is a column of masks."""
        return any(one.mask is not None for one in self.shown)

    @property
    def by_mask(self) -> bool:
        """Whether tokens can be coloured by the masks."""
        return all(one.mask is not None for one in self.shown)

    @property
    def first(self) -> int:
        """The first column of features."""
        return 2 if self.masked else 1

    @property
    def width(self) -> float:
        columns = self.first + max(len(group.levels) for group in self.groups)
        return columns * (_CELL + _GAP) + _GAP

    @property
    def heights(self) -> list[float]:
        """Of the rows, in their images' proportions as far as they are not extreme."""
        aspects = [one.image.height / one.image.width for one in self.shown]
        return [_CELL * min(max(aspect, _ASPECTS[0]), _ASPECTS[1]) for aspect in aspects]

    def row_top(self, top: float, row: int) -> float:
        """Of an image's row in a group, or of the t-SNE's below the last; `top` is the group's."""
        return top + _GROUP_TITLE + _TITLE + sum(self.heights[:row]) + row * _GAP

    @property
    def group_height(self) -> float:
        return self.row_top(0, len(self.shown)) + _CELL + _BETWEEN

    def figure(self) -> "Figure":
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        height = len(self.groups) * self.group_height
        figure = Figure(figsize=(self.width, height), dpi=DPI)
        FigureCanvasAgg(figure)
        return figure

    def left(self, column: int) -> float:
        return _GAP + column * (_CELL + _GAP)

    def axes(self, figure: "Figure", column: int, top: float, height: float) -> "Axes":
        """A cell without ticks and frame, whose top is so far from the figure's."""
        whole = len(self.groups) * self.group_height
        place = (self.left(column) / self.width, 1 - (top + height) / whole, _CELL / self.width, height / whole)
        axes = figure.add_axes(place)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    def write(self, figure: "Figure", text: str, x: float, y: float, **style: Any) -> None:
        whole = len(self.groups) * self.group_height
        figure.text(x / self.width, 1 - y / whole, text, parse_math=False, **{"color": _INK, **style})


def _draw_inputs(layout: _Layout, figure: "Figure", group: FeatureGroup, top: float) -> None:
    """The group's name, images and masks, and what t-SNE's colours mean."""
    shown = layout.shown
    layout.write(figure, group.title, layout.left(0), top + 0.18, fontsize=9, weight="bold", va="baseline")
    _head(layout, figure, "image", 0, top)
    if layout.masked:
        _head(layout, figure, "truth", 1, top)
    for index, one in enumerate(shown):
        axes = layout.axes(figure, 0, layout.row_top(top, index), layout.heights[index])
        _picture(axes, np.asarray(one.image), one.image)
        if not layout.by_mask and len(shown) > 1:
            axes.spines[:].set(visible=True, color=_colour_of(index), linewidth=2)
        if one.mask is not None:
            axes = layout.axes(figure, 1, layout.row_top(top, index), layout.heights[index])
            _picture(axes, one.mask, one.image, cmap="gray", vmin=0, vmax=255)
    below = layout.row_top(top, len(shown))
    right = layout.left(layout.first) - 3 * _GAP
    layout.write(figure, "t-SNE", right, below + 0.45 * _CELL, fontsize=7.5, ha="right", va="baseline")
    if layout.by_mask:
        meanings = [("● object", _OBJECT), ("● background", _GROUND)]
    else:
        meanings = [("by image", _INK)] if len(shown) > 1 else []
    for line, (text, colour) in enumerate(meanings, 1):
        y = below + 0.45 * _CELL + 0.13 * line
        layout.write(figure, text, right, y, fontsize=6.5, ha="right", va="baseline", color=colour)


def _draw_level(
    layout: _Layout,
    figure: "Figure",
    level: FeatureLevel,
    colours: Sequence[NDArray[np.float32]],
    top: float,
    column: int,
) -> None:
    """One column: the components of every image."""
    _head(layout, figure, level.title, column, top)
    for index, (one, coloured) in enumerate(zip(layout.shown, colours, strict=True)):
        axes = layout.axes(figure, column, layout.row_top(top, index), layout.heights[index])
        _picture(axes, coloured, one.image, interpolation="nearest")


def _draw_plane(
    layout: _Layout, figure: "Figure", level: FeatureLevel, top: float, column: int, tokens: int, seed: int
) -> None:
    """t-SNE, below a column."""
    axes = layout.axes(figure, column, layout.row_top(top, len(layout.shown)), _CELL)
    on_object = _on_objects(layout, level)
    chosen = choose_tokens(on_object, tokens, seed)
    placed = plane(level.maps, chosen, seed)
    colours_of = _token_colours(layout, level, on_object)
    # Points are pixels in a PDF too: thousands of them as vectors open slowly.
    axes.scatter(placed[:, 0], placed[:, 1], s=2.2, c=colours_of[chosen], linewidths=0, rasterized=True)
    axes.margins(0.04)
    axes.spines[:].set(visible=True, color="#dadce0", linewidth=0.6)


def _on_objects(layout: _Layout, level: FeatureLevel) -> NDArray[np.bool_]:
    """Which tokens of all images lie on an object, (N,); none where some image has no mask."""
    if not layout.by_mask:
        return np.zeros(sum(one.shape[0] * one.shape[1] for one in level.maps), np.bool_)
    pairs = zip(layout.shown, level.maps, strict=True)
    return np.concatenate([mask_of_tokens(shown.mask, one).ravel() for shown, one in pairs if shown.mask is not None])


def _token_colours(layout: _Layout, level: FeatureLevel, on_object: NDArray[np.bool_]) -> NDArray[Any]:
    """A colour for each token of all images, (N,)."""
    if layout.by_mask:
        return np.where(on_object, _OBJECT, _GROUND)
    sizes = [one.shape[0] * one.shape[1] for one in level.maps]
    return np.repeat([_colour_of(index) for index in range(len(sizes))], sizes)


def _colour_of(index: int) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["tab10"](index % 10))


def _head(layout: _Layout, figure: "Figure", title: str, column: int, top: float) -> None:
    """What stands above a column: its name, and smaller below it the shape."""
    name, _, shape = title.partition("\n")
    middle = layout.left(column) + _CELL / 2
    layout.write(figure, name, middle, top + _GROUP_TITLE + 0.14, fontsize=8, ha="center", va="baseline")
    layout.write(figure, shape, middle, top + _GROUP_TITLE + 0.27, fontsize=5.5, ha="center", va="baseline")


def _picture(axes: "Axes", picture: NDArray[Any], image: Image.Image, **style: Any) -> None:
    """A picture of any size, in the image's own proportions."""
    axes.imshow(picture, extent=(0, image.width, image.height, 0), **style)
    axes.set_anchor("C")
