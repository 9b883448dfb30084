"""Weights rounded in one pass give the same numbers as autocast, which rounds them one by one."""

import pytest
import torch
from support import toy_network
from torch import Tensor
from torch.func import functional_call

from dsu.loss import SegmentationLoss
from dsu.network.network import DSUNet
from dsu.network.rounding import rounded_weights


def learn(network: DSUNet, *, together: bool, start: str = "pixels") -> tuple[Tensor, dict[str, Tensor | None]]:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "pixel_values": torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8, generator=generator),
        "guide_values": torch.randint(0, 256, (2, 3, 126, 126), dtype=torch.uint8, generator=generator),
        "start_feature": start,
    }
    network.zero_grad()
    rounded = rounded_weights(network, torch.bfloat16) if together else {}
    with torch.autocast("cpu", torch.bfloat16):
        output = functional_call(network, rounded, kwargs=inputs)
    loss = SegmentationLoss()(output, torch.rand(2, 1, 128, 128, generator=generator).round())
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("start", ["pixels", "S4"])
def test_loss_and_gradients_equal_autocasts(checkpointing: bool, start: str) -> None:
    torch.manual_seed(0)
    network = toy_network(feature_dtype=torch.float16).train()
    network.gradient_checkpointing = checkpointing
    (loss, gradients), (expected, expected_gradients) = (
        learn(network, together=way, start=start) for way in (True, False)
    )
    assert torch.equal(loss, expected)
    for name, gradient in gradients.items():
        wanted = expected_gradients[name]
        assert (gradient is None) == (wanted is None), name
        assert gradient is None or (gradient.dtype == torch.float32 and torch.equal(gradient, wanted)), name
    without = [name for name, gradient in gradients.items() if name.startswith("head.adapters") and gradient is None]
    assert bool(without) == (start == "S4"), "an unused adapter must have no gradient, so that its weights do not decay"


def test_norms_and_scales_are_not_rounded() -> None:
    network = toy_network().train()
    rounded = rounded_weights(network, torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in rounded.values())
    assert not [name for name in rounded if "norm" in name or "scale" in name or not name.startswith("head.")]
