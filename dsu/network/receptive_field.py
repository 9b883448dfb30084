"""Receptive-field block: every level to 64 channels (paper, Section III; after arXiv 1711.07767)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["WIDTH", "ConvNorm", "ReceptiveFieldBlock"]

WIDTH = 64
"""Channels of the decoder."""


class ConvNorm(nn.Sequential):
    """A convolution without bias and its batch norm; no activation between the layers of a branch.

    `kernel` is a side or (height, width); the padding keeps the size.
    """

    def __init__(self, dim_in: int, dim_out: int, kernel: int | tuple[int, int], dilation: int = 1) -> None:
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (height // 2 * dilation, width // 2 * dilation)
        super().__init__(
            nn.Conv2d(dim_in, dim_out, (height, width), padding=padding, dilation=dilation, bias=False),
            nn.BatchNorm2d(dim_out),
        )


class ReceptiveFieldBlock(nn.Module):
    """Four branches that see 1, 3, 5 and 7 pixels far, joined by a 3x3, beside a 1x1 of the input.

    Args:
        dim: channels of the level.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                ConvNorm(dim, WIDTH, 1),
                *(
                    nn.Sequential(
                        ConvNorm(dim, WIDTH, 1),
                        ConvNorm(WIDTH, WIDTH, (1, kernel)),
                        ConvNorm(WIDTH, WIDTH, (kernel, 1)),
                        ConvNorm(WIDTH, WIDTH, 3, dilation=kernel),
                    )
                    for kernel in (3, 5, 7)
                ),
            ]
        )
        self.join = ConvNorm(4 * WIDTH, WIDTH, 3)
        self.shortcut = ConvNorm(dim, WIDTH, 1)

    def forward(self, level: Tensor) -> Tensor:
        """(B, dim, H, W) to (B, 64, H, W)."""
        seen = torch.cat([branch(level) for branch in self.branches], dim=1)
        return functional.relu(self.join(seen) + self.shortcut(level))
