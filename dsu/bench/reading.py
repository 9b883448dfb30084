"""The reader against plain memory maps of the same numbers, and the disk below the stores."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dsu.batches import prefetch
from dsu.bench.drawn import DrawnStore
from dsu.bench.timing import Timing, ratio, take_turns
from dsu.config import DSUNetConfig
from dsu.features.feature_dataset import FeatureDataset
from dsu.progress import SILENT, Progress
from dsu.runtime import Runtime

__all__ = ["ReadRow", "measure_reading"]

BATCH = 8


@dataclass(frozen=True)
class ReadRow:
    """One set of arrays, read a sample at a time in random order.

    Attributes:
        what: the arrays.
        bytes_per_sample: of one sample.
        samples: a second, through the training path, checksums verified, files in the page cache.
        against_plain: the reader's rate over that of numpy memory maps.
        cold: samples a second with the files out of the page cache.
    """

    what: tuple[str, ...]
    bytes_per_sample: int
    samples: float
    against_plain: float
    cold: float


def measure_reading(
    config: DSUNetConfig, drawn: DrawnStore, runtime: Runtime, rounds: int, progress: Progress = SILENT
) -> list[ReadRow]:
    """What the paper's setting reads, and what resuming from S3 reads."""
    order = [drawn.names[index] for index in np.random.default_rng(1).permutation(len(drawn.names))]
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    rows = []
    for arrays in (("pixels", "mask", "V"), ("mask", "V", "S1", "S2", "S3")):
        read, plain = _reader(drawn, arrays, batches), _memory_maps(drawn, arrays, batches)
        read(), plain()
        taken = take_turns({"reader": read, "memory map": plain}, rounds, runtime, progress)
        _forget(drawn)
        cold = take_turns({"cold": read}, 1, runtime, progress)["cold"]
        rows.append(
            ReadRow(
                arrays,
                sum(drawn.store.arrays[name].item_nbytes for name in arrays),
                _rate(order, taken["reader"]),
                ratio(taken["reader"], taken["memory map"]),
                _rate(order, cold),
            )
        )
    return rows


def _rate(order: Sequence[str], timing: Timing) -> float:
    return len(order) / timing.median


def _reader(drawn: DrawnStore, arrays: Sequence[str], batches: Sequence[Sequence[str]]) -> Callable[[], None]:
    samples = FeatureDataset(drawn.store, [name for name in arrays if name != "mask"], names=drawn.names)

    def read() -> None:
        for batch in prefetch(lambda names=names: samples.read(names, [0] * len(names)) for names in batches):  # type: ignore[misc]
            assert batch.mask is not None

    return read


def _memory_maps(drawn: DrawnStore, arrays: Sequence[str], batches: Sequence[Sequence[str]]) -> Callable[[], None]:
    row = {name: index for index, name in enumerate(drawn.names)}
    maps = [np.load(drawn.plain[name], mmap_mode="r") for name in arrays]

    def read() -> None:
        for names in batches:
            rows = [row[name] for name in names]
            for array in maps:
                array[rows]

    return read


def _forget(drawn: DrawnStore) -> None:
    """Ask the kernel to drop the store's files from the page cache, where there is such a request."""
    if not hasattr(os, "posix_fadvise"):
        return
    os.sync()
    for path in drawn.store.path.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
