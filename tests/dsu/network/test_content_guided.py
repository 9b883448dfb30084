from functools import partial

import pytest
import torch
from published_operations import grouped_pixel_attention
from torch.nn import functional

from dsu.network.layers import ContentGuidedFusion, reflect_pad


def test_it_is_channel_then_spatial_then_pixel_attention() -> None:
    """Compared with the definition, channel by channel."""
    torch.manual_seed(0)
    fusion = ContentGuidedFusion(16).double()
    x, y = torch.randn(2, 2, 16, 5, 6, dtype=torch.float64)
    s = x + y
    squeezed = torch.relu(
        s.mean((2, 3)) @ fusion.channel[0].weight[..., 0, 0].T + fusion.channel[0].bias
    )  # (B, 2): an eighth of the channels
    channel = squeezed @ fusion.channel[2].weight[..., 0, 0].T + fusion.channel[2].bias
    summary = functional.pad(torch.stack([s.mean(1), s.amax(1)], 1), (3, 3, 3, 3), mode="reflect")
    spatial = functional.conv2d(summary, fusion.spatial.weight, fusion.spatial.bias)
    coarse = channel[:, :, None, None] + spatial
    attended = []
    for c in range(16):
        pair = functional.pad(torch.stack([s[:, c], coarse[:, c]], 1), (3, 3, 3, 3), mode="reflect")
        attended.append(functional.conv2d(pair, fusion.pixel.weight[[c]], fusion.pixel.bias[[c]]))
    w = 1 / (1 + torch.exp(-1 / (1 + torch.exp(-torch.cat(attended, 1)))))
    mixed = s + w * x + (1 - w) * y
    expected = torch.einsum("bchw,oc->bohw", mixed, fusion.out.weight[..., 0, 0]) + fusion.out.bias[:, None, None]
    torch.testing.assert_close(fusion(x, y), expected, atol=1e-12, rtol=0)


def test_two_depthwise_convolutions_equal_the_grouped_one() -> None:
    """Compared with the layer that owns the weights, on interleaved channels: outputs and gradients, float64."""
    torch.manual_seed(0)
    fusion = ContentGuidedFusion(8).double()
    total, coarse = torch.randn(2, 2, 8, 6, 5, dtype=torch.float64)
    weights = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    found = []
    for attend in (fusion._pixel_attention, partial(grouped_pixel_attention, fusion)):
        inputs = [total.clone().requires_grad_(), coarse.clone().requires_grad_()]
        output = attend(*inputs)
        leaves = [*inputs, fusion.pixel.weight, fusion.pixel.bias]
        found.append([output, *torch.autograd.grad((output * weights).sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_each_map_has_a_weight_between_a_half_and_three_quarters() -> None:
    """The sigmoid is applied twice, so w is within (0.5, 0.731) for any attention."""
    fusion = ContentGuidedFusion(8).double()
    torch.nn.init.dirac_(fusion.out.weight)
    torch.nn.init.zeros_(fusion.out.bias)
    ones, zeros = torch.ones(1, 8, 4, 4, dtype=torch.float64), torch.zeros(1, 8, 4, 4, dtype=torch.float64)
    for bias, weight in ((-60.0, 0.5), (60.0, torch.tensor(1.0).double().sigmoid().item())):
        torch.nn.init.constant_(fusion.pixel.bias, bias)
        torch.testing.assert_close(fusion(ones, zeros), 1 + torch.full_like(ones, weight), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sides", [(4, 4), (5, 9)])
def test_reflect_pad_equals_torchs_own_padding(sides: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *sides)
    assert torch.equal(reflect_pad(x, 3), functional.pad(x, (3, 3, 3, 3), mode="reflect"))


@pytest.mark.parametrize("side", [4, 11])
def test_shapes(side: int) -> None:
    fusion = ContentGuidedFusion(16)
    assert fusion(torch.randn(2, 16, side, side), torch.randn(2, 16, side, side)).shape == (2, 16, side, side)
