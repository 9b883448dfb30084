import torch
from hypothesis import given, settings, strategies as st
from published_operations import grouped_haar, grouped_inverse_haar
from torch.nn import functional

from dsu.network.layers import ChannelScale, WaveletConv, haar, inverse_haar

HALVES = st.integers(1, 6)
ROOT = 2**-0.5


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@settings(max_examples=30)
@given(batch=st.integers(1, 3), channels=st.integers(1, 5), height=HALVES, width=HALVES)
def test_the_inverse_undoes_the_transform_and_energy_is_kept(
    batch: int, channels: int, height: int, width: int
) -> None:
    x = random(batch, channels, 2 * height, 2 * width)
    subbands = haar(x)
    assert subbands.shape == (batch, 4 * channels, height, width)
    # The published taps are float32 values: orthonormal to six decimal places only.
    torch.testing.assert_close(inverse_haar(subbands), x, atol=1e-6, rtol=0)
    torch.testing.assert_close(subbands.square().sum(), x.square().sum(), atol=0, rtol=1e-6)


def test_subbands_come_in_the_published_order() -> None:
    low, high = torch.tensor([ROOT, ROOT]), torch.tensor([ROOT, -ROOT])
    x = random(2, 3, 4, 6)
    for index, (along_height, along_width) in enumerate(((low, low), (high, low), (low, high), (high, high))):
        taps = torch.outer(along_height, along_width).double()
        expected = torch.stack(
            [functional.conv2d(x[:, [c]], taps[None, None], stride=2)[:, 0] for c in range(3)], dim=1
        )
        torch.testing.assert_close(haar(x)[:, index::4], expected, atol=1e-6, rtol=0)


def test_additions_equal_the_published_grouped_convolutions() -> None:
    """Outputs and gradients of the transform and its inverse, float64."""
    x, subbands = random(2, 5, 8, 6).requires_grad_(), random(2, 20, 4, 3).requires_grad_()
    for ours, theirs, argument in ((haar, grouped_haar, x), (inverse_haar, grouped_inverse_haar, subbands)):
        got, expected = ours(argument), theirs(argument)
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
        weights = random(*got.shape)
        gradients = [torch.autograd.grad((one * weights).sum(), argument)[0] for one in (got, expected)]
        torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_flat_images_have_only_the_low_band_and_stripes_only_one_band() -> None:
    flat = torch.ones(1, 1, 4, 4)
    columns = torch.tensor([1.0, -1, 1, -1]).expand(1, 1, 4, 4)
    assert [bool(band.any()) for band in haar(flat).unbind(1)] == [True, False, False, False]
    assert [bool(band.any()) for band in haar(columns).unbind(1)] == [False, False, True, False]
    assert [bool(band.any()) for band in haar(columns.mT).unbind(1)] == [False, True, False, False]


@settings(max_examples=20)
@given(height=st.integers(1, 9), width=st.integers(1, 9))
def test_any_size_is_kept(height: int, width: int) -> None:
    """With a subband convolution that copies its input, the wavelet branch is the scaled identity."""
    conv = WaveletConv(2).double()
    torch.nn.init.zeros_(conv.base.weight)
    torch.nn.init.zeros_(conv.base.bias)
    torch.nn.init.dirac_(conv.subband.weight, groups=8)
    x = random(2, 2, height, width)
    torch.testing.assert_close(conv(x), 0.1 * x, atol=1e-6, rtol=0)


def test_the_base_scale_multiplies_the_bias_too() -> None:
    conv = WaveletConv(3).double()
    torch.nn.init.zeros_(conv.subband.weight)
    torch.nn.init.constant_(conv.base_scale.weight, 2.0)
    x = random(1, 3, 5, 5)
    torch.testing.assert_close(conv(x), 2 * conv.base(x))


def test_scales_start_at_the_papers_values() -> None:
    conv = WaveletConv(3)
    assert set(conv.base_scale.weight.flatten().tolist()) == {1.0}
    assert conv.subband_scale.weight.shape == (1, 12, 1, 1)
    assert torch.all(conv.subband_scale.weight == 0.1)
    assert ChannelScale(2, 3.0)(torch.ones(1, 2, 1, 1)).flatten().tolist() == [3.0, 3.0]


def test_memory_layout_changes_nothing_but_rounding() -> None:
    conv = WaveletConv(4).double()
    x = random(2, 4, 7, 7)
    torch.testing.assert_close(conv(x.contiguous(memory_format=torch.channels_last)), conv(x), atol=1e-12, rtol=0)
