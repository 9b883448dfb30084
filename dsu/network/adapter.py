"""The adapter in front of a Hiera block (paper, Section III, "Adapter"; after arXiv 2304.09148)."""

from torch import Tensor, nn

__all__ = ["Adapter"]

HIDDEN = 32


class Adapter(nn.Module):
    """x + GELU(W2 GELU(W1 x)) on the tokens that enter a block.

    The width of the bottleneck is 32 whatever the block's; both layers have biases and GELU is the exact one.

    Args:
        dim: channels of the tokens entering the block.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, HIDDEN)
        self.up = nn.Linear(HIDDEN, dim)
        self.activation = nn.GELU()

    def init_identity(self) -> None:
        """Make it the identity, from which it can still learn: only the second layer is zero, and GELU'(0) is 1/2."""
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, H, W, dim) to the same shape."""
        prompt: Tensor = self.activation(self.up(self.activation(self.down(tokens))))
        return tokens + prompt
