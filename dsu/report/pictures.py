"""The thumbnails of a report: one strip per image with image, ground truth, prediction and errors.

One file instead of four means a quarter of the requests and files; the page shows one panel at a time.
"""

import hashlib
import io
from base64 import b64encode
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.data.images import UnreadableImage, read_image
from dsu.evaluation.evaluate import Evaluation, PredictionPair, read_pair
from dsu.files import atomic_write

# Orange and blue of Okabe and Ito's palette: distinct for every kind of colour vision, and by lightness alone.
FALSE_POSITIVE: Final = (230, 159, 0)
FALSE_NEGATIVE: Final = (0, 114, 178)
SUFFIX: Final = ".webp"

_LONGEST: Final = 320
"""Pixels of a panel's longer side: sharp on high-density screens, at about 20 kB per strip."""
_GUTTER: Final = 4


@dataclass(frozen=True)
class Strip:
    """The address of a strip, and the size in pixels of one of its panels.

    Panels are evenly spaced: CSS shows panel k of n at k / (n - 1) of the strip. `complaint` says in a sentence why a
    known image is missing.
    """

    source: str
    width: int
    height: int
    panels: int
    complaint: str = ""


def draw_strip(evaluated: tuple[Evaluation, PredictionPair], folder: Path | None, place: str) -> Strip:
    """Draw the strip of an image.

    Files are named by their content's hash, so an earlier page still finds its own, and existing files are reused.

    Args:
        evaluated: The evaluation of a set, and one of its pairs.
        folder: Where to write the file; None embeds it in the page as a data URI.
        place: The folder's address relative to the page.

    Raises:
        DsuError: A file can't be read or written.
    """
    found, case = evaluated
    image, complaint = None, ""
    try:
        image = None if case.image is None else read_image(case.image)
    except UnreadableImage as error:
        case, complaint = replace(case, image=None), str(error)
    prediction, truth = read_pair(case, found.mask_format, resize=True)
    panels = draw_panels(truth, prediction, image, normalize=found.normalize)
    # Repeat every panel's edge, so that scaling does not mix it with its neighbour.
    padded = [np.pad(np.asarray(panel), ((0, 0), (_GUTTER, _GUTTER), (0, 0)), mode="edge") for panel in panels]
    encoded = io.BytesIO()
    # The default method, 4 of 6, takes more than twice as long for 4 % smaller files.
    Image.fromarray(np.hstack(padded)[:, _GUTTER:-_GUTTER]).save(encoded, "WEBP", quality=80, method=2)
    content = encoded.getvalue()
    if folder is None:
        source = f"data:image/webp;base64,{b64encode(content).decode()}"
    else:
        name = hashlib.sha256(content).hexdigest()[:20] + SUFFIX
        source = f"{place}/{name}"
        if not (folder / name).exists():
            atomic_write(folder / name, content)
    return Strip(source, *panels[0].size, len(panels), complaint)


def draw_panels(
    truth: NDArray[np.uint8], prediction: NDArray[np.uint8], image: Image.Image | None, *, normalize: bool
) -> list[Image.Image]:
    """Draw the image (if there is one), ground truth, prediction and errors as RGB thumbnails of one size.

    Errors are those that IoU and Dice count: a map above 0.5 against foreground above 128. They are found at full size,
    so thin ones fade in the thumbnail instead of vanishing. Correct pixels keep the image's grey values.

    Args:
        truth: Ground truth (H, W).
        prediction: The map (H, W), 0..255.
        image: The segmented image, of any size.
        normalize: Whether to min-max normalise the map, as its evaluation did; a constant map stays as it is.
    """
    low, high = int(prediction.min()), int(prediction.max())
    level = (prediction - float(low)) / (high - low) if normalize and low < high else prediction / 255
    wanted, given = truth > 128, level > 0.5
    height, width = truth.shape
    scale = min(1.0, _LONGEST / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = None if image is None else image.resize(size, Image.Resampling.BICUBIC)
    grey = Image.new("RGB", size, (128, 128, 128)) if small is None else small.convert("L").convert("RGB")
    # Dim the background, to tell true positives from true negatives.
    errors = Image.composite(grey, grey.point(lambda value: value // 3), _shrunk(wanted, size))
    for wrong, colour in ((given & ~wanted, FALSE_POSITIVE), (wanted & ~given, FALSE_NEGATIVE)):
        errors.paste(colour, mask=_shrunk(wrong, size))
    shown = Image.fromarray((level * 255).round().astype(np.uint8)).resize(size, Image.Resampling.BOX)
    panels = [_shrunk(wanted, size).convert("RGB"), shown.convert("RGB"), errors]
    return panels if small is None else [small, *panels]


def _shrunk(region: NDArray[np.bool_], size: tuple[int, int]) -> Image.Image:
    """A region's coverage of each small pixel, 0..255."""
    return Image.fromarray(region.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
