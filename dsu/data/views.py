"""Views (the four flips and any number of extra ones), and what a run draws: views and samples.

Encoders are not flip-equivariant, so features are kept once a view. Pixels and masks of the flips are flipped when
they are read; those of a cached augmentation (`dsu.data.decoding`) are kept, since no array turns into them. What a run
draws is a pure function of seed, epoch and sample, never of worker, batch or mode: cached and end-to-end runs see the
same data.

A view is a number: its two lowest bits are the flip (1: of the width, 2: of the height), the rest is the cached
augmentation that is flipped, 0 being the image itself.
"""

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ALL_FLIPS",
    "FLIPPED_WHEN_READ",
    "FLIPS",
    "MAX_AUGMENTATIONS",
    "RECIPE",
    "UNFLIPPED",
    "Views",
    "augmentation_of",
    "draw_samples",
    "draw_view",
    "epoch_order",
    "flip",
    "flip_one",
    "hashed_share",
    "view_count",
    "view_index",
    "view_name",
]

FLIPS: Final = ("identity", "horizontal", "vertical", "both")

MAX_AUGMENTATIONS: Final = 60
"""So many cached augmentations of a sample a store has places for."""

RECIPE: Final = 1
"""Counts the ways in which cached augmentations were ever made: part of fingerprints."""

FLIPPED_WHEN_READ: Final = ("pixels", "mask")
"""Arrays that keep no flips."""


@dataclass(frozen=True)
class Views:
    """Which views are drawn from, or kept: written `none`, `width`, `flips`, and with extra ones `flips+3`.

    Attributes:
        flips: how many of `FLIPS`, counted from the first: 1, 2 or 4.
        extra: how many cached augmentations beside them.
    """

    flips: int = 4
    extra: int = 0

    @classmethod
    def parse(cls, text: object) -> "Views":
        """Views as they are written; 1, 2 and 4 stand for the flips alone. Raises `ValueError`."""
        if isinstance(text, Views):
            return text
        named = {"none": 1, "1": 1, "width": 2, "2": 2, "flips": 4, "4": 4}
        found = re.fullmatch(r"(\w+?)(?:\+(\d+))?", str(text))
        if found is None or found[1] not in named or int(found[2] or 0) > MAX_AUGMENTATIONS:
            raise ValueError(f"must be none, width or flips, or flips+K with K up to {MAX_AUGMENTATIONS}, not {text!r}")
        return cls(named[found[1]], int(found[2] or 0))

    def __str__(self) -> str:
        flips = {1: "none", 2: "width", 4: "flips"}[self.flips]
        return f"{flips}+{self.extra}" if self.extra else flips

    def __len__(self) -> int:
        return self.flips + self.extra

    @property
    def numbers(self) -> tuple[int, ...]:
        """The views' numbers, flips first."""
        return (*range(self.flips), *(4 * index for index in range(1, self.extra + 1)))


ALL_FLIPS: Final = Views(4)
UNFLIPPED: Final = Views(1)


def view_name(view: int) -> str:
    """What a view is called."""
    extra, flip = augmentation_of(view), FLIPS[view % 4]
    return flip if not extra else f"extra{extra}" if not view % 4 else f"extra{extra} {flip}"


def augmentation_of(view: int) -> int:
    """Which cached augmentation a view is, or is a flip of; 0 for the image itself."""
    return view // 4


def view_count(array: str) -> int:
    """How many places an array has, all from the start: one with a single place would serve it for every view."""
    return len(FLIPS) + MAX_AUGMENTATIONS if array not in FLIPPED_WHEN_READ else 1 + MAX_AUGMENTATIONS


def view_index(array: str, view: int) -> int:
    """Where `array` keeps a view: all flips in one place, or each in its own; cached augmentations behind them.

    Raises `ValueError` for flips of cached augmentations, which only arrays that are flipped when read can give.
    """
    if array in FLIPPED_WHEN_READ:
        return augmentation_of(view)
    if view < len(FLIPS):
        return view
    if view % 4:
        raise ValueError(f"{view_name(view)} has no place in a store")
    return len(FLIPS) - 1 + augmentation_of(view)


def draw_view(seed: int, epoch: int, name: str, views: Views, turn: int = 0) -> int:
    """The view of sample `name` in `epoch`, one of `views` with the same chance each.

    `turn` counts the sample's earlier draws in that epoch.
    """
    again = f"/{turn}" if turn else ""
    return views.numbers[_draw(f"view/{seed}/{epoch}/{name}{again}") % len(views)]


def epoch_order(seed: int, epoch: int, names: Sequence[str]) -> list[str]:
    """`names` shuffled for `epoch`, whatever order they came in."""
    return sorted(names, key=lambda name: (_draw(f"order/{seed}/{epoch}/{name}"), name))


def draw_samples(seed: int, epoch: int, names: Sequence[str], empty: Collection[str] | None) -> list[tuple[str, int]]:
    """The samples of an epoch in order, as many as `names`, each with the number of its earlier draws.

    With `empty` given, half of the draws are of samples in it and half of others, each kind evenly used: of a kind
    that is rarer some come several times, of the other some wait for a later epoch. Otherwise each comes once.
    """
    if empty is None:
        return [(name, 0) for name in epoch_order(seed, epoch, names)]
    kinds = [sorted(set(names) & set(empty)), sorted(set(names) - set(empty))]
    shares = (len(names) // 2, len(names) - len(names) // 2)
    drawn: list[tuple[str, int]] = []
    for kind, share in zip(kinds, shares, strict=True):
        order = epoch_order(seed, epoch, kind)
        drawn += [(order[index % len(order)], index // len(order)) for index in range(share)]
    return sorted(drawn, key=lambda one: (_draw(f"order/{seed}/{epoch}/{one[0]}/{one[1]}"), one))


def flip(batch: "Tensor", views: "Tensor") -> "Tensor":
    """Each sample of (B, H, W, ...) flipped as its view, by number in `views` (B,); exact, and its own inverse.

    Nothing is looked up on the host: on a GPU this waits for nothing.
    """
    for bit, side in ((1, 2), (2, 1)):
        turned = (views & bit).bool().view(-1, *(1,) * (batch.ndim - 1))
        batch = batch.flip(side).where(turned, batch)
    return batch


def flip_one(image: "Tensor", view: int) -> "Tensor":
    """One sample (H, W, ...) flipped as `view`, a number that is at hand: on a CPU many times as fast as `flip`."""
    return image.flip([side for bit, side in ((1, 1), (2, 0)) if view & bit])


def hashed_share(content: str) -> float:
    """A number from 0 to 1 that follows from a text alone."""
    return _draw(content) / 2**64


def _draw(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
