"""The smallest network and one batch for it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsu.architecture import Ablation, build_architecture
from dsu.encoders.weights import EncoderWeights, load_dino, load_hiera
from dsu.network.network import DSUNet

Build = Callable[..., DSUNet]


@pytest.fixture
def build() -> Build:
    """A toy network with the same random weights at every call, heads included."""

    def call(adapt_last: int | None = None, stored: torch.dtype | None = None, ablation: Ablation = "none") -> DSUNet:
        architecture = build_architecture(
            "toy", hiera_size=128, dino_size=126, adapt_last=adapt_last, ablation=ablation
        )
        weights = EncoderWeights(random=True)
        hiera, _ = load_hiera(architecture, weights)
        dino, _ = load_dino(architecture, weights)
        torch.manual_seed(0)
        return DSUNet(architecture, hiera, dino, stored=stored)

    return call


@pytest.fixture(scope="session")
def batch() -> tuple[Tensor, Tensor]:
    """Two normalised images at both input sizes."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 3, 128, 128, generator=generator), torch.randn(2, 3, 126, 126, generator=generator)
