"""Predictions paired with their ground truths, and one such pair read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.data.datasets import Paths, find_samples
from dsu.data.images import or_unreadable, read_mask, upright_size
from dsu.data.masks import MaskFormat
from dsu.data.pairing import Pair, make_split, named_images, pair_names
from dsu.errors import DsuError

__all__ = ["Case", "match", "read_case", "truths_in"]


@dataclass(frozen=True)
class Case:
    """One predicted map and its ground truth; `name` is what errors and per-image tables call it.

    `image` is what was segmented, where that is known: it is shown to people, and no figure depends on it.
    """

    name: str
    prediction: Path
    truth: Path
    image: Path | None = None


def truths_in(truth: str | Path, paths: Paths) -> list[Pair]:
    """The samples that masks are of: a data set's, or one for each mask of any other folder.

    A folder in which but few files lie beside a mask of theirs is taken for one of masks.
    """
    splits = find_samples(truth, paths)
    if any(split.masks == split.images and split.images_without_mask for split in splits):
        splits = (make_split("", "", "all", Path(truth), None),)
    return [pair for split in splits for pair in split.pairs]


def match(predictions: Path, samples: Sequence[Pair]) -> tuple[list[Case], list[str], list[str]]:
    """Pair a folder of predictions with samples and their masks, by the rule by which these pair in training.

    Args:
        predictions: A folder of maps, subfolders included.
        samples: Each with its mask; where there is none the image is one, as `truths_in` gives them.

    Returns:
        The cases in the order of `samples`; the names of ground truths without a prediction; the names of
        predictions without a ground truth.

    Raises:
        UsageError: A folder that is absent or has no images.
        DsuError: Two predictions that differ in ending only.
    """
    files = named_images(predictions)
    found = pair_names([(sample.name,) for sample in samples], files)
    cases = [
        Case(sample.name, files[name], sample.mask or sample.image, sample.image if sample.mask else None)
        for sample, name in zip(samples, found, strict=True)
        if name is not None
    ]
    missing = [sample.name for sample, name in zip(samples, found, strict=True) if name is None]
    used = set(found)
    return cases, missing, [name for name in files if name not in used]


def read_case(case: Case, mask_format: MaskFormat, *, resize: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read one pair, prediction and ground truth, both uint8 (H, W) of the ground truth's size.

    A prediction of its image's own size is brought to the mask's where that is another: there the data are at fault.

    Raises:
        DsuError: A file that cannot be read, or different sizes without `resize`.
    """
    prediction, truth = read_mask(case.prediction), mask_format.read(case.truth)
    if prediction.shape == truth.shape:
        return prediction, truth
    height, width = truth.shape
    if not resize and not _is_of_its_image(case, prediction.shape):
        raise DsuError(
            f"the prediction {case.prediction} has {prediction.shape[1]}x{prediction.shape[0]} pixels and "
            f"its ground truth {case.truth} {width}x{height}: predict at the images' own size, or bring "
            "predictions to their masks' size with --resize."
        )
    resized = Image.fromarray(prediction).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized), truth


def _is_of_its_image(case: Case, shape: tuple[int, ...]) -> bool:
    return case.image is not None and or_unreadable(upright_size)(case.image) == (shape[1], shape[0])
