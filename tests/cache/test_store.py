from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr

from dsu_cache import (
    BusyError,
    CacheError,
    Compressor,
    CorruptError,
    FieldDifference,
    Fingerprint,
    ShardId,
    StaleError,
    Store,
    audit,
    file_sizes,
    orphans,
    remove_store,
)
from dsu_cache.locks import creating

Values = Callable[[str, Iterable[int], int], npt.NDArray[Any]]
Put = Callable[[Store, Iterable[str]], None]
Fill = Callable[[Store, str, Sequence[int]], list[ShardId]]


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The modification time and bytes of every data file."""
    paths = [path for path in folder.glob("*/c/**/*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def complete(store: Store, array: str) -> tuple[int, ...]:
    """The views in which every sample is stored."""
    return tuple(view for view in range(store.arrays[array].views) if not store.missing(array, [view]))


def damaged(store: Store) -> list[ShardId | None]:
    return [finding.shard for finding in audit(store)]


def test_a_store_opens_as_it_was_created(tmp_path: Path, put: Put) -> None:
    created = Store.create(tmp_path / "s", {"dataset": "toy", "from": ["a"]}, rows_per_shard=8, compressor="zstd")
    created.add_array("V", (2,), np.float16, 4, Fingerprint({"size": (2, 2)}, {"torch": "2.6"}))
    put(created, "ab")
    opened = Store.open(tmp_path / "s")
    assert opened.attributes == {"dataset": "toy", "from": ["a"]}
    assert (opened.rows_per_shard, opened.compressor) == (8, "zstd")
    assert opened.manifest == created.manifest
    assert opened.arrays == created.arrays
    assert opened.arrays["V"].fingerprint == Fingerprint({"size": [2, 2]}, {"torch": "2.6"})


def test_attributes_are_replaced(store: Store) -> None:
    store.set_attributes({"note": 1})
    assert Store.open(store.path).attributes == store.attributes == {"note": 1}


def test_create_refuses_a_folder_that_is_not_empty(tmp_path: Path, store: Store) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    for path in (tmp_path / "photos", tmp_path / "photos" / "a.jpg", store.path):
        with pytest.raises(CacheError, match=r"already exists|exists and is not a folder"):
            Store.create(path, {})


def test_create_replaces_an_interrupted_creation(store: Store, tmp_path: Path) -> None:
    other = Store.create(tmp_path / "other", {})
    (other.path / "zarr.json").unlink()
    assert Store.create(other.path, {"dataset": "again"}).attributes == {"dataset": "again"}


@pytest.mark.parametrize(("rows_per_shard", "compressor"), [(0, None), (4, "gzip")])
def test_create_refuses_an_invalid_layout(tmp_path: Path, rows_per_shard: int, compressor: Any) -> None:
    with pytest.raises(ValueError, match="a store can't have"):
        Store.create(tmp_path / "s", {}, rows_per_shard, compressor)
    assert not (tmp_path / "s").exists()


def test_open_reports_the_problem(tmp_path: Path, store: Store) -> None:
    with pytest.raises(CacheError, match="there is no store in"):
        Store.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    zarr.create_group(tmp_path / "foreign", zarr_format=3)
    with pytest.raises(CacheError, match="not a store of format 3"):
        Store.open(tmp_path / "foreign")
    for path in (store.path / "manifest").glob("0*.json"):
        path.write_bytes(b"")
    with pytest.raises(CorruptError, match="no intact manifest"):
        Store.open(store.path)


@pytest.mark.parametrize("compressor", [None, "zstd", "blosc"])
def test_zarr_reads_the_written_values(
    tmp_path: Path, compressor: Compressor, put: Put, fill: Fill, values: Values
) -> None:
    store = Store.create(tmp_path / "s", {}, 4, compressor)
    put(store, "abcdefghij")
    for name, shape, dtype, views in [
        ("pixels", (4, 4, 3), "uint8", 1),
        ("V", (2, 2, 8), "float16", 4),
        ("label", (), "int64", 2),
    ]:
        store.add_array(name, shape, dtype, views, Fingerprint({"is": name}))
        fill(store, name, range(views))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Zarr recognises everything in the folder
        group = zarr.open_group(store.path, mode="r")
        assert {name for name, _ in group.arrays()} == {"pixels", "V", "label"}
    for name, info in store.arrays.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert array.shape == (10, info.views, *info.item_shape)
        assert array.dtype == info.dtype
        assert array.chunks == (1, 1, *info.item_shape)
        assert array.shards == (4, 1, *info.item_shape)
        assert array.attrs["fingerprint"] == {"fields": {"is": name}, "recorded": {}}
        for view in range(info.views):
            np.testing.assert_array_equal(array[:, view], values(name, range(10), view))


def test_a_partial_shard_takes_only_the_space_of_its_rows(store: Store, fill: Fill) -> None:
    fill(store, "pixels", [0])
    sizes = [(store.path / "pixels" / "c" / str(shard) / "0/0/0/0").stat().st_size for shard in range(3)]
    index = 4 * 16 + 4
    assert sizes == [4 * (48 + 4) + index, 4 * (48 + 4) + index, 2 * (48 + 4) + index]
    assert (
        sum(file_sizes(store.path / "pixels").values())
        == sum(sizes) + (store.path / "pixels" / "zarr.json").stat().st_size
    )
    assert store.arrays["pixels"].item_nbytes == 48


def test_missing_shrinks_as_shards_are_written(store: Store, fill: Fill) -> None:
    assert store.missing("V", [1, 0, 1]) == [ShardId(view, shard) for view in (0, 1) for shard in range(3)]
    assert complete(store, "V") == ()
    fill(store, "V", [2])
    assert store.missing("V", [2]) == []
    assert complete(store, "V") == (2,)
    fill(store, "V", [0, 1, 3])  # views may be written later
    assert complete(Store.open(store.path), "V") == (0, 1, 2, 3)


def test_new_samples_are_written_to_new_shards_and_others_do_not_change(
    store: Store, put: Put, fill: Fill, values: Values
) -> None:
    fill(store, "pixels", [0])
    fill(store, "V", [0])
    before = files(store.path)
    put(store, [*"abcdefghij", "k", "l"])
    assert store.rows_in_shard(3).tolist() == [12, 13]
    assert fill(store, "pixels", [0]) == fill(store, "V", [0]) == [ShardId(0, 3)]
    after = files(store.path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"pixels/c/3/0/0/0/0", "V/c/3/0/0/0/0"}
    group = zarr.open_group(store.path, mode="r")
    np.testing.assert_array_equal(group["V"][12:, 0], values("V", [12, 13], 0))  # type: ignore[index]


def test_changed_samples_leave_orphans_and_only_they_are_rewritten(store: Store, put: Put, fill: Fill) -> None:
    fill(store, "pixels", [0])
    assert orphans(store) == 0
    put(store, ["A", *"bcdefghi", "j"])
    assert orphans(store) == 1
    assert fill(store, "pixels", [0]) == [ShardId(0, 3)]
    assert store.rows_in_shard(0).tolist() == [1, 2, 3]
    assert fill(store, "V", [0]) == [ShardId(0, shard) for shard in range(4)]
    assert orphans(store) == 1


def test_a_shard_with_gaps_is_written_without_them(store: Store, put: Put, fill: Fill, values: Values) -> None:
    put(store, "acdfghij")
    fill(store, "V", [1])
    array = zarr.open_group(store.path, mode="r")["V"]
    assert isinstance(array, zarr.Array)
    for row in store.manifest.rows_in_use.tolist():
        np.testing.assert_array_equal(array[row, 1], values("V", [row], 1)[0])
    size = (store.path / "V" / "c/0/1/0/0/0").stat().st_size
    assert size == 3 * (64 + 4) + 4 * 16 + 4


def test_an_interrupted_shard_is_missing_and_is_rewritten_with_the_same_bytes(store: Store, fill: Fill) -> None:
    fill(store, "V", [0])
    whole = {name: content for name, (_, content) in files(store.path).items()}
    data, marker = store.path / "V/c/1/0/0/0/0", store.path / "commits/V/0.1.json"
    for left in (data.read_bytes(), data.read_bytes()[:100], b""):
        marker.unlink()
        data.write_bytes(left)
        (data.parent / "0.1234.partial").write_bytes(b"stray")
        assert Store.open(store.path).missing("V", [0]) == [ShardId(0, 1)]
        assert complete(store, "V") == ()
        fill(store, "V", [0])
        assert {name: content for name, (_, content) in files(store.path).items()} == whole


def test_shards_with_a_torn_marker_a_truncated_file_or_no_file_are_missing(store: Store, fill: Fill) -> None:
    fill(store, "V", [0])
    marker = store.path / "commits/V/0.0.json"
    marker.write_bytes(marker.read_bytes()[:-1])
    cut = store.path / "V/c/1/0/0/0/0"
    cut.write_bytes(cut.read_bytes()[:-1])
    (store.path / "V/c/2/0/0/0/0").unlink()
    assert fill(store, "V", [0]) == [ShardId(0, 0), ShardId(0, 1), ShardId(0, 2)]
    assert store.missing("V", [0]) == damaged(store) == []


def test_damage_is_found_and_can_be_repaired(store: Store, fill: Fill) -> None:
    fill(store, "V", [0, 1])
    assert damaged(store) == []
    data = store.path / "V/c/2/1/0/0/0"
    content = bytearray(data.read_bytes())
    content[7] ^= 1
    data.write_bytes(content)
    assert store.missing("V", [0, 1]) == []
    assert damaged(store) == [ShardId(1, 2)]
    store.stored("V").discard(ShardId(1, 2))
    assert fill(store, "V", [0, 1]) == [ShardId(1, 2)]
    assert damaged(store) == []


def test_several_threads_write_the_same_bytes_as_one(
    store: Store, tmp_path: Path, put: Put, fill: Fill, values: Values
) -> None:
    other = Store.create(tmp_path / "other", {"dataset": "toy"}, rows_per_shard=4)
    put(other, "abcdefghij")
    for array, info in store.arrays.items():
        fill(store, array, range(info.views))
        other.add_array(array, info.item_shape, info.dtype, info.views, info.fingerprint)

    def write(array: str, shard: ShardId) -> None:
        rows = other.rows_in_shard(shard.shard)
        other.write_shard(array, shard.view, shard.shard, rows, values(array, rows, shard.view))

    with ThreadPoolExecutor(8) as pool:
        work = [
            (name, shard) for name, info in other.arrays.items() for shard in other.missing(name, range(info.views))
        ]
        for done in [pool.submit(write, *one) for one in work]:
            done.result()
    contents = [{name: content for name, (_, content) in files(s.path).items()} for s in (store, other)]
    assert contents[0] == contents[1]
    assert damaged(other) == []


def test_write_shard_refuses_wrong_arguments(store: Store, values: Values) -> None:
    rows = store.rows_in_shard(0)
    right = values("V", rows, 0)
    with pytest.raises(ValueError, match=r"float16 .4, 2, 2, 8. for shard 0, not float32"):
        store.write_shard("V", 0, 0, rows, right.astype(np.float32))
    with pytest.raises(ValueError, match=r"not float16 \(4, 32\)"):
        store.write_shard("V", 0, 0, rows, right.reshape(4, 32))
    with pytest.raises(ValueError, match="give exactly those"):
        store.write_shard("V", 0, 0, rows[:2], right[:2])
    with pytest.raises(ValueError, match="0 rows in use"):
        store.write_shard("V", 0, 9, [], right[:0])
    with pytest.raises(CacheError, match="no view 4"):
        store.write_shard("V", 4, 0, rows, right)
    with pytest.raises(CacheError, match=r"no array 'S1' \(it has (V, pixels|pixels, V)\)"):
        store.write_shard("S1", 0, 0, rows, right)
    assert files(store.path) == {}
    store.write_shard("V", 0, 0, rows, right)
    with pytest.raises(CacheError, match="already written: discard it"):
        store.write_shard("V", 0, 0, rows, right)


def test_arrays_are_added_and_removed(store: Store, fill: Fill) -> None:
    fill(store, "pixels", [0])
    with pytest.raises(CacheError, match="already has an array 'pixels'"):
        store.add_array("pixels", (1,), "uint8", 1, Fingerprint({}))
    before = files(store.path)
    store.add_array("label", (), "int64", 1, Fingerprint({}))
    fill(store, "label", [0])
    store.remove_array("label")
    assert set(Store.open(store.path).arrays) == set(store.arrays) == {"pixels", "V"}
    assert files(store.path) == before
    with pytest.raises(CacheError, match="no array 'label'"):
        store.remove_array("label")
    store.add_array("label", (), "int64", 1, Fingerprint({}))
    assert len(store.missing("label", [0])) == 3


def test_the_rest_of_an_interrupted_removal_does_not_count(store: Store, fill: Fill) -> None:
    fill(store, "pixels", [0])
    (store.path / "pixels" / "zarr.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = Store.open(store.path)
    assert set(store.arrays) == {"V"}
    store.add_array("pixels", (4, 4, 3), "uint8", 1, Fingerprint({}))
    assert len(store.missing("pixels", [0])) == 3
    assert files(store.path) == {}


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "views"),
    [
        ("manifest", (2,), "uint8", 1),
        ("../V", (2,), "uint8", 1),
        ("S1", (2, 0), "uint8", 1),
        ("S1", (2,), "uint8", 0),
        ("S1", (2,), "object", 1),
        ("S1", (2,), ">f2", 1),
    ],
)
def test_add_array_refuses_invalid_names_shapes_types_and_views(
    store: Store, name: str, shape: tuple[int, ...], dtype: str, views: int
) -> None:
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        store.add_array(name, shape, dtype, views, Fingerprint({}))


def test_check_refuses_stale_arrays_and_returns_drift(store: Store) -> None:
    store.add_array("S1", (2,), "float16", 1, Fingerprint({"weights": "1a"}, {"torch": "2.6"}))
    assert store.check({"S1": Fingerprint({"weights": "1a"}, {"torch": "2.6"}), "V": Fingerprint({"size": 2})}) == ()
    drift = store.check({"S1": Fingerprint({"weights": "1a"}, {"torch": "2.7"})})
    assert drift == (FieldDifference("S1", "torch", "2.6", "2.7"),)
    with pytest.raises(
        StaleError, match=r"S1: weights is '1a' in the store, but '2b' is needed. Run it again"
    ) as caught:
        store.check({"S1": Fingerprint({"weights": "2b"}), "V": Fingerprint({"size": 2})}, "Run it again.")
    assert caught.value.differences == (FieldDifference("S1", "weights", "1a", "2b"),)


def test_the_lock_brings_the_store_up_to_date(store: Store, put: Put) -> None:
    other = Store.open(store.path)
    with other.lock():
        put(other, "abc")
        other.add_array("label", (), "int64", 1, Fingerprint({}))
        with pytest.raises(BusyError, match=r"the store .* is being written by process"), store.lock():
            pytest.fail("two writers")
    with pytest.raises(CacheError, match="already has an array 'label'"):
        store.add_array("label", (), "int64", 1, Fingerprint({}))
    with store.lock():
        assert store.manifest == other.manifest
        assert store.arrays == other.arrays


def test_an_empty_array_grows(tmp_path: Path, put: Put, fill: Fill) -> None:
    store = Store.create(tmp_path / "s", {}, 4)
    store.add_array("V", (2, 2, 8), "float16", 1, Fingerprint({}))
    assert complete(store, "V") == (0,)
    put(store, "ab")
    assert fill(store, "V", [0]) == [ShardId(0, 0)]


def test_an_array_that_is_being_read_is_not_removed_until_its_reader_is_closed_or_gone(
    store: Store, fill: Fill
) -> None:
    fill(store, "pixels", [0])
    fill(store, "V", [0])
    for left in ("V", "pixels"):
        readers = [store.reader([left]), Store.open(store.path).reader([left])]
        with pytest.raises(BusyError, match=r"is being read by process \d+ on .* since 2"):
            store.remove_array(left)
        assert readers[0].read([0], [0])[left].shape[0] == 1
        readers.pop().close()
        with pytest.raises(BusyError, match="is being read"):
            store.remove_array(left)
        readers.clear()
        store.remove_array(left)


def test_only_one_process_at_a_time_can_create_a_store(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with creating(tmp_path / "s"), pytest.raises(BusyError, match="another process is creating"):
        Store.create(tmp_path / "s", {})
    Store.create(tmp_path / "s", {})


def test_damaged_metadata_is_named_not_used_and_replaced_by_adding_the_array_again(store: Store, fill: Fill) -> None:
    fill(store, "V", range(4))
    before = files(store.path)
    path = store.path / "V" / "zarr.json"
    path.write_text(path.read_text().replace('"size": 2', '"size": 3'))
    store = Store.open(store.path)
    assert set(store.arrays) == {"pixels"} and "checksum" in store.damaged["V"]
    for use in (store.stored, lambda name: store.reader([name]), lambda name: store.missing(name, [0])):
        with pytest.raises(CorruptError, match=r"V/zarr\.json is damaged"):
            use("V")
    with pytest.raises(CorruptError, match=r"V/zarr\.json is damaged"):
        store.check_readable()
    store.add_array("V", (2, 2, 8), "float16", 4, Fingerprint({"size": 2}))
    fill(store, "V", range(4))
    assert {name: content for name, (_, content) in files(store.path).items()} == {n: c for n, (_, c) in before.items()}
    store.check_readable()


def test_remove_store_refuses_other_folders(store: Store, tmp_path: Path) -> None:
    (tmp_path / "photos" / "manifest").mkdir(parents=True)
    with pytest.raises(CacheError, match="is not a store"):
        remove_store(tmp_path / "photos")
    with store.lock(), pytest.raises(BusyError, match="is being written by process"):
        remove_store(store.path)
    remove_store(store.path)
    assert not store.path.exists()
