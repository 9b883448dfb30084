"""Predictions beside image and truth, for print: the paper's Figures 5 and 6."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final

from dsu.data.images import upright_size
from dsu.data.masks import MaskFormat, choose_mask_format, examine_mask
from dsu.errors import UsageError
from dsu.pictures import Picture, as_rgb
from dsu.progress import SILENT, Progress, Task
from dsu.sheets import page_files, save_figures
from dsu.visualization.compared import ComparedImage
from dsu.visualization.page import DPI, PAGE_HEIGHT, PAGE_WIDTH, Page, fill_pages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison"]

_GAP: Final = 0.025
_TITLE: Final = 0.18
_LABEL: Final = 0.15
"""Inches, as all sizes here."""
_TALLEST: Final = (1.0, 1.5)
"""The height of a row in widths of a column, at most: the more, the more portraits there are. Single ones among
landscapes would fill the page; they are narrower than their column instead."""
_FAINT_INK: Final = "#5f6368"


@dataclass(frozen=True)
class Comparison:
    """Image, truth (where the images have one) and predictions side by side, as wide as a printed page.

    Each row is as high as its image wants it, so no picture is cut.

    Attributes:
        rows: What is shown, one or more.
        methods: What stands above their predictions.
        named: Whether each row says its name, and why it was chosen.
        note: A line below the last row of every page; empty for none.
    """

    rows: Sequence[ComparedImage]
    methods: Sequence[str]
    named: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        if not self.rows:
            raise UsageError("there is no image whose predictions could be compared: give one or more.")

    @property
    def titles(self) -> list[str]:
        """What stands above the columns."""
        return ["Image", *(["GT"] if self._has_truth else []), *self.methods]

    def pages(self) -> list[list[ComparedImage]]:
        """The rows of each page. Raises `UnreadableImage` for an image that is none."""
        room = PAGE_HEIGHT - self._first_top - self._note_height
        return fill_pages(self.rows, [self._row_height(row) for row in self.rows], room)

    def draw(self, path: Path, progress: Progress = SILENT) -> list[Path]:
        """Draw all pages.

        Args:
            path: .png (300 dpi; further pages beside it as `-2.png`, ...) or .pdf (text as text); its folder is made.
            progress: Told of every row.

        Returns:
            The files written, those of `dsu.sheets.page_files`.

        Raises:
            UsageError: Another ending than .png and .pdf.
            DsuError: A file that can't be read or written.
        """
        pages = self.pages()
        files = page_files(path, len(pages))
        mask_format = choose_mask_format([examine_mask(row.truth)[1] for row in self.rows if row.truth is not None])
        with progress.task("drawing", len(self.rows)) as task:
            return save_figures((self._page(page, mask_format, task) for page in pages), files, DPI)

    @property
    def _has_truth(self) -> bool:
        return all(row.truth is not None for row in self.rows)

    @property
    def _cell(self) -> float:
        return (PAGE_WIDTH - _GAP) / len(self.titles) - _GAP

    @property
    def _first_top(self) -> float:
        return _GAP + _TITLE

    @property
    def _label_height(self) -> float:
        return _LABEL if self.named else 0.0

    @property
    def _note_height(self) -> float:
        return _LABEL if self.note else 0.0

    @cached_property
    def _tallest(self) -> float:
        least, most = _TALLEST
        return min(max(median(_aspect(row.image) for row in self.rows), least), most)

    def _picture_height(self, row: ComparedImage) -> float:
        return self._cell * min(_aspect(row.image), self._tallest)

    def _row_height(self, row: ComparedImage) -> float:
        return self._label_height + self._picture_height(row) + _GAP

    def _page(self, rows: Sequence[ComparedImage], mask_format: MaskFormat, task: Task) -> "Figure":
        """Files are read here, page by page: a comparison may have any number of rows."""
        page = Page(PAGE_WIDTH, self._first_top + sum(map(self._row_height, rows)) + self._note_height)
        lefts = [_GAP + column * (self._cell + _GAP) for column in range(len(self.titles))]
        for left, title in zip(lefts, self.titles, strict=True):
            page.write(title, left + self._cell / 2, _GAP + 0.75 * _TITLE, 8, room=self._cell, ha="center")
        top = self._first_top
        for row in rows:
            height = self._picture_height(row)
            if self.named:
                _write_label(page, " · ".join(filter(None, (row.name, row.remark))), top)
            for left, picture in zip(lefts, self._pictures(row, mask_format), strict=True):
                page.picture(as_rgb(picture), left, top + self._label_height, self._cell, height)
            top += self._row_height(row)
            task.advance()
        if self.note:
            _write_label(page, self.note, top)
        return page.figure

    def _pictures(self, row: ComparedImage, mask_format: MaskFormat) -> Iterator[Picture]:
        yield row.image
        if self._has_truth and row.truth is not None:
            yield mask_format.read(row.truth)
        yield from row.predictions


def _aspect(image: Path) -> float:
    width, height = upright_size(image)
    return height / width


def _write_label(page: Page, text: str, top: float) -> None:
    page.write(text, _GAP, top + 0.7 * _LABEL, 6.5, room=PAGE_WIDTH - 2 * _GAP, color=_FAINT_INK)
