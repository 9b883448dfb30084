import torch

from dsu.network.modulation import ChannelModulation, resize_map


def test_shape_and_plain_formulation() -> None:
    torch.manual_seed(0)
    modulation = ChannelModulation(6, 10).double()
    x = torch.randn(3, 6, 5, 5, dtype=torch.float64)
    mixed = torch.einsum("bchw,oc->bohw", modulation.depthwise(x), modulation.pointwise.weight[..., 0, 0])
    mean, variance = mixed.mean((0, 2, 3), keepdim=True), mixed.var((0, 2, 3), keepdim=True, unbiased=False)
    expected = ((mixed - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
    torch.testing.assert_close(modulation(x), expected, atol=1e-10, rtol=0)
    assert modulation.pointwise.bias is None


def test_a_map_of_the_right_size_is_passed_on_untouched() -> None:
    x = torch.randn(1, 2, 4, 4)
    assert resize_map(x, 4) is x


def test_resizing_does_not_align_corners() -> None:
    """Halving takes the mean of four with corners not aligned; aligned corners would keep the corner pixels."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert resize_map(x, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
