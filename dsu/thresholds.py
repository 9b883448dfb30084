"""Thresholds of maps. They always apply to 8-bit values: tables and files agree."""

import math
from typing import Final

DEFAULT_THRESHOLD: Final = 0.5
"""The threshold if no other was chosen. No 8-bit value is exactly one half: values from 128 are above."""


def level_of(threshold: float) -> int:
    """The smallest 8-bit value v with v / 255 >= threshold, for a threshold in [0, 1]."""
    return math.ceil(255 * threshold - 1e-9)
