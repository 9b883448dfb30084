"""Predictions beside image and truth, for print: the paper's Figures 5 and 6."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Final

from matplotlib.figure import Figure

from dsu.data.images import upright_size
from dsu.data.masks import MaskFormat, choose_mask_format, examine_mask
from dsu.drawing import (
    DPI,
    GRID_GAP,
    GRID_LABEL,
    GRID_TITLE,
    PAGE_HEIGHT,
    PAGE_WIDTH,
    draw_grid,
    fill_pages,
    page_files,
    save_figures,
)
from dsu.errors import UsageError
from dsu.pictures import Picture
from dsu.progress import SILENT, Progress, Task
from dsu.visualization.images import ComparedImage

__all__ = ["Comparison"]

_TALLEST: Final = (1.0, 1.5)
"""The height of a row in widths of a column, at most: the more, the more portraits there are. Single ones among
landscapes would fill the page; they are narrower than their column instead."""


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
        return ["Image", *(["GT"] if all(row.truth is not None for row in self.rows) else []), *self.methods]

    @property
    def _cell(self) -> float:
        return (PAGE_WIDTH - GRID_GAP) / len(self.titles) - GRID_GAP

    @cached_property
    def _heights(self) -> list[float]:
        """Of each row's pictures, in inches."""
        sizes = [upright_size(row.image) for row in self.rows]
        aspects = [height / width for width, height in sizes]
        tallest = min(max(median(aspects), _TALLEST[0]), _TALLEST[1])
        return [self._cell * min(aspect, tallest) for aspect in aspects]

    def pages(self) -> list[list[tuple[ComparedImage, float]]]:
        """The rows of each page, with their heights. Raises `UnreadableImage` for an image that is none."""
        room = PAGE_HEIGHT - GRID_GAP - GRID_TITLE - (GRID_LABEL if self.note else 0)
        around = GRID_GAP + (GRID_LABEL if self.named else 0)
        rows = list(zip(self.rows, self._heights, strict=True))
        return fill_pages(rows, [height + around for height in self._heights], room)

    def draw(self, path: Path, progress: Progress = SILENT) -> list[Path]:
        """Draw all pages.

        Args:
            path: .png (300 dpi; further pages beside it as `-2.png`, ...) or .pdf (text as text); its folder is made.
            progress: Told of every row.

        Returns:
            The files written, those of `dsu.drawing.page_files`.

        Raises:
            UsageError: Another ending than .png and .pdf.
            DsuError: A file that can't be read or written.
        """
        pages = self.pages()
        files = page_files(path, len(pages))
        mask_format = choose_mask_format([examine_mask(row.truth)[1] for row in self.rows if row.truth is not None])
        with progress.task("drawing", len(self.rows)) as task:
            draw = partial(self._page, mask_format=mask_format, task=task)
            return save_figures(map(draw, pages), files, DPI)

    def _page(self, rows: Sequence[tuple[ComparedImage, float]], mask_format: MaskFormat, task: Task) -> Figure:
        labels = [" · ".join(filter(None, (row.name, row.remark))) for row, _ in rows]
        return draw_grid(
            self._pictures(rows, mask_format, task),
            self.titles,
            labels if self.named else None,
            [height for _, height in rows],
            cell=self._cell,
            note=self.note,
        )

    def _pictures(
        self, rows: Sequence[tuple[ComparedImage, float]], mask_format: MaskFormat, task: Task
    ) -> Iterator[Iterable[Picture]]:
        """Truths are read here, a row at a time: a comparison may have any number of rows."""
        for row, _ in rows:
            truth = [mask_format.read(row.truth)] if "GT" in self.titles and row.truth is not None else []
            yield [row.image, *truth, *row.predictions]
            task.advance()
