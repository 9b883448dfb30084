"""The paper's loss: IoU weighted towards boundaries plus BCE, over three side outputs (paper, equations 1 and 2).

For rare foreground, both terms can be replaced (see `SegmentationLoss`).

The loss is also defined for an image without an object. Its region term is then 1 - 1 / (1 + c), where c is the sum of
w p (for a Tversky term multiplied by 1 - beta): 0 for an empty prediction, and close to 1 for a large one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional

from dsu.choices import BceKind, RegionKind
from dsu.errors import UsageError, did_you_mean

SIDE_WEIGHTS: Final = (0.25, 0.5, 1.0)
"""w1, w2, w3 of equation 2, from the deepest side output to the finest."""

WINDOW: Final = 31


class Output(Protocol):
    """The network's output."""

    @property
    def side_logits(self) -> Sequence[Tensor]:
        """Logits (B, 1, H, W), deepest first."""


@dataclass(frozen=True)
class SegmentationLoss:
    """Deep supervision of three side outputs: a region term and a BCE each (paper, equations 2 to 4).

    Args:
        region: the paper's IoU, or the Tversky index, with separate weights for misses and false alarms.
        bce: plain (the paper), weighted at boundaries, or focal.
        tversky_beta: weight of misses in the Tversky index, between 0 and 1; false alarms have weight 1 - beta.
        focal_gamma: exponent of the focal BCE.

    Raises `UsageError` for an unknown term or a number out of range.

    Example:
        >>> loss = SegmentationLoss()(model(**inputs), batch["mask"])
        >>> loss.backward()
    """

    region: RegionKind = "iou"
    bce: BceKind = "plain"
    tversky_beta: float = 0.7
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        for name, value, known in (("region", self.region, RegionKind), ("bce", self.bce, BceKind)):
            if value not in get_args(known):
                choices = ", ".join(get_args(known))
                raise UsageError(
                    f"{name} can't be {value!r}: choose {choices}{did_you_mean(str(value), get_args(known))}."
                )
        if not 0 < self.tversky_beta < 1 or self.focal_gamma < 0:
            raise UsageError(
                f"tversky_beta {self.tversky_beta} or focal_gamma {self.focal_gamma} is out of range: the first must "
                "be between 0 and 1, the second at least 0."
            )

    def __call__(self, output: Output, mask: Tensor) -> Tensor:
        """The sum of 0.25, 0.5 and 1 times the side outputs' losses, deepest first: a scalar.

        Args:
            output: the network's output; its logits may have any floating-point type.
            mask: (B, 1, H, W) in [0, 1], with soft edges.
        """
        return self.total(self.side_losses([precise(logits) for logits in output.side_logits], mask))

    def side_losses(self, side_logits: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        """The unweighted loss of each side output: the mean over images of region term plus BCE, a scalar each."""
        _check_mask(mask, side_logits[-1])
        weight = boundary_weight(mask)
        return [(self._region(z, mask, weight) + self._bce(z, mask, weight)).mean() for z in side_logits]

    def total(self, side_losses: Sequence[Tensor]) -> Tensor:
        """Equation 2: the weighted sum of the side outputs' losses, deepest first."""
        start = side_losses[0].new_zeros(())
        return sum((w * loss for w, loss in zip(SIDE_WEIGHTS, side_losses, strict=True)), start=start)

    def _region(self, logits: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        """The region term, (B, 1): one minus IoU or Tversky index."""
        probability = logits.sigmoid()
        both = (probability * mask * weight).sum((2, 3))
        if self.region == "iou":
            union = (weight * (probability + mask)).sum((2, 3))
            return 1 - (both + 1) / (union - both + 1)
        alarms = (probability * (1 - mask) * weight).sum((2, 3))
        misses = ((1 - probability) * mask * weight).sum((2, 3))
        return 1 - (both + 1) / (both + (1 - self.tversky_beta) * alarms + self.tversky_beta * misses + 1)

    def _bce(self, logits: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        """Binary cross-entropy: a scalar for all images, or (B, 1)."""
        if self.bce == "plain":
            return functional.binary_cross_entropy_with_logits(logits, mask)
        pixels = functional.binary_cross_entropy_with_logits(logits, mask, reduction="none")
        if self.bce == "focal":
            return ((mask - logits.sigmoid()).abs() ** self.focal_gamma * pixels).mean((2, 3))
        return (weight * pixels).sum((2, 3)) / weight.sum((2, 3))


def _check_mask(mask: Tensor, logits: Tensor) -> None:
    """Raise `UsageError` if a mask is not (B, 1, H, W) floats in [0, 1]; values on a GPU are not checked."""
    if not mask.is_floating_point():
        kind = str(mask.dtype).removeprefix("torch.")
        raise UsageError(
            f"The mask is {kind}, but the loss needs floats in [0, 1]: give mask.float(), or for bytes mask / 255."
        )
    if mask.shape != logits.shape:
        raise UsageError(
            f"The mask is {tuple(mask.shape)} and the logits are {tuple(logits.shape)}: give one (B, 1, H, W)."
        )
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and mask.numel() and mask.max() > 1:
        raise UsageError(
            f"The mask's maximum is {mask.max().item():g}, but the loss needs floats in [0, 1]: divide it by 255."
        )


def boundary_weight(mask: Tensor) -> Tensor:
    """Pixel weights 1 + 5 |local mean - mask|, large at pixels within 15 pixels of a boundary.

    (B, 1, H, W) to the same shape. The mean includes zero padding. The 31 x 31 window is summed along each axis
    separately, which costs 62 instead of 961 additions per pixel.
    """
    half = WINDOW // 2
    rows = functional.avg_pool2d(mask, (1, WINDOW), stride=1, padding=(0, half), divisor_override=1)
    square = functional.avg_pool2d(rows, (WINDOW, 1), stride=1, padding=(half, 0), divisor_override=1)
    return 1 + 5 * (square / WINDOW**2 - mask).abs()


def precise(logits: Tensor) -> Tensor:
    """Convert to float32; float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()
