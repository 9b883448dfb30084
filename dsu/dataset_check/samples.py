"""What one image and its mask hold, as far as a check asks: read once, and the mask once more when it can be read."""

import hashlib
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageStat
from scipy import ndimage  # type: ignore[import-untyped]

from dsu.data.images import FEW_VALUES, MaskKind, raw_mask, read_bytes, read_image, resize_mask
from dsu.data.masks import MaskFacts, MaskFormat, mask_facts
from dsu.data.overlaps import ImageSignature
from dsu.data.pairing import Pair

__all__ = ["HALF", "Foreground", "MaskFile", "Sample", "Storage", "look_at", "measure", "object_boxes"]

HALF: Final = 128
"""From this grey level on a pixel of a mask is foreground, wherever a check counts."""

_ORIENTATION: Final = 0x0112
_MOST_COUNTED: Final = 256
"""Masks of more distinct values are not counted value by value: they are 16-bit greys."""

_CORNERS_TOUCH: Final = np.ones((3, 3))

Size = tuple[int, int]
"""Width and height in pixels, upright."""


@dataclass(frozen=True)
class Storage:
    """How a file keeps its picture.

    Attributes:
        format: Pillow's name: "JPEG", "PNG".
        mode: Pillow's name: "RGB", "L" (8-bit grey), "I;16" (16-bit grey), "P" (palette), "RGBA", "CMYK".
        alpha: Whether some of it may be transparent.
        turned: Whether EXIF says that it is to be turned or mirrored.
        frames: Whether there are more pictures in it than the first.
    """

    format: str
    mode: str
    alpha: bool = False
    turned: bool = False
    frames: bool = False

    @property
    def deep(self) -> bool:
        """Whether it is grey of more than 8 bits."""
        return self.mode in ("I", "F") or self.mode.startswith("I;16")


@dataclass(frozen=True)
class MaskFile:
    """A mask before it is known how the masks of its set are read."""

    path: Path
    storage: Storage
    size: Size
    facts: MaskFacts


@dataclass(frozen=True)
class Sample:
    """One image, and its mask where its split has masks.

    Attributes:
        name: In its split.
        image: The file.
        storage: How it keeps the image.
        size: Of the image.
        contrast: Standard deviation of its grey levels, 0 to 127.5.
        brightest: The brightest of them, 0 to 255.
        signature: What it is compared with others by.
        mask: What is known of the mask.
    """

    name: str
    image: Path
    storage: Storage
    size: Size
    contrast: float
    brightest: int
    signature: ImageSignature
    mask: MaskFile | None


@dataclass(frozen=True)
class Foreground:
    """What a mask marks, read as the masks of its set are.

    Attributes:
        share: Of its pixels, those that are foreground, 0 to 1.
        soft: Of its pixels, those between black and white.
        border: Of the pixels of its outermost rows and columns, those that are foreground.
        objects: Connected areas of foreground; corners touch.
        vanished: How many of them leave no pixel of foreground at the network's size.
        left: How many pixels are foreground at the network's size.
        sha256: Of its grey levels, read so.
    """

    share: float
    soft: float
    border: float
    objects: int
    vanished: int
    left: int
    sha256: str


def look_at(pair: Pair, split: str) -> tuple[Sample, Counter[int]]:
    """Read an image and its mask, before it is known how the masks are read.

    Returns:
        What they hold, and how many of the mask's pixels have each raw value: none for a mask of very many values.

    Raises:
        UnreadableImage: As `dsu.data.images.read_image`, of either file.
    """
    data = read_bytes(pair.image)
    image = read_image(pair.image, data)
    grey = image.convert("L")
    mask, values = (None, Counter[int]()) if pair.mask is None else _mask_file(pair.mask)
    sample = Sample(
        name=pair.name,
        image=pair.image,
        storage=_storage(data),
        size=image.size,
        contrast=ImageStat.Stat(grey).stddev[0],
        brightest=int(grey.getextrema()[1]),  # type: ignore[arg-type]  # of one channel: two numbers
        signature=ImageSignature.of(image, split, pair.name, pair.image),
        mask=mask,
    )
    return sample, values


def measure(mask: Path, mask_format: MaskFormat, side: int) -> Foreground:
    """Read a mask and measure what it marks, at its own size and at the network's. Raises `UnreadableImage`."""
    grey = mask_format.read(mask)
    small = resize_mask(grey, side) >= HALF
    foreground = grey >= HALF
    objects, vanished = _count_objects(foreground, small)
    return Foreground(
        share=float(foreground.mean()),
        soft=float(((grey > 0) & (grey < 255)).mean()),
        border=_border_share(foreground),
        objects=objects,
        vanished=vanished,
        left=int(small.sum()),
        sha256=hashlib.sha256(f"{grey.shape} ".encode() + grey.tobytes()).hexdigest(),
    )


def _storage(data: bytes) -> Storage:
    """From the header alone, of a file that has been decoded before."""
    with Image.open(io.BytesIO(data)) as image:
        # A PNG would decode all its pixels to look for EXIF behind them, where hardly any program writes it.
        sought = image.format != "PNG" or "exif" in image.info
        return Storage(
            format=image.format or "unknown",
            mode=image.mode,
            alpha=image.has_transparency_data,
            turned=sought and image.getexif().get(_ORIENTATION, 1) not in (0, 1),
            frames=bool(getattr(image, "is_animated", False)),
        )


def _mask_file(path: Path) -> tuple[MaskFile, Counter[int]]:
    data = read_bytes(path)
    raw, kind = raw_mask(path, data)
    facts = mask_facts(raw, kind, int(raw.max()))
    return MaskFile(path, _storage(data), (raw.shape[1], raw.shape[0]), facts), _value_counts(raw, kind)


def object_boxes(foreground: NDArray[np.bool_]) -> list[tuple[slice, slice]]:
    """Rows and columns of every object, a connected area of (H, W) foreground."""
    labels, _ = ndimage.label(foreground, _CORNERS_TOUCH)
    boxes: list[tuple[slice, slice]] = ndimage.find_objects(labels)
    return boxes


def _count_objects(foreground: NDArray[np.bool_], small: NDArray[np.bool_]) -> tuple[int, int]:
    """How many objects (H, W) there are, and how many of them no pixel of the small mask (side, side) lies on."""
    labels, count = ndimage.label(foreground, _CORNERS_TOUCH)
    if not count:
        return 0, 0
    height, width = foreground.shape
    kept = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST))
    seen = np.unique(labels[kept & foreground])
    return int(count), int(count - len(seen))


def _border_share(foreground: NDArray[np.bool_]) -> float:
    border = (foreground[0], foreground[-1], foreground[:, 0], foreground[:, -1])
    return float(np.concatenate(border).mean())


def _value_counts(raw: NDArray[Any], kind: MaskKind) -> Counter[int]:
    if raw.dtype == np.uint8:  # counting is many times faster than sorting, and takes no memory
        return Counter({value: count for value, count in enumerate(Image.fromarray(raw).histogram()) if count})
    values, counts = np.unique(raw, return_counts=True)
    if len(values) > (FEW_VALUES if kind == "colours" else _MOST_COUNTED):
        return Counter()
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))
