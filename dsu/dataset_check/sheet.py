"""A check on one page: some pairs, the masks with the least and most foreground, examples of findings, and three
histograms."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image

from dsu.data.images import FEW_VALUES, read_image
from dsu.dataset_check import DatasetCheck, SplitCheck
from dsu.dataset_check.reading import HALF, Sample
from dsu.dataset_check.rules import SEVERITIES, Finding, case_of
from dsu.drawing import FAINT_INK, INK, Page, save_figures, style_axes
from dsu.pictures import CELL_GROUND, overlay, page_files
from dsu.progress import SILENT, Progress, Task

DPI: Final = 200

_COLUMNS: Final = 6
_CELL_SIZE: Final = (1.62, 1.22)
"""Width and height in inches."""
_GAP: Final = 0.1
_SECTION_HEIGHT: Final = 0.32
_HEADER_HEIGHT: Final = 0.62
_PLOTS_HEIGHT: Final = 2.1
"""Height of the histograms, including their labels."""

_SEVERITY_INK: Final = dict(zip(SEVERITIES, ("#c5221f", "#b06000", INK), strict=True))

_MIN_SHARE: Final = 1e-4
"""Foreground fraction at which the scale begins; smaller values are drawn at its beginning."""

Cell = tuple[Sample, str, str]
"""One cell: an image with its mask, the bold line below it and that line's colour; the second line is its name."""


def draw_sheet(found: DatasetCheck, path: Path, progress: Progress = SILENT) -> Path:
    """Draw what a check found, as .png (200 dpi) or .pdf.

    Masks are drawn over their images, tinted and outlined, read as in training; small objects are circled.

    Args:
        found: The check.
        path: The file to write; its folder is created.
        progress: Receives progress.

    Raises:
        UsageError: Another extension than .png and .pdf.
        UnreadableImage: A file that could be read before is gone.
        DsuError: The file cannot be written.
    """
    [file] = page_files(path)
    sections = [(title, cells) for title, cells in _sections(found) if cells]
    with progress.task("drawing", sum(len(cells) for _, cells in sections), "pictures") as task:
        save_figures(map(partial(_page, found, task=task), [sections]), [file], DPI)
    return file


# ---- selection ----


def _sections(found: DatasetCheck) -> Iterator[tuple[str, list[Cell]]]:
    samples = [sample for check in found.splits for sample in check.samples]
    chosen = np.linspace(0, len(samples) - 1, min(_COLUMNS, len(samples))).round().astype(int)
    sizes = [(sample, f"{sample.size[0]}x{sample.size[1]}", INK) for sample in (samples[index] for index in chosen)]
    yield "Samples, evenly spread", sizes
    marked = [(one.foreground.share, one.sample) for check in found.splits for one in check.masked]
    ordered = sorted((pair for pair in marked if pair[0] > 0), key=lambda pair: pair[0])
    half = _COLUMNS // 2
    extremes = [*ordered[:half], *ordered[max(half, len(ordered) - half) :]]
    yield "Least and most foreground", [(sample, f"{100 * share:.3g} %", INK) for share, sample in extremes]
    yield "Examples of findings", _finding_cells(found.findings)


def _finding_cells(findings: Sequence[Finding]) -> list[Cell]:
    """One case of each finding, then a second one if there is room; cases of the same finding are side by side."""
    shown = [finding for finding in findings if any(case.samples for case in finding.cases)]
    taken: dict[int, list[Cell]] = {}
    room = 3 * _COLUMNS
    for cases in zip_longest(*(finding.cases[:2] for finding in shown)):
        for index, (finding, case) in enumerate(zip(shown, cases, strict=True)):
            samples = case.samples[:2] if case else ()
            if len(samples) <= room:
                room -= len(samples)
                words, colour = finding.key.replace("-", " "), _SEVERITY_INK[finding.severity]
                taken.setdefault(index, []).extend((sample, words, colour) for sample in samples)
    return [cell for index in sorted(taken) for cell in taken[index]]


# ---- drawing ----


def _page(found: DatasetCheck, sections: Sequence[tuple[str, Sequence[Cell]]], task: Task) -> Figure:
    pitch = _CELL_SIZE[1] + 0.36  # two lines below a cell
    rows = sum(-(-len(cells) // _COLUMNS) for _, cells in sections)
    page = Page(
        _GAP + _COLUMNS * (_CELL_SIZE[0] + _GAP),
        _HEADER_HEIGHT + len(sections) * _SECTION_HEIGHT + rows * pitch + _PLOTS_HEIGHT,
        DPI,
    )
    _write_header(page, found)
    top = _HEADER_HEIGHT
    for title, cells in sections:
        page.write(title, _GAP, top + 0.2, 9, weight="bold")
        top += _SECTION_HEIGHT
        for index, cell in enumerate(cells):
            row, column = divmod(index, _COLUMNS)
            _draw_cell(page, _GAP + column * (_CELL_SIZE[0] + _GAP), top + row * pitch, cell, found)
            task.advance()
        top += -(-len(cells) // _COLUMNS) * pitch
    page.write("Foreground, mask values, sizes", _GAP, top + 0.2, 9, weight="bold")
    room = (page.width - _GAP) / 3
    for column, draw in enumerate((_draw_shares, _draw_values, _draw_sizes)):
        draw(
            page.axes(
                _GAP + column * room + 0.5,
                top + _SECTION_HEIGHT + 0.05,
                room - 0.75,
                _PLOTS_HEIGHT - _SECTION_HEIGHT - 0.6,
            ),
            found,
        )
    return page.finish()


def _write_header(page: Page, found: DatasetCheck) -> None:
    pairs = ", ".join(f"{check.name} {len(check.samples):,}" for check in found.splits)
    severities = [finding.severity for finding in found.findings]
    counts = ", ".join(f"{severities.count(severity)} {severity}" for severity in SEVERITIES)
    line = f"read: {pairs}   ·   findings: {counts}   ·   network input {found.side}x{found.side}"
    if any(check.mask_format for check in found.splits):
        line += "   ·   yellow circle: a small object"
    page.write(found.splits[0].split.dataset, _GAP, 0.27, 13, weight="bold")
    page.write(line, _GAP, 0.5, 7.5, color=FAINT_INK)


def _draw_cell(page: Page, left: float, top: float, cell: Cell, found: DatasetCheck) -> None:
    sample, words, colour = cell
    size = page.fit(sample.size, *_CELL_SIZE)
    check = next(check for check in found.splits if check.name == sample.signature.split)
    image = read_image(sample.image, depth=check.depth).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    mask = check.mask_format.read(sample.mask.path, image=sample.head) if check.mask_format and sample.mask else None
    if mask is not None:
        image = overlay(image, Image.fromarray(mask).resize(size, Image.Resampling.BOX))
    edges = page.picture(image, left, top, *_CELL_SIZE, frame=None, ground=CELL_GROUND)
    if mask is not None:
        page.ring_small_objects(mask >= HALF, edges, (left, top, *_CELL_SIZE))
    page.write(words, left, top + _CELL_SIZE[1] + 0.13, 7, weight="bold", color=colour, room=_CELL_SIZE[0])
    page.write(case_of(sample).name, left, top + _CELL_SIZE[1] + 0.26, 6, color=FAINT_INK, room=_CELL_SIZE[0])


# ---- histograms ----


def _splits_with_colours(found: DatasetCheck) -> Iterator[tuple[SplitCheck, str]]:
    """Every split with its colour."""
    return zip(found.splits, cycle(("#08519c", "#e8590c", "#2b8a3e", "#9c36b5", "#5f6368")))


def _draw_shares(axes: Axes, found: DatasetCheck) -> None:
    """Histogram of the masks' foreground on a logarithmic scale, without empty masks."""
    style_axes(axes, "foreground of a mask, % of its pixels", "masks")
    bins = (np.logspace(np.log10(_MIN_SHARE), 0, 25) * 100).tolist()
    for check, colour in _splits_with_colours(found):
        shares = [100 * max(one.foreground.share, _MIN_SHARE) for one in check.masked if one.foreground.share > 0]
        axes.hist(shares, bins=bins, label=check.name, color=colour, alpha=0.6)
    if not any(one.foreground.share > 0 for check in found.splits for one in check.masked):
        _write_none(axes)
        return
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set(xscale="log", xlim=(bins[0], 100))
    axes.set_xticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    if len(found.splits) > 1:
        axes.legend(fontsize=6, frameon=False, loc="upper left", handlelength=1)


def _draw_values(axes: Axes, found: DatasetCheck) -> None:
    """The masks' raw values by their fraction of all pixels, on a logarithmic scale."""
    style_axes(axes, "raw value in the masks", "% of pixels")
    values = sorted({value for check in found.splits for value in check.values})
    if not values:
        _write_none(axes)
        return
    few = len(values) <= FEW_VALUES
    places = {value: index if few else value for index, value in enumerate(values)}
    least = 100.0
    for check, colour in _splits_with_colours(found):
        shares = {places[value]: 100 * pixels / check.values.total() for value, pixels in check.values.items()}
        least = min(least, *shares.values()) if shares else least
        axes.bar(list(shares), list(shares.values()), width=0.8 if few else 1.0, color=colour, alpha=0.6)
    axes.set(yscale="log", ylim=(least / 3, 130))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if few:
        in_colour = any(facts.kind == "colours" for check in found.splits for facts in check.masks)
        shown = {
            places[value]: f"#{value:06X}" if in_colour else str(value) for value in values[:: -(-len(values) // 8)]
        }
        axes.set_xticks([*shown], [*shown.values()])


def _draw_sizes(axes: Axes, found: DatasetCheck) -> None:
    """Width and height of every image, with the network's input size."""
    style_axes(axes, "width, pixels", "height, pixels")
    for check, colour in _splits_with_colours(found):
        sizes = np.array([sample.size for sample in check.samples]).reshape(-1, 2)
        axes.scatter(sizes[:, 0], sizes[:, 1], s=7, color=colour, alpha=0.35, linewidths=0, rasterized=True)
    axes.plot([found.side], [found.side], "s", markersize=6, color="black", fillstyle="none", markeredgewidth=1)
    lengths = [length for check in found.splits for sample in check.samples for length in sample.size] or [found.side]
    least, most = min(lengths), max(lengths)
    place, side = ((-5, -8), "right") if found.side > most / 2 else ((5, -8), "left")
    axes.annotate("network", (found.side, found.side), place, textcoords="offset points", fontsize=6, ha=side)
    # Logarithmic if lengths differ by orders of magnitude, with as many labels as fit.
    many = most > 8 * least
    if many:
        axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        steps = (1.0,) if most > 200 * least else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=steps) if many else MaxNLocator(5))
        axis.set_minor_formatter(lambda value, _: "")
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def _write_none(axes: Axes) -> None:
    axes.text(0.5, 0.5, "none", ha="center", va="center", color=FAINT_INK, fontsize=8, transform=axes.transAxes)
    axes.set(xticks=[], yticks=[])
