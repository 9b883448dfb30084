"""Select the images for a comparison of predictions with images and ground truth."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dsu.data.datasets import Paths, find_dataset, find_samples, masks_below, test_splits
from dsu.data.pairing import PREDICTIONS_FILE, find_images, named_images, pair_files, pair_names, unwrapped
from dsu.errors import DsuError, UsageError, did_you_mean
from dsu.evaluation.evaluate import PredictionPair, evaluate, truths_in
from dsu.evaluation.ground_truth import NoKnownTruth, find_evaluation_sets, read_record
from dsu.heads.head_file import HEAD_FILE, read_head_info
from dsu.metrics.figures import LOWER_IS_BETTER, PER_IMAGE
from dsu.progress import SILENT, Progress


@dataclass(frozen=True)
class ComparedImage:
    """One row: an image, its ground truth (if it has one) and one prediction per method.

    `remark` gives the score for which the image was chosen, if any.
    """

    name: str
    image: Path
    truth: Path | None = None
    predictions: tuple[Path, ...] = ()
    remark: str = ""


def find_compared(
    source: str | None, predictions: Mapping[str, Path], paths: Paths, truth: Path | None = None
) -> tuple[list[ComparedImage], dict[str, int]]:
    """Pair images, masks and predictions by name: the path below their folder, without extension.

    Args:
        source: a benchmark, a predicted set, or a folder of images (or of images and masks). None: the sets named in
            the record of the predictions.
        predictions: each method's name and folder: one written by `dsu predict`, or any folder of maps.
        paths: the folders of benchmarks.
        truth: the folder of masks, if `source` is a folder of images.

    Returns:
        The images that have all of these, in order; and the number of omitted images, by what they lack.

    Raises:
        UsageError: a source or folder does not exist or has no images, or no image has all.
        DsuError: the images of a record are gone.
    """
    for folder in predictions.values():
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder: give a run folder or a folder of masks with --predictions.")
        if (folder / HEAD_FILE).exists():
            raise UsageError(f"{folder} contains a head but no predictions: run `dsu predict --head {folder}` first.")
    lacking: Counter[str] = Counter()
    rows: list[ComparedImage] = []
    sets = _find_sets(source, predictions, truth, paths, lacking)
    for name, samples in sets.items():
        names = [sample.name for sample in samples]
        found = {}
        for method, folder in predictions.items():
            # In a subfolder of the set's name, or in the folder itself.
            inner = folder / name if (folder / name).is_dir() else folder
            found[method] = pair_files(names, named_images(unwrapped(inner)))
            lacking[f"a prediction of {method}"] += found[method].count(None)
        before = f"{name}/" if len(sets) > 1 else ""
        for sample, *maps in zip(samples, *found.values(), strict=True):
            if None not in maps:
                rows.append(replace(sample, name=before + sample.name, predictions=tuple(maps)))
    if not rows:
        raise UsageError(
            f"No image of {source or ', '.join(sets)} has image, mask and predictions of the same name (without "
            f"{', '.join(f'{what}: {count:,}' for what, count in lacking.items() if count)}): check the folders."
        )
    return rows, {what: count for what, count in lacking.items() if count}


def pick_names(rows: Sequence[ComparedImage], names: Sequence[str]) -> list[ComparedImage]:
    """The named rows, in the given order. Raises `UsageError` for an unknown name."""
    by_name = {row.name: row for row in rows}
    for name in names:
        if name not in by_name:
            near = did_you_mean(name, by_name)
            raise UsageError(f"No complete image is called {name!r}{near or ': check --names.'}")
    return [by_name[name] for name in names]


def choose_worst(
    rows: Sequence[ComparedImage], count: int, metric: str, progress: Progress = SILENT
) -> list[ComparedImage]:
    """The rows with the worst scores of the first method, worst first, each with its score as remark.

    Args:
        rows: each with at least one prediction.
        count: the number of rows to return.
        metric: one of `dsu.metrics.figures.PER_IMAGE`; maps are min-max normalised first, as for benchmarks, and
            resized to their ground truth.
        progress: advances by every evaluated image.

    Raises:
        UsageError: an unknown metric, or images without ground truth.
        DsuError: a file can't be read.
    """
    if metric not in PER_IMAGE:
        near = did_you_mean(metric, PER_IMAGE)
        raise UsageError(f"--by can't be {metric!r}: give {', '.join(PER_IMAGE)}{near or '.'}")
    cases = [PredictionPair(row.name, row.predictions[0], row.truth) for row in rows if row.truth is not None]
    if len(cases) < len(rows):
        raise UsageError("--worst needs ground truth, and there is none: give it with --truth, or use --names.")
    figures = [float(found[metric]) for found in evaluate(cases, resize=True, progress=progress).per_image]
    order = sorted(range(len(rows)), key=lambda index: figures[index], reverse=metric in LOWER_IS_BETTER)
    return [replace(rows[index], remark=f"{metric} {figures[index]:.3f}") for index in order[:count]]


def used_random_encoders(predictions: Path) -> bool:
    """Whether a run folder's predictions were made with random encoders, which a figure should say."""
    head = predictions.parent / HEAD_FILE
    if (predictions / PREDICTIONS_FILE).is_file() and head.is_file():
        with suppress(DsuError):  # of a damaged head: its predictions can still be shown
            return read_head_info(head).random
    return False


def _find_sets(
    source: str | None, predictions: Mapping[str, Path], truth: Path | None, paths: Paths, lacking: Counter[str]
) -> dict[str, list[ComparedImage]]:
    """Images and ground truths of each set, without predictions."""
    recorded = next(((name, path) for name, path in predictions.items() if (path / PREDICTIONS_FILE).is_file()), None)
    if source is None and truth is not None:
        raise UsageError(f"--truth {truth} needs a folder of images: give that, too.")
    if source is not None and truth is not None:
        return _sets_from_folders(source, truth, paths, lacking)
    if recorded is not None and (source is None or not Path(source).is_dir()):
        try:
            return _sets_from_record(source, *recorded, paths, lacking)
        except UsageError:
            if without_truth := _sets_without_truth(source, recorded[1]):
                return without_truth
            raise
    if source is None:
        raise UsageError(
            f"{', '.join(map(str, predictions.values()))} do not record which images were predicted: give a "
            "benchmark or a folder of images."
        )
    return _sets_from_dataset(source, paths)


def _sets_from_folders(source: str, truth: Path, paths: Paths, lacking: Counter[str]) -> dict[str, list[ComparedImage]]:
    images = {pair.name: pair.image for split in find_samples(source, paths) for pair in split.pairs}
    truths = truths_in(truth, paths)
    found = pair_names([(one.name,) for one in truths], images)
    lacking["an image"] = found.count(None)
    return {
        Path(source).resolve().name: [
            ComparedImage(name, images[name], one.mask or one.image)
            for one, name in zip(truths, found, strict=True)
            if name is not None
        ]
    }


def _sets_from_record(
    source: str | None, method: str, folder: Path, paths: Paths, lacking: Counter[str]
) -> dict[str, list[ComparedImage]]:
    """The sets recorded by `dsu predict`, with their images and ground truths."""
    try:
        evaluated = find_evaluation_sets([] if source is None else [source], folder, None, paths)
    except NoKnownTruth as error:
        raise UsageError(
            f"{folder} does not record where images and masks are: give a benchmark or a folder of images."
        ) from error
    lacking[f"a prediction of {method}"] = sum(len(one.missing) for one in evaluated)
    return {
        one.name: [ComparedImage(case.name, case.image, case.truth) for case in one.pairs if case.image is not None]
        for one in evaluated
    }


def _sets_without_truth(source: str | None, folder: Path) -> dict[str, list[ComparedImage]]:
    """The sets of a record (or the named one) without known ground truth, with the images that still exist."""
    found: dict[str, list[ComparedImage]] = {}
    for name, how in read_record(folder).items():
        if how["source"] is None and source in (None, name):
            places = how.get("places", {})
            images = [(item, Path(places.get(item, places.get("", "")), item)) for item in how["names"]]
            rows = [
                ComparedImage(str(Path(item).with_suffix("")), image, None) for item, image in images if image.is_file()
            ]
            found |= {name or folder.name: rows} if rows else {}
    return found


def _sets_from_dataset(source: str, paths: Paths) -> dict[str, list[ComparedImage]]:
    """A benchmark's test splits, or the images of a folder, with masks if it has any."""
    try:
        splits = find_dataset(source, paths)
    except UsageError as error:
        folder = Path(source)
        if not folder.is_dir():
            raise
        images = find_images(folder)  # raises if there are none
        if not masks_below(folder):
            names = [image.relative_to(folder).with_suffix("").as_posix() for image in images]
            return {folder.resolve().name: [*map(ComparedImage, names, images)]}
        raise UsageError(
            f"Images and masks in {source} can't be told apart or do not pair: give the folder of images, and that "
            "of masks with --truth."
        ) from error
    return {
        split.name: [ComparedImage(pair.name, pair.image, pair.mask) for pair in split.pairs]
        for split in test_splits(splits)
    }
