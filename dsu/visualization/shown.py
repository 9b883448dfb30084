"""Which images a figure of features shows, and their masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.datasets import find_dataset
from dsu.errors import UsageError
from dsu.evaluation import match
from dsu.folders import find_images, unwrapped
from dsu.images import read_image
from dsu.masks import choose_reading, examine_mask
from dsu.progress import SILENT, Progress

__all__ = ["MOST", "Shown", "find_shown"]

T = TypeVar("T")

MOST: Final = 24
"""Images of one figure."""


@dataclass(frozen=True)
class Shown:
    """One image of a figure: RGB, and its mask (any size, uint8 0..255) where it has one."""

    name: str
    image: Image.Image
    mask: NDArray[np.uint8] | None


def find_shown(sources: Sequence[Path], masks: Path | None, count: int, progress: Progress = SILENT) -> list[Shown]:
    """Read the images that a user means, with their masks.

    Args:
        sources: Image files, and folders of images, or of images and masks.
        masks: A folder of masks of the same names (paths below a folder, without ending).
        count: How many images of each folder are taken, evenly spread: neighbours are often alike.
        progress: Who is told of images left out.

    Raises:
        UsageError: More than `MOST` images, a source that is absent or has none, or a folder of masks that has none
            of these images.
        UnreadableImage: A file that cannot be read.
    """
    found: list[tuple[str, Path, Path | None]] = []
    for source in sources:
        named = _in_folder(source) if source.is_dir() else [(path.stem, path, None) for path in find_images(source)]
        if len(named) > count and source.is_dir():
            progress.say(f"{source}: {count} of {len(named):,} images (--count shows more)")
            named = _spread(named, count)
        found += named
    if len(found) > MOST:
        raise UsageError(f"{len(found)} images make too tall a figure: give {MOST} at most.")
    if masks is not None:
        found = _with_masks(found, masks)
    paths = [mask for _, _, mask in found if mask is not None]
    reading = choose_reading([examine_mask(path)[1] for path in paths])
    return [Shown(name, read_image(image), None if mask is None else reading.read(mask)) for name, image, mask in found]


def _spread(items: Sequence[T], count: int) -> list[T]:
    """So many of the items, from the first to the last, at even distances."""
    return [items[round(index * (len(items) - 1) / max(count - 1, 1))] for index in range(count)]


def _in_folder(folder: Path) -> list[tuple[str, Path, Path | None]]:
    """Names, images and masks of a data set's folder; of any other folder the images below it."""
    try:
        splits = find_dataset(folder, folder)
    except UsageError:
        return [(path.relative_to(folder).with_suffix("").as_posix(), path, None) for path in find_images(folder)]
    return [(pair.name, pair.image, pair.mask) for split in splits for pair in split.pairs]


def _with_masks(found: Sequence[tuple[str, Path, Path | None]], masks: Path) -> list[tuple[str, Path, Path | None]]:
    named: Mapping[str, Path] = {name: image for name, image, _ in found}
    cases, missing, _ = match(unwrapped(masks) if masks.is_dir() else masks, named.items())
    if not cases:
        raise UsageError(f"{masks} holds no mask called like {missing[0]}: give --masks the folder of their masks.")
    by_name = {case.name: case.prediction for case in cases}
    return [(name, image, by_name.get(name)) for name, image, _ in found]
