"""One way in: from files, opened pictures and arrays to what the network reads.

Stage one, training end to end, prediction, tiles, figures and the Python API all decode here.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dsu.config import DSUNetConfig
from dsu.data.augmentation import Augmentation
from dsu.data.images import Box, mask_box, printable, read_bytes, read_image, resize_image, resize_mask, upright_rgb
from dsu.data.masks import MaskFormat
from dsu.errors import DsuError, UsageError

__all__ = ["Decoded", "ImageLike", "ImageProcessor", "SampleFiles", "open_image", "open_sample", "stack"]

ImageLike = Image.Image | NDArray[np.uint8] | str | Path
"""A picture of Pillow's, a file, or an array of uint8, (height, width, 3) or (height, width)."""


def open_image(image: ImageLike) -> Image.Image:
    """An image as RGB, upright; an opened picture is read exactly as its file.

    Raises:
        UnreadableImage: A file that cannot be read or decoded.
        UsageError: Something else than an image.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise UsageError(
            "An image must be a PIL image, a path or a uint8 array (height, width[, 3]): convert it first."
        )
    return upright_rgb(image)


class SampleFiles(NamedTuple):
    """The files of a sample, and what they hashed to (SHA-256)."""

    image: Path
    image_sha256: str
    mask: Path | None
    mask_sha256: str | None


def open_sample(files: SampleFiles, mask_format: MaskFormat) -> tuple[Image.Image, NDArray[np.uint8] | None]:
    """An image and its mask at their own sizes: what is decoded is what was hashed.

    Raises:
        UnreadableImage: A file that cannot be read or decoded.
        DsuError: A file that has changed since it was hashed.
    """
    image, image_sha256, mask, mask_sha256 = files
    picture = read_image(image, _read_known(image, image_sha256))
    return picture, None if mask is None else mask_format.read(mask, _read_known(mask, mask_sha256))


def _read_known(path: Path, sha256: str | None) -> bytes:
    data = read_bytes(path)
    if sha256 != hashlib.sha256(data).hexdigest():
        raise DsuError(
            f"{printable(path)} has changed since it was hashed: run the command again, after `dsu cache verify` if "
            f"its size and time are the old ones."
        )
    return data


@dataclass(frozen=True)
class Decoded:
    """One image as the network reads it, in uint8.

    Attributes:
        size: Width and height of the image, or of the tile, before it was resized.
        pixels: (S, S, 3), what Hiera reads.
        guide_pixels: (S', S', 3), what DINOv2 reads; None where it is not wanted.
        mask: (S, S); None without one.
    """

    size: tuple[int, int]
    pixels: NDArray[np.uint8]
    guide_pixels: NDArray[np.uint8] | None
    mask: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class ImageProcessor:
    """Brings images to the sizes that a network reads.

    Args:
        config: It gives both sizes.
        guide: Whether DINOv2's input is wanted, too.

    Example:
        >>> inputs = ImageProcessor(model.config)(["a.jpg", Image.open("b.png")])
        >>> logits = model(**inputs).logits
    """

    config: DSUNetConfig
    guide: bool = True

    def __call__(self, images: Sequence[ImageLike]) -> dict[str, Any]:
        """`pixel_values` (B, 3, S, S) and `guide_values` (B, 3, S', S'), uint8: what the network's `forward` takes."""
        decoded = [self.fit(open_image(image)) for image in images]
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
        """Cut, augment and resize an RGB image, and alike its mask (H, W), whose size may be another one."""
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


def stack(arrays: Sequence[NDArray[Any] | None]) -> Tensor | None:
    """Arrays of one shape as one tensor; None where there are none."""
    present = [array for array in arrays if array is not None]
    if not present:
        return None
    if len(present) != len(arrays):
        raise DsuError("Some samples have a mask and some have none: complete the masks or leave them all away.")
    return torch.from_numpy(np.stack(present))
