"""Read a split for a check: every image and mask once, and each mask again once its format is known."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageStat

from dsu.data.groups import ImageSignature
from dsu.data.images import (
    FEW_VALUES,
    Depth,
    ImageHead,
    MaskKind,
    UnreadableImage,
    choose_depth,
    or_unreadable,
    pixels_sha256,
    raw_mask,
    read_bytes,
    read_image_and_head,
    resize_mask,
)
from dsu.data.masks import MaskFacts, MaskFormat, check_mask, choose_mask_format, mask_facts
from dsu.data.pairing import Pair, Split
from dsu.errors import UsageError
from dsu.progress import SILENT, Progress, in_threads

HALF: Final = 128
"""Grey level from which a mask's pixel counts as foreground in a check."""

_MODES: Final = {
    **{"L": "grey", "LA": "grey", "1": "1 bit", "P": "palette", "PA": "palette"},
    **{"RGBA": "RGB", "F": "float"},
}
"""Pillow's modes in words; transparency is described separately."""

_READ_AS: Final = {
    "RGB": "unchanged",
    "RGBA": "unchanged",
    "L": "grey, the same in all three channels",
    "LA": "grey, the same in all three channels",
    "1": "black and white",
    "P": "the palette's colours",
    "PA": "the palette's colours",
    "CMYK": "converted to RGB, without its colour profile",
}
"""How `dsu.data.images.read_image` reads an image with 8 bits, by Pillow's mode."""

Size = tuple[int, int]
"""Width and height in pixels, upright."""


@dataclass(frozen=True)
class Storage:
    """How a file stores its image.

    Attributes:
        format: Pillow's name: "JPEG", "PNG".
        mode: Pillow's name: "RGB", "L" (8-bit grey), "I;16" (16-bit grey), "P" (palette), "RGBA", "CMYK".
        alpha: Whether it may have transparency.
        turned: Whether EXIF rotates or mirrors it.
        frames: Whether it contains several frames.
    """

    format: str
    mode: str
    alpha: bool
    turned: bool
    frames: bool

    @property
    def deep(self) -> bool:
        """Whether it is grey with more than 8 bits."""
        return self.mode in ("I", "F") or self.mode.startswith("I;16")

    @property
    def kind(self) -> str:
        """`PNG, grey, alpha`: the format and what is remarkable."""
        mode = _MODES.get(self.mode, "16-bit grey" if self.deep else self.mode)
        extras = (("alpha", self.alpha), ("rotated by EXIF", self.turned), ("several frames", self.frames))
        return ", ".join([self.format, mode, *(name for name, there in extras if there)])

    def read_as(self, depth: Depth | None) -> str:
        """How `dsu.data.images.read_image` reads it with this black and white point."""
        extras = (
            ("alpha dropped", self.alpha),
            ("rotated upright", self.turned),
            ("first frame only", self.frames),
        )
        step = _READ_AS.get(self.mode, "converted to RGB")
        if self.deep and depth is not None:
            step = f"scaled to 8 bits: {depth[0]:g} is black and {depth[1]:g} white"
        return ", ".join([step, *(name for name, there in extras if there)])


@dataclass(frozen=True)
class MaskFile:
    """A mask before the format of its set is known."""

    path: Path
    storage: Storage
    size: Size
    facts: MaskFacts


@dataclass(frozen=True)
class Sample:
    """One image, and its mask if its split has masks.

    Attributes:
        name: Name in its split.
        image: The file.
        storage: How the file stores the image.
        head: The image's size and orientation, and the range of raw values if it has more than 8 bits.
        contrast: Standard deviation of its grey levels, 0 to 127.5.
        brightest: Maximum grey level, 0 to 255.
        signature: For comparison with other images.
        mask: Facts about the mask.
    """

    name: str
    image: Path
    storage: Storage
    head: ImageHead
    contrast: float
    brightest: int
    signature: ImageSignature
    mask: MaskFile | None

    @property
    def size(self) -> Size:
        """The image's size."""
        return self.head.size


@dataclass(frozen=True)
class Foreground:
    """The content of a mask, read in its set's format.

    Attributes:
        share: Fraction of its pixels that are foreground, 0 to 1.
        soft: Fraction of its pixels between black and white.
        border: Fraction of foreground in its outermost rows and columns.
        objects: Number of connected foreground regions (8-connected).
        vanished: Number of them without any foreground pixel at the network's input size.
        left: Number of foreground pixels at the network's input size.
        sha256: SHA-256 of its grey levels in this format.
    """

    share: float
    soft: float
    border: float
    objects: int
    vanished: int
    left: int
    sha256: str


@dataclass(frozen=True)
class Masked:
    """A sample whose mask could be read: the sample, facts about the file, and the mask's content."""

    sample: Sample
    facts: MaskFacts
    foreground: Foreground


@dataclass(frozen=True)
class SplitCheck:
    """The content of a split.

    Attributes:
        split: The paired and unpaired files.
        samples: Pairs with two readable files; only images if there are no masks.
        unreadable: Files that stage one leaves out, with the reason.
        depth: Black and white point of images with more than 8 bits; None without any.
        values: Number of pixels for each raw mask value, without masks of very many values (16-bit greys).
        mask_format: How the masks are read; None if there are no masks or no format fits.
        refusal: Why no format fits.
        masked: The samples with the content of their masks in this format.
    """

    split: Split
    samples: tuple[Sample, ...]
    unreadable: tuple[tuple[Path, str], ...]
    depth: Depth | None
    values: Counter[int]
    mask_format: MaskFormat | None
    refusal: str | None
    masked: tuple[Masked, ...]

    @property
    def name(self) -> str:
        """The split's."""
        return self.split.name

    @property
    def trains(self) -> bool:
        """Whether it is a training split."""
        return self.split.kind != "test"

    @property
    def masks(self) -> list[MaskFacts]:
        """Facts about each mask's file."""
        return [sample.mask.facts for sample in self.samples if sample.mask]


def read_split(
    split: Split,
    side: int,
    foreground: Sequence[int] | None = None,
    depth: Depth | None = None,
    progress: Progress = SILENT,
) -> SplitCheck:
    """Read every image and mask of a split, one per thread at a time.

    Args:
        split: What to read.
        side: The network's input size in pixels, at which objects are searched for again.
        foreground: Raw mask values that are foreground, if the user gave them.
        depth: Black and white point of images with more than 8 bits, if known; else chosen from all of them, which are
            then read again.
        progress: Receives progress.
    """
    samples: list[Sample] = []
    unreadable: list[tuple[Path, str]] = []
    values: Counter[int] = Counter()
    read = partial(_read_sample, split=split.name, opaque=foreground is not None)
    look = or_unreadable(partial(read, depth=depth))
    for seen in in_threads(look, split.pairs, f"reading {split.name}", progress):
        if isinstance(seen, UnreadableImage):
            unreadable.append((seen.path, seen.reason))
        else:
            samples.append(seen[0])
            values.update(seen[1])
    if depth is None and (depth := choose_depth(one.head.extent for one in samples if one.head.extent)):
        deep = {sample.name for sample in samples if sample.head.extent}
        pairs_of_deep = [pair for pair in split.pairs if pair.name in deep]
        again = in_threads(partial(read, depth=depth), pairs_of_deep, f"scaling {split.name}", progress)
        scaled = {sample.name: sample for sample, _ in again}
        samples = [scaled.get(sample.name, sample) for sample in samples]
    pairs = [(sample, sample.mask) for sample in samples if sample.mask]
    mask_format, refusal = None, None
    masked: list[Masked] = []
    if pairs:
        try:
            mask_format = choose_mask_format([mask.facts for _, mask in pairs], foreground)
        except UsageError as error:
            refusal = str(error)
    if mask_format:

        def work(pair: tuple[Sample, MaskFile], mask_format: MaskFormat = mask_format) -> Foreground:
            return measure(pair[1].path, mask_format, side, pair[0].head)

        marked = in_threads(work, pairs, f"measuring masks of {split.name}", progress, unit="masks")
        masked = [Masked(sample, mask.facts, one) for (sample, mask), one in zip(pairs, marked, strict=True)]
    return SplitCheck(split, tuple(samples), tuple(unreadable), depth, values, mask_format, refusal, tuple(masked))


def _read_sample(pair: Pair, split: str, *, opaque: bool, depth: Depth | None) -> tuple[Sample, Counter[int]]:
    """Read an image and its mask before the mask format is known.

    Returns:
        The sample, and the number of the mask's pixels for each raw value; empty for a mask of very many values.

    Raises:
        UnreadableImage: As stage one, which leaves the pair out: a file that can't be read, or a mask that is a
            photograph (unless `opaque`) or has another aspect ratio than its image.
    """
    data = read_bytes(pair.image)
    image, head = read_image_and_head(pair.image, data, depth)
    grey = image.convert("L")
    mask, values = None, Counter[int]()
    if pair.mask is not None:
        mask, values = _read_mask_file(pair.mask, head, None if opaque else data)
    sample = Sample(
        name=pair.name,
        image=pair.image,
        storage=_read_storage(data),
        head=head,
        contrast=ImageStat.Stat(grey).stddev[0],
        brightest=int(grey.getextrema()[1]),  # type: ignore[arg-type]  # of one channel: two numbers
        signature=ImageSignature.of(image, split, pair.name, pair.image),
        mask=mask,
    )
    return sample, values


def measure(mask: Path, mask_format: MaskFormat, side: int, image: ImageHead | None = None) -> Foreground:
    """Read a mask and measure its content, at its own size and at the network's.

    `image` is the header of its image, see `dsu.data.images.raw_mask`. Raises `UnreadableImage`.
    """
    grey = mask_format.read(mask, image=image)
    small = resize_mask(grey, side) >= HALF
    foreground = grey >= HALF
    objects, vanished = _count_objects(foreground, small)
    border = np.concatenate((foreground[0], foreground[-1], foreground[:, 0], foreground[:, -1]))
    return Foreground(
        share=float(foreground.mean()),
        soft=float(((grey > 0) & (grey < 255)).mean()),
        border=float(border.mean()),
        objects=objects,
        vanished=vanished,
        left=int(small.sum()),
        sha256=pixels_sha256(grey),
    )


def _read_storage(data: bytes) -> Storage:
    """How a file stores its image, from its header only."""
    with Image.open(io.BytesIO(data)) as image:
        # A PNG would decode all its pixels to look for EXIF behind them, where hardly any program writes it.
        sought = image.format != "PNG" or "exif" in image.info
        return Storage(
            format=image.format or "unknown",
            mode=image.mode,
            alpha=image.has_transparency_data,
            turned=sought and image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1),
            frames=bool(getattr(image, "is_animated", False)),
        )


def _read_mask_file(path: Path, head: ImageHead, image: bytes | None) -> tuple[MaskFile, Counter[int]]:
    """A mask, rotated like its image; `head` and `image` are the image's, None for any content."""
    data = read_bytes(path)
    raw, kind = raw_mask(path, data, head)
    if image is not None:
        check_mask(path, raw, kind, is_image=image == data)
    return MaskFile(
        path, _read_storage(data), (raw.shape[1], raw.shape[0]), mask_facts(raw, kind, int(raw.max()))
    ), _value_counts(raw, kind)


def _count_objects(foreground: NDArray[np.bool_], small: NDArray[np.bool_]) -> tuple[int, int]:
    """The number of objects in (H, W), and the number of those without a pixel in the small mask (side, side)."""
    from scipy import ndimage  # type: ignore[import-untyped]

    labels, count = ndimage.label(foreground, np.ones((3, 3)))  # 8-connected
    if not count:
        return 0, 0
    height, width = foreground.shape
    kept = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST))
    return int(count), int(count - len(np.unique(labels[kept & foreground])))


def _value_counts(raw: NDArray[Any], kind: MaskKind) -> Counter[int]:
    if raw.dtype == np.uint8:  # counting is many times faster than sorting and needs no memory
        return Counter({value: count for value, count in enumerate(Image.fromarray(raw).histogram()) if count})
    values, counts = np.unique(raw, return_counts=True)
    # Photographs and 16-bit greys have more values; they are not counted value by value.
    if len(values) > (FEW_VALUES if kind == "colours" else 256):
        return Counter()
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))
