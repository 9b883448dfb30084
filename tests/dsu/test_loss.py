from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional

from dsu.loss import SegmentationLoss, boundary_weight
from dsu.network.network import DSUNetOutput


def soft_masks(batch: int, side: int, seed: int = 0) -> Tensor:
    """Blobs with soft edges; if there are several images, the last is empty."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 1, 6, 6, dtype=torch.float64, generator=generator)
    masks = functional.interpolate(noise, size=(side, side), mode="bicubic").clamp(0, 1)
    if batch > 1:
        masks[-1] = 0
    return masks


def logits(batch: int, side: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(batch, 1, side, side, dtype=torch.float64, generator=generator) for _ in range(3)]


LOSSES = [
    SegmentationLoss(),
    SegmentationLoss(bce="weighted"),
    SegmentationLoss(bce="focal", focal_gamma=2.0),
    SegmentationLoss(region="tversky", tversky_beta=0.7),
    SegmentationLoss(region="tversky", tversky_beta=0.2, bce="focal", focal_gamma=1.0),
]


def total(loss: SegmentationLoss, side_logits: Sequence[Tensor], mask: Tensor) -> Tensor:
    return loss(DSUNetOutput(tuple(side_logits)), mask)


def image_loss(z: Tensor, m: Tensor, loss: SegmentationLoss) -> Tensor:
    """The definition for one image (H, W)."""
    w = 1 + 5 * (functional.avg_pool2d(m[None, None], 31, stride=1, padding=15)[0, 0] - m).abs()
    p = 1 / (1 + torch.exp(-z))
    both = (w * p * m).sum()
    alarms, misses = (w * p).sum() - both, (w * m).sum() - both
    if loss.region == "iou":
        region = (both + 1) / (both + alarms + misses + 1)
    else:
        region = (both + 1) / (both + (1 - loss.tversky_beta) * alarms + loss.tversky_beta * misses + 1)
    entropy = -(m * torch.log(p) + (1 - m) * torch.log(1 - p))
    mean = {
        "plain": lambda: entropy.mean(),
        "weighted": lambda: (w * entropy).sum() / w.sum(),
        "focal": lambda: ((m - p).abs() ** loss.focal_gamma * entropy).mean(),
    }[loss.bce]()
    return 1 - region + mean


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_loss_is_the_mean_over_images_of_the_definition(loss: SegmentationLoss) -> None:
    masks, outputs = soft_masks(3, 40), logits(3, 40)
    assert ((masks > 0) & (masks < 1)).float().mean() > 0
    losses = loss.side_losses(outputs, masks)
    for z, got in zip(outputs, losses, strict=True):
        expected = torch.stack([image_loss(z[i, 0], masks[i, 0], loss) for i in range(3)]).mean()
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    weighted = 0.25 * losses[0] + 0.5 * losses[1] + losses[2]
    torch.testing.assert_close(total(loss, outputs, masks), weighted, atol=1e-12, rtol=0)


def test_terms_differ_and_the_papers_are_the_default() -> None:
    masks, outputs = soft_masks(2, 40), logits(2, 40)
    by_loss = [total(loss, outputs, masks) for loss in LOSSES]
    assert torch.equal(by_loss[0], total(SegmentationLoss(), outputs, masks))
    assert all(abs(a - b) > 1e-3 for index, a in enumerate(by_loss) for b in by_loss[:index])


def test_tversky_beta_weights_misses_against_false_alarms() -> None:
    """One wrong pixel each, far from the boundary, so that the boundary weights are equal."""
    mask = torch.zeros(1, 1, 128, 128, dtype=torch.float64)
    mask[..., :64] = 1
    missed, alarm = [mask.clone() for _ in range(2)]
    missed[..., 16, 16], alarm[..., 16, 111] = 0, 1
    costs = {
        tversky_beta: [
            float(total(SegmentationLoss(region="tversky", tversky_beta=tversky_beta), [(m * 2 - 1) * 50] * 3, mask))
            for m in (missed, alarm)
        ]
        for tversky_beta in (0.5, 0.9)
    }
    assert costs[0.5][0] == pytest.approx(costs[0.5][1], rel=1e-3)
    assert costs[0.9][0] > costs[0.5][0] > costs[0.9][1]


def test_the_region_term_without_an_object() -> None:
    """1 - 1 / (1 + c), where c is the sum of w p, weighted for Tversky."""
    mask, z = torch.zeros(1, 1, 32, 32, dtype=torch.float64), logits(1, 32)[0]
    mass = float(z.sigmoid().sum())
    entropy = float(functional.binary_cross_entropy_with_logits(z, mask))
    for loss, share in ((SegmentationLoss(), 1.0), (SegmentationLoss(region="tversky", tversky_beta=0.7), 0.3)):
        [region, *_] = loss.side_losses([z], mask)
        assert float(region) - entropy == pytest.approx(1 - 1 / (1 + share * mass), abs=1e-12)


@settings(max_examples=15)
@given(height=st.integers(1, 50), width=st.integers(1, 50), seed=st.integers(0, 99))
def test_the_boundary_weight_is_a_31x31_average(height: int, width: int, seed: int) -> None:
    mask = torch.rand(2, 1, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = 1 + 5 * (functional.avg_pool2d(mask, 31, stride=1, padding=15) - mask).abs()
    torch.testing.assert_close(boundary_weight(mask), expected, atol=1e-12, rtol=0)


def test_the_boundary_weight_is_exact_for_masks_of_half_precision() -> None:
    """Sums of values with few bits are exact, so that the result equals the plain 31 x 31 pool."""
    mask = soft_masks(2, 64).half().double()
    assert torch.equal(boundary_weight(mask), 1 + 5 * (functional.avg_pool2d(mask, 31, 1, 15) - mask).abs())


def test_the_average_includes_the_padding() -> None:
    weight = boundary_weight(torch.ones(1, 1, 64, 64))[0, 0]
    assert weight[32, 32] == 1
    assert weight[0, 0] == pytest.approx(1 + 5 * (1 - 16**2 / 31**2))


@pytest.mark.parametrize("fill", [0.0, 1.0])
@pytest.mark.parametrize("sure", [-200.0, 0.0, 200.0])
@pytest.mark.parametrize("parts", LOSSES, ids=str)
def test_losses_of_empty_and_full_masks_are_finite(fill: float, sure: float, parts: SegmentationLoss) -> None:
    outputs = [torch.full((1, 1, 32, 32), sure, requires_grad=True) for _ in range(3)]
    loss = total(parts, outputs, torch.full((1, 1, 32, 32), fill))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(x.grad).all() for x in outputs if x.grad is not None)


def test_an_images_loss_does_not_depend_on_its_batch() -> None:
    masks, outputs = soft_masks(3, 32), logits(3, 32)
    alone = [total(SegmentationLoss(), [z[[i]] for z in outputs], masks[[i]]) for i in range(3)]
    torch.testing.assert_close(total(SegmentationLoss(), outputs, masks), torch.stack(alone).mean(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_gradients(loss: SegmentationLoss) -> None:
    masks = soft_masks(2, 5)
    outputs = [z.requires_grad_() for z in logits(2, 5)]
    assert torch.autograd.gradcheck(lambda *z: total(loss, z, masks), tuple(outputs))


def test_a_perfect_prediction_has_almost_no_loss() -> None:
    mask = (soft_masks(1, 40) > 0.5).double()
    assert total(SegmentationLoss(), [(mask * 2 - 1) * 50] * 3, mask) < 1e-10
