import torch

from dsu.network.layers import ChannelModulation


def test_shape_and_plain_formulation() -> None:
    torch.manual_seed(0)
    modulation = ChannelModulation(6, 10).double()
    x = torch.randn(3, 6, 5, 5, dtype=torch.float64)
    mixed = torch.einsum("bchw,oc->bohw", modulation.depthwise(x), modulation.pointwise.weight[..., 0, 0])
    mean, variance = mixed.mean((0, 2, 3), keepdim=True), mixed.var((0, 2, 3), keepdim=True, unbiased=False)
    expected = ((mixed - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
    torch.testing.assert_close(modulation(x), expected, atol=1e-10, rtol=0)
    assert modulation.pointwise.bias is None
