"""Views: the four flips, and which one a sample gets.

Encoders are not flip-equivariant, so features are kept once a view, while pixels and masks are flipped when
they are read. What a run draws is a pure function of seed, epoch and sample, never of worker, batch or mode:
cached and end-to-end runs see the same data.
"""

import hashlib
from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor

__all__ = ["VIEWS", "ViewCount", "draw_view", "epoch_order", "flip"]

VIEWS: Final = ("identity", "horizontal", "vertical", "both")
"""A view's number has bit 0 set for a flip of the width and bit 1 for a flip of the height."""

ViewCount = Literal[1, 2, 4]
"""How many of `VIEWS` are drawn from or stored, counted from the first: none, horizontal, both axes."""


def draw_view(seed: int, epoch: int, name: str, views: ViewCount) -> int:
    """The view of sample `name` in `epoch`: each axis that `views` allows flips with p = 0.5."""
    return _draw(f"view/{seed}/{epoch}/{name}") % views


def epoch_order(seed: int, epoch: int, names: Sequence[str]) -> list[str]:
    """`names` shuffled for `epoch`, whatever order they came in."""
    return sorted(names, key=lambda name: (_draw(f"order/{seed}/{epoch}/{name}"), name))


def flip(batch: Tensor, views: Tensor) -> Tensor:
    """Each sample of (B, H, W, ...) in its own view, by number in `views` (B,); exact, and its own inverse.

    Nothing is looked up on the host: on a card this waits for nothing.
    """
    for bit, side in ((1, 2), (2, 1)):
        turned = (views & bit).bool().view(-1, *(1,) * (batch.ndim - 1))
        batch = torch.where(turned, batch.flip(side), batch)
    return batch


def _draw(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
