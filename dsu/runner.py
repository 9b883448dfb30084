"""Masks from a model of `dsu export`. Needs only numpy, Pillow and onnxruntime.

    python dsu_runner.py model.onnx photo.jpg more-photos/ -o masks

    >>> from dsu_runner import Model
    >>> model = Model("model.onnx")
    >>> mask = model("photo.jpg")  # float32 (height, width) in [0, 1], the image's own size

`dsu export` copies this file next to each model as `dsu_runner.py`. `dsu` itself reads images, cuts tiles and runs such
models with it.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

__all__ = ["Model", "ModelError", "TileBlender", "mask_of", "open_image", "resize_logits", "stretch", "tile_boxes"]

FORMAT: Final = 1
IMAGE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".jp2"}
)
# Named, because Pillow would otherwise try every plugin it has, one of which starts Ghostscript.
FORMATS: Final = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
MAX_PIXELS: Final = 500_000_000
"""The largest image to read. The largest photographs have about 400 megapixels (multi-shot cameras); a file that claims
more probably tries to exhaust memory. At this size RGB takes 1.5 GB."""
WHITE_16: Final = 65535
BATCH: Final = 8
"""Images, or tiles of one image, per batch."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, the last two exclusive."""

# Pillow refuses at twice its own limit, too early for the largest photographs.
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)


class ModelError(Exception):
    """A model, device or image that can't be used: one sentence with the reason and the fix."""


class Model:
    """A loaded exported model.

    Args:
        path: the `.onnx` file; a `.data` file next to it belongs to it.
        device: `auto` (CUDA if onnxruntime supports it), `cpu`, `cuda` or `cuda:N`.
        threads: number of CPU threads; None: one per core.

    Attributes:
        facts: recorded at export: sizes, precision, threshold, licences, the head's digest, the result of the check.
        head: the metadata of the head's file, as JSON.
        provider: the execution provider: `CPUExecutionProvider` or `CUDAExecutionProvider`.

    Raises:
        ModelError: the file does not exist, is no model of dsu, or onnxruntime does not support the device here.
    """

    def __init__(self, path: str | Path, device: str = "auto", threads: int | None = None) -> None:
        if not Path(path).is_file():
            raise ModelError(f"There is no model at {path}: check the path.")
        import onnxruntime  # imported only now, since dsu uses the rest of this module without it

        wanted = _providers(device, onnxruntime.get_available_providers())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # log only errors, which are also raised
        options.intra_op_num_threads = threads or 0
        # If other programs are busy, threads that spin while waiting occupy the cores that they wait for.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        except Exception as error:  # onnxruntime's exceptions have no common base
            reason = str(error).splitlines()[0].rstrip(".")
            raise ModelError(f"{path} can't be loaded ({reason}): export the model again.") from error
        self.provider: str = self._session.get_providers()[0]
        if device.startswith("cuda") and not self.provider.startswith("CUDA"):
            raise ModelError(
                "onnxruntime could not start CUDA and would compute on the CPU: repair CUDA, or give --device cpu."
            )
        noted = self._session.get_modelmeta().custom_metadata_map
        try:
            self.facts: dict[str, Any] = json.loads(noted["dsu_export"])
            self.head: str = noted["dsu"]
            newer = self.facts["format"] > FORMAT
        except (KeyError, ValueError, TypeError) as error:
            raise ModelError(f"{path} was not written by `dsu export`: give a model that it wrote.") from error
        if newer:
            raise ModelError(
                f"{path} was exported by a newer dsu, {self.facts.get('version')}: use the dsu_runner.py next to it, "
                "or update dsu."
            )
        self.sizes: dict[str, int] = self.facts["sizes"]
        self.depth: tuple[float, float] | None = self.facts["depth"] and tuple(self.facts["depth"])
        self.tiling: tuple[int, int] | None = self.facts["tiling"] and tuple(self.facts["tiling"])
        self.threshold: float | None = self.facts["threshold"]

    def __call__(self, images: Any, normalization: str = "none") -> Any:
        """The mask of an image, or a list of the masks of several: float32 (height, width) in [0, 1].

        Args:
            images: one or several paths, PIL images or arrays, see `open_image`.
            normalization: `none` gives probabilities, `minmax` min-max normalises each map.
        """
        one = isinstance(images, str | Path | Image.Image | np.ndarray)
        opened = [open_image(image, self.depth) for image in ([images] if one else images)]
        masks = [self.cut(mask) for mask in self.segment(opened, normalization, self.tiling)]
        return masks[0] if one else masks

    def segment(
        self,
        pictures: Sequence[Image.Image],
        normalization: str = "none",
        tiling: tuple[int, int] | None = None,
        batch: int = BATCH,
    ) -> list[NDArray[np.float32]]:
        """The soft masks of upright RGB images, (height, width) in [0, 1] each.

        Args:
            pictures: images of any sizes.
            normalization: see `__call__`.
            tiling: side and overlap of tiles in pixels; None for whole images.
            batch: number of images, or tiles of one image, per batch.
        """
        if tiling is not None:
            return [mask_of(self._segment_tiles(picture, tiling, batch), normalization) for picture in pictures]
        found = []
        for start in range(0, len(pictures), batch):
            some = pictures[start : start + batch]
            for picture, logits in zip(some, self.logits(some), strict=True):
                found.append(mask_of(resize_logits(logits, picture.size), normalization))
        return found

    def logits(self, pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
        """(B, S, S) logits of RGB images at the network's input size."""
        return self.run(self.inputs(pictures))[:, 0]

    def inputs(self, pictures: Sequence[Image.Image]) -> dict[str, NDArray[np.uint8]]:
        """The network's inputs for RGB images: (B, side, side, 3) uint8 for each of `sizes`."""
        return {
            name: np.stack([np.asarray(one.resize((side, side), Image.Resampling.BILINEAR)) for one in pictures])
            for name, side in self.sizes.items()
        }

    def run(self, given: dict[str, NDArray[np.uint8]]) -> NDArray[np.float32]:
        """(B, 1, S, S) logits from `inputs`."""
        return np.asarray(self._session.run(["logits"], given)[0])

    def cut(self, mask: NDArray[np.float32]) -> NDArray[np.float32]:
        """A mask binarised at the model's threshold, if it has one."""
        return mask if self.threshold is None else (mask >= self.threshold).astype(np.float32)

    def _segment_tiles(self, picture: Image.Image, tiling: tuple[int, int], batch: int) -> NDArray[np.float32]:
        boxes = list(tile_boxes(picture.size, *tiling))
        blender = TileBlender(boxes)
        for start in range(0, len(boxes), batch):
            some = boxes[start : start + batch]
            tiles = [picture.crop(box) for box in some]
            for box, tile, logits in zip(some, tiles, self.logits(tiles), strict=True):
                blender.add(box, resize_logits(logits, tile.size))
        return blender.logits


def _providers(device: str, there: Sequence[str]) -> list[Any]:
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not number.isdecimal()):
        raise ModelError(f"The device can't be {device!r}: give auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and "CUDAExecutionProvider" not in there:
        raise ModelError("This onnxruntime has no CUDA: install onnxruntime-gpu, or give --device cpu.")
    # TF32, on by default, would change the results of a float32 model.
    cuda = [("CUDAExecutionProvider", {"device_id": int(number or 0), "use_tf32": 0})]
    return [*(cuda if kind != "cpu" and "CUDAExecutionProvider" in there else []), "CPUExecutionProvider"]


# ---- images ----


def open_image(image: Any, depth: tuple[float, float] | None = None) -> Image.Image:
    """An image as upright RGB (by EXIF); alpha is dropped, more than 8 bits are scaled.

    Args:
        image: a path, a PIL image, or an array (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels: uint8, uint16
            or floats from 0 to 1.
        depth: the black and white point (raw values) of files and PIL images with more than 8 bits.

    Raises:
        ModelError: it can't be read as an image.
    """
    if isinstance(image, np.ndarray):
        image = image_from_array(image)
    try:
        if isinstance(image, Image.Image):
            return to_rgb(ImageOps.exif_transpose(image), depth)
        with Image.open(io.BytesIO(Path(image).read_bytes()), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"its {opened.width}x{opened.height} pixels are more than {MAX_PIXELS:,}")
            opened.load()
            return to_rgb(ImageOps.exif_transpose(opened), depth)
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        reason = str(error).rstrip(".") or type(error).__name__
        raise ModelError(f"{image} can't be read as an image ({reason}): save it again as PNG or JPEG.") from error


def to_rgb(image: Image.Image, depth: tuple[float, float] | None = None) -> Image.Image:
    """Convert an upright image to RGB without alpha; see `open_image` for `depth`."""
    image.info.pop("transparency", None)  # a conversion to RGB would warn about these
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image.convert("RGB")
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    if depth is not None:
        low, high = depth
        grey = (values - low) * (255 / max(high - low, 1e-12))
    else:
        if image.mode == "F" and values.max() <= 1:
            values = values * WHITE_16
        grey = values.clip(0, WHITE_16).round() * np.float32(255 / WHITE_16)
    return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")


def image_from_array(pixels: NDArray[Any]) -> Image.Image:
    """A PIL image of an array of pixels, see `open_image`. Raises `ModelError` for any other array."""
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim not in (2, 3) or 0 in pixels.shape or (pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4)):
        raise ModelError(
            f"An array of shape {pixels.shape} is not an image: give (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 "
            "channels."
        )
    if pixels.dtype.kind == "f":
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # written so that NaN is refused too
            raise ModelError(
                f"Float pixels must be from 0 to 1, and these range from {pixels.min():g} to {pixels.max():g}: scale "
                "them, or give uint8."
            )
        pixels = (pixels * 255).round().astype(np.uint8)
    elif pixels.dtype == np.uint16:
        pixels = (pixels * (255 / WHITE_16)).round().astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise ModelError(f"Pixels of type {pixels.dtype} have no known range: give uint8, uint16 or floats.")
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)


# ---- masks ----


def mask_of(logits: NDArray[np.float32], normalization: str = "none") -> NDArray[np.float32]:
    """Probabilities (height, width) from logits, min-max normalised with `minmax`; the logits are overwritten."""
    mask = np.negative(logits, out=logits)
    with np.errstate(over="ignore"):  # a large negative logit: the mask is 0
        np.exp(mask, out=mask)
    mask += 1
    np.reciprocal(mask, out=mask)
    return stretch(mask) if normalization == "minmax" else mask


def stretch(mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """Min-max normalise a mask (H, W) in place: the benchmarks' convention."""
    low, high = mask.min(), mask.max()
    mask -= low
    mask /= high - low + np.float32(1e-8)
    return mask


def resize_logits(logits: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize (S, S) logits bilinearly, corners not aligned, to an image's (width, height): (height, width)."""
    (left, right, across), (above, below, down) = (
        _interpolation(source, target) for source, target in zip(logits.shape[::-1], size, strict=True)
    )
    rows = logits[above] + (logits[below] - logits[above]) * down[:, None]
    resized: NDArray[np.float32] = rows[:, right] - rows[:, left]
    resized *= across
    resized += rows[:, left]
    return resized


def _interpolation(source: int, target: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """For each `target` position, the two `source` positions around it, and its distance from the first."""
    half, scale = np.float32(0.5), np.float32(source / target)  # in float32, as in torch
    at = np.maximum((np.arange(target, dtype=np.float32) + half) * scale - half, 0)
    first = at.astype(np.intp)
    return first, np.minimum(first + 1, source - 1), at - first.astype(np.float32)


def tile_boxes(size: tuple[int, int], side: int, overlap: int) -> Iterator[Box]:
    """Boxes of the tiles of an image of `size` (width, height), row by row: as few as possible, evenly spaced."""
    across, down = (_spans(length, side, overlap) for length in size)
    yield from ((x, y, right, bottom) for y, bottom in down for x, right in across)


def _spans(length: int, side: int, overlap: int) -> list[tuple[int, int]]:
    if length <= side:
        return [(0, length)]
    count = -(-(length - overlap) // (side - overlap))
    starts = [round(index * (length - side) / (count - 1)) for index in range(count)]
    return [(start, start + side) for start in starts]


class TileBlender:
    """Logits of a whole image from those of its tiles, which are blended where they overlap.

    Each pixel is a weighted average. Weights rise linearly from a tile's edge to its neighbour's end, separately on
    each axis. Tiles form a grid, so the sum of weights is known in advance.

    Args:
        boxes: boxes of all tiles.
    """

    def __init__(self, boxes: Iterable[Box]) -> None:
        boxes = list(boxes)
        self._across = _blend_weights({(left, right) for left, _, right, _ in boxes})
        self._down = _blend_weights({(top, bottom) for _, top, _, bottom in boxes})
        self.size = max(box[2] for box in boxes), max(box[3] for box in boxes)
        self.logits: NDArray[np.float32] = np.zeros(self.size[::-1], np.float32)
        """(height, width), complete after all tiles were added."""

    def add(self, box: Box, logits: NDArray[np.float32]) -> None:
        """Add a tile's logits (height, width) at the tile's own size."""
        left, top, right, bottom = box
        faded = logits * self._across[left, right]
        faded *= self._down[top, bottom][:, None]
        self.logits[top:bottom, left:right] += faded


def _blend_weights(spans: set[tuple[int, int]]) -> dict[tuple[int, int], NDArray[np.float32]]:
    """The weights of each span of an axis; they add up to 1 everywhere."""
    ordered = sorted(spans)
    rises = {}
    total = np.zeros(max(end for _, end in ordered))
    for index, (start, end) in enumerate(ordered):
        # Without a neighbour, the ramp is half a pixel: the weight is 1 at once.
        before = max(ordered[index - 1][1] - start, 0.5) if index else 0.5
        after = max(end - ordered[index + 1][0], 0.5) if index + 1 < len(ordered) else 0.5
        at = np.arange(end - start) + 0.5
        rises[start, end] = np.minimum(1, np.minimum(at / before, (end - start - at) / after))
        total[start:end] += rises[start, end]
    return {(start, end): (weight / total[start:end]).astype(np.float32) for (start, end), weight in rises.items()}


# ---- command line ----


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the masks of images and folders of images as PNG; returns 0, or 1 if any could not be written."""
    parser = argparse.ArgumentParser(description="Write masks of images with a model of `dsu export`.")
    parser.add_argument("model", type=Path, help="the .onnx file")
    parser.add_argument("images", type=Path, nargs="+", help="images, or folders of them")
    parser.add_argument("-o", "--out", type=Path, default=Path("masks"), help="folder for the masks (default: masks)")
    parser.add_argument(
        "--threshold", type=float, help="binarise masks at this value in [0, 1] (default: the model's threshold)"
    )
    parser.add_argument("--minmax", action="store_true", help="stretch each mask to its full range")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    asked = parser.parse_args(arguments)
    failed = 0
    try:
        model = Model(asked.model, asked.device)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    model.threshold = model.threshold if asked.threshold is None else asked.threshold
    print(f"{asked.model} on {model.provider}", file=sys.stderr)
    for image, target in _targets(asked.images, asked.out):
        try:
            mask = model(image, "minmax" if asked.minmax else "none")
        except ModelError as error:
            failed = 1
            print(f"error: {error}", file=sys.stderr)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((mask * 255).astype(np.uint8)).save(target)
        print(target)
    return failed


def _targets(images: Iterable[Path], out: Path) -> Iterator[tuple[Path, Path]]:
    """Images and their output files: `a.jpg` becomes `OUT/a.png`, and an `a.png` next to it `OUT/a_png.png`."""
    taken = set()
    for given in images:
        for image in sorted(given.rglob("*")) if given.is_dir() else [given]:
            if image == given or image.suffix.lower() in IMAGE_SUFFIXES:
                inside = image.relative_to(given) if image != given else Path(image.name)
                target = out / inside.with_suffix(".png")
                if target in taken:
                    target = out / inside.with_name(f"{inside.name.replace('.', '_')}.png")
                taken.add(target)
                yield image, target


if __name__ == "__main__":
    sys.exit(main())
