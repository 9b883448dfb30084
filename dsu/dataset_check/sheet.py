"""A check on one page: some pairs, the least and the most foreground, odd ones, and three histograms."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.data.images import read_image
from dsu.dataset_check.plots import draw_shares, draw_sizes, draw_values
from dsu.dataset_check.reading import HALF, Sample, object_boxes
from dsu.dataset_check.rules import SEVERITIES, Finding, case_of
from dsu.pictures import CELL_GROUND, overlay
from dsu.progress import SILENT, Progress
from dsu.sheets import page_files, save_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dsu.dataset_check import DatasetCheck

__all__ = ["draw_sheet"]

DPI: Final = 200

_COLUMNS: Final = 6
_ODD_ROWS: Final = 3
_CELL: Final = (1.62, 1.22)
"""Inches: width, height."""
_GAP: Final = 0.1
_CAPTION: Final = 0.36
"""Two lines below a cell."""
_SECTION: Final = 0.32
_HEADER: Final = 0.62
_PLOTS: Final = 2.1
"""Height of the histograms with all that is written around them."""

_INK: Final = "#202124"
_FAINT_INK: Final = "#5f6368"
_RING: Final = "#ffd400"
_SEVERITY_INK: Final = dict(zip(SEVERITIES, ("#c5221f", "#b06000", _INK), strict=True))
_LETTERS: Final = 31
"""That go below a cell, at the size in which names are written."""

_SMALL: Final = 0.07
"""Of an image's longer side: an object that is smaller is ringed, since it is hardly seen."""
_RINGS: Final = 4
"""At most on one picture."""
_THINNEST: Final = 6
"""Pixels."""


@dataclass(frozen=True)
class _Cell:
    """One picture: an image with its mask, and the two lines below it."""

    sample: Sample
    title: str
    colour: str = _INK


def draw_sheet(found: "DatasetCheck", path: Path, progress: Progress = SILENT) -> Path:
    """Draw what a check found, as .png (200 dpi) or .pdf.

    Masks are laid over their images, tinted and outlined, read as training reads them; small objects are ringed.

    Args:
        found: The check.
        path: The file to write; its folder is made.
        progress: Who is told.

    Raises:
        UsageError: Another ending than .png and .pdf.
        UnreadableImage: A file that could be read before is gone.
        DsuError: The file cannot be written.
    """
    [file] = page_files(path, 1)
    sections = [(title, cells) for title, cells in _sections(found) if cells]
    with progress.task("drawing", sum(len(cells) for _, cells in sections), "pictures") as task:

        def figures() -> Iterator["Figure"]:
            page = _Page(found, [len(cells) for _, cells in sections])
            for title, cells in sections:
                page.section(title)
                for column, cell in enumerate(cells):
                    _draw_cell(page.cell(column), cell, found)
                    task.advance()
                page.end_section(len(cells))
            page.plots(found)
            yield page.figure

        save_figures(figures(), [file], DPI)
    return file


# ---- what is shown ----


def _sections(found: "DatasetCheck") -> Iterator[tuple[str, list[_Cell]]]:
    samples = [sample for check in found.splits for sample in check.samples]
    chosen = np.linspace(0, len(samples) - 1, min(_COLUMNS, len(samples))).round().astype(int)
    yield "Some of them, evenly spread", [_Cell(samples[index], _size(samples[index])) for index in chosen]
    marked = [(one.foreground.share, one.sample) for check in found.splits for one in check.masked]
    ordered = sorted((pair for pair in marked if pair[0] > 0), key=lambda pair: pair[0])
    half = _COLUMNS // 2
    extremes = [*ordered[:half], *ordered[max(half, len(ordered) - half) :]]
    yield "The least and the most foreground", [_Cell(sample, f"{100 * share:.3g} %") for share, sample in extremes]
    yield "Odd ones, by finding", _odd(found.findings)


def _odd(findings: Sequence[Finding]) -> list[_Cell]:
    """One case of each finding, then a second one as far as there is room; those of a finding side by side."""
    shown = [finding for finding in findings if any(case.samples for case in finding.cases)]
    taken: dict[int, list[_Cell]] = {}
    room = _COLUMNS * _ODD_ROWS
    for cases in zip_longest(*(finding.cases[:2] for finding in shown)):
        for index, (finding, case) in enumerate(zip(shown, cases, strict=True)):
            samples = case.samples[:2] if case else ()
            if len(samples) <= room:
                room -= len(samples)
                words = finding.key.replace("-", " ")
                cells = [_Cell(sample, words, _SEVERITY_INK[finding.severity]) for sample in samples]
                taken.setdefault(index, []).extend(cells)
    return [cell for index in sorted(taken) for cell in taken[index]]


def _size(sample: Sample) -> str:
    return f"{sample.size[0]}x{sample.size[1]}"


# ---- how it is drawn ----


class _Page:
    """The figure, filled from its top; places are inches from its top left."""

    def __init__(self, found: "DatasetCheck", cells: Sequence[int]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._width = _GAP + _COLUMNS * (_CELL[0] + _GAP)
        self._height = _HEADER + sum(_SECTION + -(-count // _COLUMNS) * self._pitch for count in cells) + _PLOTS
        self.figure = Figure(figsize=(self._width, self._height), dpi=DPI)
        FigureCanvasAgg(self.figure)
        self._top = _HEADER
        pairs = ", ".join(f"{check.name} {len(check.samples):,}" for check in found.splits)
        judged = ", ".join(
            f"{sum(finding.severity == severity for finding in found.findings)} {severity}" for severity in SEVERITIES
        )
        self._write(found.splits[0].split.dataset, _GAP, 0.27, fontsize=13, weight="bold")
        line = f"read: {pairs}   ·   findings: {judged}   ·   network input {found.side}x{found.side}"
        if any(check.mask_format for check in found.splits):
            line += "   ·   yellow ring: a small object"
        self._write(line, _GAP, 0.5, fontsize=7.5, color=_FAINT_INK)

    @property
    def _pitch(self) -> float:
        return _CELL[1] + _CAPTION

    def section(self, title: str) -> None:
        """Write a title; cells follow."""
        self._write(title, _GAP, self._top + 0.2, fontsize=9, weight="bold")
        self._top += _SECTION

    def cell(self, index: int) -> "Axes":
        """The axes of one of the section's cells."""
        row, column = divmod(index, _COLUMNS)
        left, top = _GAP + column * (_CELL[0] + _GAP), self._top + row * self._pitch
        axes = self._axes(left, top, *_CELL)
        axes.set(xticks=[], yticks=[], facecolor=[value / 255 for value in CELL_GROUND])
        axes.spines[:].set_visible(False)
        return axes

    def end_section(self, cells: int) -> None:
        """Go on below so many cells."""
        self._top += -(-cells // _COLUMNS) * self._pitch

    def plots(self, found: "DatasetCheck") -> None:
        """The histograms, below everything else."""
        self.section("Foreground, mask values, sizes")
        room = (self._width - _GAP) / 3
        for column, draw in enumerate((draw_shares, draw_values, draw_sizes)):
            draw(self._axes(_GAP + column * room + 0.5, self._top + 0.05, room - 0.75, _PLOTS - _SECTION - 0.6), found)

    def _axes(self, left: float, top: float, width: float, height: float) -> "Axes":
        bottom = 1 - (top + height) / self._height
        place = (left / self._width, bottom, width / self._width, height / self._height)
        return self.figure.add_axes(place)

    def _write(self, text: str, x: float, y: float, **style: Any) -> None:
        style = {"color": _INK, "va": "baseline", "parse_math": False, **style}
        self.figure.text(x / self._width, 1 - y / self._height, text, **style)


def _draw_cell(axes: "Axes", cell: _Cell, found: "DatasetCheck") -> None:
    image, mask = _pair(cell.sample, found)
    image = image.resize(_fitted(image.size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if mask is not None:
        small = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.BOX))
        image = overlay(image, small)
    axes.imshow(np.asarray(image), interpolation="none")
    # The cell keeps its shape, the image its own: the rest shows the ground.
    across, down = ((length - _CELL[axis] * DPI) / 2 for axis, length in enumerate(image.size))
    axes.set(xlim=(across, image.width - across), ylim=(image.height - down, down), aspect="auto")
    if mask is not None:
        _ring_small_objects(axes, mask, image.size)
    _write_below(axes, 0.03, cell.title, fontsize=7, weight="bold", color=cell.colour)
    _write_below(axes, 0.15, case_of(cell.sample).name, fontsize=6, color=_FAINT_INK)


def _write_below(axes: "Axes", down: float, text: str, **style: Any) -> None:
    """One line, so many cell heights below a cell."""
    axes.text(0, -down, _shortened(text), transform=axes.transAxes, parse_math=False, va="top", **style)


def _fitted(size: tuple[int, int]) -> tuple[int, int]:
    """The size at which an image fills its cell, one way at least; a ribbon keeps a few pixels of width."""
    scale = min(room * DPI / length for room, length in zip(_CELL, size, strict=True))
    return max(_THINNEST, round(size[0] * scale)), max(_THINNEST, round(size[1] * scale))


def _pair(sample: Sample, found: "DatasetCheck") -> tuple[Image.Image, NDArray[np.uint8] | None]:
    """An image and its mask, (H, W) of its own size; None where it has none or it cannot be read."""
    mask_format = next(check.mask_format for check in found.splits if check.name == sample.signature.split)
    mask = mask_format.read(sample.mask.path) if mask_format and sample.mask else None
    return read_image(sample.image), mask


def _ring_small_objects(axes: "Axes", mask: NDArray[np.uint8], size: tuple[int, int]) -> None:
    """Ring the smallest objects of a mask (H, W) on its image, drawn at `size` (width, height)."""
    from matplotlib.patches import Circle

    scale = np.array([size[1] / mask.shape[0], size[0] / mask.shape[1]])
    boxes = np.array([[(part.start, part.stop) for part in box] for box in object_boxes(mask >= HALF)])
    if not len(boxes):
        return
    boxes = boxes * scale[None, :, None]
    extents = (boxes[:, :, 1] - boxes[:, :, 0]).max(axis=1)
    for index in np.argsort(extents, kind="stable")[:_RINGS]:
        if extents[index] < _SMALL * max(size):
            down, across = boxes[index].mean(axis=1)
            axes.add_patch(Circle((across, down), _SMALL * max(size), fill=False, color=_RING, linewidth=1.2))


def _shortened(name: str) -> str:
    """Its beginning and its end: what tells names apart stands at either."""
    if len(name) <= _LETTERS:
        return name
    return f"{name[: _LETTERS // 2]}…{name[-(_LETTERS // 2) :]}"
