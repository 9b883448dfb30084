"""Which images a figure shows: with their masks for features, with their truths and predictions for comparisons."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.data.datasets import Paths, find_dataset, find_samples, test_splits
from dsu.data.decoding import open_image
from dsu.data.images import UnreadableImage
from dsu.data.masks import choose_mask_format, examine_mask
from dsu.data.pairing import Pair, find_images, named_images, pair_files, pair_names, unwrapped
from dsu.errors import DsuError, UsageError, did_you_mean
from dsu.evaluation.evaluate import JudgedImage, evaluate, truths_in
from dsu.evaluation.ground_truth import find_judged_sets
from dsu.heads.head_file import HEAD_FILE, read_head_info
from dsu.metrics.figures import LOWER_IS_BETTER, PER_IMAGE
from dsu.prediction.predict import RECORD_FILE
from dsu.progress import SILENT, Progress

__all__ = [
    "MOST",
    "ComparedImage",
    "Shown",
    "are_of_random_encoders",
    "choose_worst",
    "find_compared",
    "find_shown",
    "pick_names",
]

MOST: Final = 24
"""Images of one figure of features."""


# ---- features ----


@dataclass(frozen=True)
class Shown:
    """One image of a figure: RGB, and its mask (any size, uint8 0..255) where it has one."""

    name: str
    image: Image.Image
    mask: NDArray[np.uint8] | None


def find_shown(
    sources: Sequence[str], masks: Path | None, count: int, paths: Paths, progress: Progress = SILENT
) -> tuple[list[Shown], list[str]]:
    """Read the images that a user means, with their masks.

    Args:
        sources: Image files; folders of images, or of images and masks; benchmarks by name. Where there are test
            splits, these are meant.
        masks: A folder of masks of the same names (paths below a folder, without ending).
        count: How many images of each folder are taken, evenly spread: neighbours are often alike.
        paths: Where benchmarks lie.
        progress: Who is told of images left out.

    Returns:
        The images; and a sentence for each that was skipped, since it or its mask cannot be read.

    Raises:
        UsageError: More than `MOST` images, a source that is absent or has none, or a folder of masks that has none
            of these images.
        UnreadableImage: None of the images can be read.
    """
    found: list[Pair] = []
    for source in sources:
        named = [pair for split in find_samples(source, paths) for pair in split.pairs]
        if len(named) > count:
            progress.say(f"{source}: {count} of {len(named):,} images (--count shows more)")
        places = np.linspace(0, len(named) - 1, min(count, len(named))).round().astype(int)
        found += [named[place] for place in places]
    if len(found) > MOST:
        raise UsageError(f"{len(found)} images make too tall a figure: give {MOST} at most.")
    if masks is not None:
        files = pair_files([pair.name for pair in found], named_images(unwrapped(masks) if masks.is_dir() else masks))
        if not any(files):
            raise UsageError(
                f"{masks} holds no mask called like {found[0].name}: give --masks the folder of their masks."
            )
        found = [replace(pair, mask=mask) for pair, mask in zip(found, files, strict=True)]
    return _read(found)


def _read(found: Sequence[Pair]) -> tuple[list[Shown], list[str]]:
    """Images and masks, these read by one rule; and why others cannot be."""
    opened, broken = [], []
    for pair in found:
        try:
            facts = examine_mask(pair.mask)[1] if pair.mask else None
            opened.append((pair.name, open_image(pair.image), pair.mask, facts))
        except UnreadableImage as error:
            broken.append(error)
    if broken and not opened:
        raise broken[0]
    mask_format = choose_mask_format([facts for *_, facts in opened if facts is not None])
    shown = [Shown(name, image, mask_format.read(mask) if mask else None) for name, image, mask, _ in opened]
    return shown, list(map(str, broken))


# ---- comparisons ----


@dataclass(frozen=True)
class ComparedImage:
    """One row: an image, its truth (where it has one) and a prediction a method.

    `remark` says why it was chosen (a metric's value), where that is worth saying.
    """

    name: str
    image: Path
    truth: Path | None
    predictions: tuple[Path, ...] = ()
    remark: str = ""


def find_compared(
    source: str | None, predictions: Mapping[str, Path], paths: Paths, truth: Path | None = None
) -> tuple[list[ComparedImage], dict[str, int]]:
    """Pair images, masks and predictions by their names: paths below their folders, without ending.

    Args:
        source: A benchmark, a set that was predicted, or a folder of images (or of images and masks). None takes the
            sets that the predictions' own record names.
        predictions: Each method's name and its folder: one that `dsu predict` wrote into, or any folder of maps.
        paths: Where benchmarks lie.
        truth: The masks' folder, beside a folder of images.

    Returns:
        The images that have all of these, in order; and how many were left out, by what they lack.

    Raises:
        UsageError: A source or folder that is absent or has no images, or no image has all.
        DsuError: The images of a record are gone.
    """
    for folder in predictions.values():
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder: give --predictions a run's folder or one of masks.")
        if (folder / HEAD_FILE).exists():
            raise UsageError(f"{folder} holds a head and no predictions: run `dsu predict --head {folder}` first.")
    lacking: Counter[str] = Counter()
    rows: list[ComparedImage] = []
    sets = _find_sets(source, predictions, truth, paths, lacking)
    for name, samples in sets.items():
        names = [sample.name for sample in samples]
        found = {}
        for method, folder in predictions.items():
            # In a folder of the set's name, or right in it.
            inner = folder / name if (folder / name).is_dir() else folder
            found[method] = pair_files(names, named_images(unwrapped(inner)))
            lacking[f"a prediction of {method}"] += found[method].count(None)
        before = f"{name}/" if len(sets) > 1 else ""
        for sample, *maps in zip(samples, *found.values(), strict=True):
            if None not in maps:
                rows.append(replace(sample, name=before + sample.name, predictions=tuple(maps)))
    if not rows:
        raise UsageError(
            f"No image of {source or ', '.join(sets)} has all it takes under one name (without "
            f"{', '.join(f'{what}: {count:,}' for what, count in lacking.items() if count)}): check the folders."
        )
    return rows, {what: count for what, count in lacking.items() if count}


def pick_names(rows: Sequence[ComparedImage], names: Sequence[str]) -> list[ComparedImage]:
    """The named rows, in the order given. Raises `UsageError` for a name that there is not."""
    by_name = {row.name: row for row in rows}
    for name in names:
        if name not in by_name:
            near = did_you_mean(name, by_name)
            raise UsageError(f"No image that has all it takes is called {name!r}{near or ': check --names.'}")
    return [by_name[name] for name in names]


def choose_worst(
    rows: Sequence[ComparedImage], count: int, metric: str, progress: Progress = SILENT
) -> list[ComparedImage]:
    """The rows on which the first method does worst, worst first, each with its figure as remark.

    Args:
        rows: With a prediction each at least.
        count: How many.
        metric: One of `dsu.metrics.figures.PER_IMAGE`; maps are stretched to their full range first, as benchmarks
            do, and brought to their truth's size.
        progress: Told of every image measured.

    Raises:
        UsageError: Another metric, or images without truth.
        DsuError: A file that can't be read.
    """
    if metric not in PER_IMAGE:
        near = did_you_mean(metric, PER_IMAGE)
        raise UsageError(f"--by can't be {metric!r}: give {', '.join(PER_IMAGE)}{near or '.'}")
    cases = [JudgedImage(row.name, row.predictions[0], row.truth) for row in rows if row.truth is not None]
    if len(cases) < len(rows):
        raise UsageError("--worst goes by the ground truth, and there is none: give it with --truth, or give --names.")
    figures = [float(found[metric]) for found in evaluate(cases, resize=True, progress=progress).per_image]
    order = sorted(range(len(rows)), key=lambda index: figures[index], reverse=metric in LOWER_IS_BETTER)
    return [replace(rows[index], remark=f"{metric} {figures[index]:.3f}") for index in order[:count]]


def are_of_random_encoders(predictions: Path) -> bool:
    """Whether a run folder's predictions are those of a head on random encoders, which a figure should say."""
    head = predictions.parent / HEAD_FILE
    if (predictions / RECORD_FILE).is_file() and head.is_file():
        with suppress(DsuError):  # of a damaged head: its predictions can be shown all the same
            return read_head_info(head).random
    return False


_Sets = dict[str, list[ComparedImage]]
"""Images and truths of each set, without predictions."""


def _find_sets(
    source: str | None, predictions: Mapping[str, Path], truth: Path | None, paths: Paths, lacking: Counter[str]
) -> _Sets:
    recorded = next(((name, path) for name, path in predictions.items() if (path / RECORD_FILE).is_file()), None)
    if source is None and truth is not None:
        raise UsageError(f"--truth {truth} goes with a folder of images: name that, too.")
    if source is not None and truth is not None:
        return _in_two_folders(source, truth, paths, lacking)
    if recorded is not None and (source is None or not Path(source).is_dir()):
        return _in_record(source, *recorded, paths, lacking)
    if source is None:
        raise UsageError(
            f"{', '.join(map(str, predictions.values()))} does not say which images were predicted: name them, a "
            f"benchmark or a folder."
        )
    return _in_dataset(source, paths)


def _in_two_folders(source: str, truth: Path, paths: Paths, lacking: Counter[str]) -> _Sets:
    images = {pair.name: pair.image for split in find_samples(source, paths) for pair in split.pairs}
    truths = truths_in(truth, paths)
    found = pair_names([(one.name,) for one in truths], images)
    lacking["an image"] = found.count(None)
    samples = [
        ComparedImage(name, images[name], one.mask or one.image)
        for one, name in zip(truths, found, strict=True)
        if name is not None
    ]
    return {Path(source).resolve().name: samples}


def _in_record(source: str | None, method: str, folder: Path, paths: Paths, lacking: Counter[str]) -> _Sets:
    """The sets that `dsu predict` noted down, with what they were predicted from."""
    try:
        judged = find_judged_sets([] if source is None else [source], folder, None, paths)
    except UsageError as error:
        if source is not None:
            raise
        raise UsageError(
            f"{folder} does not say where images and their masks are: name them, a benchmark or a folder."
        ) from error
    lacking[f"a prediction of {method}"] = sum(len(one.missing) for one in judged)
    return {
        one.name: [ComparedImage(case.name, case.image, case.truth) for case in one.judged if case.image is not None]
        for one in judged
    }


def _in_dataset(source: str, paths: Paths) -> _Sets:
    """A benchmark's test splits, or what a folder holds; masks where it has any."""
    try:
        splits = find_dataset(source, paths)
    except UsageError as error:
        if not Path(source).is_dir():
            raise
        find_images(Path(source))  # which says so where there are none at all
        raise UsageError(
            f"Images and masks in {source} can't be told apart or do not pair: name the images' folder, and the "
            f"masks' with --truth."
        ) from error
    return {
        split.name: [ComparedImage(pair.name, pair.image, pair.mask) for pair in split.pairs]
        for split in test_splits(splits)
    }
