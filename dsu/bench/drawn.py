"""What is measured on: a store of random features and batches of random images, of the real shapes and types."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from dsu.batches import Batch
from dsu.bench.disk import disk_rate, file_sizes
from dsu.config import LEVELS, DSUNetConfig
from dsu.features.stores import FeatureStore
from dsu.features.writing import writing
from dsu.network.resume import feature_block, feature_shape
from dsu.progress import SILENT, Progress
from dsu_cache import Entry, Fingerprint

__all__ = ["DrawnStore", "draw_store", "images"]


def images(config: DSUNetConfig, count: int, *, dino: bool, seed: int = 0) -> Batch:
    """Decoded images as they come from a folder, in all four views."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))

    side, dino_side = config.hiera_size, config.dino_size
    names = tuple(f"image{index}" for index in range(count))
    return Batch.of(
        names,
        tuple(index % 4 for index in range(count)),
        pixels=draw(count, side, side, 3),
        mask=torch.from_numpy(rng.choice(np.array([0, 255], np.uint8), (count, side, side))),
        dino_pixels=draw(count, dino_side, dino_side, 3) if dino else None,
    )


@dataclass(frozen=True)
class DrawnStore:
    """A store in one view, and the same arrays as plain files.

    Attributes:
        store: of `pixels`, `mask`, `V`, S1..S4 and the tokens that the cases resume from.
        plain: a `.npy` file (samples, *item) by array.
        names: of its samples.
        written: bytes a second, as stage one writes.
        disk: bytes a second of plain files of the same sizes: see `disk_rate`.
    """

    store: FeatureStore
    plain: dict[str, Path]
    names: Sequence[str]
    written: float
    disk: float


@contextmanager
def draw_store(config: DSUNetConfig, below: Path, samples: int, progress: Progress = SILENT) -> Iterator[DrawnStore]:
    """A store below the folder where stores lie, gone afterwards."""
    below.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with TemporaryDirectory(prefix=".bench-", dir=below) as folder:
        store = FeatureStore.create(Path(folder) / "store", {})
        names = [f"sample{index:05}" for index in range(samples)]
        with store.lock():
            manifest = store.manifest.assign({n: Entry(n, {}) for n in names}, store.rows_per_shard)
            store.set_manifest(manifest)
            shapes = _shapes(config)
            plain = {name: Path(folder) / f"{name}.npy" for name in shapes}
            seconds, total = 0.0, 0
            with progress.task("writing random features", len(shapes), "arrays") as task:
                for name, (shape, kind) in shapes.items():
                    values = _draw(rng, (samples, *shape), kind)
                    np.save(plain[name], values)
                    store.add_array(name, shape, kind, 1, Fingerprint({}))
                    started = time.perf_counter()
                    with writing(store) as writer:
                        for _, shard in store.missing(name, [0]):
                            rows = store.rows_in_shard(shard)
                            some = store.manifest.names_at(*rows.tolist())
                            writer.put(name, 0, shard, some, [torch.from_numpy(values[rows[0] : rows[-1] + 1])])
                    seconds, total = seconds + time.perf_counter() - started, total + values.nbytes
                    task.advance()
        yield DrawnStore(store, plain, names, total / seconds, disk_rate(file_sizes(store), below))


def _shapes(config: DSUNetConfig) -> dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]]:
    side, float16 = config.hiera_size, np.dtype(np.float16)
    starts = {feature_block(config, f"S{level}") for level in LEVELS}
    firsts = {config.hiera.depth - depth for depth in config.usual_depths}
    tokens = [f"B{first}" for first in sorted(firsts - starts - {0})]
    return {
        "pixels": ((side, side, 3), np.dtype(np.uint8)),
        "mask": ((side, side), np.dtype(np.uint8)),
        **{name: (feature_shape(config, name), float16) for name in ("V", *(f"S{level}" for level in LEVELS), *tokens)},
    }


def _draw(rng: np.random.Generator, shape: tuple[int, ...], kind: np.dtype[np.generic]) -> NDArray[np.generic]:
    """Random rows of which a tenth is new and the rest shifted copies: numbers enough, drawn quickly."""
    first = (min(shape[0], 16), *shape[1:])
    fresh: NDArray[np.generic] = (
        rng.integers(0, 256, first).astype(kind)
        if kind == np.uint8
        else rng.standard_normal(first, np.float32).astype(kind)
    )
    return np.concatenate([np.roll(fresh, turn, axis=1) for turn in range(-(-shape[0] // len(fresh)))])[: shape[0]]
