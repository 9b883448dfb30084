"""The paper's Figures 1 and 2 for any images: features as principal components and as t-SNE.

Both projections are scikit-learn's. They are fitted to the tokens of all images together, so a colour or a position
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
from dsu.visualization.features import FeatureGroup, ShownImage

_LEVELS_PER_BLOCK: Final = 4
"""Levels side by side: with images and masks, as wide as the text of a printed page. Further ones follow below."""

_CELL_WIDTH: Final = 1.1
_GAP: Final = 0.04
_TITLES_HEIGHT: Final = 0.6
"""Height of the titles above the images: the block's name, and the columns' names with their shapes. All sizes here are
in inches."""

_OBJECT_COLOUR: Final = "#d6336c"
_BACKGROUND_COLOUR: Final = "#8fa3b5"

Map = NDArray[np.float32]
"""One image's tokens on their grid, (H, W, C)."""

_TSNE_ITERATIONS: Final = 500
"""Iterations of t-SNE: 3 s for 1,500 tokens. Twice as many take twice as long and reduce the divergence by 4 %, which
is not visible."""

TsneMap = tuple[NDArray[np.float32], NDArray[Any]]
"""t-SNE of one level: positions (N, 2), and their colours (N,)."""


# ---- projections ----


def principal_colours(
    maps: Sequence[Map], like: Sequence[NDArray[np.float32]] | None = None
) -> list[NDArray[np.float32]]:
    """The first three principal components of one level's features as red, green and blue.

    Args:
        maps: one map per image, (H, W, C) with the same C; the components are fitted to all of them together.
        like: colours of the same tokens for other features. A component's sign is arbitrary, so each is flipped if that
            correlates better with these.

    Returns:
        (H, W, 3) in [0, 1] per map.

    Raises:
        DsuError: a value is not finite.
    """
    tokens = _tokens(maps)
    count = min(3, *tokens.shape)
    # An exact solver with signs fixed by scikit-learn: the same tokens always have the same colours.
    with np.errstate(invalid="ignore"):  # explained variance ratios, which are not used, divide by a variance of zero
        found = PCA(count, svd_solver="covariance_eigh").fit_transform(tokens)
    # Percentiles, since a few outliers must not reduce the contrast of all others.
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
    """Draw tokens for t-SNE, up to half of them on objects, so that small objects stay visible.

    Args:
        on_object: which tokens of all maps, one map after another, are on an object, (N,).
        most: the number of tokens to draw.
        seed: of the draw.

    Returns:
        Indices of tokens, (`most`,) or fewer; those on objects are last, so that they are plotted on top.
    """
    order = np.random.default_rng(seed).permutation(len(on_object))
    objects, others = order[on_object[order]], order[~on_object[order]]
    kept = min(len(objects), max(most // 2, most - len(others)))
    return np.concatenate([others[: most - kept], objects[:kept]])


def tsne_positions(maps: Sequence[Map], chosen: NDArray[np.intp], seed: int) -> NDArray[np.float32]:
    """Positions by t-SNE: tokens with similar features are close to each other.

    Args:
        maps: as in `principal_colours`.
        chosen: indices of the tokens to place, (N,), at least four; see `choose_tokens`.
        seed: of t-SNE.

    Returns:
        (N, 2), in the order of `chosen`. Axes and scale have no meaning.

    Raises:
        DsuError: a value is not finite.
    """
    tokens = _tokens(maps)[chosen]
    # As t-SNE's authors advise: this removes noise and keeps distances.
    reduced = PCA(min(50, *tokens.shape), svd_solver="covariance_eigh").fit_transform(tokens)
    perplexity = min(30.0, (len(tokens) - 1) / 3)
    # With several threads the order of summation is random, and t-SNE is chaotic: the figure would differ every time.
    with threadpool_limits(1):
        placed = TSNE(2, perplexity=perplexity, init="pca", max_iter=_TSNE_ITERATIONS, random_state=seed).fit_transform(
            reduced
        )
    return np.asarray(placed, np.float32)


def mask_of_tokens(mask: NDArray[np.uint8], one: Map) -> NDArray[np.bool_]:
    """Which tokens of a map (H, W, C) are on the object of a mask (any size, uint8 0..255): (H, W).

    The object must cover a quarter of a token: small defects cover less than half of any token of the deep levels.
    """
    height, width = one.shape[:2]
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.BOX)) >= 64


def _tokens(maps: Sequence[Map]) -> NDArray[np.float64]:
    """The tokens of all maps, one map after another, (N, C). Raises `DsuError` if a value is not finite."""
    tokens = np.concatenate([one.reshape(-1, one.shape[-1]) for one in maps]).astype(np.float64)
    if not np.isfinite(tokens).all():
        raise DsuError("The features are not finite and can't be drawn: try --precision fp32.")
    return tokens


# ---- the figure ----


@dataclass(frozen=True)
class FeatureFigure:
    """A block for every four levels of a group: one row per image (image, mask, each level's first three principal
    components as colours), and below them each level's t-SNE.

    Components are fitted per level, to all images together. In t-SNE a dot is a token. It is coloured by the mask if
    every image has one, else by image; then the image's frame has the same colour.

    Attributes:
        shown: the images, at least one, in the order of the groups' maps.
        groups: their features.
        tokens: the number of tokens of all images together in t-SNE, at least four; None omits t-SNE.
        seed: of the choice of tokens and of t-SNE.
    """

    shown: Sequence[ShownImage]
    groups: Sequence[FeatureGroup]
    tokens: int | None = 1500
    seed: int = 0

    def pages(self) -> list[list[FeatureGroup]]:
        """The blocks of each page: groups of at most four levels."""
        blocks = [
            replace(group, levels=group.levels[start : start + _LEVELS_PER_BLOCK])
            for group in self.groups
            for start in range(0, len(group.levels), _LEVELS_PER_BLOCK)
        ]
        return fill_pages(blocks, [self._block_height] * len(blocks), PAGE_HEIGHT)

    def draw(self, path: Path, progress: Progress = SILENT) -> list[Path]:
        """Draw all pages.

        Args:
            path: .png (300 dpi; further pages next to it as `-2.png`, ...) or .pdf (with text as text); its folder is
                created.
            progress: advances by every level placed and drawn.

        Returns:
            The written files: those of `dsu.pictures.page_files`.

        Raises:
            UsageError: the extension is neither .png nor .pdf.
            DsuError: features are not finite, or a file can't be written.
        """
        pages = self.pages()
        files = page_files(path, len(pages))
        planes = iter(self._place_tokens(self.tokens, progress) if self.tokens is not None else [])
        with progress.task("drawing", sum(len(group.levels) for group in self.groups), "levels") as task:
            return save_figures(map(partial(self._page, planes=planes, task=task), pages), files, DPI)

    @property
    def _row_tops(self) -> list[float]:
        """The top of each image's row in a block, and of the t-SNE row; rows have their images' proportions."""
        heights = [
            _CELL_WIDTH * min(max(aspect, 0.3), 1.5)
            for aspect in [one.image.height / one.image.width for one in self.shown]
        ]
        return list(accumulate((height + _GAP for height in heights), initial=_TITLES_HEIGHT))

    @property
    def _block_height(self) -> float:
        return self._row_tops[-1] + (0 if self.tokens is None else _CELL_WIDTH) + 3 * _GAP

    @property
    def _coloured_by_mask(self) -> bool:
        """Whether tokens can be coloured by the masks."""
        return all(one.mask is not None for one in self.shown)

    @property
    def _first_feature_column(self) -> int:
        """The index of the first column of features, after images and masks (if there are any)."""
        return 2 if any(one.mask is not None for one in self.shown) else 1

    def _place_tokens(self, tokens: int, progress: Progress) -> list[TsneMap]:
        """t-SNE of every level: by far the slowest step."""
        levels = [level for group in self.groups for level in group.levels]
        planes = []
        with progress.task("computing t-SNE", len(levels), "levels") as task:
            for level in levels:
                on_object, colours = self._mark_tokens(level.maps)
                chosen = choose_tokens(on_object, tokens, self.seed)
                planes.append((tsne_positions(level.maps, chosen, self.seed), colours[chosen]))
                task.advance()
        return planes

    def _mark_tokens(self, maps: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.bool_], NDArray[Any]]:
        """For the tokens of all images, (N,): whether each is on an object, and its colour.

        If any image lacks a mask, no token counts as on an object.
        """
        if self._coloured_by_mask:
            pairs = zip(self.shown, maps, strict=True)
            marks = [mask_of_tokens(one.mask, tokens).ravel() for one, tokens in pairs if one.mask is not None]
            on_object = np.concatenate(marks)
            return on_object, np.where(on_object, _OBJECT_COLOUR, _BACKGROUND_COLOUR)
        sizes = [one.shape[0] * one.shape[1] for one in maps]
        return np.zeros(sum(sizes), np.bool_), np.repeat([_colour_of(index) for index in range(len(sizes))], sizes)

    def _page(self, blocks: Sequence[FeatureGroup], planes: Iterator[TsneMap], task: Task) -> Figure:
        """Draw a page; takes one item of `planes` for each level of its blocks."""
        widest = max(len(block.levels) for block in blocks)
        page = Page(_left(self._first_feature_column + widest), len(blocks) * self._block_height)
        for index, block in enumerate(blocks):
            top = index * self._block_height
            room = page.width - 2 * _GAP
            page.write(block.title, _GAP, top + 0.18, 9, weight="bold", room=room / 2 if block.remark else room)
            page.write(block.remark, _GAP + room, top + 0.18, 6.5, ha="right", color="#b3261e", room=room / 2)
            self._draw_inputs(page, top)
            colours: list[NDArray[np.float32]] = []
            for column, level in enumerate(block.levels, self._first_feature_column):
                colours = principal_colours(level.maps, like=colours if level.adapted else None)
                pictures = [Image.fromarray((255 * one).round().astype(np.uint8)) for one in colours]
                self._draw_column(page, column, top, level.title, pictures, Image.Resampling.NEAREST)
                if self.tokens is not None:
                    places, of_tokens = next(planes)
                    axes = page.axes(_left(column), top + self._row_tops[-1], _CELL_WIDTH, _CELL_WIDTH)
                    axes.set(xticks=[], yticks=[])
                    # Points are rasterised in a PDF too: files with thousands of vector points open slowly.
                    axes.scatter(places[:, 0], places[:, 1], s=2.2, c=of_tokens, linewidths=0, rasterized=True)
                    axes.margins(0.04)
                    axes.spines[:].set(color="#dadce0", linewidth=0.6)
                task.advance()
        return page.finish()

    def _draw_inputs(self, page: Page, top: float) -> None:
        """Draw images, masks and the legend of t-SNE's colours."""
        by_image = self.tokens is not None and not self._coloured_by_mask and len(self.shown) > 1
        self._draw_column(page, 0, top, "image", [one.image for one in self.shown], framed=by_image)
        if self._first_feature_column > 1:
            masks = [None if one.mask is None else Image.fromarray(one.mask) for one in self.shown]
            self._draw_column(page, 1, top, "truth", masks)
        if self.tokens is None:
            return
        meanings = [("by image", INK)] if by_image else []
        if self._coloured_by_mask:
            meanings = [("● object", _OBJECT_COLOUR), ("● background", _BACKGROUND_COLOUR)]
        right, y = _left(self._first_feature_column) - 3 * _GAP, top + self._row_tops[-1] + 0.45 * _CELL_WIDTH
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
        """Draw a column's name, its shape in smaller text below, and one picture per image with the image's
        proportions."""
        name, _, shape = title.partition("\n")
        left = _left(column)
        page.write(name, left + _CELL_WIDTH / 2, top + 0.4, 8, ha="center")
        page.write(shape, left + _CELL_WIDTH / 2, top + 0.53, 5.5, ha="center")
        tops = self._row_tops
        for row, (one, picture) in enumerate(zip(self.shown, pictures, strict=True)):
            if picture is not None:
                height = tops[row + 1] - tops[row] - _GAP
                frame = _colour_of(row) if framed else None
                page.picture(
                    picture.convert("RGB"),
                    left,
                    top + tops[row],
                    _CELL_WIDTH,
                    height,
                    shape=one.image.size,
                    frame=frame,
                    line=0.0134,
                    resample=resample,
                )


def _left(column: int) -> float:
    return _GAP + column * (_CELL_WIDTH + _GAP)


def _colour_of(index: int) -> str:
    return to_hex(colormaps["tab10"](index % 10))
