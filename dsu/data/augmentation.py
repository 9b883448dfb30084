"""Cached augmentations: an image and its mask turned, cut out and recoloured, for training sets of few images.

What a cached augmentation is follows from the sample's content and the view's number alone, so that it may be kept: a
training set of 100 images with `--views flips+8` has 1,200 views, and costs the disk of as many. All of it is done to
the image at its own size, before it is resized for the encoders.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from dsu.data.views import hashed_share

__all__ = ["RECIPE", "Augmentation", "augmentation"]

RECIPE: Final = 1
"""Counts the ways in which cached augmentations were ever made: part of fingerprints."""

_LEAST_SIDE: Final = 0.5
_RECOLOURING: Final = 0.3
_ATTEMPTS: Final = 8
_FOREGROUND: Final = 128


@dataclass(frozen=True)
class Augmentation:
    """What is done to an image, and but for the colours to its mask.

    Attributes:
        crops: parts to cut out, as shares of the image: its side and where it begins between left and right, top and
            bottom, 0 to 1. The first one that keeps some of the object is taken; none that does: the whole image.
        turns: quarter turns against the clock, 0 to 3.
        mirrored: whether left and right change places afterwards.
        brightness, contrast, saturation: factors, 1 changes nothing.
    """

    crops: tuple[tuple[float, float, float], ...]
    turns: int
    mirrored: bool
    brightness: float
    contrast: float
    saturation: float

    def apply(self, image: Image.Image, mask: NDArray[np.uint8] | None) -> tuple[Image.Image, NDArray[np.uint8] | None]:
        """The view of an RGB image and of its mask (H, W), whose size may be another one."""
        crop = next((crop for crop in self.crops if _keeps_object(mask, crop)), (1.0, 0.0, 0.0))
        image = image.crop(_box(crop, *image.size))
        for _ in range(self.turns):
            image = image.transpose(Image.Transpose.ROTATE_90)
        if self.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = ImageEnhance.Brightness(image).enhance(self.brightness)
        image = ImageEnhance.Contrast(image).enhance(self.contrast)
        image = ImageEnhance.Color(image).enhance(self.saturation)
        if mask is None:
            return image, None
        mask = np.rot90(_cut(mask, crop), self.turns)
        return image, np.ascontiguousarray(mask[:, ::-1] if self.mirrored else mask)


def augmentation(content: str, index: int) -> Augmentation:
    """Cached augmentation `index` (from 1) of the sample whose content has the hash `content`."""
    shares = [hashed_share(f"extra/{content}/{index}/{n}") for n in range(5 + 3 * _ATTEMPTS)]
    turning, mirroring, *colours = shares[:5]
    brightness, contrast, saturation = (1 + _RECOLOURING * (2 * share - 1) for share in colours)
    crops = tuple(
        (_LEAST_SIDE + (1 - _LEAST_SIDE) * side, x, y)
        for side, x, y in zip(shares[5::3], shares[6::3], shares[7::3], strict=True)
    )
    return Augmentation(crops, int(4 * turning), mirroring < 0.5, brightness, contrast, saturation)


def _box(crop: tuple[float, float, float], width: int, height: int) -> tuple[int, int, int, int]:
    side, x, y = crop
    wide, high = max(1, round(side * width)), max(1, round(side * height))
    left, top = round(x * (width - wide)), round(y * (height - high))
    return left, top, left + wide, top + high


def _cut(mask: NDArray[np.uint8], crop: tuple[float, float, float]) -> NDArray[np.uint8]:
    left, top, right, bottom = _box(crop, mask.shape[1], mask.shape[0])
    return mask[top:bottom, left:right]


def _keeps_object(mask: NDArray[np.uint8] | None, crop: tuple[float, float, float]) -> bool:
    """Whether some of the object is in a part; any part will do where there is no object."""
    if mask is None or mask.max(initial=0) < _FOREGROUND:
        return True
    return bool(_cut(mask, crop).max(initial=0) >= _FOREGROUND)
