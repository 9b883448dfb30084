"""What the disk takes: plain files, written as stage one writes its own."""

import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from dsu.features.writing import WRITERS
from dsu_cache import Store

__all__ = ["disk_rate", "file_sizes"]

ROUNDS: Final = 3


def disk_rate(sizes: Sequence[int], below: Path) -> float:
    """Bytes a second of plain files, each written at once and flushed once, by as many threads as stage one has.

    The median of three rounds, in a folder below `below` that goes away again.
    """
    content = memoryview(np.random.default_rng(0).bytes(max(sizes)))

    def write(path: Path, size: int) -> None:
        with path.open("wb") as file:
            file.write(content[:size])
            file.flush()
            os.fsync(file.fileno())

    rates = []
    for _ in range(ROUNDS):
        with TemporaryDirectory(prefix=".bench-", dir=below) as folder, ThreadPoolExecutor(WRITERS) as pool:
            paths = [Path(folder) / str(number) for number in range(len(sizes))]
            started = time.perf_counter()
            list(pool.map(write, paths, sizes))
            rates.append(sum(sizes) / (time.perf_counter() - started))
    return statistics.median(rates)


def file_sizes(store: Store) -> list[int]:
    """Bytes of each of a store's data files."""
    return [path.stat().st_size for path in store.path.glob("*/c/**/*") if path.is_file()]
