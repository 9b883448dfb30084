"""Sheets: pictures side by side, a row an image and a column a kind, for the screen and for print.

Pictures are fitted into cells of one size, pixel by pixel; titles and labels are written over them as text, which
stays text (vectors) in a PDF. The paper's Figures 5 and 6 are such sheets.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image, ImageOps

from dsu.errors import UsageError
from dsu.files import atomic_write, make_folder
from dsu.pictures import CELL_GROUND, Picture, as_rgb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SHEET_SUFFIXES", "page_files", "save_figures", "sheet"]

SHEET_SUFFIXES: Final = (".png", ".pdf")

_PAPER: Final = (255, 255, 255)
_INK: Final = "#202124"
_FAINT_INK: Final = "#5f6368"
_TITLE_POINTS: Final = 8.0
_LABEL_POINTS: Final = 6.5
_LEAST_POINTS: Final = 5.0
"""Below this no one reads a title; one that is still too long then is shortened."""
_GAP_INCHES: Final = 0.025
_ASPECTS: Final = (0.5, 1.5)
"""Heights of a cell, in widths: a panorama among portraits must not decide them alone."""
_LOOKED_AT: Final = 50
"""Pictures whose shapes decide the cells' shape."""


def sheet(
    rows: Sequence[Sequence[Picture]],
    titles: Sequence[str],
    path: Path,
    labels: Sequence[str] | None = None,
    *,
    cell: int = 192,
    dpi: int = 110,
) -> None:
    """Draw pictures side by side, as a PNG or a PDF of one page.

    All cells have one size, whose proportions are those of most of the first column's pictures; each picture is
    fitted into its cell, its own proportions kept.

    Args:
        rows: Pictures of any sizes.
        titles: What stands above each column.
        path: The file to write, .png or .pdf; its folder is made.
        labels: What stands above each row, its image's name for instance.
        cell: The width of a column in pixels.
        dpi: Pixels an inch; fixes how large the text is beside the pictures.

    Raises:
        UsageError: No rows, a row with more or fewer pictures than titles, a label too many or too few, or
            another ending than .png and .pdf.
        UnreadableImage: A picture's file cannot be read.
        DsuError: The file cannot be written.

    Example:
        >>> sheet([[Path("a.jpg"), mask > 0.5]], ["image", "prediction"], Path("sheet.png"))
    """
    if not rows or {len(row) for row in rows} != {len(titles)}:
        raise UsageError(f"a sheet of {len(titles)} titles wants {len(titles)} pictures in each of its rows.")
    if labels is not None and len(labels) != len(rows):
        raise UsageError(f"{len(labels)} labels do not name {len(rows)} rows: give one a row, or none.")
    layout = _Layout(len(titles), cell, _cell_height([row[0] for row in rows], cell), dpi, labels is not None)
    # BatchIndices by whoever saves it, where letters that the font lacks are forgiven.
    figures = (_page(*content, layout) for content in [(rows, titles, labels)])
    save_figures(figures, page_files(path, 1), dpi)


def page_files(path: Path, pages: int) -> list[Path]:
    """The files that hold so many pages: one PDF, or for PNGs `a.png`, `a-2.png`, ...

    Raises:
        UsageError: Another ending than .png and .pdf.
    """
    if path.suffix.lower() not in SHEET_SUFFIXES:
        raise UsageError(f"{path} can't be drawn as {path.suffix or 'a file without ending'}: name a .png or a .pdf.")
    if path.suffix.lower() == ".pdf":
        return [path]
    return [path, *(path.with_name(f"{path.stem}-{page}{path.suffix}") for page in range(2, pages + 1))]


def save_figures(figures: Iterator["Figure"], files: Sequence[Path], dpi: int) -> list[Path]:
    """Write matplotlib's figures, all into one PDF or each into its PNG, so that no file is ever half there.

    The same figures give the same bytes: no date is noted. Raises `DsuError` naming a file that can't be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_pdf import PdfPages

    make_folder(files[0].parent)
    with warnings.catch_warnings():  # of letters that the font lacks: a name is no reason to stop, nor to shout
        warnings.filterwarnings("ignore", message="Glyph")
        if files[0].suffix.lower() == ".pdf":
            buffer = io.BytesIO()
            # Type 42: text that other programs can select and edit.
            with rc_context({"pdf.fonttype": 42}), PdfPages(buffer, metadata={"CreationDate": None}) as pages:
                for figure in figures:
                    pages.savefig(figure, dpi=dpi)
            atomic_write(files[0], buffer.getvalue())
            return list(files)
        for file, figure in zip(files, figures, strict=True):
            atomic_write(file, _png(figure, dpi))
    return list(files)


def _png(figure: "Figure", dpi: int) -> bytes:
    """Without matplotlib's alpha channel, of which some printers make black."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    opaque = io.BytesIO()
    with Image.open(drawn) as picture:
        picture.convert("RGB").save(opaque, "PNG", dpi=(dpi, dpi))
    return opaque.getvalue()


@dataclass(frozen=True)
class _Layout:
    """Where things stand on a page, in pixels from its top left."""

    columns: int
    cell: int
    height: int
    dpi: int
    labelled: bool

    @property
    def gap(self) -> int:
        return _gap(self.dpi)

    @property
    def title_height(self) -> int:
        return self._line(_TITLE_POINTS)

    @property
    def label_height(self) -> int:
        return self._line(_LABEL_POINTS) if self.labelled else 0

    @property
    def pitch(self) -> int:
        """From one row to the next."""
        return self.label_height + self.height + self.gap

    def left(self, column: int) -> int:
        return self.gap + column * (self.cell + self.gap)

    def top(self, row: int) -> int:
        """Of a row's pictures, below its label."""
        return self.gap + self.title_height + row * self.pitch + self.label_height

    def size(self, rows: int) -> tuple[int, int]:
        return self.left(self.columns), self.top(rows) - self.label_height

    def _line(self, points: float) -> int:
        return round(1.6 * points / 72 * self.dpi)


def _gap(dpi: int) -> int:
    return max(2, round(_GAP_INCHES * dpi))


def _cell_height(pictures: Sequence[Picture], cell: int) -> int:
    shapes = [as_rgb(picture).size for picture in pictures[:_LOOKED_AT]]
    aspect = median(height / width for width, height in shapes)
    return max(1, round(cell * min(max(aspect, _ASPECTS[0]), _ASPECTS[1])))


def _page(
    rows: Sequence[Sequence[Picture]], titles: Sequence[str], labels: Sequence[str] | None, layout: _Layout
) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = layout.size(len(rows))
    figure = Figure(figsize=(width / layout.dpi, height / layout.dpi), dpi=layout.dpi)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    # Without interpolation a PDF keeps the pixels as they are, and a PNG has them one to one.
    axes.imshow(np.asarray(_pictures(rows, layout)), interpolation="none", aspect="auto")
    for column, title in enumerate(titles):
        middle = layout.left(column) + layout.cell / 2
        below = layout.gap + 0.8 * layout.title_height
        _write(figure, title, middle, below, layout.cell, _TITLE_POINTS, ha="center", color=_INK)
    for row, label in enumerate(labels or ()):
        below = layout.top(row) - 0.3 * layout.label_height
        room = width - 2 * layout.gap
        _write(figure, label, layout.left(0), below, room, _LABEL_POINTS, ha="left", color=_FAINT_INK)
    return figure


def _pictures(rows: Sequence[Sequence[Picture]], layout: _Layout) -> Image.Image:
    page = Image.new("RGB", layout.size(len(rows)), _PAPER)
    for index, row in enumerate(rows):
        for column, picture in enumerate(row):
            fitted = ImageOps.contain(as_rgb(picture), (layout.cell, layout.height), Image.Resampling.LANCZOS)
            left, top = layout.left(column), layout.top(index)
            page.paste(CELL_GROUND, (left, top, left + layout.cell, top + layout.height))
            page.paste(fitted, (left + (layout.cell - fitted.width) // 2, top + (layout.height - fitted.height) // 2))
    return page


def _write(figure: "Figure", text: str, x: float, y: float, room: float, points: float, **style: Any) -> None:
    """Write one line in `room` pixels: smaller if need be, then shortened in its middle."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    assert isinstance(figure.canvas, FigureCanvasAgg)
    renderer = figure.canvas.get_renderer()  # type: ignore[no-untyped-call]
    width, height = figure.bbox.width, figure.bbox.height
    written = figure.text(x / width, 1 - y / height, text, fontsize=points, va="baseline", parse_math=False, **style)
    extent = written.get_window_extent(renderer).width
    if extent > room:
        # Letters do not shrink quite evenly, hence a little less.
        written.set_fontsize(max(_LEAST_POINTS, 0.96 * points * room / extent))
    keep = len(text)
    while written.get_window_extent(renderer).width > room and keep > 2:
        keep -= 1
        written.set_text(f"{text[: keep // 2]}…{text[-(keep - keep // 2) :]}")
