"""Channel modulation: DINOv2's map made to fit a level of Hiera (paper, Section III, "Channel Modulation")."""

from torch import Tensor, nn
from torch.nn import functional

from dsu.network.wavelet import WaveletConv

__all__ = ["ChannelModulation"]


class ChannelModulation(nn.Module):
    """Depthwise wavelet convolution, 1x1 convolution to the level's width, batch norm, ReLU.

    Args:
        dino_dim: channels of DINOv2's map.
        level_dim: channels of the Hiera level that it is to be fused into.
    """

    def __init__(self, dino_dim: int, level_dim: int) -> None:
        super().__init__()
        self.depthwise = WaveletConv(dino_dim)
        self.pointwise = nn.Conv2d(dino_dim, level_dim, 1, bias=False)
        self.norm = nn.BatchNorm2d(level_dim)

    def forward(self, dino_map: Tensor) -> Tensor:
        """(B, dino_dim, h, w), already on the level's grid, to (B, level_dim, h, w)."""
        return functional.relu(self.norm(self.pointwise(self.depthwise(dino_map))))
