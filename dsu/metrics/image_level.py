"""Metrics of whole images, from each map's largest value.

In inspection (tiles, scans, products), most images have no object, and pixel metrics say little about them: F, IoU and
Dice of an empty ground truth are 0 for any prediction. What matters there is whether the prediction raises an alarm.

Conventions. An image's response is its map's largest value, v / 255, after resizing if that was asked for, but never
normalised: min-max normalisation gives every map the response 1, even noise on an empty image. An image raises an alarm
if its response is at least 0.5. No 8-bit value is exactly half, so these are the maps with a pixel of 128 or more, the
same pixels that IoU and Dice count without normalisation.

* false_alarms: the share of images without an object that raise an alarm.
* misses: the share of images with an object that raise none. The alarm's position does not matter.
* AUROC: the area under the ROC curve of the responses, computed as the Mann-Whitney statistic (Hanley and McNeil,
  Radiology 1982): over all pairs of an image with an object and one without, the share in which the former has the
  greater response, ties counting half. It needs images of both kinds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from dsu.thresholds import DEFAULT_THRESHOLD

ALARM: Final = DEFAULT_THRESHOLD
"""The lowest response that raises an alarm."""

_STRETCHED: Final = 254 / 255
"""The lowest response of a min-max normalised map, whether truncated or rounded to 8 bits."""


@dataclass(frozen=True)
class ImageLevel:
    """Every image's response, and whether its ground truth is empty, in order of evaluation.

    Attributes:
        responses: The largest value of each map, in [0, 1].
        empty: Whether each ground truth has no foreground pixel.
    """

    responses: tuple[float, ...]
    empty: tuple[bool, ...]

    @property
    def without_object(self) -> int:
        """Number of images without an object."""
        return sum(self.empty)

    @property
    def with_object(self) -> int:
        """Number of images with an object."""
        return len(self.empty) - self.without_object

    def figures(self) -> dict[str, float]:
        """The metrics of `dsu.metrics.figures.IMAGE_LEVEL`, in [0, 1], without undefined ones (see `lacking`)."""
        responses, empty = np.array(self.responses), np.array(self.empty, dtype=bool)
        without_object, with_object = responses[empty], responses[~empty]
        found = {}
        if self.without_object:
            found["false_alarms"] = float((without_object >= ALARM).mean())
        if self.with_object:
            found["misses"] = float((with_object < ALARM).mean())
        if self.without_object and self.with_object:
            found["AUROC"] = auroc(with_object, without_object)
        return found

    @property
    def lacking(self) -> str:
        """Why some of the metrics are undefined, in a few words; empty if all are defined."""
        if not self.with_object:
            return "no image has an object"
        return "" if self.without_object else "every image has an object"

    @property
    def stretched(self) -> bool:
        """Whether every map reaches the full range, as after min-max normalisation at prediction."""
        return bool(self.responses) and min(self.responses) >= _STRETCHED


def auroc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """The share of pairs in which the positive has the greater score, ties counting half.

    Both need at least one score.

    Example:
        >>> auroc([0.9, 0.5], [0.5, 0.1])
        0.875
    """
    ordered = np.sort(negatives)
    below, not_above = (np.searchsorted(ordered, positives, side) for side in ("left", "right"))
    return float((below + not_above).sum() / (2 * len(positives) * len(negatives)))
