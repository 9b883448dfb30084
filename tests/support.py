"""What tests of several rooms share."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from click.testing import Result
from PIL import Image

__all__ = ["TINY", "Dsu", "pixel_difference"]

TINY: Final = ("--preset", "toy", "--hiera-size", "128", "--dino-size", "126")
"""The smallest network there is: reflect padding wants S4 of 4x4, which is an input of 128."""

Dsu = Callable[..., Result]
"""Runs `dsu ...`; the result's `output` is all that was printed."""


def pixel_difference(first: Path, second: Path) -> int:
    """The largest difference of two grey pictures, in grey levels."""
    a, b = (np.asarray(Image.open(path)).astype(int) for path in (first, second))
    return int(np.abs(a - b).max())
