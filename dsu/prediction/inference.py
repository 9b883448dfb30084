"""Compute logits from batches and tiles, and masks from logits."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dsu.batches import Batch, prefetch
from dsu.choices import Normalization
from dsu.data.decoding import ImageProcessor
from dsu.data.images import Box
from dsu.data.tiles import Tiling
from dsu.graphs import GraphRunner, Outputs
from dsu.network.network import DSUNet
from dsu.network.resume import ResumePoint, earliest
from dsu.runner import BATCH, TileBlender, stretch
from dsu.runtime import Runtime


def finish_mask(logits: Tensor, size: tuple[int, int], normalization: Normalization) -> NDArray[np.float32]:
    """One image's mask at its own size (paper, Section IV.C, and the published program).

    Args:
        logits: (1, S, S), the finest output.
        size: width and height in pixels.
        normalization: see `Normalization`.

    Returns:
        (height, width) float32 in [0, 1].
    """
    return mask_of(resize_logits(logits, size), normalization)


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (1, S, S) logits bilinearly to an image's (width, height); returns (height, width) float32."""
    width, height = size
    resized = functional.interpolate(
        logits.float().unsqueeze(0), size=(height, width), mode="bilinear", align_corners=False
    )
    return resized[0, 0]


def mask_of(logits: Tensor, normalization: Normalization) -> NDArray[np.float32]:
    """An image's mask, (height, width) float32 in [0, 1], from its logits at that size, which are overwritten."""
    mask = logits.sigmoid_().cpu().numpy()
    return stretch(mask) if normalization == "minmax" else mask


class PixelBudget:
    """Limits the pixels that all threads process at once; a larger image is processed alone.

    Args:
        most: pixels.
    """

    def __init__(self, most: int) -> None:
        self._most, self._taken, self._given_back = most, 0, threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Reserve an image's pixels within a `with` statement."""
        with self._given_back:
            self._given_back.wait_for(lambda: not self._taken or self._taken + pixels <= self._most)
            self._taken += pixels
        try:
            yield
        finally:
            with self._given_back:
                self._taken -= pixels
                self._given_back.notify_all()


class Predictor:
    """Computes the finest logits of unflipped batches, from the store or from images.

    On a GPU, single samples are computed by one CUDA graph, and batches by another one. So batches must have one size:
    smaller ones are padded to `batch_size`.

    Args:
        network: in evaluation mode on the runtime's device.
        runtime: device and precision.
        point: where the network resumes.
        batch_size: the usual number of samples in a batch.
    """

    def __init__(self, network: DSUNet, runtime: Runtime, point: ResumePoint, batch_size: int = BATCH) -> None:
        self.network, self.runtime, self.point, self.batch_size = network, runtime, point, batch_size
        self._single, self._several = GraphRunner.on(runtime.device), GraphRunner.on(runtime.device)

    def __call__(self, batch: Batch) -> Tensor:
        """(B, 1, S, S) logits on the device."""
        count, graphs = len(batch.names), self._single if len(batch.names) == 1 else self._several
        batch = batch.to(self.runtime.device)
        if count > 1 and graphs.captures:
            batch = batch.padded(self.batch_size)  # on the device: the host's memory is pinned, a padded copy is not
        return graphs.run(self._eager, batch)["logits"][:count]

    @property
    def refusal(self) -> str:
        """That a graph could not be captured, for a progress line; otherwise empty."""
        return next((graphs.remark for graphs in (self._single, self._several) if graphs.refusal), "")

    @torch.no_grad()
    def _eager(self, batch: Batch) -> Outputs:
        with self.runtime.autocast():
            return {"logits": self.network(**batch.inputs, start_feature=self.point.start).logits}


@dataclass(frozen=True)
class TiledImage:
    """An image in tiles.

    Attributes:
        boxes: the box of each tile.
        fetch: returns a batch of the tiles from a start to a stop index in `boxes`.
    """

    boxes: Sequence[Box]
    fetch: Callable[[int, int], Batch]


def segment_tiles(predictor: Callable[[Batch], Tensor], image: TiledImage, size: int) -> Tensor:
    """Logits (height, width) float32 of a whole image on the CPU, computed in batches of `size` tiles."""
    blender = TileBlender(image.boxes)
    starts = range(0, len(image.boxes), size)
    batches = prefetch(partial(image.fetch, start, min(start + size, len(image.boxes))) for start in starts)
    for start, batch in zip(starts, batches, strict=True):
        for box, one in zip(image.boxes[start:], predictor(batch), strict=False):
            left, top, right, bottom = box
            blender.add(box, resize_logits(one, (right - left, bottom - top)).cpu().numpy())
    return torch.from_numpy(blender.logits)


def tiled_image(network: DSUNet, image: Image.Image, tiling: Tiling) -> TiledImage:
    """An RGB image in tiles, cropped and resized when fetched."""
    boxes = tiling.boxes(*image.size)
    processor = ImageProcessor(network.config, bool(earliest(network.config).guides))

    def fetch(start: int, stop: int) -> Batch:
        names = [f"{left},{top}" for left, top, _, _ in boxes[start:stop]]
        return Batch.decoded(names, [processor.fit(image, box=box) for box in boxes[start:stop]])

    return TiledImage(boxes, fetch)
