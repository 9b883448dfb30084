"""Predictions beside image and truth, for print: the paper's Figures 5 and 6."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dsu.errors import UsageError, did_you_mean
from dsu.evaluation import Case, evaluate, match, match_folders
from dsu.folders import unwrapped
from dsu.masks import choose_reading, examine_mask
from dsu.meters import PER_IMAGE
from dsu.pairing import image_and_mask_folders
from dsu.progress import SILENT, Progress
from dsu.sheets import cell_of_page, sheet

__all__ = ["ComparedImage", "choose_worst", "draw_comparison", "find_compared", "pick_names"]

DPI: Final = 300
WIDTH: Final = 7.16
"""Inches: the text of a printed page, over both of its columns."""
HEIGHT: Final = 9.2

_LESS_IS_BETTER: Final = frozenset({"MAE"})


@dataclass(frozen=True)
class ComparedImage:
    """One row: an image, its truth and a prediction a method.

    `remark` says why it was chosen (a metric's value), where that is worth saying.
    """

    name: str
    image: Path
    truth: Path
    predictions: tuple[Path, ...]
    remark: str = ""


def find_compared(
    images: Path, truth: Path, predictions: Mapping[str, Path]
) -> tuple[list[ComparedImage], dict[str, int]]:
    """Pair images, masks and predictions by their paths below their folders, without ending.

    Args:
        images: The images' folder, or one of images and masks.
        truth: Likewise the masks'.
        predictions: Each method's name and its folder of maps.

    Returns:
        The images that have all of these, in order; and how many truths lack an image or one method's prediction,
        by what is lacking.

    Raises:
        UsageError: A folder that is absent or has no images, or no image has all.
    """
    cases, missing, _ = match_folders(_inner(images, 0), _inner(truth, 1))
    lacking = {"an image": len(missing)}
    named = [(case.name, case.truth) for case in cases]
    found: list[dict[str, Path]] = []
    for method, folder in predictions.items():
        paired, missing, _ = match(unwrapped(folder) if folder.is_dir() else folder, named)
        found.append({case.name: case.prediction for case in paired})
        lacking[f"a prediction of {method}"] = len(missing)
    rows = [
        ComparedImage(case.name, case.prediction, case.truth, tuple(of[case.name] for of in found))
        for case in cases
        if all(case.name in of for of in found)
    ]
    if not rows:
        raise UsageError(
            f"No image of {images} has a truth in {truth} and a prediction in every folder under the same name: "
            f"check the folders."
        )
    return rows, {what: count for what, count in lacking.items() if count}


def pick_names(rows: Sequence[ComparedImage], names: Sequence[str]) -> list[ComparedImage]:
    """The named rows, in the order given. Raises `UsageError` for a name that there is not."""
    by_name = {row.name: row for row in rows}
    for name in names:
        if name not in by_name:
            near = did_you_mean(name, by_name)
            raise UsageError(f"No image with truth and predictions is called {name!r}{near or ': check --names.'}")
    return [by_name[name] for name in names]


def choose_worst(
    rows: Sequence[ComparedImage], count: int, metric: str, progress: Progress = SILENT
) -> list[ComparedImage]:
    """The rows on which the first method does worst, worst first, each with its figure as remark.

    Args:
        rows: With a prediction each at least.
        count: How many.
        metric: One of `dsu.meters.PER_IMAGE`; maps are stretched to their full range first, as benchmarks do, and
            brought to their truth's size.
        progress: Told of every image measured.

    Raises:
        UsageError: Another metric.
        DsuError: A file that can't be read.
    """
    if metric not in PER_IMAGE:
        near = did_you_mean(metric, PER_IMAGE)
        raise UsageError(f"--by can't be {metric!r}: give {', '.join(PER_IMAGE)}{near or '.'}")
    cases = [Case(row.name, row.predictions[0], row.truth) for row in rows]
    figures = [float(found[metric]) for found in evaluate(cases, resize=True, progress=progress).per_image]
    order = sorted(range(len(rows)), key=lambda index: figures[index], reverse=metric in _LESS_IS_BETTER)
    return [replace(rows[index], remark=f"{metric} {figures[index]:.3f}") for index in order[:count]]


def draw_comparison(
    rows: Sequence[ComparedImage], methods: Sequence[str], path: Path, *, named: bool = False
) -> list[Path]:
    """Draw image, truth and predictions side by side, as wide as a printed page and in as many pages as it takes.

    Args:
        rows: The images to show.
        methods: What stands above their predictions.
        path: .png (300 dpi; further pages beside it as `-2.png`, ...) or .pdf (text as text).
        named: Whether each row says its name, and why it was chosen.

    Returns:
        The files written.

    Raises:
        UsageError: No rows, or another ending than .png and .pdf.
        DsuError: A file that can't be read or written.
    """
    facts = [examine_mask(row.truth)[1] for row in rows]
    reading = choose_reading(facts)
    as_it_is = not reading.labels and not any(fact.is_coloured for fact in facts)
    # Files are read when their page is drawn; a mask that must be interpreted is held until then.
    truths = [row.truth if as_it_is else reading.read(row.truth) for row in rows]
    pictures = [[row.image, truth, *row.predictions] for row, truth in zip(rows, truths, strict=True)]
    labels = [" · ".join(filter(None, (row.name, row.remark))) for row in rows] if named else None
    titles = ["Image", "GT", *methods]
    cell = cell_of_page(WIDTH, len(titles), DPI)
    return sheet(pictures, titles, path, labels, cell=cell, dpi=DPI, page_height=HEIGHT)


def _inner(folder: Path, which: int) -> Path:
    """The images (0) or the masks (1) of a folder that holds both; any other folder as it is."""
    try:
        return image_and_mask_folders(folder)[which] or folder
    except (UsageError, OSError):
        return folder
