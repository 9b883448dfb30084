"""Content-guided attention fusion of a Hiera level and modulated DINOv2 (arXiv 2301.04805; paper, "Feature
Fusion")."""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ContentGuidedFusion"]

SQUEEZE = 8


class ContentGuidedFusion(nn.Module):
    """Weighs two feature maps against each other by channel, spatial and pixel attention.

    The pixel attention's sigmoid is applied twice, as the published program does: the weight of either map
    lies between 0.5 and 0.73.

    Args:
        dim: channels of both maps; they need at least 4x4 positions (reflect padding by 3).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.channel = nn.Sequential(nn.Conv2d(dim, dim // SQUEEZE, 1), nn.ReLU(), nn.Conv2d(dim // SQUEEZE, dim, 1))
        self.spatial = nn.Conv2d(2, 1, 7)
        self.pixel = nn.Conv2d(2 * dim, dim, 7, groups=dim)
        self.out = nn.Conv2d(dim, dim, 1)

    def forward(self, level: Tensor, modulated: Tensor) -> Tensor:
        """Two (B, dim, H, W) to one."""
        total = level + modulated
        channel = self.channel(total.mean((2, 3), keepdim=True))  # (B, dim, 1, 1)
        summary = torch.cat([total.mean(1, keepdim=True), total.max(1, keepdim=True).values], dim=1)
        spatial = self.spatial(reflect_pad(summary, 3))  # (B, 1, H, W)
        coarse = channel + spatial
        weight = torch.sigmoid(torch.sigmoid(self._pixel_attention(total, coarse)))
        fused: Tensor = self.out(total + weight * level + (1 - weight) * modulated)
        return fused

    def _pixel_attention(self, total: Tensor, coarse: Tensor) -> Tensor:
        """`self.pixel` of both maps, channel by channel interleaved: (B, dim, H, W).

        One group of that layer sees a channel of the sum and the same channel of the coarse attention. Two depthwise
        convolutions with the halves of its weight give the same numbers and have fast kernels; groups of two have none.
        """
        weight, dim = self.pixel.weight, len(self.pixel.weight)
        total, coarse = reflect_pad(total, 3), reflect_pad(coarse, 3)
        of_total = functional.conv2d(total, weight[:, :1], self.pixel.bias, groups=dim)
        return of_total + functional.conv2d(coarse, weight[:, 1:], groups=dim)


def reflect_pad(x: Tensor, by: int) -> Tensor:
    """Mirror (B, C, H, W) at its edges, which are not repeated: (B, C, H + 2 by, W + 2 by).

    torch's own reflection padding has no deterministic backward pass on a GPU; copies have.
    """
    x = torch.cat([x[..., 1 : by + 1].flip(-1), x, x[..., -by - 1 : -1].flip(-1)], dim=-1)
    return torch.cat([x[..., 1 : by + 1, :].flip(-2), x, x[..., -by - 1 : -1, :].flip(-2)], dim=-2)
