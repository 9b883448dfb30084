"""From a head's file to a network, and from its logits to masks: what every way of predicting shares."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dsu.batches import Batch
from dsu.choices import Normalization
from dsu.graphs import GraphRunner, Outputs
from dsu.network.network import DSUNet
from dsu.network.resume import ResumePoint
from dsu.runtime import Runtime

__all__ = ["Predictor", "finish_mask", "mask_of", "resize_logits"]


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
    """(1, S, S) logits bilinearly to an image's (width, height): (height, width) float32."""
    width, height = size
    resized = functional.interpolate(
        logits.float().unsqueeze(0), size=(height, width), mode="bilinear", align_corners=False
    )
    return resized[0, 0]


def mask_of(logits: Tensor, normalization: Normalization) -> NDArray[np.float32]:
    """An image's mask, (height, width) float32 in [0, 1], from its logits at that size, which are written over."""
    mask = logits.sigmoid_()
    if normalization == "minmax":
        low, high = mask.min(), mask.max()
        mask = mask.sub_(low).div_(high - low + 1e-8)
    return mask.cpu().numpy()


class Predictor:
    """The finest logits of unflipped batches, from the store or from images; on a GPU as one captured graph.

    Args:
        network: in evaluation mode on the runtime's device.
        runtime: device and precision.
        point: where every batch starts.
    """

    def __init__(self, network: DSUNet, runtime: Runtime, point: ResumePoint) -> None:
        self.network, self.runtime, self.point = network, runtime, point
        self._graphs = GraphRunner.on(runtime.device)

    def __call__(self, batch: Batch) -> Tensor:
        """(B, 1, S, S) logits on the device."""
        return self._graphs.run(self._eager, batch.to(self.runtime.device))["logits"]

    @torch.no_grad()
    def _eager(self, batch: Batch) -> Outputs:
        with self.runtime.autocast():
            return {"logits": self.network(**batch.inputs, start_feature=self.point.start).logits}
