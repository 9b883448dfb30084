"""Off-screen drawing with matplotlib: pages of images and text for screen and print, and training curves.

Images are fitted into cells, aligned to pixels. Titles and labels are drawn over them as text, which stays text
(vectors) in a PDF. The paper's Figures 5 and 6 are such pages.
"""

import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox, TransformedBbox
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dsu.data.masks import object_boxes
from dsu.errors import UsageError
from dsu.files import atomic_write, make_folder
from dsu.pictures import CELL_GROUND, Picture, as_rgb, page_files

T = TypeVar("T")

DPI: Final = 300
INK: Final = "#202124"
FAINT_INK: Final = "#5f6368"
PAGE_WIDTH: Final = 7.16
"""Text width of a printed page in inches, over both columns."""
PAGE_HEIGHT: Final = 9.2

GRID_GAP: Final = 0.025
GRID_TITLE: Final = 0.18
GRID_LABEL: Final = 0.15
"""Inches: the gap between the images of a grid, the height of a line of titles and of a label."""


# ---- pages ----


class Page:
    """A page with `dpi` pixels per inch. Positions and sizes are in inches from its top left; images are aligned to
    whole pixels.

    Attributes:
        width, height: in inches.
        figure: matplotlib's, without the images until `finish`.
    """

    def __init__(self, width: float, height: float, dpi: int = DPI) -> None:
        self._dpi = dpi
        pixels = max(1, round(width * dpi)), max(1, round(height * dpi))
        self.width, self.height = pixels[0] / dpi, pixels[1] / dpi
        self.figure = Figure(figsize=(self.width, self.height), dpi=dpi)
        FigureCanvasAgg(self.figure)
        self._canvas = Image.new("RGB", pixels, "white")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes whose inner frame has this position."""
        bottom = 1 - (top + height) / self.height
        return self.figure.add_axes((left / self.width, bottom, width / self.width, height / self.height))

    def fit(self, size: tuple[int, int], width: float, height: float) -> tuple[int, int]:
        """The size in pixels at which an image fills a cell in at least one direction; a very narrow one keeps 6
        pixels."""
        room = round(width * self._dpi), round(height * self._dpi)
        scale = min(room[0] / size[0], room[1] / size[1])
        wide, high = (max(min(6, most), round(scale * length)) for length, most in zip(size, room, strict=True))
        return wide, high

    def picture(
        self,
        picture: Image.Image,
        left: float,
        top: float,
        width: float,
        height: float,
        *,
        shape: tuple[int, int] | None = None,
        frame: str | None = "#9aa0a6",
        line: float = 0.0067,
        ground: tuple[int, int, int] | None = None,
        resample: Image.Resampling = Image.Resampling.LANCZOS,
    ) -> tuple[float, float, float, float]:
        """Fit an image into a cell.

        Args:
            picture: RGB, any size.
            left, top, width, height: the cell.
            shape: width and height that define its aspect ratio; by default its own.
            frame, line: colour and width of a line around the image; without one, a white image border merges with the
                paper.
            ground: colour of the cell where the image does not fill it; by default the paper.
            resample: the resampling filter.

        Returns:
            The edges of the drawn image: left, top, right, bottom.
        """
        x, y, across, down = (round(inches * self._dpi) for inches in (left, top, width, height))
        size = self.fit(shape or picture.size, width, height)
        fitted = picture.resize(size, resample, reducing_gap=3.0)
        if ground is not None:
            self._canvas.paste(ground, (x, y, x + across, y + down))
        x, y = x + (across - size[0]) // 2, y + (down - size[1]) // 2
        if frame is not None:
            border = round(line * self._dpi)
            self._canvas.paste(ImageOps.expand(fitted, border, frame), (x - border, y - border))
        else:
            self._canvas.paste(fitted, (x, y))
        return x / self._dpi, y / self._dpi, (x + size[0]) / self._dpi, (y + size[1]) / self._dpi

    def ring_small_objects(
        self,
        foreground: NDArray[np.bool_],
        edges: tuple[float, float, float, float],
        cell: tuple[float, float, float, float],
    ) -> None:
        """Circle the smallest objects on an image: at most four, and none that is easy to see.

        Args:
            foreground: the objects, (H, W).
            edges: the image's edges, from `picture`.
            cell: left, top, width and height, beyond which nothing is drawn.
        """
        boxes = np.array([[(part.start, part.stop) for part in box] for box in object_boxes(foreground)])
        if not len(boxes):
            return
        left, top, right, bottom = edges
        boxes = boxes * np.array([(bottom - top), (right - left)])[:, None] / np.array(foreground.shape)[:, None]
        extents = (boxes[:, :, 1] - boxes[:, :, 0]).max(axis=1)
        radius = 0.07 * max(right - left, bottom - top)  # smaller ones are hardly visible
        bounds = Bbox.from_bounds(cell[0], self.height - cell[1] - cell[3], *cell[2:])
        clip = TransformedBbox(bounds, self.figure.dpi_scale_trans)
        for index in np.argsort(extents, kind="stable")[:4]:
            if extents[index] < radius:
                down, across = boxes[index].mean(axis=1)
                centre = left + across, self.height - top - down
                ring = Circle(centre, radius, fill=False, color="#ffd400", linewidth=1.2, clip_box=clip)
                ring.set_transform(self.figure.dpi_scale_trans)
                self.figure.add_artist(ring)

    def write(self, text: str, x: float, y: float, points: float, *, room: float | None = None, **style: Any) -> None:
        """Write one line with its baseline at `y`; if `room` is short, it is made smaller, then shortened in the
        middle.

        `style` are matplotlib's text properties (`ha`, `weight`, `color`, ...).
        """
        style = {"color": INK, "va": "baseline", "parse_math": False, **style}
        written = self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=points, **style)
        pixels = None if room is None else room * self._dpi
        if pixels is None or (wide := written.get_window_extent().width) <= pixels:
            return
        # Text does not scale exactly, hence a small margin; below 5 points it is unreadable.
        written.set_fontsize(max(5.0, 0.96 * points * pixels / wide))
        keep = len(text)
        while written.get_window_extent().width > pixels and keep > 2:
            keep -= 1
            written.set_text(f"{text[: keep // 2]}…{text[-(keep - keep // 2) :]}")

    def finish(self) -> Figure:
        """Draw the images below everything else."""
        axes = self.figure.add_axes((0, 0, 1, 1), zorder=-1)
        axes.set_axis_off()
        # Without interpolation, PNG and PDF contain the pixels unchanged.
        axes.imshow(np.asarray(self._canvas), interpolation="none", aspect="auto")
        return self.figure


def fill_pages(items: Sequence[T], heights: Sequence[float], room: float) -> list[list[T]]:
    """Distribute items of these heights over as few pages as possible, in order, at least one on each."""
    pages: list[list[T]] = []
    left = 0.0
    for item, height in zip(items, heights, strict=True):
        if height > left:
            pages.append([])
            left = room
        pages[-1].append(item)
        left -= height
    return pages


def save_figures(figures: Iterable[Figure], files: Sequence[Path], dpi: int) -> list[Path]:
    """Write matplotlib's figures atomically: all into one PDF, or each into its own PNG.

    The same figures give the same bytes: no date is stored. `figures` may be an iterator that draws here, one after
    another; letters that the font lacks are ignored. Raises `DsuError` naming a file that can't be written.
    """
    make_folder(files[0].parent)
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a name is no reason to stop or to warn
        warnings.filterwarnings("ignore", message="Glyph")
        if files[0].suffix.lower() == ".pdf":
            # Type 42: other programs can select and edit the text.
            with rc_context({"pdf.fonttype": 42}), PdfPages(buffer, metadata={"CreationDate": None}) as pages:
                for figure in figures:
                    pages.savefig(figure, dpi=dpi)
            atomic_write(files[0], buffer.getvalue())
            return list(files)
        for file, figure in zip(files, figures, strict=True):
            drawn, opaque = io.BytesIO(), io.BytesIO()
            figure.savefig(drawn, format="png", dpi=dpi)
            # Without matplotlib's alpha channel, which some printers print as black.
            with Image.open(drawn) as picture:
                picture.convert("RGB").save(opaque, "PNG", dpi=(dpi, dpi))
            atomic_write(file, opaque.getvalue())
    return list(files)


# ---- images side by side ----


def draw_grid(
    rows: Iterable[Iterable[Picture]],
    titles: Sequence[str],
    labels: Sequence[str] | None,
    heights: Sequence[float],
    *,
    cell: float,
    dpi: int = DPI,
    note: str = "",
    marked: Sequence[NDArray[np.bool_]] | None = None,
    **style: Any,
) -> Figure:
    """Draw one row per image and one column per kind on one page.

    Args:
        rows: Images, consumed one by one, so a page may have any number of them.
        titles: Title above each column.
        labels: Label above each row; None for none.
        heights: Height of each row's cells, in inches.
        cell: Width of a column, in inches.
        dpi: Pixels per inch.
        note: A line below the last row; empty for none.
        marked: Each row's objects, (H, W), whose small ones are circled in all its images; None for none.
        style: See `Page.picture`.
    """
    gap, title_line, line = (round(inches * dpi) / dpi for inches in (GRID_GAP, GRID_TITLE, GRID_LABEL))
    label_line = 0.0 if labels is None else line
    width, top = gap + len(titles) * (cell + gap), gap + title_line
    page = Page(width, top + sum(heights) + len(heights) * (label_line + gap) + (line if note else 0), dpi)
    lefts = [gap + column * (cell + gap) for column in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        page.write(title, left + cell / 2, gap + 0.78 * title_line, 8, room=cell, ha="center")
    for index, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if labels is not None:
            page.write(labels[index], gap, top + 0.7 * line, 6.5, room=width - 2 * gap, color=FAINT_INK)
        for left, picture in zip(lefts, row, strict=True):
            edges = page.picture(as_rgb(picture), left, top + label_line, cell, height, **style)
            if marked is not None:
                page.ring_small_objects(marked[index], edges, (left, top + label_line, cell, height))
        top += label_line + height + gap
    page.write(note, gap, top + 0.7 * line, 6.5, room=width - 2 * gap, color=FAINT_INK)
    return page.finish()


def sheet(
    rows: Sequence[Sequence[Picture]],
    titles: Sequence[str],
    path: Path,
    labels: Sequence[str] | None = None,
    *,
    marked: Sequence[NDArray[np.bool_]] | None = None,
    cell: int = 192,
    dpi: int = 110,
) -> None:
    """Draw images side by side, as a PNG or a PDF of one page.

    All cells have the same size, with the aspect ratio of most images in the first column; each image is fitted into
    its cell with its own aspect ratio.

    Args:
        rows: Images of any sizes.
        titles: Title above each column.
        path: The file to write, .png or .pdf; its folder is created if missing.
        labels: Label above each row, such as its image's name.
        marked: See `draw_grid`.
        cell: The width of a column in pixels.
        dpi: Pixels per inch; determines the text's size relative to the images.

    Raises:
        UsageError: No rows, a row with more or fewer images than titles, too many or too few labels, or another
            extension than .png and .pdf.
        UnreadableImage: An image file can't be read.
        DsuError: The file cannot be written.

    Example:
        >>> sheet([[Path("a.jpg"), mask > 0.5]], ["image", "prediction"], Path("sheet.png"))
    """
    if not rows or {len(row) for row in rows} != {len(titles)}:
        raise UsageError(f"a sheet with {len(titles)} titles needs {len(titles)} images in each row.")
    if labels is not None and len(labels) != len(rows):
        raise UsageError(f"{len(labels)} labels do not match {len(rows)} rows: give one per row, or none.")
    # A single panorama must not determine the aspect ratio of all.
    aspect = median(height / width for width, height in (as_rgb(row[0]).size for row in rows[:50]))
    heights = [max(1, round(cell * min(max(aspect, 0.5), 1.5))) / dpi] * len(rows)
    draw = partial(
        draw_grid,
        titles=titles,
        labels=labels,
        heights=heights,
        cell=cell / dpi,
        dpi=dpi,
        marked=marked,
        frame=None,
        ground=CELL_GROUND,
    )
    save_figures(map(draw, [rows]), page_files(path), dpi)


# ---- curves ----


def style_axes(axes: Axes, across: str = "", up: str = "", points: float = 7) -> None:
    """Set a plot's axis names, a faint grid in the background, and no box."""
    axes.grid(visible=True, color="#e8eaed", linewidth=points / 12)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=points - 0.5, length=2, which="both")
    axes.set_xlabel(across, fontsize=points)
    axes.set_ylabel(up, fontsize=points)


# Name, colour and line of each column. D1 is the deepest side output, D3 the finest: it becomes the prediction.
_LOSSES: Final = {
    "loss": ("total", INK, "-"),
    "loss_D1": ("D1, deepest", "#9ecae1", "-"),
    "loss_D2": ("D2", "#4292c6", "-"),
    "loss_D3": ("D3, finest", "#08519c", "-"),
    "val_loss": ("validation, total", "#d6336c", "--"),
}
_VALIDATION: Final = {
    "val_S": ("S", "#2b8a3e", "-"),
    "val_IoU": ("IoU", "#94c973", "-"),
    "val_MAE": ("MAE", "#e8590c", "-"),
}
_RATE: Final = {"lr": ("", FAINT_INK, "-")}


def training_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a run's history as a PNG: losses, validation scores if there are any, learning rate.

    Args:
        history: One row per epoch: epoch, lr, loss, loss_D1, loss_D2, loss_D3, and val_loss, val_S, val_MAE, val_IoU. A
            column may be absent, and an entry empty, if nothing was measured.
        path: The file to write; its folder is created if missing.

    Raises:
        UsageError: There is no epoch in the history.
    """
    if not _series(history, "loss"):
        raise UsageError("the history has no epoch with a loss: train for at least one epoch first.")
    panels = {"loss": (3.0, _LOSSES), "validation": (2.0, _VALIDATION), "learning rate": (0.9, _RATE)}
    if not any(_series(history, key) for key in _VALIDATION):
        del panels["validation"]
    shares = [share for share, _ in panels.values()]
    figure = Figure(figsize=(7.5, 1.2 * sum(shares)), dpi=150, layout="constrained")
    cells = figure.subplots(len(shares), 1, sharex=True, squeeze=False, height_ratios=shares)[:, 0]
    for axes, (name, (_, styles)) in zip(cells, panels.items(), strict=True):
        style_axes(axes, "epoch" if axes is cells[-1] else "", name, points=10)
        lines = [line for key, style in styles.items() for line in _draw_series(axes, _series(history, key), *style)]
        if name == "validation":  # on a scale that fits the curve, a change of 1 % would look like a plunge
            axes.set_ylim(0, 1)
        elif lines:
            axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        if styles is not _RATE:  # above their panel, to cover no curve
            axes.legend(handles=lines, ncols=len(lines), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    cells[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    figure.align_ylabels(cells)
    save_figures([figure], [path], 150)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """The epochs and values of a column, without empty and non-finite values."""
    filled = [(float(row["epoch"]), float(row[key])) for row in rows if row.get(key) not in (None, "")]
    return [point for point in filled if isfinite(point[1])]


def _draw_series(axes: Axes, points: Sequence[tuple[float, float]], label: str, colour: str, style: str) -> list[Any]:
    """Draw the line through these epochs and values, if there are any; returns the drawn lines."""
    # Markers show how few points there are; without them, a single point would be invisible.
    marker = "o" if len(points) <= 20 else ""
    if not points:
        return []
    epochs, values = zip(*points, strict=True)
    return axes.plot(epochs, values, style, label=label, color=colour, marker=marker, markersize=3, linewidth=1.6)
