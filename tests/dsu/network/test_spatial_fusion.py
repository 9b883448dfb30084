import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dsu.network import layers
from dsu.network.layers import SpatialFeatureFusion


@pytest.fixture
def fusion() -> SpatialFeatureFusion:
    torch.manual_seed(0)
    return SpatialFeatureFusion().double()


def maps() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    small = torch.randn(2, 64, 3, 4, dtype=torch.float64, generator=generator)
    return small, torch.randn(2, 64, 6, 8, dtype=torch.float64, generator=generator)


def attention_by_position(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention computed position by position: weights over all positions, softmax, mean of values."""
    result = torch.zeros_like(value)
    for b in range(len(value)):
        for row in range(value.shape[2]):
            for column in range(value.shape[3]):
                logits = torch.einsum("c,chw->hw", query[b, :, row, column], key[b]) / 32**0.5
                weight = torch.exp(logits - logits.max())
                result[b, :, row, column] = torch.einsum("hw,chw->c", weight / weight.sum(), value[b])
    return result


def test_it_is_attention_over_the_large_maps_positions(fusion: SpatialFeatureFusion) -> None:
    fusion.eval()
    small, big = maps()
    grown = functional.interpolate(small, size=(6, 8), mode="bilinear", align_corners=False)
    both = fusion.small(grown) + fusion.big(big)
    mixed = attention_by_position(fusion.query(both), fusion.key(both), fusion.value(big))
    expected = fusion.join(torch.cat([fusion.attended(mixed), big], 1))
    torch.testing.assert_close(fusion(small, big), expected, atol=1e-12, rtol=0)


def test_explicit_attention_gives_the_same_output_and_gradients(fusion: SpatialFeatureFusion) -> None:
    small, big = maps()
    for x in (small, big):
        x.requires_grad_()
    published = SpatialFeatureFusion(as_published=True).double()
    published.load_state_dict(fusion.state_dict())

    def run(module: SpatialFeatureFusion) -> list[Tensor]:
        output = module(small, big)
        return [output, *torch.autograd.grad(output.square().sum(), [small, big, *module.parameters()])]

    for a, b in zip(run(fusion), run(published), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_the_attention_matrix_is_never_materialised(
    fusion: SpatialFeatureFusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def spy(*arguments: Tensor) -> Tensor:
        calls.append([tuple(x.shape) for x in arguments])
        assert all(x.is_contiguous() for x in arguments)
        return functional.scaled_dot_product_attention(*arguments)

    monkeypatch.setattr(layers, "functional", _Patched(functional, scaled_dot_product_attention=spy))
    fusion(*maps())
    assert calls == [[(2, 1, 48, 32)] * 3]


def test_convolutions_before_a_norm_have_no_bias(fusion: SpatialFeatureFusion) -> None:
    assert all(module.bias is None for module in fusion.modules() if isinstance(module, nn.Conv2d))
    assert fusion(*maps()).shape == (2, 64, 6, 8)


class _Patched:
    """A module with some attributes replaced."""

    def __init__(self, module: object, **names: object) -> None:
        self.module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> object:
        return getattr(self.module, name)
