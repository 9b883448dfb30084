"""Spatial feature fusion, a step of the decoder: a deep, small map guides a large one (paper, "Decoder")."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsu.network.receptive_field import WIDTH

__all__ = ["SpatialFeatureFusion"]

INNER = 32


def _conv_norm_relu(dim_in: int, dim_out: int, kernel: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim_in, dim_out, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(dim_out),
        nn.ReLU(),
    )


class SpatialFeatureFusion(nn.Module):
    """One-head attention over the large map's positions, with both maps asking and the large map answering.

    At 88x88 the attention matrix has 60 million entries an image. Torch's fused attention never materialises it, in
    training as in inference: 100 MiB instead of 1.5 GB at batch 2, and a backward pass that recomputes it block by
    block in less time than reading it back takes.

    Args:
        as_published: write the matrix out, as the authors do.
    """

    def __init__(self, *, as_published: bool = False) -> None:
        super().__init__()
        self._attend = _attend_written_out if as_published else _attend
        self.small = _conv_norm_relu(WIDTH, WIDTH)
        self.big = _conv_norm_relu(WIDTH, WIDTH)
        self.query = nn.Sequential(_conv_norm_relu(WIDTH, INNER), _conv_norm_relu(INNER, INNER))
        self.key = nn.Sequential(_conv_norm_relu(WIDTH, INNER), _conv_norm_relu(INNER, INNER))
        self.value = _conv_norm_relu(WIDTH, INNER)
        self.attended = _conv_norm_relu(INNER, WIDTH)
        self.join = _conv_norm_relu(2 * WIDTH, WIDTH, kernel=3)

    def forward(self, small: Tensor, big: Tensor) -> Tensor:
        """(B, 64, h, w) and (B, 64, H, W) to (B, 64, H, W)."""
        small = functional.interpolate(small, size=big.shape[-2:], mode="bilinear", align_corners=False)
        asking = self.small(small) + self.big(big)
        mixed = self._attend(self.query(asking), self.key(asking), self.value(big))
        joined: Tensor = self.join(torch.cat([self.attended(mixed), big], dim=1))
        return joined


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, 32, H, W) to the same: every position of `query` asks all of `key`, scaled by 32^-0.5."""
    query, key, sequence = (_as_sequence(x).unsqueeze(1) for x in (query, key, value))  # one head
    mixed = functional.scaled_dot_product_attention(query, key, sequence)
    return mixed.squeeze(1).transpose(1, 2).reshape(value.shape)


def _attend_written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `_attend`, by the authors' operations in their order."""
    weight = (INNER**-0.5 * (_as_sequence(query) @ key.flatten(2))).softmax(-1)
    mixed: Tensor = weight @ _as_sequence(value)
    return mixed.transpose(1, 2).contiguous().view(value.shape)


def _as_sequence(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H W, C), contiguous: otherwise torch falls back to the materialised attention."""
    return x.flatten(2).transpose(1, 2).contiguous()
