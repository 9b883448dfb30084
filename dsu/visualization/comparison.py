"""Predictions next to image and ground truth, for print (the paper's Figures 5 and 6)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Final

from matplotlib.figure import Figure

from dsu.data.images import image_head
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
    save_figures,
)
from dsu.pictures import Picture, overlay, page_files
from dsu.progress import SILENT, Progress, Task
from dsu.visualization.compared import ComparedImage

_CELL_WIDTH: Final = 1.13
"""Width of a column in inches: three are 3.49 wide, like a printed column."""


@dataclass(frozen=True)
class ComparisonFigure:
    """Image, ground truth (if all images have one) and predictions side by side.

    Three columns are as wide as a printed column, six and more as a printed page. Each row has its image's height, so
    nothing is cropped.

    Attributes:
        rows: the images, at least one.
        methods: titles of the columns of predictions.
        named: whether each row shows its name, and why it was chosen.
        note: a line below the last row of every page; empty for none.
        overlays: a threshold for each method, which adds a column with the predictions overlaid on the images.
        width: of the figure, in inches; None: as the number of columns requires.
        per_page: rows per page, regardless of its height; None: as many as fit on a printed page.
    """

    rows: Sequence[ComparedImage]
    methods: Sequence[str]
    named: bool = False
    note: str = ""
    overlays: Sequence[float] = ()
    width: float | None = None
    per_page: int | None = None

    @property
    def titles(self) -> list[str]:
        """The titles of the columns."""
        truth = ["GT"] if all(row.truth is not None for row in self.rows) else []
        laid = [f"{method}, overlay" for method, _ in zip(self.methods, self.overlays, strict=False)]
        return ["Image", *truth, *self.methods, *laid]

    @property
    def _cell(self) -> float:
        columns = len(self.titles)
        width = self.width or min(PAGE_WIDTH, GRID_GAP + columns * (_CELL_WIDTH + GRID_GAP))
        return (width - GRID_GAP) / columns - GRID_GAP

    @cached_property
    def _heights(self) -> list[float]:
        """The height of each row's images, in inches."""
        aspects = [height / width for width, height in (image_head(row.image).size for row in self.rows)]
        # Rows of mostly portrait images may be taller. A few portraits among landscapes would fill the page, so they
        # are drawn narrower than their column instead.
        tallest = min(max(median(aspects), 1.0), 1.5)
        return [self._cell * min(aspect, tallest) for aspect in aspects]

    def pages(self) -> list[list[tuple[ComparedImage, float]]]:
        """The rows of each page, with their heights. Raises `UnreadableImage` if a file is not an image."""
        rows = list(zip(self.rows, self._heights, strict=True))
        if self.per_page is not None:
            return fill_pages(rows, [1.0] * len(rows), self.per_page)
        room = PAGE_HEIGHT - GRID_GAP - GRID_TITLE - (GRID_LABEL if self.note else 0)
        around = GRID_GAP + (GRID_LABEL if self.named else 0)
        return fill_pages(rows, [height + around for height in self._heights], room)

    def draw(self, path: Path, progress: Progress = SILENT) -> list[Path]:
        """Draw all pages.

        Args:
            path: .png (300 dpi; further pages next to it as `-2.png`, ...) or .pdf (with text as text); its folder is
                created.
            progress: advances by every row.

        Returns:
            The written files: those of `dsu.pictures.page_files`.

        Raises:
            UsageError: the extension is neither .png nor .pdf.
            DsuError: a file can't be read or written.
        """
        pages = self.pages()
        files = page_files(path, len(pages))
        mask_format = choose_mask_format([examine_mask(row.truth) for row in self.rows if row.truth is not None])
        with progress.task("drawing", len(self.rows)) as task:
            return save_figures(map(partial(self._page, mask_format=mask_format, task=task), pages), files, DPI)

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
        """Yield each row's images. Masks are read row by row, since a comparison may have any number of rows."""
        for row, _ in rows:
            truths = [row.truth] if "GT" in self.titles and row.truth is not None else []
            masks = [mask_format.read(truth, image=image_head(row.image)) for truth in truths]
            laid = [overlay(row.image, *pair) for pair in zip(row.predictions, self.overlays, strict=False)]
            yield [row.image, *masks, *row.predictions, *laid]
            task.advance()
