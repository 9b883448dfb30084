"""The pictures of a report: of every case one strip of image, ground truth, prediction and errors, side by side.

One file a case instead of four is a quarter of the requests and of the files beside the page, which shows one panel
of it at a time.
"""

import hashlib
import io
import os
from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.data.images import UnreadableImage, or_unreadable, read_image
from dsu.evaluation.evaluate import Case, Evaluation, read_case
from dsu.files import atomic_write
from dsu.progress import Task

__all__ = ["FALSE_NEGATIVE", "FALSE_POSITIVE", "SUFFIX", "Strip", "draw_panels", "draw_strips"]

# Orange and blue of Okabe and Ito's palette: apart for every kind of colour vision, and in lightness alone.
FALSE_POSITIVE: Final = (230, 159, 0)
"""RGB of what was predicted and is not there."""
FALSE_NEGATIVE: Final = (0, 114, 178)
"""RGB of what is there and was missed."""
SUFFIX: Final = ".webp"

_LONGEST: Final = 320
"""Pixels of a panel's longer side: sharp in the gallery on a dense screen, and a strip stays at about 20 kB."""
_QUALITY: Final = 80
# Of 0 to 6: the default, 4, takes more than twice as long for files 4 % smaller.
_EFFORT: Final = 2
_GUTTER: Final = 4
_NO_IMAGE: Final = (128, 128, 128)


@dataclass(frozen=True)
class Strip:
    """Where a case's strip is, as the page names it, and the size in pixels of one of its panels.

    The panels' left edges are evenly spaced, so that CSS finds panel k of n at k / (n - 1) of the strip.
    `complaint` says, in a sentence, why the image is missing from it, though one is known.
    """

    source: str
    width: int
    height: int
    panels: int
    complaint: str = ""


def draw_strips(found: Evaluation, folder: Path | None, place: str, task: Task) -> list[Strip]:
    """Draw a strip a case, in the order of `found.cases`, several at a time.

    A file is called by its content's hash: a page that was made before and is still open or stands finds its own
    pictures until another takes its name, and what is drawn already is not written again.

    Args:
        found: What was judged.
        folder: Where the files go; None keeps the pictures in the page, as data URIs.
        place: The folder's address relative to the page.
        task: Told of each case.

    Raises:
        DsuError: A file that can't be read or written.
    """
    draw = partial(_strip, found=found, folder=folder, place=place)
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="draw") as pool:
        try:
            return list(_told(pool.map(draw, found.cases), task))
        except BaseException:
            # Leaving the pool would otherwise draw all the rest first.
            pool.shutdown(cancel_futures=True)
            raise


def draw_panels(
    truth: NDArray[np.uint8], prediction: NDArray[np.uint8], image: Image.Image | None, *, normalize: bool
) -> list[Image.Image]:
    """Draw image (where there is one), ground truth, prediction and errors, all of one small size, RGB.

    Errors are those that IoU and Dice count: a map above half against foreground above 128. They are found at full
    size, so that thin ones fade in the small picture instead of vanishing; what is right keeps the image's greys.

    Args:
        truth: Ground truth (H, W).
        prediction: The map (H, W), 0..255.
        image: What was segmented, of any size.
        normalize: Whether the map was judged stretched to its full range, and so is shown.
    """
    level = _stretched(prediction) if normalize else prediction / 255
    wanted, given = truth > 128, level > 0.5
    size = _fitted(truth.shape[1], truth.shape[0])
    small = None if image is None else image.resize(size, Image.Resampling.BICUBIC)
    grey = Image.new("RGB", size, _NO_IMAGE) if small is None else small.convert("L").convert("RGB")
    # Foreground stays bright and background is dimmed, so that hits are told from what was rightly left out.
    dimmed = grey.point(lambda value: value // 3)
    errors = Image.composite(grey, dimmed, _shrunk(wanted, size))
    for wrong, colour in ((given & ~wanted, FALSE_POSITIVE), (wanted & ~given, FALSE_NEGATIVE)):
        errors.paste(colour, mask=_shrunk(wrong, size))
    shown = Image.fromarray((level * 255).round().astype(np.uint8)).resize(size, Image.Resampling.BOX)
    panels = [_shrunk(wanted, size).convert("RGB"), shown.convert("RGB"), errors]
    return panels if small is None else [small, *panels]


def _strip(case: Case, found: Evaluation, folder: Path | None, place: str) -> Strip:
    prediction, truth = read_case(case, found.mask_format, resize=True)
    found_image = None if case.image is None else or_unreadable(read_image)(case.image)
    image, complaint = (None, str(found_image)) if isinstance(found_image, UnreadableImage) else (found_image, "")
    panels = draw_panels(truth, prediction, image, normalize=found.normalize)
    width, height = panels[0].size
    # Every panel is continued by its own edge: scaled, it takes no colour from its neighbour.
    padded = [np.pad(np.asarray(panel), ((0, 0), (_GUTTER, _GUTTER), (0, 0)), mode="edge") for panel in panels]
    joined = Image.fromarray(np.hstack(padded)[:, _GUTTER:-_GUTTER])
    content = io.BytesIO()
    joined.save(content, "WEBP", quality=_QUALITY, method=_EFFORT)
    return Strip(_kept(content.getvalue(), folder, place), width, height, len(panels), complaint)


def _kept(content: bytes, folder: Path | None, place: str) -> str:
    """The picture's address, under which it then is."""
    if folder is None:
        return f"data:image/webp;base64,{b64encode(content).decode()}"
    name = hashlib.sha256(content).hexdigest()[:20] + SUFFIX
    if not (folder / name).exists():
        atomic_write(folder / name, content)
    return f"{place}/{name}"


def _told(strips: Iterator[Strip], task: Task) -> Iterator[Strip]:
    for strip in strips:
        task.advance()
        yield strip


def _stretched(grey: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(H, W) in 0..1 as it was judged: from its own minimum to its own maximum; a constant map as it is."""
    low, high = int(grey.min()), int(grey.max())
    return grey / 255 if low == high else (grey.astype(np.float64) - low) / (high - low)


def _fitted(width: int, height: int) -> tuple[int, int]:
    scale = min(1.0, _LONGEST / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _shrunk(region: NDArray[np.bool_], size: Sequence[int]) -> Image.Image:
    """A region's share of each small pixel, in 0..255."""
    return Image.fromarray(region.astype(np.uint8) * 255).resize((size[0], size[1]), Image.Resampling.BOX)
