"""Find images in both training and test splits: identical pixels, or near-duplicates.

A network tested on its training images looks better than it is, and copies have other names, formats and sizes. So this
compares decoded pixels, never names or files: exact copies by hash, and re-saved or resized images by the correlation
of small grey copies.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.data.groups import Look, look_at
from dsu.data.images import UnreadableImage, or_unreadable, pixels_sha256, read_image
from dsu.data.pairing import Split
from dsu.progress import SILENT, Progress, in_threads

__all__ = ["NEAR", "ImageSignature", "Overlap", "Overlaps", "compare", "copies", "find_overlaps"]

NEAR: Final = 0.97
"""From this correlation on, two small copies count as the same image. Among the 1.3 million pairs of 1,629 images of
DUTS and CAMO, different photographs reach at most 0.90; re-saved and resized ones exceed 0.99."""

_SIDE: Final = 32
"""Side of the small copies, in pixels."""

_FLAT: Final = 2.0
"""Below this standard deviation, in grey levels, a small copy is flat and resembles any other."""

_ROWS: Final = 2048
"""Training images compared at once."""


@dataclass(frozen=True)
class ImageSignature:
    """One image, reduced to what is compared.

    Attributes:
        split, name, path: its split, sample and file.
        sha256: of its decoded pixels and its size.
        small: its small grey copy, (1024,) float32 with mean 0 and norm 1; all 0 for a flat image.
        look: small copy for `dsu.data.groups`.
    """

    split: str
    name: str
    path: Path
    sha256: str
    small: NDArray[np.float32]
    look: Look

    @classmethod
    def of(cls, image: Image.Image, split: str, name: str, path: Path) -> "ImageSignature":
        """The signature of a decoded RGB image (`dsu.data.images.read_image`)."""
        small = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32).ravel()
        small = small - small.mean()
        flat = small.std() < _FLAT
        small = np.zeros_like(small) if flat else small / np.linalg.norm(small)
        return cls(split, name, path, pixels_sha256(np.asarray(image)), small, look_at(image))


@dataclass(frozen=True)
class Overlap:
    """A training image and a test image with the same content.

    Attributes:
        train, test: the two.
        likeness: correlation of their small copies; 1 if all pixels are equal.
    """

    train: ImageSignature
    test: ImageSignature
    likeness: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: split, sample and file of both."""
        return {
            "train": self.train.split,
            "train_name": self.train.name,
            "train_image": str(self.train.path),
            "test": self.test.split,
            "test_name": self.test.name,
            "test_image": str(self.test.path),
            "likeness": self.likeness,
        }


@dataclass(frozen=True)
class Overlaps:
    """Images in both training and test splits.

    Attributes:
        exact: pairs with identical pixels.
        near: near-duplicates that are not exact, most similar first.
        images: number compared, by split.
        broken: a sentence for each unreadable image, which was skipped.
    """

    exact: tuple[Overlap, ...]
    near: tuple[Overlap, ...]
    images: dict[str, int]
    broken: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "exact": [overlap.to_json() for overlap in self.exact],
            "near": [overlap.to_json() for overlap in self.near],
            "images": self.images,
            "broken": list(self.broken),
        }


def find_overlaps(splits: Sequence[Split], progress: Progress = SILENT, workers: int | None = None) -> Overlaps:
    """Compare every image of the training splits with every image of the test splits.

    Args:
        splits: of any kinds; those neither for training nor for testing are ignored.
        progress: receives progress.
        workers: images decoded in parallel; by default one per processor, at most 16.
    """
    read: dict[str, list[ImageSignature]] = {"train": [], "test": []}
    broken: list[str] = []
    for split in (split for split in splits if split.kind in read):
        work = [(split.name, pair.name, pair.image) for pair in split.pairs]
        found = list(in_threads(_read, work, f"reading {split.name}", progress, workers))
        read[split.kind] += [one for one in found if isinstance(one, ImageSignature)]
        broken += [str(one) for one in found if isinstance(one, UnreadableImage)]
    exact, near = compare(read["train"], read["test"])
    count = Counter(image.split for images in read.values() for image in images)
    return Overlaps(exact, near, {name: count[name] for split in splits if count[name := split.name]}, tuple(broken))


def compare(
    train: Sequence[ImageSignature], test: Sequence[ImageSignature]
) -> tuple[tuple[Overlap, ...], tuple[Overlap, ...]]:
    """Pairs of training and test images with the same content: `exact` and `near` of `Overlaps`."""
    by_content = _by_content(train)
    exact = [Overlap(other, image, 1.0) for image in test for other in by_content.get(image.sha256, ())]
    near = [one for one in _near(train, test) if one.train.sha256 != one.test.sha256]
    return tuple(exact), tuple(sorted(near, key=lambda overlap: -overlap.likeness))


def copies(images: Iterable[ImageSignature]) -> list[list[ImageSignature]]:
    """Groups of two or more images with identical pixels, in order of appearance."""
    return [group for group in _by_content(images).values() if len(group) > 1]


def _by_content(images: Iterable[ImageSignature]) -> dict[str, list[ImageSignature]]:
    groups = defaultdict(list)
    for image in images:
        groups[image.sha256].append(image)
    return groups


@or_unreadable
def _read(work: tuple[str, str, Path]) -> ImageSignature:
    split, name, path = work
    return ImageSignature.of(read_image(path), split, name, path)


def _near(train: Sequence[ImageSignature], test: Sequence[ImageSignature]) -> Iterator[Overlap]:
    if not train or not test:
        return
    tested = np.stack([picture.small for picture in test])
    for start in range(0, len(train), _ROWS):
        likeness = np.stack([picture.small for picture in train[start : start + _ROWS]]) @ tested.T
        for row, column in np.argwhere(likeness >= NEAR):
            yield Overlap(train[start + row], test[column], min(float(likeness[row, column]), 1.0))
