"""The only path from files, opened images and arrays to the network's input.

Stage one, training end to end, prediction, tiles, figures and the Python API all decode here.

Cached augmentations, for small training sets, rotate, crop and recolour an image and its mask. They depend only on the
sample's content and the view's number, so they can be stored: a training set of 100 images with `--views flips+8` has
1,200 views, and needs the disk space of as many. They apply to the image at its own size, before it is resized for the
encoders.
"""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from dsu.config import DSUNetConfig, config_of
from dsu.data.images import (
    Box,
    Depth,
    mask_box,
    printable,
    read_bytes,
    read_image,
    read_image_and_head,
    resize_image,
    resize_mask,
    to_rgb,
)
from dsu.data.masks import MaskFormat
from dsu.data.views import hashed_share
from dsu.errors import DsuError, UsageError
from dsu.runner import ModelError, image_from_array

if TYPE_CHECKING:
    from torch import Tensor

DECODERS: Final = min(16, max(4, os.cpu_count() or 1))
"""Threads that decode images: one needs about 40 ms per image, and a GPU 5 ms for the rest."""

_MIN_CROP_SIDE: Final = 0.5
_MAX_COLOUR_CHANGE: Final = 0.3
_CROP_CANDIDATES: Final = 8
_FOREGROUND: Final = 128

ImageLike: TypeAlias = "Image.Image | NDArray[Any] | Tensor | str | Path"
"""A PIL image, a file, or an array or tensor of pixels; see `open_image`."""


def open_image(image: ImageLike, depth: Depth | None = None) -> Image.Image:
    """An image as upright RGB; an opened PIL image is read exactly as its file.

    Args:
        image: A path; a PIL image (its EXIF orientation and its depth are respected); or an array or tensor, (H, W),
            (H, W, C) or (C, H, W) with 1, 3 or 4 channels: uint8, uint16 (white is 65,535) or floats from 0 to 1.
        depth: For files and PIL images, see `dsu.data.images.read_image`.

    Raises:
        UnreadableImage: A file that cannot be read or decoded.
        UsageError: Anything else than an image, or floats outside [0, 1].
    """
    if isinstance(image, str | Path):
        if Path(image).is_dir():
            raise UsageError(f"{printable(Path(image))} is a folder: give its images, or use `dsu predict`.")
        return read_image(Path(image), depth=depth)
    if _is_tensor(image):
        image = (image.detach().float() if image.is_floating_point() else image).cpu().numpy()
    if isinstance(image, np.ndarray):
        try:
            image = image_from_array(image)
        except ModelError as error:
            raise UsageError(str(error)) from error
    if not isinstance(image, Image.Image):
        raise UsageError(
            f"A {type(image).__name__} is not an image: give a path, a PIL image, or an array or tensor of pixels."
        )
    return to_rgb(ImageOps.exif_transpose(image), depth)


def _is_tensor(image: object) -> "TypeGuard[Tensor]":
    """Without importing torch: a caller with a tensor has already imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(image, torch.Tensor)


def as_images(images: "ImageLike | Sequence[ImageLike]") -> Sequence[ImageLike]:
    """A sequence of images from one image or several; a 4-D array or tensor is several."""
    if _is_tensor(images) or isinstance(images, np.ndarray):
        one = images.ndim < 4
    else:
        one = isinstance(images, Image.Image | str | Path)
    return [images] if one else images  # type: ignore[list-item, return-value]


class SampleFiles(NamedTuple):
    """The files of a sample and their SHA-256."""

    image: Path
    image_sha256: str
    mask: Path | None
    mask_sha256: str | None


def open_sample(
    files: SampleFiles, mask_format: MaskFormat, depth: Depth | None = None
) -> tuple[Image.Image, NDArray[np.uint8] | None]:
    """An image and its mask at their own sizes, decoded from exactly the bytes that were hashed.

    Raises:
        UnreadableImage: A file that cannot be read or decoded.
        DsuError: A file that has changed since it was hashed.
    """
    image, image_sha256, mask, mask_sha256 = files
    picture, head = read_image_and_head(image, _read_hashed(image, image_sha256), depth)
    return picture, None if mask is None else mask_format.read(mask, _read_hashed(mask, mask_sha256), head)


def _read_hashed(path: Path, sha256: str | None) -> bytes:
    data = read_bytes(path)
    if sha256 != hashlib.sha256(data).hexdigest():
        raise DsuError(
            f"{printable(path)} has changed since it was hashed: run the command again; if its size and time are "
            "unchanged, run `dsu cache verify` first."
        )
    return data


# ---- cached augmentations ----


@dataclass(frozen=True)
class Augmentation:
    """The changes to an image and, except for the colours, to its mask.

    Attributes:
        crops: candidate crops, as fractions of the image from 0 to 1: side, and position between left and right, top
            and bottom. The first one that contains some of the object is used; if none does, the whole image.
        turns: quarter turns counterclockwise, 0 to 3.
        mirrored: whether it is then flipped horizontally.
        brightness, contrast, saturation: factors, 1 changes nothing.
    """

    crops: tuple[tuple[float, float, float], ...]
    turns: int
    mirrored: bool
    brightness: float
    contrast: float
    saturation: float

    def apply(self, image: Image.Image, mask: NDArray[np.uint8] | None) -> tuple[Image.Image, NDArray[np.uint8] | None]:
        """The view of an RGB image and of its mask (H, W), which may have another size."""
        crop = next((crop for crop in self.crops if _contains_object(mask, crop)), (1.0, 0.0, 0.0))
        image = image.crop(_crop_box(crop, *image.size))
        for _ in range(self.turns):
            image = image.transpose(Image.Transpose.ROTATE_90)
        if self.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = ImageEnhance.Brightness(image).enhance(self.brightness)
        image = ImageEnhance.Contrast(image).enhance(self.contrast)
        image = ImageEnhance.Color(image).enhance(self.saturation)
        if mask is None:
            return image, None
        mask = np.rot90(_crop_mask(mask, crop), self.turns)
        return image, np.ascontiguousarray(mask[:, ::-1] if self.mirrored else mask)


def augmentation(content: str, index: int) -> Augmentation:
    """Cached augmentation `index` (from 1) of the sample whose content has the hash `content`."""
    shares = [hashed_share(f"extra/{content}/{index}/{n}") for n in range(5 + 3 * _CROP_CANDIDATES)]
    turning, mirroring, *colours = shares[:5]
    brightness, contrast, saturation = (1 + _MAX_COLOUR_CHANGE * (2 * share - 1) for share in colours)
    crops = tuple(
        (_MIN_CROP_SIDE + (1 - _MIN_CROP_SIDE) * side, x, y)
        for side, x, y in zip(shares[5::3], shares[6::3], shares[7::3], strict=True)
    )
    return Augmentation(crops, int(4 * turning), mirroring < 0.5, brightness, contrast, saturation)


def _crop_box(crop: tuple[float, float, float], width: int, height: int) -> tuple[int, int, int, int]:
    side, x, y = crop
    wide, high = max(1, round(side * width)), max(1, round(side * height))
    left, top = round(x * (width - wide)), round(y * (height - high))
    return left, top, left + wide, top + high


def _crop_mask(mask: NDArray[np.uint8], crop: tuple[float, float, float]) -> NDArray[np.uint8]:
    left, top, right, bottom = _crop_box(crop, mask.shape[1], mask.shape[0])
    return mask[top:bottom, left:right]


def _contains_object(mask: NDArray[np.uint8] | None, crop: tuple[float, float, float]) -> bool:
    """Whether a crop contains some of the object; always true if there is no object."""
    if mask is None or mask.max(initial=0) < _FOREGROUND:
        return True
    return bool(_crop_mask(mask, crop).max(initial=0) >= _FOREGROUND)


# ---- network input ----


@dataclass(frozen=True)
class Decoded:
    """One image as the network's uint8 input.

    Attributes:
        size: Width and height of the image, or of the tile, before it was resized.
        pixels: (S, S, 3), Hiera's input.
        guide_pixels: (S', S', 3), DINOv2's input; None if not needed.
        mask: (S, S); None without one.
    """

    size: tuple[int, int]
    pixels: NDArray[np.uint8]
    guide_pixels: NDArray[np.uint8] | None
    mask: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class ImageProcessor:
    """Resizes images to a network's input sizes.

    Args:
        config: Gives both sizes; a model gives its config's.
        guide: Whether to prepare DINOv2's input too.

    Example:
        >>> inputs = ImageProcessor(model.config)(["a.jpg", Image.open("b.png")])
        >>> logits = model(**inputs).logits
    """

    config: DSUNetConfig
    guide: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", config_of(self.config))

    def __call__(self, images: "ImageLike | Sequence[ImageLike]") -> dict[str, Any]:
        """`pixel_values` (B, 3, S, S) and `guide_values` (B, 3, S', S'), uint8, for the network's `forward`.

        One image is a batch of one. Raises as `open_image`.
        """
        decoded = [self.fit(open_image(image)) for image in as_images(images)]
        given = {"pixel_values": stack([one.pixels for one in decoded])}
        given["guide_values"] = stack([one.guide_pixels for one in decoded])
        return {name: pixels.permute(0, 3, 1, 2) for name, pixels in given.items() if pixels is not None}

    def fit(
        self,
        picture: Image.Image,
        mask: NDArray[np.uint8] | None = None,
        box: Box | None = None,
        augmentation: Augmentation | None = None,
    ) -> Decoded:
        """Crop, augment and resize an RGB image and its mask (H, W), which may have another size."""
        if box is not None:
            if mask is not None:
                left, top, right, bottom = mask_box(box, picture.size, (mask.shape[1], mask.shape[0]))
                mask = mask[top:bottom, left:right]
            picture = picture.crop(box)
        if augmentation is not None:
            picture, mask = augmentation.apply(picture, mask)
        return Decoded(
            picture.size,
            resize_image(picture, self.config.hiera_size),
            resize_image(picture, self.config.dino_size) if self.guide else None,
            None if mask is None else resize_mask(mask, self.config.hiera_size),
        )


def stack(arrays: Sequence[NDArray[Any] | None]) -> "Tensor | None":
    """Arrays of one shape as one tensor; None if there are none."""
    present = [array for array in arrays if array is not None]
    if not present:
        return None
    if len(present) != len(arrays):
        raise DsuError("Some samples have a mask and some have none: give all masks or none.")
    import torch

    return torch.from_numpy(np.stack(present))
