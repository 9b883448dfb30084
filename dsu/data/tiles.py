"""Tiles: large images in overlapping parts, each a sample of its own, and predictions put together from them.

A defect of 20 pixels in an image of 6,000 is gone at the network's input size. A tile keeps it: `--tile 1024` cuts
an image into squares of 1,024 pixels that overlap by at least `--overlap`. Where two predictions overlap they fade
into each other, so no edge of a tile can be seen as a step.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from dsu.data.images import Box, UnreadableImage, image_head
from dsu.data.pairing import Pair, Split
from dsu.errors import UsageError

__all__ = ["LastUsed", "TileBlender", "Tiling", "image_name", "tiled"]

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Tiling:
    """How images are cut.

    Attributes:
        size: side of a tile in pixels of the image.
        overlap: pixels that neighbours share at least.

    Raises `UsageError` for what would never end.
    """

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.overlap <= self.size // 2:
            raise UsageError(
                f"Tiles of {self.size} pixels can't overlap by {self.overlap}: give an --overlap from 0 to half the "
                f"--tile."
            )

    @classmethod
    def of(cls, tile: int | None, overlap: int | None) -> "Tiling | None":
        """From options; an eighth overlaps where nothing is said. Raises `UsageError` for an overlap of no tiles."""
        if tile is None:
            if overlap is not None:
                raise UsageError("--overlap is of tiles: give --tile too.")
            return None
        return cls(tile, tile // 8 if overlap is None else overlap)

    def __str__(self) -> str:
        return f"{self.size}-{self.overlap}"

    def boxes(self, width: int, height: int) -> list[Box]:
        """Boxes of the tiles of an image, row by row: as few as can be, evenly spread.

        All are of `size`; a side of the image that is shorter is taken as it is.
        """
        return [(x, y, right, bottom) for y, bottom in self._spans(height) for x, right in self._spans(width)]

    def _spans(self, length: int) -> list[tuple[int, int]]:
        if length <= self.size:
            return [(0, length)]
        count = -(-(length - self.overlap) // (self.size - self.overlap))
        starts = [round(index * (length - self.size) / (count - 1)) for index in range(count)]
        return [(start, start + self.size) for start in starts]


def tiled(split: Split, tiling: Tiling | None) -> Split:
    """A split whose samples are the tiles of its images, called `image@left,top`; without a tiling the split itself.

    Images whose size can't be read stay whole, for whoever decodes them to say what is wrong.
    """
    if tiling is None:
        return split
    pairs = tuple(tile for pair in split.pairs for tile in _tiles_of(pair, tiling))
    return replace(split, name=f"{split.name}-tiles-{tiling}", pairs=pairs, official_count=None)


def _tiles_of(pair: Pair, tiling: Tiling) -> Iterator[Pair]:
    try:
        width, height = image_head(pair.image).size
    except UnreadableImage:
        yield pair
        return
    for box in tiling.boxes(width, height):
        yield replace(pair, name=f"{pair.name}@{box[0]},{box[1]}", box=box)


def image_name(tile: str) -> str:
    """The name of the image that a tile is of, from the tile's."""
    return tile.rpartition("@")[0]


class TileBlender:
    """Logits of a whole image, put together from those of its tiles.

    At each pixel the tiles' logits are averaged with weights that rise from a tile's edge to where its neighbour
    ends, linearly and on each axis by itself: tiles form a grid, so the weights' sum is known before any tile is.

    Args:
        boxes: of all tiles, as `Tiling.boxes` gives them.
    """

    def __init__(self, boxes: Iterable[Box]) -> None:
        boxes = list(boxes)
        self._across = _fades({(left, right) for left, _, right, _ in boxes})
        self._down = _fades({(top, bottom) for _, top, _, bottom in boxes})
        self.size = max(box[2] for box in boxes), max(box[3] for box in boxes)
        self.logits: NDArray[np.float32] = np.zeros(self.size[::-1], np.float32)
        """(height, width), complete when every tile has been added."""

    def add(self, box: Box, logits: NDArray[np.float32]) -> None:
        """Add a tile's logits (height, width) at the tile's own size."""
        left, top, right, bottom = box
        faded = logits * self._across[left, right]
        faded *= self._down[top, bottom][:, None]
        self.logits[top:bottom, left:right] += faded


def _fades(spans: set[tuple[int, int]]) -> dict[tuple[int, int], NDArray[np.float32]]:
    """For each span of an axis its weights; those of all spans add up to 1 everywhere."""
    ordered = sorted(spans)
    rises = {}
    total = np.zeros(max(end for _, end in ordered))
    for index, (start, end) in enumerate(ordered):
        # Where there is no neighbour to fade into, half a pixel: the weight is 1 at once.
        before = max(ordered[index - 1][1] - start, 0.5) if index else 0.5
        after = max(end - ordered[index + 1][0], 0.5) if index + 1 < len(ordered) else 0.5
        at = np.arange(end - start) + 0.5
        rises[start, end] = np.minimum(1, np.minimum(at / before, (end - start - at) / after))
        total[start:end] += rises[start, end]
    return {(start, end): (weight / total[start:end]).astype(np.float32) for (start, end), weight in rises.items()}


class LastUsed(Generic[K, T]):
    """What was made last, for those who ask again: an image is decoded once for its tiles, by any number of threads.

    Args:
        make: what is asked for by a key.
        most: how many are kept.
    """

    def __init__(self, make: Callable[[K], T], most: int = 2) -> None:
        self._lock = Lock()
        # One lock a key, so that others wait for what is being made instead of making it, too.
        self._entries = lru_cache(most)(lambda key: (Lock(), lru_cache(1)(partial(make, key))))

    def __call__(self, key: K) -> T:
        """What is made by `key`. Raises what making it raises."""
        with self._lock:
            lock, made = self._entries(key)
        with lock:
            return made()
