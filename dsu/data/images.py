"""Read images and masks of all formats and bit depths as RGB and 8-bit grey, and resize them for the network."""

import hashlib
import io
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, Final, Literal, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from dsu.errors import DsuError
from dsu.runner import (
    FORMATS,
    IMAGE_SUFFIXES as IMAGE_SUFFIXES,
    MAX_PIXELS as MAX_PIXELS,
    WHITE_16 as WHITE_16,
    Box as Box,
    to_rgb as to_rgb,
)

P = ParamSpec("P")
T = TypeVar("T")

OTHER_PHOTOGRAPHS: Final = frozenset(
    {".heic", ".heif", ".avif", ".jxl", ".psd", ".tga", ".exr", ".hdr", ".jp2k", ".j2k"}
    | {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"}
)
"""Extensions of photograph formats that `dsu` does not read."""

MAX_BYTES: Final = 4 << 30
"""The largest file to read: an image of that many pixels is no larger, and a sparse file may claim any size."""

# Pillow warns above its own limit, too early for the largest photographs; what is too large is refused here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Some programs write long metadata or a large colour profile into a PNG; pixels have their own limit.
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20
PngImagePlugin.MAX_TEXT_MEMORY = 256 << 20

_WHITES: Final = (1.0, 255.0, 1023.0, 4095.0, 16383.0, float(WHITE_16))
FEW_VALUES: Final = 32
"""In practice, a label map has at most this many distinct values; a mask with soft edges or noise has more."""

# Grey masks that were once JPEGs have channels up to 14 apart (four in DUTS).
_COLOUR_NOISE: Final = 32

_ROTATIONS: Final[Mapping[int, Callable[[NDArray[Any]], NDArray[Any]]]] = {
    5: np.transpose,
    6: partial(np.rot90, k=-1),
    7: lambda mask: np.rot90(mask, 2).T,
    8: np.rot90,
}
"""How EXIF's orientations rotate pixels (H, W) stored sideways."""

Depth = tuple[float, float]
"""The black and white raw values of an image with more than 8 bits."""

MaskKind = Literal["grey", "deep", "indices", "colours"]
"""Type of a mask's raw values: 8-bit grey, 16-bit grey, indices of a coloured palette, colours 0xRRGGBB."""


class UnreadableImage(DsuError):  # noqa: N818 - named after the file's state
    """A file (`path`) that can't be read or decoded as an image, and the `reason`.

    `remedy` says what to do, if not the usual for a damaged image.
    """

    def __init__(self, path: Path, reason: str, remedy: str = "save it again as PNG or JPEG, or remove it") -> None:
        super().__init__(path, reason, remedy)  # from which unpickling rebuilds it
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self) -> str:
        return f"{printable(self.path)} cannot be read as an image ({self.reason}): {self.remedy}."


def or_unreadable(read: Callable[P, T]) -> Callable[P, T | UnreadableImage]:
    """`read`, but returns the error instead of raising it, so one unreadable image does not stop the others."""

    @wraps(read)
    def attempt(*args: P.args, **options: P.kwargs) -> T | UnreadableImage:
        try:
            return read(*args, **options)
        except UnreadableImage as error:
            return error

    return attempt


def printable(path: Path) -> str:
    """A path as printable text, whatever bytes its name contains."""
    return os.fsencode(path).decode("utf-8", "replace")


def read_bytes(path: Path) -> bytes:
    """Read a whole file, so that it can be hashed and decoded from one read.

    Raises:
        UnreadableImage: It is missing, a folder, a pipe or a device, larger than `MAX_BYTES`, not readable for us, or
            its name is not UTF-8 and could not be recorded.
    """
    file_bytes_and_time(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _inaccessible(path, error) from error


def file_bytes_and_time(path: Path) -> tuple[int, int]:
    """A file's size in bytes and modification time in ns. Raises `UnreadableImage` as `read_bytes`."""
    try:
        str(path).encode()
        found = path.stat()
    except UnicodeEncodeError as error:
        way = "rename it" if sys.getfilesystemencoding() == "utf-8" else "rename it, or set PYTHONUTF8=1"
        raise UnreadableImage(path, "its name is not valid UTF-8 here", way) from error
    except OSError as error:
        raise _inaccessible(path, error) from error
    if stat.S_ISDIR(found.st_mode):
        raise UnreadableImage(path, "it is a folder", "name the image files in it")
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device might never end
        raise UnreadableImage(path, "it is not a regular file", "remove it")
    if found.st_size > MAX_BYTES:
        raise UnreadableImage(path, f"its {found.st_size / 1e9:,.1f} GB are more than any image needs")
    return found.st_size, found.st_mtime_ns


def _inaccessible(path: Path, error: OSError) -> UnreadableImage:
    return UnreadableImage(path, error.strerror or str(error), "restore it or make it readable, and run again")


def file_sha256(path: Path) -> str:
    """Hash a file: SHA-256 in hexadecimal.

    Raises:
        UnreadableImage: As `read_bytes`.
    """
    return hashlib.sha256(read_bytes(path)).hexdigest()


def pixels_sha256(pixels: NDArray[Any]) -> str:
    """Hash an image's pixels, independent of its file: SHA-256 of the shape and values (H, W, ...)."""
    digest = hashlib.sha256(f"{pixels.shape} ".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def read_image(path: Path, data: bytes | None = None, depth: Depth | None = None) -> Image.Image:
    """Read an image as RGB, upright.

    Any bit depth (more than 8 bits are scaled), grey, palette, CMYK; alpha is dropped, EXIF rotation is applied, and
    only an animation's first frame is read.

    Args:
        path: The file.
        data: The file's bytes, if already read.
        depth: Black and white point of images with more than 8 bits; None: 0 and 65,535, or 0 and 1 for floats up to 1.

    Raises:
        UnreadableImage: It cannot be read, decoded, or has more than `MAX_PIXELS` pixels.
    """
    return read_image_and_head(path, data, depth)[0]


def read_image_and_head(
    path: Path, data: bytes | None = None, depth: Depth | None = None, *, hashed: bool = False
) -> tuple[Image.Image, "ImageHead"]:
    """As `read_image`, with further facts about the file, and its pixels' hash if requested."""
    with _decoded(path, data) as (image, orientation):
        values, extent, digest = None, None, ""
        if _is_deep(image):
            values = np.nan_to_num(np.asarray(image, dtype=np.float32))
            extent = float(values.min()), float(values.max())
        picture = to_rgb(image, depth)
        if hashed:
            digest = pixels_sha256(np.asarray(picture) if values is None else values)
        return picture, ImageHead(image.size, orientation, extent, digest)


def read_rgba(path: Path, data: bytes | None = None, depth: Depth | None = None) -> Image.Image:
    """As `read_image`, but RGBA with the image's own alpha (opaque if it has none)."""
    with _decoded(path, data) as (image, _):
        alpha = (
            image.convert("RGBA").getchannel("A") if image.has_transparency_data else Image.new("L", image.size, 255)
        )
        image = to_rgb(image, depth)
        image.putalpha(alpha)
        return image


def choose_depth(extents: Iterable[Depth]) -> Depth | None:
    """One scale for all deep images of a data set, from the minimum and maximum of each; None without any.

    White is the end of the range that contains the maximum (1, or 8, 10, 12, 14 or 16 bits), or the maximum itself.
    """
    extents = list(extents)
    if not extents:
        return None
    low, high = min(low for low, _ in extents), max(high for _, high in extents)
    # Rounding leaves floats slightly outside their range.
    return min(low, 0.0), next((white for white in _WHITES if high <= white * 1.01), high)


@dataclass(frozen=True)
class ImageHead:
    """Facts from an image file's header.

    Attributes:
        size: Width and height, upright.
        orientation: EXIF orientation of the stored pixels, 1 to 8; from 5 on they are sideways.
        extent: Minimum and maximum raw value of an image with more than 8 bits, if the pixels were read.
        pixels_sha256: SHA-256 of its RGB pixels, or of its raw values if they have more than 8 bits, if requested.
    """

    size: tuple[int, int]
    orientation: int
    extent: Depth | None = None
    pixels_sha256: str = ""


def image_head(path: Path) -> ImageHead:
    """An image file's header, without its pixels; errors as in `read_image`."""
    file_bytes_and_time(path)
    with _opened(path, path) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return ImageHead(image.size[::-1] if orientation >= 5 else image.size, orientation)


def image_size(path: Path, data: bytes) -> tuple[int, int]:
    """Width and height as claimed by a file's first bytes, without decoding.

    Raises `UnreadableImage` if it is not an image.
    """
    with _opened(path, io.BytesIO(data)) as image:
        return image.size


def read_mask(
    path: Path,
    foreground: Sequence[int] | None = None,
    labels: bool = False,
    white: int = WHITE_16,
    data: bytes | None = None,
    image: ImageHead | None = None,
) -> NDArray[np.uint8]:
    """Read a mask (H, W) as uint8 grey, 0..255, upright; soft edges are kept.

    RGB without colour is its grey, 16 bits are scaled, a palette of greys is its grey. A coloured palette or coloured
    RGB means labels: 255 except for index 0 or black. Only a whole data set shows whether GREY values are labels:
    `dsu.data.masks` decides that.

    Args:
        path: The file.
        foreground: Raw values (see `raw_mask`): 255 there, 0 elsewhere.
        labels: 255 wherever the raw value is not 0.
        white: The raw value that is white in masks of 16 bits: 65535, or 255 for 8-bit values in such files.
        data: The file's bytes, if already read.
        image: The header of its image, see `raw_mask`.

    Raises:
        UnreadableImage: As `raw_mask`.
    """
    values, kind = raw_mask(path, data, image, opaque=foreground is not None)
    if foreground is not None or labels or kind in ("indices", "colours"):
        marked = values > 0 if foreground is None else np.isin(values, foreground)
        return marked.astype(np.uint8) * np.uint8(255)
    return grey_levels(values, kind, white)


def grey_levels(values: NDArray[Any], kind: MaskKind, white: int = WHITE_16) -> NDArray[np.uint8]:
    """Raw values of a grey mask, 8 or 16 bits, as uint8; those of 16 bits are scaled so that `white` is 255."""
    return _to_8_bits(values, white) if kind == "deep" else values.astype(np.uint8, copy=False)


def raw_mask(
    path: Path, data: bytes | None = None, image: ImageHead | None = None, *, opaque: bool = False
) -> tuple[NDArray[Any], MaskKind]:
    """Read a mask (H, W) as the unsigned integers in its file, and their type.

    A varying alpha is the mask, as in cutouts.

    Args:
        path: The file.
        data: The file's bytes, if already read.
        image: The header of its image. A mask drawn on the stored pixels of a photograph that EXIF rotates is rotated
            too.
        opaque: Use the mask's colours, whatever its alpha; transparent pixels are background (black).

    Raises:
        UnreadableImage: It can't be read or decoded, has more than `MAX_PIXELS` pixels, or another aspect ratio than
            its image.
    """
    with _decoded(path, data) as (mask, _):
        values, kind = _raw_values(mask, opaque)
    return (values if image is None else _fitted(values, image, path)), kind


def _raw_values(mask: Image.Image, opaque: bool) -> tuple[NDArray[Any], MaskKind]:
    if _is_deep(mask):
        return _deep_values(mask), "deep"
    if mask.mode in ("1", "L") and not mask.has_transparency_data:
        return np.asarray(mask.convert("L")), "grey"
    if mask.has_transparency_data:
        mask = mask.convert("RGBA")
        alpha = mask.getchannel("A")
        if not _is_constant(alpha) and not opaque:
            return np.asarray(alpha), "grey"
        if not _is_constant(alpha):
            mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask)
    return _raw_palette(mask) if mask.mode == "P" else _raw_colours(mask.convert("RGB"))


def _fitted(mask: NDArray[Any], image: ImageHead, path: Path) -> NDArray[Any]:
    """A mask (H, W) in its image's orientation. Raises `UnreadableImage` for another aspect ratio than the image's."""
    (width, height), (rows, columns) = image.size, mask.shape
    if image.orientation >= 5 and (columns, rows) == (height, width) != (width, height):
        return _ROTATIONS[image.orientation](mask)
    # Rounding one side changes the aspect ratio by a pixel.
    if abs(columns * height - rows * width) > max(width, height, columns, rows):
        turned = ", as if one were rotated" if (columns, rows) == (height, width) else ""
        raise UnreadableImage(
            path,
            f"its {columns}x{rows} pixels have another aspect ratio than its image's {width}x{height}{turned}",
            "draw it on its image, or remove it",
        )
    return mask


def resize_image(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Resize an RGB image bilinearly to (size, size, 3) uint8, whatever its proportions."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def resize_mask(mask: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize a mask (H, W) uint8 bicubically to (size, size) uint8, whatever its proportions."""
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.BICUBIC))


def mask_box(box: Box, size: tuple[int, int], mask_size: tuple[int, int]) -> Box:
    """A box of an image of `size` (width, height), scaled to its mask's size."""
    across, down = mask_size[0] / size[0], mask_size[1] / size[1]
    left, top, right, bottom = box
    x, y = min(round(left * across), mask_size[0] - 1), min(round(top * down), mask_size[1] - 1)
    return x, y, max(x + 1, round(right * across)), max(y + 1, round(bottom * down))


@contextmanager
def _decoded(path: Path, data: bytes | None) -> Iterator[tuple[Image.Image, int]]:
    """Open, check, decode and turn upright; also gives the EXIF orientation."""
    with _opened(path, io.BytesIO(read_bytes(path) if data is None else data)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"its {image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
        image.load()
        yield ImageOps.exif_transpose(image), image.getexif().get(ExifTags.Base.Orientation, 1)


@contextmanager
def _opened(path: Path, source: Path | io.BytesIO) -> Iterator[Image.Image]:
    """Open an image; any failure until the context ends counts as the file's."""
    try:
        with Image.open(source, formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        empty = not (source.getbuffer().nbytes if isinstance(source, io.BytesIO) else source.stat().st_size)
        raise UnreadableImage(path, f"it is {'empty' if empty else 'not in a known image format'}") from error
    # Pillow's plugins raise almost anything on damaged files: OSError, SyntaxError, struct.error, KeyError...
    except Exception as error:
        raise UnreadableImage(path, str(error).rstrip(".") or type(error).__name__) from error


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _deep_values(image: Image.Image) -> NDArray[np.uint16]:
    """Integers unchanged, floats 0..1 stretched to 16 bits."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    if image.mode == "F" and values.max() <= 1:
        values = values * WHITE_16
    return values.clip(0, WHITE_16).round().astype(np.uint16)


def _to_8_bits(values: NDArray[np.uint16], white: int) -> NDArray[np.uint8]:
    return (values.clip(0, white).astype(np.float32) * (255 / white)).round().astype(np.uint8)


def _is_constant(channel: Image.Image) -> bool:
    return len({*channel.getextrema()}) == 1


def _raw_palette(image: Image.Image) -> tuple[NDArray[Any], MaskKind]:
    palette = np.zeros((256, 3), np.uint8)
    entries = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    palette[: len(entries)] = entries
    if np.ptp(palette, axis=1).max() <= _COLOUR_NOISE:
        return np.asarray(image.convert("L")), "grey"
    indices = np.asarray(image)
    black = (palette == 0).all(axis=1)[indices]
    if palette[0].any() and black.any():
        # The palette has colours in arbitrary order: index 0 has no intended meaning.
        return _raw_colours(image.convert("RGB"))
    return np.where(black, np.uint8(0), indices), "indices"


def _raw_colours(image: Image.Image) -> tuple[NDArray[Any], MaskKind]:
    red, green, blue = (np.asarray(channel) for channel in image.split())
    brightest = np.maximum(np.maximum(red, green), blue)
    difference = brightest - np.minimum(np.minimum(red, green), blue)
    if not difference.any():
        return red, "grey"
    colours = red.astype(np.uint32) << 16 | green.astype(np.uint32) << 8 | blue
    if np.unique(colours).size <= FEW_VALUES:
        return colours, "colours"
    # So many colours come from a photograph or JPEG, in which greys and black are not exact.
    if difference.max() <= _COLOUR_NOISE:
        return np.asarray(image.convert("L")), "grey"
    colours[brightest < _COLOUR_NOISE] = 0
    return colours, "colours"
