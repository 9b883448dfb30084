"""The paper's loss: IoU weighted towards boundaries plus BCE, over three side outputs (paper, equations 1, 2)."""

from collections.abc import Sequence
from typing import Final, Literal

from torch import Tensor
from torch.nn import functional

__all__ = ["SIDE_WEIGHTS", "BceKind", "boundary_weight", "side_losses", "total_loss", "weighted_sum"]

SIDE_WEIGHTS: Final = (0.25, 0.5, 1.0)
"""w1, w2, w3 of equation 2, from the deepest side output to the finest."""

BceKind = Literal["plain", "weighted"]
"""In the authors' program the boundary weight of the BCE cancels: `plain` is what their figures were made with."""

WINDOW: Final = 31


def boundary_weight(mask: Tensor) -> Tensor:
    """1 + 5 |local mean - mask|: large where the mask changes within 15 pixels.

    (B, 1, H, W) to the same shape. The mean counts the zero padding. The sum over a square is the sum of sums
    over rows and columns, which costs 62 instead of 961 additions a pixel.
    """
    half = WINDOW // 2
    rows = functional.avg_pool2d(mask, (1, WINDOW), stride=1, padding=(0, half), divisor_override=1)
    square = functional.avg_pool2d(rows, (WINDOW, 1), stride=1, padding=(half, 0), divisor_override=1)
    return 1 + 5 * (square / WINDOW**2 - mask).abs()


def side_losses(outputs: Sequence[Tensor], mask: Tensor, bce: BceKind = "plain") -> list[Tensor]:
    """The unweighted loss of every side output.

    Args:
        outputs: logits (B, 1, H, W), deepest first.
        mask: (B, 1, H, W) in [0, 1], soft edges kept.
        bce: see `BceKind`.

    Returns:
        One scalar an output: the mean over images of IoU term plus BCE.
    """
    weight = boundary_weight(mask)
    return [_one_loss(logits, mask, weight, bce) for logits in outputs]


def total_loss(outputs: Sequence[Tensor], mask: Tensor, bce: BceKind = "plain") -> Tensor:
    """0.25, 0.5 and 1 times the losses of the side outputs, deepest first (shapes as in `side_losses`)."""
    return weighted_sum(side_losses(outputs, mask, bce))


def weighted_sum(losses: Sequence[Tensor]) -> Tensor:
    """Equation 2: the side outputs' losses, deepest first, to one."""
    return sum((w * loss for w, loss in zip(SIDE_WEIGHTS, losses, strict=True)), start=losses[0].new_zeros(()))


def _one_loss(logits: Tensor, mask: Tensor, weight: Tensor, bce: BceKind) -> Tensor:
    probability = logits.sigmoid()
    intersection = (probability * mask * weight).sum((2, 3))
    union = (weight * (probability + mask)).sum((2, 3))
    iou = 1 - (intersection + 1) / (union - intersection + 1)
    if bce == "plain":
        entropy = functional.binary_cross_entropy_with_logits(logits, mask)
    else:
        pixels = functional.binary_cross_entropy_with_logits(logits, mask, reduction="none")
        entropy = (weight * pixels).sum((2, 3)) / weight.sum((2, 3))
    return (entropy + iou).mean()
