"""Thresholds of maps. They apply to 8-bit maps, so that tables and files agree."""

import math
from typing import Final

__all__ = ["DEFAULT_THRESHOLD", "level_of", "threshold_at"]

DEFAULT_THRESHOLD: Final = 0.5
"""Where nobody has chosen another. No 8-bit value is exactly half: from 128 on pixels are above it."""


def level_of(threshold: float) -> int:
    """The least 8-bit value that reaches a threshold in [0, 1]: v / 255 >= threshold."""
    return math.ceil(255 * threshold - 1e-9)


def threshold_at(level: int) -> float:
    """The threshold of an 8-bit value, 1 to 255, with the fewest decimals that have that very `level_of`."""
    for digits in range(1, 4):
        scale: int = 10**digits
        threshold = math.floor(level / 255 * scale) / scale
        if level_of(threshold) == level:
            return threshold
    return level / 255
