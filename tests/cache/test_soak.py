"""Long reading: memory use and the number of open files do not grow.

`DSU_SOAK` is the number of batches: 300 by default, `DSU_SOAK=20000` for a thorough run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from dsu_cache import Entry, Fingerprint, Store

SOAK: Final = int(os.environ.get("DSU_SOAK", "300"))
ROWS, VIEWS, BATCH = 64, 2, 8
SHAPE = (112, 112, 2)
ALLOWANCE: Final = 8 << 20
"""Bytes by which a process may grow: allocators keep some. A batch has 0.4 MB, so 20 leaked batches are noticed."""


@pytest.fixture
def large(tmp_path: Path) -> Store:
    """A store of 6 MB: more than its readers may hold in memory."""
    store = Store.create(tmp_path / "s", {}, 16)
    store.set_manifest(store.manifest.assign({f"{row:02d}": Entry(str(row)) for row in range(ROWS)}, 16))
    store.add_array("x", SHAPE, "float16", VIEWS, Fingerprint({}))
    for view, shard in store.missing("x", range(VIEWS)):
        store.write_shard("x", view, shard, store.rows_in_shard(shard), np.full((16, *SHAPE), shard, "float16"))
    return store


def resident() -> int:
    """This process's resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def growth(store: Store, batches: int, keep: Callable[[Any], None]) -> tuple[int, int]:
    """Read batches in random order, after a warm-up with a fifth as many; returns the growth in bytes and
    descriptors."""
    chance = np.random.default_rng(1)
    warm = max(40, batches // 5)
    reader = store.reader(["x"])
    requests = ((chance.integers(0, ROWS, BATCH), chance.integers(0, VIEWS, BATCH)) for _ in range(warm + batches))
    before = (0, 0)
    for number, (rows, views) in enumerate(requests):
        keep(reader.read(rows, views))
        if number == warm:
            before = resident(), descriptors()
    return resident() - before[0], descriptors() - before[1]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("leaking", [False, True])
def test_long_reading_does_not_leak_memory_or_files(large: Store, leaking: bool) -> None:
    kept: list[Any] = []
    batches = min(SOAK, 300) if leaking else SOAK
    grown, opened = growth(large, batches, kept.append if leaking else lambda batch: None)
    print(f"\n{batches} batches{' kept' if leaking else ''}: {grown / 1e6:+.1f} MB, {opened:+d} descriptors")
    assert opened == 0
    assert (grown > ALLOWANCE) == leaking
