"""Images of the same thing: groups that must stay in one split, and images in both training and test splits.

Groups are named by the user or found by appearance.

Perceptual hashes find similar images. A hash contains the signs of the lowest cosine waves of a small grey copy with
locally normalised brightness and contrast, so light, compression and size change little. To find crops, parts of one
image are compared with the whole of the other.

Measured on 303 images of 53 magnetic tiles, most of them photographed six times: of 748 pairs of the same tile, it
finds 730 and no false one, and chains of them join all 51 repeated tiles. The usual hash of 64 bits finds 395 before
its first false pair, the correlation of small copies 404.

A network tested on its training images looks better than it is, and copies have other names, formats and sizes. So
this compares decoded pixels, never names or files: exact copies by hash, and re-saved or resized images by the
correlation of small grey copies.
"""

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.data.images import UnreadableImage, or_unreadable, pixels_sha256, read_image
from dsu.data.pairing import Pair, Split
from dsu.errors import UsageError
from dsu.progress import SILENT, Progress, few, in_threads

_MAX_SHARE: Final = 0.25
"""Largest fraction of all images in a group found by appearance."""

_AGREEMENTS: Final = (0.36, 0.6, 0.8)
"""Hash agreements, from -1 to 1. From the first on, two images show the same thing: the least similar image of a tile
has 0.42 with another one of it, images of different things have at most 0.31 (MagneticTile, DUTS, CAMO). The others
split chains that are too long."""

_SIDE: Final = 64
"""Side of the small grey copies, in pixels."""
_WAVES: Final = 20
"""Cosine waves per side in a hash."""
_BLUR: Final = 2.0
"""Window for local brightness and contrast normalisation, in pixels of a copy."""
_FLAT: Final = 2.0
"""Standard deviation, in grey levels, below which a copy is too flat to compare."""

_TRIMS: Final = (0.0, 0.05, 0.12)
_PARTS: Final = (
    *((low, high) for low in _TRIMS for high in _TRIMS if low + high <= 0.2),
    *((trim, 0.0) for trim in (0.2, 0.3, 0.4, 0.5)),
    *((0.0, trim) for trim in (0.2, 0.3, 0.4, 0.5)),
)
"""Fractions of a side that may be cropped away at both ends; the first is none."""

_MAX_FOR_CROPS: Final = 2000
"""Up to this many images, crops are compared too: 2 s for 300, 60 s for 2,000."""
_ROWS: Final = 32
"""Images whose crops are compared at once."""

Thumbnail = NDArray[np.uint8]
"""A small grey copy of an image, squeezed to (64, 64)."""


# ---- by appearance ----


def thumbnail_of(image: Image.Image) -> Thumbnail:
    """The small grey copy of an image."""
    return np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX))


def empty_thumbnail() -> Image.Image:
    """A black copy, to fill with an image's tiles."""
    return Image.new("L", (_SIDE, _SIDE))


def paste_thumbnail(whole: Image.Image, tile: Image.Image, box: Sequence[int], size: tuple[int, int]) -> None:
    """Paste a tile, of any resolution, at its box (left, top, right, bottom) in its image (width, height)."""
    x, y, right, bottom = (round(_SIDE * at / of) for at, of in zip(box, 2 * size, strict=True))
    if right > x and bottom > y:
        whole.paste(tile.convert("L").resize((right - x, bottom - y), Image.Resampling.BOX), (x, y))


def max_group_size(images: int, largest_share: float = 1.0) -> int:
    """The largest group found by appearance among so many images: a larger one would leave nothing to split."""
    return max(2, int(images * min(_MAX_SHARE, largest_share)))


def find_similar(
    thumbnails: Mapping[str, Thumbnail], most: int, progress: Progress = SILENT
) -> tuple[list[list[str]], list[list[str]]]:
    """Find groups of images of the same thing by their appearance.

    Above 2,000 images, only whole images are compared, so crops are not found.

    Args:
        thumbnails: small copy of each image (`thumbnail_of`).
        most: largest group (`max_group_size`).
        progress: receives progress.

    Returns:
        Groups of two or more, and chains longer than `most`, of which only the closest images are in groups. Both
        are sorted.
    """
    from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

    names = sorted(thumbnails)
    if len(names) < 2:
        return [], []
    agree = _agreement(np.stack([thumbnails[name] for name in names]), progress)
    groups: list[list[str]] = []
    chains: list[list[str]] = []

    def take_apart(members: NDArray[np.int64], levels: Sequence[float]) -> None:
        _, labels = connected_components(agree[members][:, members] >= levels[0], directed=False)
        for part in (members[labels == label] for label in np.unique(labels)):
            if 1 < len(part) <= most:
                groups.append([names[index] for index in part])
            elif len(part) > 1:
                if levels == _AGREEMENTS:
                    chains.append([names[index] for index in part])
                if levels[1:]:
                    take_apart(part, levels[1:])

    take_apart(np.arange(len(names)), _AGREEMENTS)
    return sorted(groups), sorted(chains)


def _agreement(thumbnails: Thumbnail, progress: Progress) -> Any:
    """Hash agreement (N, N), 0 to 1, of (N, 64, 64) copies: of wholes with wholes and with crops."""
    from scipy import sparse  # type: ignore[import-untyped]

    evened = _normalise(thumbnails)
    waves = np.stack([_cosine_basis(*part) for part in (_PARTS if len(thumbnails) <= _MAX_FOR_CROPS else _PARTS[:1])])
    wholes = _hashes(evened, waves[:1])[:, 0]
    wholes[thumbnails.std(axis=(1, 2)) < _FLAT] = 0
    blocks = []
    with progress.task("comparing images", len(thumbnails)) as task:
        for start in range(0, len(thumbnails), _ROWS):
            parts = _hashes(evened[start : start + _ROWS], waves)
            parts[thumbnails[start : start + _ROWS].std(axis=(1, 2)) < _FLAT] = 0
            found = (parts @ wholes.T).max(axis=1) / wholes.shape[1]
            blocks.append(sparse.csr_matrix(np.where(found >= _AGREEMENTS[0], found, 0)))
            task.advance(len(parts))
    found = sparse.vstack(blocks, "csr")
    return found.maximum(found.T)


def _normalise(thumbnails: Thumbnail) -> NDArray[np.float32]:
    """Copies (N, 64, 64) with a mean of 0 and a deviation of 1 about each pixel."""
    from scipy import ndimage

    blur = (0, _BLUR, _BLUR)
    grey = thumbnails.astype(np.float32)
    grey -= ndimage.gaussian_filter(grey, blur, mode="nearest")
    return np.asarray(grey / (np.sqrt(ndimage.gaussian_filter(grey * grey, blur, mode="nearest")) + 1))


def _cosine_basis(low: float, high: float) -> NDArray[np.float32]:
    """The lowest waves (20, 64) on a side after cropping away a fraction at both ends."""
    start, stop = low * _SIDE, (1 - high) * _SIDE
    centres = np.arange(_SIDE) + 0.5
    inside = np.clip(np.minimum(centres + 0.5, stop) - np.maximum(centres - 0.5, start), 0, 1)
    phase = np.pi * (np.clip(centres, start, stop) - start) / (stop - start)
    return np.asarray(np.cos(np.arange(_WAVES)[:, None] * phase) * inside, np.float32)


def _hashes(evened: NDArray[np.float32], waves: NDArray[np.float32]) -> NDArray[np.float32]:
    """Hashes (N, P * P, 399) of -1 and 1 for all crops of (N, 64, 64) copies; `waves` are (P, 20, 64)."""
    parts, count, _ = waves.shape
    basis = waves.reshape(parts * count, -1)
    found = (basis @ evened @ basis.T).reshape(-1, parts, count, parts, count).transpose(0, 1, 3, 2, 4)
    found = found.reshape(-1, parts * parts, count * count)[..., 1:]
    return np.where(found > np.median(found, axis=-1, keepdims=True), np.float32(1), np.float32(-1))


# ---- by name ----


def named_groups(given: str, names: Collection[str], progress: Progress = SILENT) -> dict[str, str]:
    """The group of each image that has one.

    Args:
        given: a regular expression, whose bracketed parts (or else the whole match) identify a group; or a CSV file of
            lines `image,group`, images with or without extension.
        names: sample names of the images.
        progress: receives notes about names in no group and lines that name no image.

    Raises `UsageError` for an invalid expression or file, or one that names no image or an image twice.
    """
    found = (
        _groups_from_file(Path(given), names, progress)
        if given.lower().endswith(".csv")
        else _groups_from_pattern(given, names)
    )
    if not found:
        raise UsageError(f"--group {given} matches none of the images ({few(sorted(names))}): correct it.")
    alone = sorted(set(names) - found.keys())
    if alone:
        progress.say(
            f"--group {given} matches no group for {len(alone):,} images ({few(alone)}): each is its own group."
        )
    return found


def _groups_from_pattern(pattern: str, names: Iterable[str]) -> dict[str, str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"--group {pattern} is not a regular expression ({error}): give one such as '^[^_]+', or a .csv file."
        ) from error
    matches = {name: compiled.search(name) for name in names}
    return {name: "\0".join(part or "" for part in one.groups() or (one[0],)) for name, one in matches.items() if one}


def _groups_from_file(path: Path, names: Collection[str], progress: Progress) -> dict[str, str]:
    try:
        rows = [row for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if any(row)]
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 CSV"
        raise UsageError(f"--group {path} can't be read ({reason}): give a file of lines `image,group`.") from error
    known = {plain: name for name in names for plain in (name, Path(name).name)} | {name: name for name in names}
    found: dict[str, str] = {}
    strangers = []
    for number, row in enumerate(rows, 1):
        if len(row) < 2:
            raise UsageError(f"--group {path} has no comma in line {number} ({row[0][:40]}): write `image,group`.")
        image, group = row[0].strip(), row[1].strip()
        name = known.get(image) or known.get(str(Path(image).with_suffix("")))
        if name is None:
            strangers += [image] if number > 1 else []  # the first line may be a header
        elif found.setdefault(name, group) != group:
            raise UsageError(f"--group {path} has {name} in two groups ({found[name]}, {group}): keep one of them.")
    if strangers:
        progress.say(f"--group {path} names {len(strangers):,} that are not images here ({few(strangers)}).")
    return found


# ---- in training and test splits ----

NEAR: Final = 0.97
"""From this correlation on, two small copies count as the same image. Among the 1.3 million pairs of 1,629 images of
DUTS and CAMO, different photographs reach at most 0.90; re-saved and resized ones exceed 0.99."""

_SMALL: Final = 32
"""Side of the small copies, in pixels."""

_COMPARED: Final = 2048
"""Training images compared at once."""


@dataclass(frozen=True)
class ImageSignature:
    """One image, reduced to what is compared.

    Attributes:
        split, name, path: its split, sample and file.
        sha256: of its decoded pixels and its size.
        small: its small grey copy, (1024,) float32 with mean 0 and norm 1; all 0 for a flat image.
        thumbnail: small copy to find groups by.
    """

    split: str
    name: str
    path: Path
    sha256: str
    small: NDArray[np.float32]
    thumbnail: Thumbnail

    @classmethod
    def of(cls, image: Image.Image, split: str, name: str, path: Path) -> "ImageSignature":
        """The signature of a decoded RGB image (`dsu.data.images.read_image`)."""
        small = np.asarray(image.convert("L").resize((_SMALL, _SMALL), Image.Resampling.BOX), np.float32).ravel()
        small = small - small.mean()
        small = np.zeros_like(small) if small.std() < _FLAT else small / np.linalg.norm(small)
        return cls(split, name, path, pixels_sha256(np.asarray(image)), small, thumbnail_of(image))


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


def find_overlaps(splits: Sequence[Split], progress: Progress = SILENT) -> Overlaps:
    """Compare every image of the training splits with every image of the test splits.

    Args:
        splits: of any kinds; those neither for training nor for testing are ignored.
        progress: receives progress.
    """
    read: dict[str, list[ImageSignature]] = {"train": [], "test": []}
    broken: list[str] = []
    for split in (split for split in splits if split.kind in read):
        read_pair = or_unreadable(partial(_signature, split=split.name))
        found = list(in_threads(read_pair, split.pairs, f"reading {split.name}", progress))
        read[split.kind] += [one for one in found if isinstance(one, ImageSignature)]
        broken += [str(one) for one in found if isinstance(one, UnreadableImage)]
    exact, near = overlapping(read["train"], read["test"])
    count = Counter(image.split for images in read.values() for image in images)
    return Overlaps(exact, near, {name: count[name] for split in splits if count[name := split.name]}, tuple(broken))


def overlapping(
    train: Sequence[ImageSignature], test: Sequence[ImageSignature]
) -> tuple[tuple[Overlap, ...], tuple[Overlap, ...]]:
    """Pairs of training and test images with the same content: `exact` and `near` of `Overlaps`."""
    by_content = _by_content(train)
    exact = [Overlap(other, image, 1.0) for image in test for other in by_content.get(image.sha256, ())]
    near = [one for one in _near_duplicates(train, test) if one.train.sha256 != one.test.sha256]
    return tuple(exact), tuple(sorted(near, key=lambda overlap: -overlap.likeness))


def copies(images: Iterable[ImageSignature]) -> list[list[ImageSignature]]:
    """Groups of two or more images with identical pixels, in order of appearance."""
    return [group for group in _by_content(images).values() if len(group) > 1]


def _by_content(images: Iterable[ImageSignature]) -> dict[str, list[ImageSignature]]:
    groups = defaultdict(list)
    for image in images:
        groups[image.sha256].append(image)
    return groups


def _signature(pair: Pair, split: str) -> ImageSignature:
    return ImageSignature.of(read_image(pair.image), split, pair.name, pair.image)


def _near_duplicates(train: Sequence[ImageSignature], test: Sequence[ImageSignature]) -> Iterator[Overlap]:
    if not train or not test:
        return
    tested = np.stack([picture.small for picture in test])
    for start in range(0, len(train), _COMPARED):
        likeness = np.stack([picture.small for picture in train[start : start + _COMPARED]]) @ tested.T
        for row, column in np.argwhere(likeness >= NEAR):
            yield Overlap(train[start + row], test[column], min(float(likeness[row, column]), 1.0))
