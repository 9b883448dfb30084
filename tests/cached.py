"""A small store of the toy network, for tests of maintenance, damage and repair."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from support import TINY

from dsu.data.views import ALL_FLIPS, UNFLIPPED
from dsu.errors import DsuError
from dsu.features.samples import FeatureDataset
from dsu.features.stores import find_training_store
from dsu_cache import CacheError

__all__ = ["LOCKS", "READS", "Cached", "complaint", "data_files", "flip", "shard"]

LOCKS = ("lock", "readers")
"""The only files of a store without a checksum: they only name the store's holders, for people."""

READS = ("pixels", "V", "S3")


@dataclass(frozen=True)
class Cached:
    """A user's images and the cache root of their features."""

    images: Path
    root: Path

    @property
    def store(self) -> Path:
        [store] = (entry for entry in self.root.glob("*/*") if entry.is_dir())
        return store

    def files(self) -> list[Path]:
        return sorted(p for p in self.store.rglob("*") if p.is_file() and p.name not in LOCKS)

    def copied(self, to: Path) -> "Cached":
        shutil.copytree(self.root, to / "features")
        return Cached(self.images, to / "features")

    def command(self, *more: object) -> list[object]:
        """The command that made it."""
        return ["cache-features", self.images, *TINY, "--features", "V,S3", "--cache-root", self.root, *more]


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def shard(cached: Cached, array: str, view: int = 0) -> Path:
    [path] = (path for path in (cached.store / array / "c" / "0" / str(view)).rglob("*") if path.is_file())
    return path


def data_files(root: Path) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in root.glob("*/*/*/c/**/*") if path.is_file()]
    return {str(path.relative_to(root)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def read_as_training_does(cached: Cached) -> None:
    """Find the store, compare it with the images and read every sample in every view, as training does."""
    store = find_training_store(cached.root, str(cached.images))
    if not set(READS) <= store.available(UNFLIPPED) or "V" not in store.available(ALL_FLIPS):
        raise DsuError("not complete: training starts from another point, or not at all")
    if store.missing("mask", [0]):
        raise DsuError("not complete: training refuses")
    names = sorted(store.check_samples())
    samples = FeatureDataset(store, ("pixels", "V"), names=names)
    for view in range(4):
        samples.read(names, [view] * len(names))
    FeatureDataset(store, ("S3",), names=names, masks=False).read(names, [0] * len(names))


def complaint(cached: Cached) -> str | None:
    """The error that training raises for a store, or None if it can read it."""
    try:
        read_as_training_does(cached)
    except (DsuError, CacheError) as error:
        return str(error)
    return None
