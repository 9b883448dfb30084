"""Depthwise convolution with a wavelet branch (arXiv 2407.05848): a large field of view for few weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ChannelScale", "WaveletConv", "haar", "inverse_haar"]

TAP = 0.4999999701976776
"""Product of two float32 taps 1/sqrt(2), the published filters' value; kept in float64 too."""


def haar(x: Tensor) -> Tensor:
    """One level of the orthonormal Haar transform.

    (B, C, H, W) with even sides to (B, 4 C, H/2, W/2): channel 4 c + subband, in the order LL, low along the width
    and high along the height, high along the width and low along the height, HH.

    Additions within each 2x2 cell: a grouped convolution gives the same numbers, but cuDNN runs its groups one by one.
    """
    return _butterfly(functional.pixel_unshuffle(x, 2))


def inverse_haar(subbands: Tensor) -> Tensor:
    """Undo `haar`: (B, 4 C, H, W) to (B, C, 2 H, 2 W).

    The transform is orthonormal and its 4x4 matrix symmetric, so the same additions undo it.
    """
    return functional.pixel_shuffle(_butterfly(subbands), 2)


def _butterfly(x: Tensor) -> Tensor:
    """The sums (++++), (++--), (+-+-) and (+--+) of every four channels in a row, times the tap: same shape."""
    batch, channels, height, width = x.shape
    a, b, c, d = x.reshape(batch, channels // 4, 4, height, width).unbind(2)
    top, bottom, left, right = a + b, c + d, a - b, c - d
    return TAP * torch.stack([top + bottom, top - bottom, left + right, left - right], dim=2).flatten(1, 2)


class ChannelScale(nn.Module):
    """One learned factor a channel."""

    def __init__(self, channels: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, channels, 1, 1), start))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) times (1, C, 1, 1)."""
        return x * self.weight


class WaveletConv(nn.Module):
    """A depthwise 3x3 convolution, plus another one between a Haar transform and its inverse.

    Both branches are scaled by learned factors a channel: the base starts at 1 (and scales its bias too), the
    wavelet branch at 0.1.

    Args:
        channels: channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.base = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.base_scale = ChannelScale(channels, 1.0)
        self.subband = nn.Conv2d(4 * channels, 4 * channels, 3, padding=1, groups=4 * channels, bias=False)
        self.subband_scale = ChannelScale(4 * channels, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape; odd sides are padded by a zero row or column and cropped again."""
        height, width = x.shape[-2:]
        even = functional.pad(x, (0, width % 2, 0, height % 2))
        detail = inverse_haar(self.subband_scale(self.subband(haar(even))))
        base: Tensor = self.base_scale(self.base(x))
        return base + detail[..., :height, :width]
