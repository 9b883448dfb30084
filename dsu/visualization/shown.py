"""Which images a figure of features shows, and their masks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.data.datasets import Paths, find_samples
from dsu.data.decoding import open_image
from dsu.data.images import UnreadableImage
from dsu.data.masks import choose_mask_format, examine_mask
from dsu.data.pairing import Pair, named_images, pair_files, unwrapped
from dsu.errors import UsageError
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
        found += _spread(named, count)
    if len(found) > MOST:
        raise UsageError(f"{len(found)} images make too tall a figure: give {MOST} at most.")
    if masks is not None:
        found = _with_masks(found, masks)
    return _read(found)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """So many of the items, or all, from the first to the last, at even distances."""
    count = min(count, len(items))
    return [items[round(index * (len(items) - 1) / max(count - 1, 1))] for index in range(count)]


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


def _with_masks(found: Sequence[Pair], folder: Path) -> list[Pair]:
    masks = named_images(unwrapped(folder) if folder.is_dir() else folder)
    files = pair_files([pair.name for pair in found], masks)
    if not any(files):
        raise UsageError(f"{folder} holds no mask called like {found[0].name}: give --masks the folder of their masks.")
    return [replace(pair, mask=mask) for pair, mask in zip(found, files, strict=True)]
