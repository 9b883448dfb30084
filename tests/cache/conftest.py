"""A small store, and the expected values of its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dsu_cache import Entry, Fingerprint, ShardId, Store

Values = Callable[[str, Iterable[int], int], npt.NDArray[Any]]
Put = Callable[[Store, Iterable[str]], None]
Fill = Callable[[Store, str, Sequence[int]], list[ShardId]]

SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "pixels": ((4, 4, 3), "uint8"),
    "V": ((2, 2, 8), "float16"),
    "label": ((), "int64"),
}


@pytest.fixture
def values() -> Values:
    """A function that returns an array's values in some rows of a view: deterministic, all zeros in row 1."""

    def value(array: str, row: int, view: int) -> npt.NDArray[Any]:
        shape, dtype = SHAPES[array]
        numbers = np.random.default_rng([row, view]).integers(1, 200, shape)
        return np.asarray(numbers * (row != 1), dtype)

    return lambda array, rows, view: np.stack([value(array, int(row), view) for row in rows])


@pytest.fixture
def put() -> Put:
    """A function that makes samples with these names the store's; a name's part before ':' is its content key."""

    def put(store: Store, names: Iterable[str]) -> None:
        entries = {name: Entry(name.partition(":")[0]) for name in names}
        store.set_manifest(store.manifest.assign(entries, store.rows_per_shard))

    return put


@pytest.fixture
def fill(values: Values) -> Fill:
    """A function that writes missing shards, and returns which these were."""

    def fill(store: Store, array: str, views: Sequence[int]) -> list[ShardId]:
        shards = store.missing(array, views)
        for view, shard in shards:
            rows = store.rows_in_shard(shard)
            store.write_shard(array, view, shard, rows, values(array, rows, view))
        return shards

    return fill


@pytest.fixture
def store(tmp_path: Path, put: Put) -> Store:
    """Ten samples a..j in shards of four rows; pixels in one view, V in four, nothing written."""
    store = Store.create(tmp_path / "store", {"dataset": "toy"}, rows_per_shard=4)
    put(store, "abcdefghij")
    store.add_array("pixels", (4, 4, 3), "uint8", 1, Fingerprint({"size": 4}))
    store.add_array("V", (2, 2, 8), "float16", 4, Fingerprint({"size": 2}))
    return store
