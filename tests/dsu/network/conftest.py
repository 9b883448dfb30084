"""The smallest network and one batch for it."""

from collections.abc import Callable

import pytest
import torch
from support import toy_network
from torch import Tensor

from dsu.network.network import DSUNet

Build = Callable[..., DSUNet]


@pytest.fixture
def build() -> Build:
    """A function that builds a toy network, with the same random weights at every call, including the head's."""
    return toy_network


@pytest.fixture(scope="session")
def batch() -> tuple[Tensor, Tensor]:
    """Two normalised images at both input sizes."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 3, 128, 128, generator=generator), torch.randn(2, 3, 126, 126, generator=generator)
