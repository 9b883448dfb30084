import copy

import pytest
import torch
from published_operations import use_published_operations
from torch import Tensor, nn
from torch.nn import functional

from dsu.network.layers import ConvNorm, ReceptiveFieldBlock


def plain_norm(x: Tensor, norm: nn.Module) -> Tensor:
    assert isinstance(norm, nn.BatchNorm2d)
    return functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False)


def plain_conv(x: Tensor, layer: nn.Module, padding: tuple[int, int], dilation: int = 1) -> Tensor:
    assert isinstance(layer, ConvNorm)
    assert layer[0].bias is None
    return plain_norm(functional.conv2d(x, layer[0].weight, padding=padding, dilation=dilation), layer[1])


def test_it_is_four_branches_a_join_and_a_shortcut() -> None:
    torch.manual_seed(0)
    block = ReceptiveFieldBlock(8).double().eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    seen = [plain_conv(x, block.branches[0], (0, 0))]
    for kernel, branch in zip((3, 5, 7), list(block.branches)[1:], strict=True):
        half = kernel // 2
        y = plain_conv(x, branch[0], (0, 0))
        y = plain_conv(y, branch[1], (0, half))
        y = plain_conv(y, branch[2], (half, 0))
        seen.append(plain_conv(y, branch[3], (kernel, kernel), dilation=kernel))
        assert branch[1][0].kernel_size == (1, kernel)
        assert branch[2][0].kernel_size == (kernel, 1)
    joined = plain_conv(torch.cat(seen, 1), block.join, (1, 1))
    expected = (joined + plain_conv(x, block.shortcut, (0, 0))).clamp(min=0)
    torch.testing.assert_close(block(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("side", [1, 4, 11])
def test_every_level_keeps_its_size_and_becomes_64_wide(side: int) -> None:
    assert ReceptiveFieldBlock(16).eval()(torch.randn(1, 16, side, side + 1)).shape == (1, 64, side, side + 1)


def test_branches_pass_negative_values_on() -> None:
    """A ReLU inside a branch would be usual, but the published block has none."""
    torch.manual_seed(0)
    block = ReceptiveFieldBlock(8)
    assert not any(isinstance(module, nn.ReLU) for module in block.modules())
    assert (block.branches[1](torch.randn(2, 8, 9, 9)) < 0).any()


def test_joint_norms_and_convolutions_equal_separate_ones() -> None:
    """Outputs, gradients and running statistics, compared with the published operations in their order."""
    torch.manual_seed(0)
    block = ReceptiveFieldBlock(8).double().train()
    alone = copy.deepcopy(block)
    use_published_operations(alone)
    x = torch.randn(3, 8, 9, 7, dtype=torch.float64)
    found = []
    for each in (block, alone):
        given = x.clone().requires_grad_()
        output = each(given)
        (output * torch.sin(torch.arange(output.numel(), dtype=torch.float64)).view_as(output)).sum().backward()
        statistics = {name: buffer for name, buffer in each.named_buffers() if buffer.is_floating_point()}
        found.append((output, given.grad, {name: weight.grad for name, weight in each.named_parameters()}, statistics))
    torch.testing.assert_close(*found, atol=1e-11, rtol=0)
