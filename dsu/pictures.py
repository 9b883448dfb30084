"""Overlays of masks on images, and cutouts of objects (`dsu.drawing` draws pages of many images)."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter

from dsu.data.images import read_image, read_mask, read_rgba
from dsu.errors import DsuError, UsageError
from dsu.thresholds import DEFAULT_THRESHOLD, level_of

Picture = Image.Image | NDArray[Any] | Path
"""An image: Pillow's, a file, or an array (H, W) or (H, W, 3) of uint8 0..255, floats 0..1 or booleans."""

CELL_GROUND: Final = (228, 230, 233)
"""The background colour of transparent pixels, and of cells that an image does not fill."""


def overlay(image: Picture, mask: Picture, threshold: float = DEFAULT_THRESHOLD) -> Image.Image:
    """Overlay a mask on its image: pixels at or above the threshold are tinted in proportion to their value, and
    outlined.

    Args:
        image: (H, W, 3) or (H, W).
        mask: (H, W), of the same size.
        threshold: in [0, 1]; pixels below it keep the image's colour.

    Returns:
        An RGB image (H, W).

    Raises:
        DsuError: the sizes differ.
    """
    ground, grey = _load_pair(image, mask)
    # Pink is rare in photographs, and visible on dark and light backgrounds.
    colour = Image.new("RGB", ground.size, (255, 32, 140))
    least = level_of(threshold)
    tinted = Image.composite(colour, ground, grey.point(lambda value: round(value * 0.45) if value >= least else 0))
    # A blurred silhouette is strictly between black and white only along its edge. (A maximum filter gives the same,
    # but takes minutes on photographs of 50 megapixels.)
    line = max(1.0, min(ground.size) / 400)
    silhouette = grey.point(lambda value: 255 if value >= least else 0)
    edge = silhouette.filter(ImageFilter.BoxBlur(line)).point(lambda value: 255 if 0 < value < 255 else 0)
    return Image.composite(colour, tinted, edge)


def cutout(image: Picture, mask: Picture, threshold: float = DEFAULT_THRESHOLD) -> Image.Image:
    """Cut the object out: the image as RGBA (H, W) with the mask, (H, W) of the same size, as its opacity.

    Pixels below the threshold, in [0, 1], become transparent, and transparent ones stay so. Transparent pixels are
    black, so the background can't be recovered.

    Raises:
        DsuError: the sizes differ.
    """
    ground = read_rgba(image) if isinstance(image, Path) else _to_pillow(image)
    rgb, grey = _load_pair(ground.convert("RGB"), mask)
    least = level_of(threshold)
    grey = grey.point(lambda value: value if value >= least else 0)
    alpha = ImageChops.multiply(ground.getchannel("A"), grey) if ground.mode == "RGBA" else grey
    cut = Image.composite(rgb, Image.new("RGB", rgb.size), alpha.point(lambda value: 255 if value else 0))
    cut.putalpha(alpha)
    return cut


def _load_pair(image: Picture, mask: Picture) -> tuple[Image.Image, Image.Image]:
    ground = as_rgb(image)
    grey = Image.fromarray(read_mask(mask)) if isinstance(mask, Path) else _to_pillow(mask).convert("L")
    if ground.size != grey.size:
        raise DsuError(
            f"the image has {ground.width}x{ground.height} pixels and the mask {grey.width}x{grey.height}: resize "
            "one to the other's size."
        )
    return ground, grey


def as_rgb(picture: Picture) -> Image.Image:
    """A new RGB image (H, W); transparent pixels show `CELL_GROUND`. The given image does not change.

    Raises:
        UnreadableImage: A file that cannot be read or decoded.
    """
    if isinstance(picture, Path):
        return read_image(picture)
    image = _to_pillow(picture)
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, CELL_GROUND), image).convert("RGB")


def _to_pillow(picture: Image.Image | NDArray[Any]) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if picture.dtype == np.uint8:
        return Image.fromarray(picture)
    return Image.fromarray((np.clip(picture.astype(np.float64), 0, 1) * 255).round().astype(np.uint8))


def page_files(path: Path, pages: int = 1) -> list[Path]:
    """The files for this number of pages: one PDF, or the PNGs `a.png`, `a-2.png`, ...

    Raises:
        UsageError: the extension is neither .png nor .pdf.
    """
    if path.suffix.lower() not in (".png", ".pdf"):
        raise UsageError(
            f"{path} can't be drawn as {path.suffix or 'a file without extension'}: give a .png or a .pdf."
        )
    if path.suffix.lower() == ".pdf":
        return [path]
    return [path, *(path.with_name(f"{path.stem}-{page}{path.suffix}") for page in range(2, pages + 1))]
