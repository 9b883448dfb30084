"""Tiles: overlapping parts of large images, each its own sample, whose predictions are blended.

A defect of 20 pixels in an image of 6,000 disappears at the network's input size. A tile keeps it: `--tile 1024` cuts
an image into squares of 1,024 pixels that overlap by at least `--overlap`. Overlapping predictions fade into each
other, so tile edges are not visible.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from threading import Lock
from typing import TypeVar

from dsu.data.images import Box, UnreadableImage, image_head
from dsu.data.pairing import Pair, Split
from dsu.errors import UsageError
from dsu.runner import tile_boxes

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Tiling:
    """How images are cut into tiles.

    Attributes:
        size: side of a tile in pixels of the image.
        overlap: minimum overlap of neighbours in pixels.

    Raises `UsageError` for an overlap above half of the size.
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
        """From options; the default overlap is an eighth. Raises `UsageError` for an overlap without tiles."""
        if tile is None and overlap is not None:
            raise UsageError("--overlap needs --tile: give both.")
        return None if tile is None else cls(tile, tile // 8 if overlap is None else overlap)

    def __str__(self) -> str:
        return f"{self.size}-{self.overlap}"

    def boxes(self, width: int, height: int) -> list[Box]:
        """Boxes of an image's tiles, row by row: as few as possible, evenly spaced.

        All have side `size`; a shorter image side is used whole.
        """
        return list(tile_boxes((width, height), self.size, self.overlap))


def tiled(split: Split, tiling: Tiling | None) -> Split:
    """A split whose samples are the tiles of its images, named `image@left,top`; without tiling, the split itself.

    Images whose size can't be read stay whole; decoding them later reports the error.
    """
    if tiling is None:
        return split
    pairs = tuple(tile for pair in split.pairs for tile in _tiles_of(pair, tiling))
    return replace(split, name=f"{split.name}-tiles-{tiling}", pairs=pairs, official_count=None)


def _tiles_of(pair: Pair, tiling: Tiling) -> list[Pair]:
    try:
        boxes = tiling.boxes(*image_head(pair.image).size)
    except UnreadableImage:
        return [pair]
    return [replace(pair, name=f"{pair.name}@{box[0]},{box[1]}", box=box) for box in boxes]


def image_name(tile: str) -> str:
    """The image's name from a tile's."""
    return tile.rpartition("@")[0]


def cached(make: Callable[[K], T], most: int = 2) -> Callable[[K], T]:
    """A thread-safe `make` that keeps its last results: an image is decoded once for all its tiles.

    Args:
        make: makes the value for a key; an error is raised at every call.
        most: number of values kept.
    """
    lock = Lock()
    # One lock per key, so that other threads wait for a value instead of making it again.
    entries = lru_cache(most)(lambda key: (Lock(), lru_cache(1)(partial(make, key))))

    def value_of(key: K) -> T:
        with lock:
            key_lock, made = entries(key)
        with key_lock:
            return made()

    return value_of
