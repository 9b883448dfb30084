"""Views (the four flips and cached augmentations), and the random draws of a run: views and samples.

Encoders are not flip-equivariant, so features are stored for each view. Pixels and masks are flipped when they are
read; those of cached augmentations (`dsu.data.decoding`) are stored. Draws are a pure function of seed, epoch and
sample, never of worker, batch or mode: runs from the store and end to end see the same data.

A view is a number: its two lowest bits are the flip (1: width, 2: height), the rest is the cached augmentation, 0 for
the image itself.
"""

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

FLIPS: Final = ("identity", "horizontal", "vertical", "both")

MAX_AUGMENTATIONS: Final = 60
"""Cached augmentations per sample that a store has room for."""

RECIPE: Final = 1
"""Version of the augmentation recipe, part of fingerprints."""

FLIPPED_WHEN_READ: Final = ("pixels", "mask")
"""Arrays stored without flips."""


@dataclass(frozen=True)
class Views:
    """A set of views, to draw from or to store: `none`, `width`, `flips`, or with augmentations `flips+3`.

    Attributes:
        flips: how many of `FLIPS`, counted from the first: 1, 2 or 4.
        extra: number of cached augmentations in addition.
    """

    flips: int = 4
    extra: int = 0

    @classmethod
    def parse(cls, text: object) -> "Views":
        """Parse views from text; 1, 2 and 4 mean flips only. Raises `ValueError`."""
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
    """A view's name."""
    extra, flip = augmentation_of(view), FLIPS[view % 4]
    return flip if not extra else f"extra{extra}" if not view % 4 else f"extra{extra} {flip}"


def augmentation_of(view: int) -> int:
    """The cached augmentation of a view; 0 for the image itself."""
    return view // 4


def view_count(array: str) -> int:
    """Number of view slots of an array, fixed from the start."""
    return len(FLIPS) + MAX_AUGMENTATIONS if array not in FLIPPED_WHEN_READ else 1 + MAX_AUGMENTATIONS


def view_index(array: str, view: int) -> int:
    """The slot of a view in `array`: one for all flips, or one for each; cached augmentations follow.

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
    """The view of sample `name` in `epoch`, drawn uniformly from `views`.

    Of the four flips, that flips each direction with probability 0.5 (paper, section IV).

    `turn` is the number of the sample's earlier draws in that epoch.
    """
    return views.numbers[_draw(f"view/{seed}/{epoch}/{name}" + (f"/{turn}" if turn else "")) % len(views)]


def epoch_order(seed: int, epoch: int, names: Sequence[str]) -> list[str]:
    """`names` shuffled for `epoch`, independent of their original order."""
    return sorted(names, key=lambda name: (_draw(f"order/{seed}/{epoch}/{name}"), name))


def draw_samples(seed: int, epoch: int, names: Sequence[str], empty: Collection[str] | None) -> list[tuple[str, int]]:
    """The samples of an epoch in order, as many as `names`, each with its number of earlier draws.

    With `empty`, half of the draws come from it and half from the other samples, each kind evenly: samples of the rarer
    kind repeat, and some of the other kind wait for a later epoch. Otherwise each sample comes once.
    """
    if empty is None:
        return [(name, 0) for name in epoch_order(seed, epoch, names)]
    kinds = [sorted(set(names) & set(empty)), sorted(set(names) - set(empty))]
    drawn: list[tuple[str, int]] = []
    for kind, share in zip(kinds, (len(names) // 2, len(names) - len(names) // 2), strict=True):
        order = epoch_order(seed, epoch, kind)
        drawn += [(order[index % len(order)], index // len(order)) for index in range(share)]
    return sorted(drawn, key=lambda one: (_draw(f"order/{seed}/{epoch}/{one[0]}/{one[1]}"), one))


def flip(batch: "Tensor", views: "Tensor") -> "Tensor":
    """Flip each sample of (B, H, W, ...) by its view number in `views` (B,); exact and self-inverse.

    Reads nothing on the host, so a GPU never waits.
    """
    for bit, side in ((1, 2), (2, 1)):
        turned = (views & bit).bool().view(-1, *(1,) * (batch.ndim - 1))
        batch = batch.flip(side).where(turned, batch)
    return batch


def flip_one(image: "Tensor", view: int) -> "Tensor":
    """Flip one sample (H, W, ...) by `view`, a plain number: on a CPU many times faster than `flip`."""
    return image.flip([side for bit, side in ((1, 1), (2, 0)) if view & bit])


def hashed_share(content: str) -> float:
    """A number from 0 to 1, a hash of a text."""
    return _draw(content) / 2**64


def _draw(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
