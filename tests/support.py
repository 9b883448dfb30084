"""Helpers for tests of several packages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

import numpy as np
from click.testing import Result
from PIL import Image

if TYPE_CHECKING:
    import torch

    from dsu.network.network import DSUNet

__all__ = ["TINY", "Dsu", "empty_weights", "pixel_difference", "toy_network"]

TINY: Final = ("--preset", "toy", "--hiera-size", "128", "--dino-size", "126")
"""Options of the smallest possible network: reflect padding needs S4 of 4x4, which is an input of 128 pixels."""

Dsu = Callable[..., Result]
"""Runs `dsu ...`; the result's `output` is everything printed."""


def pixel_difference(first: Path, second: Path) -> int:
    """The largest difference of two grey images, in grey levels."""
    a, b = (np.asarray(Image.open(path)).astype(int) for path in (first, second))
    return int(np.abs(a - b).max())


@contextmanager
def empty_weights() -> "Iterator[None]":
    """Build modules inside this context with parameters that take no memory, to count those of large networks.

    torch's own meta device forbids reading values, which sam2's trunk does while it is built.
    """
    from torch import nn

    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    with patch.object(nn.Module, "register_parameter", on_meta):
        yield


def toy_network(
    adapt_last: int | None = None,
    feature_dtype: "torch.dtype | None" = None,
    encoder_batch_size: int | None = None,
    **options: Any,
) -> "DSUNet":
    """The smallest network, with the same random weights at every call, including the head's."""
    import torch

    from dsu.config import build_config
    from dsu.encoders.weights import load_dino, load_hiera
    from dsu.network.network import DSUNet
    from dsu.settings import EncoderWeights

    config = build_config("toy", hiera_size=128, dino_size=126, adapt_last=adapt_last, **options)
    weights = EncoderWeights(random=True)
    hiera, _ = load_hiera(config, weights)
    dino, _ = load_dino(config, weights)
    torch.manual_seed(0)
    return DSUNet(config, hiera, dino, feature_dtype=feature_dtype, encoder_batch_size=encoder_batch_size)
