from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import HealthCheck, given, settings, strategies as st

from dsu_cache import CacheError, Compressor, CorruptError, Fingerprint, ShardId, Store

Values = Callable[[str, Iterable[int], int], npt.NDArray[Any]]
Put = Callable[[Store, Iterable[str]], None]
Fill = Callable[[Store, str, Sequence[int]], list[ShardId]]


@pytest.fixture
def full(store: Store, fill: Fill) -> Store:
    fill(store, "pixels", [0])
    fill(store, "V", range(4))
    return store


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=12))
def test_batches_equal_the_written_values(full: Store, values: Values, requests: list[tuple[int, int]]) -> None:
    rows, views = [row for row, _ in requests], [view for _, view in requests]
    batch = full.reader(["pixels", "V"]).read(rows, views)
    assert {name: (array.shape, str(array.dtype)) for name, array in batch.items()} == {
        "pixels": ((len(rows), 4, 4, 3), "uint8"),
        "V": ((len(rows), 2, 2, 8), "float16"),
    }
    for i, (row, view) in enumerate(requests):
        np.testing.assert_array_equal(batch["pixels"][i], values("pixels", [row], 0)[0])
        np.testing.assert_array_equal(batch["V"][i], values("V", [row], view)[0])


@pytest.mark.parametrize("compressor", [None, "zstd", "blosc"])
def test_reading_agrees_with_zarr(tmp_path: Path, compressor: Compressor, put: Put, fill: Fill) -> None:
    store = Store.create(tmp_path / "s", {}, 4, compressor)
    put(store, "abcdef")
    store.add_array("V", (2, 2, 8), "float16", 2, Fingerprint({}))
    store.add_array("label", (), "int64", 1, Fingerprint({}))
    fill(store, "V", [0, 1])
    fill(store, "label", [0])
    batch = store.reader(["V", "label"], keep_open=False).read(np.arange(6), np.ones(6, np.int64))
    group = zarr.open_group(store.path, mode="r")
    np.testing.assert_array_equal(batch["V"], group["V"][:, 1])  # type: ignore[index]
    np.testing.assert_array_equal(batch["label"], group["label"][:, 0])  # type: ignore[index]


def test_views_may_differ_between_arrays(store: Store, fill: Fill, values: Values) -> None:
    store.add_array("label", (), "int64", 4, Fingerprint({}))
    for name in ("V", "label", "pixels"):
        fill(store, name, range(store.arrays[name].views))
    batch = store.reader(["pixels", "V", "label"]).read([5], {"V": [3], "label": [0]})
    np.testing.assert_array_equal(batch["V"], values("V", [5], 3))
    np.testing.assert_array_equal(batch["label"], values("label", [5], 0))


@pytest.mark.parametrize("written", ["nothing", "the rest of the shard"])
def test_missing_samples_are_never_read_as_zeros(store: Store, put: Put, fill: Fill, written: str) -> None:
    if written == "the rest of the shard":
        before = store.manifest
        put(store, "abcdefghi")  # without j, row 9
        fill(store, "pixels", [0])
        store.set_manifest(before)
    with pytest.raises(CorruptError, match=r"array 'pixels', row 9, view 0 \(shard 2; 'j'\) is damaged or was never"):
        store.reader(["pixels"]).read([9], [0])


def test_a_sample_of_only_zeros_is_not_missing(store: Store, fill: Fill, values: Values) -> None:
    again = Store.open(store.path)
    with again.lock():
        fill(again, "pixels", [0])
    assert not values("pixels", [1], 0).any()
    assert not again.reader(["pixels"]).read([1], [0])["pixels"].any()


def test_a_flipped_bit_names_the_sample(full: Store, values: Values, put: Put) -> None:
    put(full, [*"abcdefghij", "f:copy"])
    where = values("V", [5], 2).tobytes()
    data = full.path / "V/c/1/2/0/0/0"
    flip(data, data.read_bytes().index(where) + 10)
    reader = full.reader(["pixels", "V"])
    with pytest.raises(CorruptError, match=r"array 'V', row 5, view 2 \(shard 1; 'f', 'f:copy'\) is damaged"):
        reader.read([0, 4, 5, 6], [2, 2, 2, 2])
    np.testing.assert_array_equal(reader.read([4, 6], [2, 2])["V"], values("V", [4, 6], 2))


def test_a_damaged_index_and_damaged_metadata_are_corrupt(full: Store) -> None:
    data = full.path / "pixels/c/0/0/0/0/0"
    flip(data, len(data.read_bytes()) - 10)
    with pytest.raises(CorruptError, match="array 'pixels', row 2"):
        full.reader(["pixels"]).read([2], [0])
    (full.path / "V" / "zarr.json").write_text("{")
    with pytest.raises(CorruptError, match=r"V/zarr.json is damaged"):
        full.reader(["V"])


def test_a_damaged_orphan_is_reported_without_a_sample(full: Store, put: Put) -> None:
    put(full, "bcdefghij")
    (full.path / "pixels/c/0/0/0/0/0").unlink()
    with pytest.raises(CorruptError, match=r"row 0, view 0 .shard 0; no sample in the manifest"):
        full.reader(["pixels"]).read([0], [0])


@pytest.mark.parametrize(
    ("rows", "views", "message"),
    [
        ([10], [0], "rows must lie between 0 and 9, not 10 to 10"),
        ([-1], [0], "rows must lie between 0 and 9"),
        ([0], [4], "views of 'V' must lie between 0 and 3"),
        ([0, 1], [0], "2 rows and 1 views of 'V'"),
        ([0.5], [0], "whole numbers"),
        ([[0]], [0], "shape"),
    ],
)
def test_invalid_requests_are_refused(full: Store, rows: Any, views: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        full.reader(["V"]).read(rows, views)


def test_an_unknown_array_is_named(full: Store) -> None:
    with pytest.raises(CacheError, match="no array 'S1'"):
        full.reader(["S1"])
