"""Propose thresholds from validation images, and measure their effect on other images.

Conventions. An image is found, or raises a false alarm, if its response (see `dsu.metrics.image_level`) reaches the
threshold. Dice is over all pixels together (F with beta 1), at each of the 8-bit values 1 to 255; maps are never
normalised. If several values are equally good, the middle of their longest run is chosen, because it is farthest from
thresholds that are worse.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dsu.metrics.image_level import ImageLevel
from dsu.thresholds import level_of

CALIBRATION_BINS: Final = 10

_LEVELS: Final = np.arange(1, 256)


@dataclass(frozen=True)
class AtThreshold:
    """The effect of a threshold on a set.

    Attributes:
        found, missed: number of images with an object that raise an alarm, and that raise none.
        false_alarms, silent: the same for images without an object.
        precision, recall, dice: over all pixels together, in [0, 1]; 0 if no pixel reaches the threshold.
    """

    found: int
    missed: int
    false_alarms: int
    silent: int
    precision: float
    recall: float
    dice: float


def evaluate_threshold(threshold: float, images: ImageLevel, pixels: NDArray[np.int64]) -> AtThreshold:
    """The effect of a threshold on a set.

    Args:
        threshold: in [0, 1].
        images: every image's response.
        pixels: number of pixels outside and inside objects by 8-bit value, (2, 256).
    """
    level = level_of(threshold)
    alarms, empty = _levels(images) >= level, np.array(images.empty, bool)
    off, on = (int(count) for count in pixels[:, level:].sum(axis=1))
    objects = int(pixels[1].sum())
    return AtThreshold(
        found=int((alarms & ~empty).sum()),
        missed=int((~alarms & ~empty).sum()),
        false_alarms=int((alarms & empty).sum()),
        silent=int((~alarms & empty).sum()),
        precision=on / max(1, on + off),
        recall=on / max(1, objects),
        dice=2 * on / max(1, on + off + objects),
    )


def propose_thresholds(
    images: ImageLevel, pixels: NDArray[np.int64], false_alarms: float = 0.05
) -> Iterator[tuple[str, float]]:
    """Each rule's name and threshold; rules without a suitable threshold are left out.

    Args:
        images, pixels: see `evaluate_threshold`.
        false_alarms: the share of images without an object that may raise a false alarm, in [0, 1].
    """
    if images.with_object:
        above = pixels[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
        dice = 2 * above[1] / np.maximum(1, above.sum(axis=0) + pixels[1].sum())
        yield "best pixels", _middle(dice == dice.max())
    levels, empty = _levels(images), np.array(images.empty, bool)
    found = np.array([(levels[~empty] >= level).sum() for level in _LEVELS])
    raised = np.array([(levels[empty] >= level).sum() for level in _LEVELS])
    complete = found == images.with_object
    if images.with_object and complete.any():
        yield "no misses", _middle(complete & (raised == raised[complete].min()))
    if images.with_object and images.without_object:
        balanced = found / images.with_object - raised / images.without_object
        yield "balanced", _middle(balanced == balanced.max())
        few = raised <= false_alarms * images.without_object + 1e-9
        if few.any():
            yield f"false alarms up to {100 * false_alarms:g} %", _middle(few & (found == found[few].max()))


def calibration(images: ImageLevel) -> list[tuple[float, float, int, int]]:
    """How often images with similar responses have an object.

    Returns up to `CALIBRATION_BINS` bins in ascending order, as equal in size as ties allow: lowest and highest
    response, number of images, and how many of them have an object. Empty if all images have an object, or none has.
    """
    if not (images.with_object and images.without_object):
        return []
    responses, empty = np.array(images.responses), np.array(images.empty, bool)
    count = min(CALIBRATION_BINS, max(2, len(responses) // 5))
    edges = np.unique(np.quantile(responses, np.linspace(0, 1, count + 1)[1:-1], method="lower"))
    parts = np.searchsorted(edges, responses)
    members = [np.flatnonzero(parts == part) for part in np.unique(parts)]
    return [
        (float(responses[at].min()), float(responses[at].max()), len(at), int((~empty[at]).sum())) for at in members
    ]


def threshold_at(level: int) -> float:
    """The threshold with the fewest decimals whose `level_of` is this 8-bit value (1 to 255)."""
    for digits in range(1, 4):
        scale: int = 10**digits
        threshold = math.floor(level / 255 * scale) / scale
        if level_of(threshold) == level:
            return threshold
    return level / 255


def _levels(images: ImageLevel) -> NDArray[np.intp]:
    levels: NDArray[np.intp] = np.rint(255 * np.array(images.responses)).astype(np.intp)
    return levels


def _middle(good: NDArray[np.bool_]) -> float:
    """The threshold in the middle of the longest run of good values; `good[0]` belongs to the value 1."""
    ends = np.flatnonzero(np.diff(np.concatenate([[0], good.astype(np.int8), [0]])))
    starts, stops = ends[::2], ends[1::2]
    longest = int((stops - starts).argmax())
    return threshold_at(int(_LEVELS[(starts[longest] + stops[longest] - 1) // 2]))
