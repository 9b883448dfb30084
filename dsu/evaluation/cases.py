"""Predictions paired with their ground truths, and one such pair read."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.data.images import IMAGE_SUFFIXES, UnreadableImage, read_mask, upright_size
from dsu.data.masks import MaskFormat
from dsu.errors import DsuError, UsageError

__all__ = ["Case", "match", "match_folders", "named_images", "read_case"]


@dataclass(frozen=True)
class Case:
    """One predicted map and its ground truth; `name` is what errors and per-image tables call it.

    `image` is what was segmented, where that is known: it is shown to people, and no figure depends on it.
    """

    name: str
    prediction: Path
    truth: Path
    image: Path | None = None


def match_folders(predictions: Path, truth: Path) -> tuple[list[Case], list[str], list[str]]:
    """Pair the images of two folders by path without suffix, subfolders included.

    Returns:
        The cases; the names of ground truths without a prediction; the names of predictions without a ground
        truth. All in the order of their paths.

    Raises:
        UsageError: A folder that is absent or has no images.
        DsuError: Two files of one folder that differ in suffix only.
    """
    return match(predictions, named_images(truth).items())


def match(predictions: Path, truths: Iterable[tuple[str, Path]]) -> tuple[list[Case], list[str], list[str]]:
    """Pair a folder of predictions with named masks, as `match_folders` does, in the order of `truths`.

    A name is a prediction's path inside its folder, without suffix: `val/0001` finds `val/0001.png`.
    """
    found = named_images(predictions)
    wanted = dict(truths)
    cases = [Case(name, found[name], mask) for name, mask in wanted.items() if name in found]
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    return cases, missing, extra


def named_images(folder: Path) -> dict[str, Path]:
    """Index a folder's images, hidden ones left out, by path without suffix, in order.

    Raises:
        UsageError: A folder that is absent or has no images.
        DsuError: Two files that differ in suffix only.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: name the one that holds the images.")
    named: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() not in IMAGE_SUFFIXES or any(part.startswith(".") for part in inside.parts):
            continue
        if path.is_dir():
            continue
        name = inside.with_suffix("").as_posix()
        if name in named:
            raise DsuError(
                f"{named[name]} and {path} have one name: keep one of them, so that it is plain which counts."
            )
        named[name] = path
    if not named:
        raise UsageError(
            f"{folder} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}): name the folder that holds them."
        )
    return named


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
    try:
        return case.image is not None and upright_size(case.image) == (shape[1], shape[0])
    except UnreadableImage:
        return False
