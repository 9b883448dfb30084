"""Bilinear resizing of feature maps, corners not aligned."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["bilinear_weights", "resize_by_products", "resize_map"]


def resize_map(x: Tensor, side: int) -> Tensor:
    """Resize (B, C, h, w) to (B, C, side, side); exact where nothing changes."""
    if x.shape[-2:] == (side, side):
        return x
    return functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


def bilinear_weights(source: int, target: int) -> Tensor:
    """The weights by which `target` positions mix `source` ones along one side: (target, source) float64."""
    identity = torch.eye(source, dtype=torch.float64).unsqueeze(0)
    return functional.interpolate(identity, size=target, mode="linear", align_corners=False)[0].T.contiguous()


def resize_by_products(x: Tensor, weights: Tensor) -> Tensor:
    """Resize (B, h, w, C), whose sides are equal, by two products with `weights` (side, h): (B, side, side, C).

    `interpolate` runs another kernel under torch's deterministic mode, which changes most values in their last bits.
    Products do not, so what is stored does not depend on that mode. They are computed in float32 at least, also under
    autocast.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x if x.dtype == torch.float64 else x.float()
        weights = weights.to(x.dtype)
        batch, _, _, channels = x.shape
        columns = weights @ x  # (B, h, side, C)
        rows: Tensor = weights @ columns.flatten(2)  # (B, side, side * C)
        return rows.view(batch, len(weights), len(weights), channels)
