"""Bilinear resizing of feature maps, corners not aligned."""

import torch
from torch import Tensor
from torch.nn import functional


def resize_map(x: Tensor, side: int) -> Tensor:
    """Resize (B, C, h, w) to (B, C, side, side); exact if the size is unchanged."""
    if x.shape[-2:] == (side, side):
        return x
    return functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


def bilinear_weights(source: int, target: int) -> Tensor:
    """Interpolation weights from `source` to `target` positions along one side: (target, source) float64."""
    identity = torch.eye(source, dtype=torch.float64).unsqueeze(0)
    return functional.interpolate(identity, size=target, mode="linear", align_corners=False)[0].T.contiguous()


def resize_by_products(x: Tensor, weights: Tensor) -> Tensor:
    """Resize a square (B, h, h, C) by two products with `weights` (side, h): (B, side, side, C).

    `interpolate` uses another kernel in torch's deterministic mode, which changes the last bits of most values. Matrix
    products don't, so stored features do not depend on that mode. They run in at least float32, also under autocast.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x if x.dtype == torch.float64 else x.float()
        weights = weights.to(x.dtype)
        batch, _, _, channels = x.shape
        columns = weights @ x  # (B, h, side, C)
        rows: Tensor = weights @ columns.flatten(2)  # (B, side, side * C)
        return rows.view(batch, len(weights), len(weights), channels)
