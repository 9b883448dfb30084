"""Users' folders made for a test, and the findings of a check in them."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.data.datasets import Paths
from dsu.dataset_check import DatasetCheck, Finding, check_dataset

__all__ = ["SIZE", "Mask", "boxed", "check", "finding", "photo", "plain", "write"]

Mask = NDArray[Any] | Image.Image

SIZE: Final = (120, 90)


def photo(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A structured image, different for every seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def boxed(*values: int, size: tuple[int, int] = SIZE, ground: int = 0) -> NDArray[np.uint8]:
    """A mask with one box per value, side by side."""
    mask = np.full(size[::-1], ground, np.uint8)
    for index, value in enumerate(values):
        mask[30:60, 10 + 30 * index : 35 + 30 * index] = value
    return mask


def write(folder: Path, pairs: dict[str, tuple[Image.Image, Mask | None]], kind: str = ".png") -> Path:
    """Write a user's folder: images with these names, and masks if there are any."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, (image, mask) in pairs.items():
        image.save(folder / "images" / name)
        if mask is not None:
            (folder / "masks").mkdir(exist_ok=True)
            picture = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
            picture.save(folder / "masks" / f"{Path(name).stem}{kind}")
    return folder


def plain(count: int, start: int = 0) -> dict[str, tuple[Image.Image, Mask | None]]:
    """Sound pairs: a check finds nothing, except that they are few."""
    return {f"plain{start + index}.png": (photo(start + index), boxed(255)) for index in range(count)}


def check(folder: Path, **options: Any) -> DatasetCheck:
    """Run `dsu datasets check FOLDER`."""
    return check_dataset(str(folder), Paths(folder.parent), **options)


def finding(found: DatasetCheck, key: str) -> Finding:
    """The only finding with this key."""
    [one] = [finding for finding in found.findings if finding.key == key]
    return one
