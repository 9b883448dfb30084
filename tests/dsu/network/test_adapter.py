import math

import torch

from dsu.network.layers import HIDDEN, Adapter


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def test_it_adds_a_bottleneck_of_two_gelus() -> None:
    torch.manual_seed(0)
    adapter = Adapter(24).double()
    tokens = torch.randn(2, 5, 3, 24, dtype=torch.float64)
    (w1, b1), (w2, b2) = (layer.parameters() for layer in (adapter.down, adapter.up))
    hidden = exact_gelu(torch.einsum("bhwc,kc->bhwk", tokens, w1) + b1)
    expected = tokens + exact_gelu(torch.einsum("bhwk,ck->bhwc", hidden, w2) + b2)
    torch.testing.assert_close(adapter(tokens), expected, atol=1e-12, rtol=0)


def test_its_bottleneck_does_not_grow_with_the_block() -> None:
    for dim in (16, 1152):
        adapter = Adapter(dim)
        assert adapter.down.out_features == HIDDEN == 32
        assert sum(p.numel() for p in adapter.parameters()) == 2 * 32 * dim + 32 + dim
