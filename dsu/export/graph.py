"""The whole network as one ONNX graph in float32, in the arithmetic of `DSUNet`: frozen features are rounded alike.

A trap: Python's arithmetic with a batch's size (`len(tensor)`) writes the traced size into the graph, which then gives
wrong masks at every other one. So `dsu.export.checking` runs other batches than the traced one.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from dsu.config import DSUNetConfig
from dsu.network.network import DSUNet
from dsu.network.resume import earliest

__all__ = ["BESIDE", "TRACED", "WholeNetwork", "input_sizes", "silence", "write_graph"]

TRACED: Final = 5
"""Images of the batch that is traced; those that are checked have other numbers."""

OPSET: Final = 23
"""The first with an Attention operator: one fusion at 88x88 holds 39 MB with it, and 757 MB written out."""

BESIDE: Final = 3 << 29
"""Bytes of weights from which they lie in a file of their own: no ONNX file holds 2 GiB."""


def input_sizes(config: DSUNetConfig) -> dict[str, int]:
    """The graph's inputs, (B, side, side, 3) uint8 RGB each, with their sides."""
    guide = {"dino_pixels": config.dino_size} if config.injections else {}
    return {"pixels": config.hiera_size, **guide}


class WholeNetwork(nn.Module):
    """From images as they are decoded to the finest logits, without any loop over the batch."""

    def __init__(self, network: DSUNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor, dino_pixels: Tensor | None = None) -> Tensor:
        """(B, S, S, 3) and (B, S', S', 3) uint8 to (B, 1, S, S)."""
        point = earliest(self.network.config)
        guide = None if dino_pixels is None else dino_pixels.permute(0, 3, 1, 2)
        given = self.network.encode_at_once(None, guide, point.guides)
        return self.network(pixels.permute(0, 3, 1, 2), features=given, start_feature=point.start).logits  # type: ignore[no-any-return]


def write_graph(network: DSUNet, path: Path) -> None:
    """Write a network on the CPU, in evaluation mode, as ONNX; large weights beside it, in `path` + `.data`."""
    sizes = input_sizes(network.config)
    example = tuple(torch.zeros(TRACED, side, side, 3, dtype=torch.uint8) for side in sizes.values())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), silence():
        program = torch.onnx.export(
            WholeNetwork(network.requires_grad_(False)).eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(sizes),
            output_names=["logits"],
            dynamic_shapes=tuple({0: batch} for _ in sizes),
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=weights > BESIDE)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Around exporters, which print and warn of what their users need not know."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
