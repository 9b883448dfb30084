import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dsu.loss import BceKind, boundary_weight, side_losses, total_loss


def soft_masks(batch: int, side: int, seed: int = 0) -> Tensor:
    """Blobs with soft edges, one of the images empty when there are several."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 1, 6, 6, dtype=torch.float64, generator=generator)
    masks = functional.interpolate(noise, size=(side, side), mode="bicubic").clamp(0, 1)
    if batch > 1:
        masks[-1] = 0
    return masks


def logits(batch: int, side: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(batch, 1, side, side, dtype=torch.float64, generator=generator) for _ in range(3)]


def image_loss(z: Tensor, m: Tensor, bce: BceKind) -> Tensor:
    """The definition for one image (H, W)."""
    w = 1 + 5 * (functional.avg_pool2d(m[None, None], 31, stride=1, padding=15)[0, 0] - m).abs()
    p = 1 / (1 + torch.exp(-z))
    intersection, both = (w * p * m).sum(), (w * (p + m)).sum()
    entropy = -(m * torch.log(p) + (1 - m) * torch.log(1 - p))
    mean = entropy.mean() if bce == "plain" else (w * entropy).sum() / w.sum()
    return 1 - (intersection + 1) / (both - intersection + 1) + mean


@pytest.mark.parametrize("bce", ["plain", "weighted"])
def test_it_is_the_mean_over_images_of_the_definition(bce: BceKind) -> None:
    masks, outputs = soft_masks(3, 40), logits(3, 40)
    assert ((masks > 0) & (masks < 1)).float().mean() > 0
    losses = side_losses(outputs, masks, bce)
    for z, loss in zip(outputs, losses, strict=True):
        expected = torch.stack([image_loss(z[i, 0], masks[i, 0], bce) for i in range(3)]).mean()
        torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    weighted = 0.25 * losses[0] + 0.5 * losses[1] + losses[2]
    torch.testing.assert_close(total_loss(outputs, masks, bce), weighted, atol=1e-12, rtol=0)


def test_the_two_entropies_differ_and_plain_is_the_default() -> None:
    masks, outputs = soft_masks(2, 40), logits(2, 40)
    plain, weighted = total_loss(outputs, masks), total_loss(outputs, masks, "weighted")
    assert torch.equal(plain, total_loss(outputs, masks, "plain"))
    assert (plain - weighted).abs() > 1e-3


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 50), width=st.integers(1, 50), seed=st.integers(0, 99))
def test_the_boundary_weight_is_one_pool_of_31(height: int, width: int, seed: int) -> None:
    mask = torch.rand(2, 1, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = 1 + 5 * (functional.avg_pool2d(mask, 31, stride=1, padding=15) - mask).abs()
    torch.testing.assert_close(boundary_weight(mask), expected, atol=1e-12, rtol=0)


def test_the_boundary_weight_of_sums_that_are_exact_is_exact() -> None:
    """Masks of few bits, as the reference figures have them: not one rounding differs from the plain pool."""
    mask = soft_masks(2, 64).half().double()
    assert torch.equal(boundary_weight(mask), 1 + 5 * (functional.avg_pool2d(mask, 31, 1, 15) - mask).abs())


def test_the_padding_counts() -> None:
    weight = boundary_weight(torch.ones(1, 1, 64, 64))[0, 0]
    assert weight[32, 32] == 1
    assert weight[0, 0] == pytest.approx(1 + 5 * (1 - 16**2 / 31**2))


@pytest.mark.parametrize("fill", [0.0, 1.0])
@pytest.mark.parametrize("sure", [-200.0, 0.0, 200.0])
def test_masks_without_an_object_or_without_a_background_are_finite(fill: float, sure: float) -> None:
    outputs = [torch.full((1, 1, 32, 32), sure, requires_grad=True) for _ in range(3)]
    loss = total_loss(outputs, torch.full((1, 1, 32, 32), fill))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(x.grad).all() for x in outputs if x.grad is not None)


def test_an_image_counts_the_same_whatever_else_is_in_its_batch() -> None:
    masks, outputs = soft_masks(3, 32), logits(3, 32)
    alone = [total_loss([z[[i]] for z in outputs], masks[[i]]) for i in range(3)]
    torch.testing.assert_close(total_loss(outputs, masks), torch.stack(alone).mean(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bce", ["plain", "weighted"])
def test_gradients(bce: BceKind) -> None:
    masks = soft_masks(2, 5)
    outputs = [z.requires_grad_() for z in logits(2, 5)]
    assert torch.autograd.gradcheck(lambda *z: total_loss(z, masks, bce), tuple(outputs))


def test_a_perfect_prediction_has_next_to_no_loss() -> None:
    mask = (soft_masks(1, 40) > 0.5).double()
    assert total_loss([(mask * 2 - 1) * 50] * 3, mask) < 1e-10
