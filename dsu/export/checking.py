"""What shows that an exported model is right: the same images through torch and through the file, and both clocked."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dsu.data.datasets import find_images, masks_below
from dsu.data.images import UnreadableImage, or_unreadable, read_image, resize_image
from dsu.data.synthetic import draw_sample
from dsu.errors import DsuError, UsageError
from dsu.export.runner import Model, mask_of
from dsu.metrics.meters import Meters
from dsu.network.network import DSUNet

__all__ = [
    "BATCHES",
    "Agreement",
    "Loss",
    "compare",
    "images_to_check",
    "loss_of",
    "masks_of",
    "network_inputs",
    "through_torch",
]

BATCHES: Final = (1, 2, 3)
"""Sizes that are run; none is the traced one."""

LARGEST: Final = 1e-3
"""Of the logits' standard deviation; right exports differ by some 5e-6 of it."""

ROUNDS: Final = 3

Arrays = dict[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class Agreement:
    """How near a float32 model is to torch, and how long both take for one image.

    Attributes:
        logits: the largest difference, in standard deviations of torch's logits.
        grey_levels: the largest difference of masks that are stretched to their full range.
        torch_seconds, seconds: the fastest of some runs of one image, taken in turns.
    """

    logits: float
    grey_levels: float
    torch_seconds: float
    seconds: float

    @property
    def fault(self) -> str | None:
        """Why the model must not be used, a clause; None if it is right."""
        if not self.logits <= LARGEST:  # so that NaN fails, too
            return f"its logits differ from torch's by {self.logits:.2g} of their deviation, more than {LARGEST:g}"
        return None if self.grey_levels <= 1 else f"its masks differ from torch's by {self.grey_levels:.1f} grey levels"


@dataclass(frozen=True)
class Loss:
    """What a model of lower precision loses against the float32 one, and how long both take for one image.

    Attributes:
        S: the structure measure of its masks, with the float32 model's, cut at a half, as the truth.
        S_before: that of the float32 model's own soft masks.
        MAE: the mean difference of masks, 0 to 1. Masks are stretched to their full range.
        grey_levels: the largest difference.
        float_seconds, seconds: the fastest of some runs of one image, taken in turns.
    """

    S: float
    S_before: float
    MAE: float
    grey_levels: float
    float_seconds: float
    seconds: float

    def to_json(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


def images_to_check(folder: Path | None, count: int = sum(BATCHES)) -> list[Image.Image]:
    """RGB images from all over a folder, again and again where they are few; drawn ones without a folder.

    Masks among them are left out. Raises `UsageError` for a folder without any image that can be read.
    """
    if folder is None:
        return [Image.fromarray(draw_sample(np.random.default_rng((17, index)))[0]) for index in range(count)]
    images = find_images(folder)
    masks = masks_below(folder)
    paths = [path for path in images if os.path.realpath(path) not in masks]
    read = or_unreadable(lambda path: read_image(path))
    chosen = [read(paths[index * len(paths) // count]) for index in range(count)] if paths else []
    found = [one for one in chosen if not isinstance(one, UnreadableImage)]
    if not found:
        raise UsageError(f"{folder} holds no image that can be read: give another folder.")
    return [found[index % len(found)] for index in range(count)]


def network_inputs(sizes: dict[str, int], pictures: Sequence[Image.Image]) -> Arrays:
    """Images as the network reads them: (B, side, side, 3) uint8 by input."""
    return {name: np.stack([resize_image(one, side) for one in pictures]) for name, side in sizes.items()}


def through_torch(network: DSUNet) -> Callable[[Arrays], NDArray[np.float32]]:
    """The network in the way that `Segmenter` runs it: encoders in blocks of a fixed number of images."""

    @torch.no_grad()
    def run(given: Arrays) -> NDArray[np.float32]:
        values = [torch.from_numpy(one).permute(0, 3, 1, 2) for one in given.values()]
        return network(*values, start_feature="pixels").logits.numpy()  # type: ignore[no-any-return]

    return run


def compare(network: DSUNet, model: Model, given: Arrays) -> Agreement:
    """Run the same images through both, in batches of `BATCHES`. Raises `DsuError` where the model can't run them."""
    expected, found = [], []
    reference = through_torch(network)
    for batch in _batches(given):
        expected.append(reference(batch))
        found.append(_run(model, batch))
    a, b = np.concatenate(expected), np.concatenate(found)
    seconds = _seconds([reference, model.run], given)
    return Agreement(float(np.abs(a - b).max() / a.std()), float(_grey(a, b).max()), *seconds)


def loss_of(model: Model, floating: Model, given: Arrays) -> Loss:
    """What a model of lower precision loses. Raises `DsuError` where it can't run, or gives what is not finite."""
    masks = [masks_of(one, given) for one in (floating, model)]
    own, other = (_structure(side, masks[0]) for side in masks)
    differences = np.abs(masks[0] - masks[1])
    seconds = _seconds([floating.run, model.run], given)
    return Loss(other, own, float(differences.mean()), float(differences.max() * 255), *seconds)


def masks_of(model: Model, given: Arrays) -> NDArray[np.float32]:
    """Stretched masks (B, S, S) of a model, in batches of `BATCHES`. Raises as `loss_of`."""
    logits = np.concatenate([_run(model, batch) for batch in _batches(given)])
    if not np.isfinite(logits).all():
        raise DsuError("The model's output is not finite at this precision: export with --precision fp32.")
    return np.stack([mask_of(one[0], "minmax") for one in logits])


def _structure(masks: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    meters = Meters()
    for mask, other in zip(masks, truth, strict=True):
        meters.s.step(mask.astype(np.float64), other >= 0.5, normalize=False)
    return float(meters.s.get_results()["sm"])


def _batches(given: Arrays) -> list[Arrays]:
    starts = [sum(BATCHES[:index]) for index in range(len(BATCHES))]
    return [
        {name: values[start : start + size] for name, values in given.items()}
        for start, size in zip(starts, BATCHES, strict=True)
    ]


def _run(model: Model, batch: Arrays) -> NDArray[np.float32]:
    try:
        return model.run(batch)
    except Exception as error:  # onnxruntime's own kinds
        count = len(next(iter(batch.values())))
        raise DsuError(
            f"The exported model can't run a batch of {count} ({str(error).splitlines()[0]}): this is a defect of dsu."
        ) from error


def _grey(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Differences of stretched masks, (B, S, S), in grey levels."""
    stretched = [np.stack([mask_of(one[0].copy(), "minmax") for one in logits]) for logits in (a, b)]
    differences: NDArray[np.float32] = np.abs(stretched[0] - stretched[1]) * np.float32(255)
    return differences


def _seconds(runs: Sequence[Callable[[Arrays], Any]], given: Arrays) -> list[float]:
    """The fastest time of each for one image, in turns, so that a busy moment falls on all."""
    one = {name: values[:1] for name, values in given.items()}
    best = [float("inf")] * len(runs)
    for _ in range(ROUNDS):
        for index, run in enumerate(runs):
            started = time.perf_counter()
            run(one)
            best[index] = min(best[index], time.perf_counter() - started)
    return best
