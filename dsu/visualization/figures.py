"""The paper's Figures 1 and 2 from one's own images: features as principal components and as t-SNE.

Both are scikit-learn's. What is fitted is fitted over the tokens of all images together, so that a colour or a place
means the same in every image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA  # type: ignore[import-untyped]
from sklearn.manifold import TSNE  # type: ignore[import-untyped]
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from dsu.drawing import DPI, INK, PAGE_HEIGHT, Page, fill_pages, save_figures
from dsu.errors import DsuError
from dsu.pictures import page_files
from dsu.progress import SILENT, Progress, Task
from dsu.visualization.features import FeatureGroup, Shown

__all__ = ["FeatureFigure", "choose_tokens", "mask_of_tokens", "plane", "principal_colours"]

_LEVELS: Final = 4
"""Side by side: with images and masks, as wide as a printed page's text. Further ones go on below."""

_CELL: Final = 1.1
_GAP: Final = 0.04
_TITLES: Final = 0.6
"""Height of what stands above the pictures: the block's name, and the columns' names with their shapes. Inches, as all
sizes here."""

_OBJECT: Final = "#d6336c"
_GROUND: Final = "#8fa3b5"

Map = NDArray[np.float32]
"""One image's tokens on their grid, (H, W, C)."""

_ROUNDS: Final = 500
"""Of t-SNE: 3 s for 1,500 tokens. Twice as many take twice as long and fit 4 % closer, which no picture shows."""

Plane = tuple[NDArray[np.float32], NDArray[Any]]
"""t-SNE of one level: places (N, 2), and their colours (N,)."""


# ---- projections ----


def principal_colours(
    maps: Sequence[Map], like: Sequence[NDArray[np.float32]] | None = None
) -> list[NDArray[np.float32]]:
    """The first three principal components of one kind of features as red, green and blue.

    Args:
        maps: An image each, (H, W, C) of one C; fitted over all of them together.
        like: Colours of the same tokens of other features, to compare with: a component's sign is chance, so each is
            turned to where it agrees with these.

    Returns:
        (H, W, 3) in [0, 1] for each.

    Raises:
        DsuError: A value is not finite.
    """
    tokens = _tokens(maps)
    count = min(3, *tokens.shape)
    # An exact solver, whose signs scikit-learn fixes: the same tokens have the same colours every time.
    with np.errstate(invalid="ignore"):  # of shares of a variance of zero, which no one asks for
        found = PCA(count, svd_solver="covariance_eigh").fit_transform(tokens)
    # Not of the darkest and brightest token: single odd ones must not dim all others.
    low, high = np.percentile(found, (1, 99), axis=0)
    colours = np.full((len(tokens), 3), 0.5, np.float32)
    colours[:, :count] = np.clip((found - low) / np.maximum(high - low, 1e-12), 0, 1)
    if like is not None:
        others = np.concatenate([one.reshape(-1, 3) for one in like])
        against = ((colours - colours.mean(axis=0)) * (others - others.mean(axis=0))).sum(axis=0) < 0
        colours = np.where(against, 1 - colours, colours)
    ends = np.cumsum([one.shape[0] * one.shape[1] for one in maps])[:-1]
    return [part.reshape(*one.shape[:2], 3) for part, one in zip(np.split(colours, ends), maps, strict=True)]


def choose_tokens(on_object: NDArray[np.bool_], most: int, seed: int) -> NDArray[np.intp]:
    """Draw tokens for t-SNE: small objects would be lost among the rest, so up to half are of objects, if they have it.

    Args:
        on_object: Which of all maps' tokens, one map after another, lie on an object, (N,).
        most: How many to draw.
        seed: Of the draw.

    Returns:
        Numbers of tokens, (`most`,) or fewer, those of objects last: drawn last, they lie on top.
    """
    order = np.random.default_rng(seed).permutation(len(on_object))
    objects, others = order[on_object[order]], order[~on_object[order]]
    kept = min(len(objects), max(most // 2, most - len(others)))
    return np.concatenate([others[: most - kept], objects[:kept]])


def plane(maps: Sequence[Map], chosen: NDArray[np.intp], seed: int) -> NDArray[np.float32]:
    """t-SNE: places in the plane at which tokens that are near in the features are near.

    Args:
        maps: As in `principal_colours`.
        chosen: Numbers of the tokens to place, (N,), four at least; see `choose_tokens`.
        seed: Of t-SNE.

    Returns:
        (N, 2), in `chosen`'s order. Axes and scale mean nothing.

    Raises:
        DsuError: A value is not finite.
    """
    tokens = _tokens(maps)[chosen]
    # As t-SNE's authors advise: noise goes, distances stay.
    count = min(50, *tokens.shape)
    reduced = PCA(count, svd_solver="covariance_eigh").fit_transform(tokens)
    perplexity = min(30.0, (len(tokens) - 1) / 3)
    # Of several threads, which adds up first is chance, and t-SNE is chaotic: the picture would differ every time.
    with threadpool_limits(1):
        placed = TSNE(2, perplexity=perplexity, init="pca", max_iter=_ROUNDS, random_state=seed).fit_transform(reduced)
    return np.asarray(placed, np.float32)


def mask_of_tokens(mask: NDArray[np.uint8], one: Map) -> NDArray[np.bool_]:
    """Which tokens of a map (H, W, C) lie on the object of a mask (any size, uint8 0..255): (H, W).

    A quarter of a token is enough: small defects cover no token of the deep levels by half.
    """
    height, width = one.shape[:2]
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.BOX)) >= 64


def _tokens(maps: Sequence[Map]) -> NDArray[np.float64]:
    """(N, C), all maps one after another."""
    tokens = np.concatenate([one.reshape(-1, one.shape[-1]) for one in maps]).astype(np.float64)
    if not np.isfinite(tokens).all():
        raise DsuError("The features are not finite and can't be drawn: try --precision fp32.")
    return tokens


# ---- how they are drawn ----


@dataclass(frozen=True)
class FeatureFigure:
    """A block for every four levels of a group: a row an image (image, mask, each level's first three principal
    components as colours), and below them each level's t-SNE.

    Components are fitted over all images together, each level for itself. In t-SNE a dot is a token, coloured by
    the mask where every image has one, else by image; then the images' frames say which colour is whose.

    Attributes:
        shown: The images, one at least, in the order of the groups' maps.
        groups: Their features.
        tokens: How many tokens, of all images together, t-SNE places, four at least; None leaves t-SNE out.
        seed: Of the choice of tokens and of t-SNE.
    """

    shown: Sequence[Shown]
    groups: Sequence[FeatureGroup]
    tokens: int | None = 1500
    seed: int = 0

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
            The files written, those of `dsu.drawing.page_files`.

        Raises:
            UsageError: Another ending than .png and .pdf.
            DsuError: Features that are not finite, or a file that can't be written.
        """
        pages = self.pages()
        files = page_files(path, len(pages))
        planes = iter(self._place_tokens(self.tokens, progress) if self.tokens is not None else [])
        with progress.task("drawing", sum(len(group.levels) for group in self.groups), "levels") as task:
            return save_figures(map(partial(self._page, planes=planes, task=task), pages), files, DPI)

    @property
    def _row_tops(self) -> list[float]:
        """Of each image's row in a block, and of what comes below them; rows have their images' proportions."""
        aspects = [one.image.height / one.image.width for one in self.shown]
        heights = [_CELL * min(max(aspect, 0.3), 1.5) for aspect in aspects]
        return list(accumulate((height + _GAP for height in heights), initial=_TITLES))

    @property
    def _block_height(self) -> float:
        return self._row_tops[-1] + (0 if self.tokens is None else _CELL) + 3 * _GAP

    @property
    def _by_mask(self) -> bool:
        """Whether tokens can be coloured by the masks."""
        return all(one.mask is not None for one in self.shown)

    @property
    def _first(self) -> int:
        """The first column of features, behind images and, where there are any, masks."""
        return 2 if any(one.mask is not None for one in self.shown) else 1

    def _place_tokens(self, tokens: int, progress: Progress) -> list[Plane]:
        """t-SNE of every level: by far what takes longest."""
        levels = [level for group in self.groups for level in group.levels]
        planes = []
        with progress.task("placing tokens (t-SNE)", len(levels), "levels") as task:
            for level in levels:
                on_object, colours = self._mark_tokens(level.maps)
                chosen = choose_tokens(on_object, tokens, self.seed)
                planes.append((plane(level.maps, chosen, self.seed), colours[chosen]))
                task.advance()
        return planes

    def _mark_tokens(self, maps: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.bool_], NDArray[Any]]:
        """Of all images' tokens, (N,): which lie on an object (none, where some image has no mask), and a colour."""
        if self._by_mask:
            pairs = zip(self.shown, maps, strict=True)
            marks = [mask_of_tokens(one.mask, tokens).ravel() for one, tokens in pairs if one.mask is not None]
            on_object = np.concatenate(marks)
            return on_object, np.where(on_object, _OBJECT, _GROUND)
        sizes = [one.shape[0] * one.shape[1] for one in maps]
        return np.zeros(sum(sizes), np.bool_), np.repeat([_colour_of(index) for index in range(len(sizes))], sizes)

    def _page(self, blocks: Sequence[FeatureGroup], planes: Iterator[Plane], task: Task) -> Figure:
        """Takes as many of the planes as its blocks have levels."""
        widest = max(len(block.levels) for block in blocks)
        page = Page(_left(self._first + widest), len(blocks) * self._block_height)
        for index, block in enumerate(blocks):
            top = index * self._block_height
            room = page.width - 2 * _GAP
            page.write(block.title, _GAP, top + 0.18, 9, weight="bold", room=room / 2 if block.remark else room)
            page.write(block.remark, _GAP + room, top + 0.18, 6.5, ha="right", color="#b3261e", room=room / 2)
            self._draw_inputs(page, top)
            colours: list[NDArray[np.float32]] = []
            for column, level in enumerate(block.levels, self._first):
                colours = principal_colours(level.maps, like=colours if level.adapted else None)
                pictures = [Image.fromarray((255 * one).round().astype(np.uint8)) for one in colours]
                self._draw_column(page, column, top, level.title, pictures, Image.Resampling.NEAREST)
                if self.tokens is not None:
                    places, of_tokens = next(planes)
                    axes = page.axes(_left(column), top + self._row_tops[-1], _CELL, _CELL)
                    axes.set(xticks=[], yticks=[])
                    # Points are pixels in a PDF too: thousands of them as vectors open slowly.
                    axes.scatter(places[:, 0], places[:, 1], s=2.2, c=of_tokens, linewidths=0, rasterized=True)
                    axes.margins(0.04)
                    axes.spines[:].set(color="#dadce0", linewidth=0.6)
                task.advance()
        return page.finish()

    def _draw_inputs(self, page: Page, top: float) -> None:
        """Images and masks, and what t-SNE's colours mean."""
        by_image = self.tokens is not None and not self._by_mask and len(self.shown) > 1
        self._draw_column(page, 0, top, "image", [one.image for one in self.shown], framed=by_image)
        if self._first > 1:
            masks = [None if one.mask is None else Image.fromarray(one.mask) for one in self.shown]
            self._draw_column(page, 1, top, "truth", masks)
        if self.tokens is None:
            return
        meanings = [("by image", INK)] if by_image else []
        if self._by_mask:
            meanings = [("● object", _OBJECT), ("● background", _GROUND)]
        right, y = _left(self._first) - 3 * _GAP, top + self._row_tops[-1] + 0.45 * _CELL
        page.write("t-SNE", right, y, 7.5, ha="right")
        for line, (text, colour) in enumerate(meanings, 1):
            page.write(text, right, y + 0.13 * line, 6.5, ha="right", color=colour)

    def _draw_column(
        self,
        page: Page,
        column: int,
        top: float,
        title: str,
        pictures: Sequence[Image.Image | None],
        resample: Image.Resampling = Image.Resampling.LANCZOS,
        *,
        framed: bool = False,
    ) -> None:
        """A column's name, smaller below it the shape, and a picture an image in that one's proportions."""
        name, _, shape = title.partition("\n")
        left = _left(column)
        page.write(name, left + _CELL / 2, top + 0.4, 8, ha="center")
        page.write(shape, left + _CELL / 2, top + 0.53, 5.5, ha="center")
        tops = self._row_tops
        for row, (one, picture) in enumerate(zip(self.shown, pictures, strict=True)):
            if picture is not None:
                height = tops[row + 1] - tops[row] - _GAP
                frame = _colour_of(row) if framed else None
                page.picture(
                    picture.convert("RGB"),
                    left,
                    top + tops[row],
                    _CELL,
                    height,
                    shape=one.image.size,
                    frame=frame,
                    line=0.0134,
                    resample=resample,
                )


def _left(column: int) -> float:
    return _GAP + column * (_CELL + _GAP)


def _colour_of(index: int) -> str:
    return to_hex(colormaps["tab10"](index % 10))
