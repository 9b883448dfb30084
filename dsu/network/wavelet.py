"""Depthwise convolution with a wavelet branch (arXiv 2407.05848): a large field of view for few weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ChannelScale", "WaveletConv", "haar", "inverse_haar"]

TAP = 0.4999999701976776
"""Product of two float32 taps 1/sqrt(2), the published filters' value; kept in float64 too."""


def haar(x: Tensor) -> Tensor:
    """One level of the orthonormal Haar transform.

    (B, C, H, W) with even sides to (B, 4 C, H/2, W/2): channel 4 c + subband, in the order LL, low along the
    width and high along the height, high along the width and low along the height, HH.
    """
    top_left, top_right = x[..., ::2, ::2], x[..., ::2, 1::2]
    bottom_left, bottom_right = x[..., 1::2, ::2], x[..., 1::2, 1::2]
    subbands = torch.stack(_butterfly(top_left, top_right, bottom_left, bottom_right), dim=2)
    return subbands.flatten(1, 2)  # (B, C, 4, H/2, W/2) -> (B, 4C, H/2, W/2)


def inverse_haar(subbands: Tensor) -> Tensor:
    """Undo `haar`: (B, 4 C, H, W) to (B, C, 2 H, 2 W).

    The transform is symmetric and orthonormal, so its inverse is the same butterfly, laid out again.
    """
    batch, channels, height, width = subbands.shape
    ll, lh, hl, hh = subbands.view(batch, channels // 4, 4, height, width).unbind(2)
    top_left, top_right, bottom_left, bottom_right = _butterfly(ll, lh, hl, hh)
    top = torch.stack((top_left, top_right), dim=-1).flatten(-2)
    bottom = torch.stack((bottom_left, bottom_right), dim=-1).flatten(-2)
    return torch.stack((top, bottom), dim=-2).flatten(-3, -2)


def _butterfly(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        TAP * (a + b + c + d),
        TAP * (a + b - c - d),
        TAP * (a - b + c - d),
        TAP * (a - b - c + d),
    )


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
