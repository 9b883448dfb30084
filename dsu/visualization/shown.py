"""Which images a figure of features shows, and their masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.data.datasets import find_dataset
from dsu.data.folders import find_images, unwrapped
from dsu.data.images import IMAGE_SUFFIXES, UnreadableImage, read_image
from dsu.data.masks import choose_mask_format, examine_mask
from dsu.errors import UsageError
from dsu.evaluation.evaluate import match
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


def find_shown(
    sources: Sequence[str], masks: Path | None, count: int, *, data_root: Path, progress: Progress = SILENT
) -> tuple[list[Shown], list[str]]:
    """Read the images that a user means, with their masks.

    Args:
        sources: Image files; folders of images, or of images and masks; benchmarks by name. Where there are test
            splits, these are meant.
        masks: A folder of masks of the same names (paths below a folder, without ending).
        count: How many images of each folder are taken, evenly spread: neighbours are often alike.
        data_root: Where benchmarks lie.
        progress: Who is told of images left out.

    Returns:
        The images; and a sentence for each that was skipped, since it or its mask cannot be read.

    Raises:
        UsageError: More than `MOST` images, a source that is absent or has none, or a folder of masks that has none
            of these images.
        UnreadableImage: None of the images can be read.
    """
    found: list[_Named] = []
    for source in sources:
        named = _named(source, data_root)
        if len(named) > count:
            progress.say(f"{source}: {count} of {len(named):,} images (--count shows more)")
        found += _spread(named, count)
    if len(found) > MOST:
        raise UsageError(f"{len(found)} images make too tall a figure: give {MOST} at most.")
    if masks is not None:
        found = _with_masks(found, masks)
    return _read(found)


_Named = tuple[str, Path, Path | None]
"""A name, an image and its mask."""


def _spread(items: Sequence[T], count: int) -> list[T]:
    """So many of the items, or all, from the first to the last, at even distances."""
    count = min(count, len(items))
    return [items[round(index * (len(items) - 1) / max(count - 1, 1))] for index in range(count)]


def _named(source: str, data_root: Path) -> list[_Named]:
    """What a file, a folder or a benchmark's name means; of a folder that is no data set the images below it."""
    path = Path(source)
    if path.is_file() or (path.suffix.lower() in IMAGE_SUFFIXES and not path.exists()):
        return [(path.stem, image, None) for image in find_images(path)]
    try:
        splits = find_dataset(source, data_root)
    except UsageError:
        if not path.is_dir():
            raise
        return [(image.relative_to(path).with_suffix("").as_posix(), image, None) for image in find_images(path)]
    chosen = [split for split in splits if split.kind != "train"] or splits
    return [(pair.name, pair.image, pair.mask) for split in chosen for pair in split.pairs]


def _read(found: Sequence[_Named]) -> tuple[list[Shown], list[str]]:
    """Images and masks, these read by one rule; and why others cannot be."""
    opened, broken = [], []
    for name, path, mask in found:
        try:
            opened.append((name, read_image(path), mask, examine_mask(mask)[1] if mask else None))
        except UnreadableImage as error:
            broken.append(error)
    if broken and not opened:
        raise broken[0]
    mask_format = choose_mask_format([facts for *_, facts in opened if facts is not None])
    shown = [Shown(name, image, mask_format.read(mask) if mask else None) for name, image, mask, _ in opened]
    return shown, list(map(str, broken))


def _with_masks(found: Sequence[_Named], masks: Path) -> list[_Named]:
    named: Mapping[str, Path] = {name: image for name, image, _ in found}
    cases, missing, _ = match(unwrapped(masks) if masks.is_dir() else masks, named.items())
    if not cases:
        raise UsageError(f"{masks} holds no mask called like {missing[0]}: give --masks the folder of their masks.")
    by_name = {case.name: case.prediction for case in cases}
    return [(name, image, by_name.get(name)) for name, image, _ in found]
