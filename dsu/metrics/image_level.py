"""Figures of whole images, told by each map's largest response.

Data that is inspected (tiles, scans, products) is mostly without an object, and there the pixel metrics say little:
F, IoU and Dice of an empty ground truth are 0 whatever was predicted. What is asked of such images is whether the
prediction stayed silent.

Conventions. An image's response is the greatest value of its map, v / 255, of the map as it was evaluated (resized
where that was asked for) but never normalised: min-max gives every map the response 1, noise on an empty image
included. An image raises an alarm where its response is at least 0.5; no 8-bit value is exactly half, so these are
the maps with a pixel of 128 or more, those that IoU and Dice count without normalisation.

* false_alarms: the share of the images without an object that raise one.
* misses: the share of the images with an object that raise none. Where in the image an alarm lies is not asked.
* AUROC: the area under the ROC curve of the responses, computed as the Mann-Whitney statistic (Hanley and McNeil,
  Radiology 1982): how often an image with an object has a greater response than one without, over all pairs, ties
  counting half. It needs images of both kinds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from dsu.thresholds import DEFAULT_THRESHOLD

__all__ = ["ALARM", "ImageLevel", "auroc"]

ALARM: Final = DEFAULT_THRESHOLD
"""The least response that is an alarm."""

_STRETCHED: Final = 254 / 255
"""What every min-max normalised map reaches, whether it was truncated to 8 bits or rounded."""


@dataclass(frozen=True)
class ImageLevel:
    """Every image's response, and whether its ground truth is empty, in the order in which they were evaluated.

    Attributes:
        responses: The largest value of each map, in [0, 1].
        empty: Whether each ground truth has no foreground pixel.
    """

    responses: tuple[float, ...]
    empty: tuple[bool, ...]

    @property
    def without_object(self) -> int:
        """How many images have no object."""
        return sum(self.empty)

    @property
    def with_object(self) -> int:
        """How many images have one."""
        return len(self.empty) - self.without_object

    def figures(self) -> dict[str, float]:
        """`dsu.metrics.figures.IMAGE_LEVEL`, in [0, 1]; those that are not defined are left out, see `lacking`."""
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
        """Why some of the figures are not defined, in a few words; empty if all are."""
        if not self.with_object:
            return "no image has an object"
        return "" if self.without_object else "every image has an object"

    @property
    def stretched(self) -> bool:
        """Whether every map reaches full range, as maps do that were min-max normalised when they were predicted."""
        return bool(self.responses) and min(self.responses) >= _STRETCHED


def auroc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """The share of pairs in which the positive's score is the greater one, ties counting half.

    Both must have at least one score.

    Example:
        >>> auroc([0.9, 0.5], [0.5, 0.1])
        0.875
    """
    ordered = np.sort(negatives)
    below, not_above = (np.searchsorted(ordered, positives, side) for side in ("left", "right"))
    return float((below + not_above).sum() / (2 * len(positives) * len(negatives)))
