"""The paper's loss: IoU weighted towards boundaries plus BCE, over three side outputs (paper, equations 1, 2).

Beside it, for rare foreground, either part can be exchanged (`Loss`).

An image without an object has a loss like any other. Its region term is 1 - 1 / (1 + c), where c is the sum of w p
(of a Tversky term: c times 1 - beta): 0 for an empty prediction, and the more is predicted the closer to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from torch import Tensor
from torch.nn import functional

__all__ = [
    "PAPER_LOSS",
    "SIDE_WEIGHTS",
    "BceKind",
    "Loss",
    "RegionKind",
    "boundary_weight",
    "side_losses",
    "total_loss",
    "weighted_sum",
]

SIDE_WEIGHTS: Final = (0.25, 0.5, 1.0)
"""w1, w2, w3 of equation 2, from the deepest side output to the finest."""

BceKind = Literal["plain", "weighted", "focal"]
"""In the authors' program the boundary weight of the BCE cancels: `plain` is what their figures were made with.
`focal` weighs each pixel by a power of its error, |m - p|, so that the many easy ones count little (1708.02002)."""

RegionKind = Literal["iou", "tversky"]
"""The paper's IoU, or the Tversky index, in which misses and false alarms have weights of their own
(arXiv 1706.05721)."""


@dataclass(frozen=True)
class Loss:
    """What the loss of a side output consists of.

    Attributes:
        region: see `RegionKind`.
        bce: see `BceKind`.
        tversky_beta: the misses' share of the weight in the Tversky index, between 0 and 1; false alarms have the rest.
        focal_gamma: the exponent of a focal BCE.
    """

    region: RegionKind = "iou"
    bce: BceKind = "plain"
    tversky_beta: float = 0.7
    focal_gamma: float = 2.0


PAPER_LOSS: Final = Loss()

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


def side_losses(outputs: Sequence[Tensor], mask: Tensor, loss: Loss = PAPER_LOSS) -> list[Tensor]:
    """The unweighted loss of every side output.

    Args:
        outputs: logits (B, 1, H, W), deepest first.
        mask: (B, 1, H, W) in [0, 1], soft edges kept.
        loss: see `Loss`.

    Returns:
        One scalar an output: the mean over images of region term plus BCE.
    """
    weight = boundary_weight(mask)
    return [(_region(logits, mask, weight, loss) + _bce(logits, mask, weight, loss)).mean() for logits in outputs]


def total_loss(outputs: Sequence[Tensor], mask: Tensor, loss: Loss = PAPER_LOSS) -> Tensor:
    """0.25, 0.5 and 1 times the losses of the side outputs, deepest first (shapes as in `side_losses`)."""
    return weighted_sum(side_losses(outputs, mask, loss))


def weighted_sum(losses: Sequence[Tensor]) -> Tensor:
    """Equation 2: the side outputs' losses, deepest first, to one."""
    return sum((w * loss for w, loss in zip(SIDE_WEIGHTS, losses, strict=True)), start=losses[0].new_zeros(()))


def _region(logits: Tensor, mask: Tensor, weight: Tensor, loss: Loss) -> Tensor:
    """(B, 1): one minus the region's agreement."""
    probability = logits.sigmoid()
    both = (probability * mask * weight).sum((2, 3))
    if loss.region == "iou":
        union = (weight * (probability + mask)).sum((2, 3))
        return 1 - (both + 1) / (union - both + 1)
    alarms = (probability * (1 - mask) * weight).sum((2, 3))
    misses = ((1 - probability) * mask * weight).sum((2, 3))
    return 1 - (both + 1) / (both + (1 - loss.tversky_beta) * alarms + loss.tversky_beta * misses + 1)


def _bce(logits: Tensor, mask: Tensor, weight: Tensor, loss: Loss) -> Tensor:
    """Binary cross-entropy, one figure for all images or (B, 1)."""
    if loss.bce == "plain":
        return functional.binary_cross_entropy_with_logits(logits, mask)
    pixels = functional.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    if loss.bce == "focal":
        return ((mask - logits.sigmoid()).abs() ** loss.focal_gamma * pixels).mean((2, 3))
    return (weight * pixels).sum((2, 3)) / weight.sum((2, 3))
