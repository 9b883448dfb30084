"""Property tests: written values are read back exactly or not at all, for any order of writing and any shard size."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from hypothesis import given, settings, strategies as st

from dsu_cache import Compressor, CorruptError, Entry, Fingerprint, ShardId, Store, audit, discard_refuted

VIEWS = 2

shapes = st.sampled_from([(), (3,), (2, 2, 3)])
dtypes = st.sampled_from(["uint8", "float16", "float32", "int64"])
compressors = st.sampled_from([None, "zstd", "blosc"])
quick = settings(max_examples=30)


def content(row: int, view: int, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """The values of a row in a view; every third row is all zeros, which must not count as missing."""
    numbers = np.random.default_rng([row, view]).integers(0, 200, shape) * (row % 3 > 0)
    return np.asarray(numbers, dtype)


@contextmanager
def written(
    count: int,
    rows_per_shard: int,
    shape: tuple[int, ...] = (3,),
    dtype: str = "float16",
    compressor: Compressor = None,
    order: Callable[[list[ShardId]], list[ShardId]] = lambda shards: shards,
) -> Iterator[Store]:
    """A store of `count` rows, with its shards written in a given order."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "s", {}, rows_per_shard, compressor)
        entries = {f"n{i:03d}": Entry(str(i)) for i in range(count)}
        store.set_manifest(store.manifest.assign(entries, rows_per_shard))
        store.add_array("x", shape, dtype, VIEWS, Fingerprint({}))
        for view, shard in order(store.missing("x", range(VIEWS))):
            rows = store.rows_in_shard(shard)
            store.write_shard("x", view, shard, rows, np.stack([content(r, view, shape, dtype) for r in rows.tolist()]))
        yield Store.open(store.path)


@quick
@given(
    data=st.data(),
    count=st.integers(0, 11),
    rows_per_shard=st.integers(1, 5),
    shape=shapes,
    dtype=dtypes,
    compressor=compressors,
)
def test_any_list_of_indices_is_read_after_writing_in_any_order(
    data: st.DataObject, count: int, rows_per_shard: int, shape: tuple[int, ...], dtype: str, compressor: Compressor
) -> None:
    def order(shards: list[ShardId]) -> list[ShardId]:
        return data.draw(st.permutations(shards))

    with written(count, rows_per_shard, shape, dtype, compressor, order) as store:
        assert store.missing("x", range(VIEWS)) == []
        rows = data.draw(st.lists(st.integers(0, count - 1), max_size=9)) if count else []
        views = [data.draw(st.integers(0, VIEWS - 1)) for _ in rows]
        got = store.reader(["x"], keep_open=data.draw(st.booleans())).read(rows, views)["x"]
        assert (got.shape, str(got.dtype)) == ((len(rows), *shape), dtype)
        for one, row, view in zip(got, rows, views, strict=True):
            np.testing.assert_array_equal(one, content(row, view, shape, dtype))
        by_zarr = zarr.open_group(store.path, mode="r")["x"]
        assert isinstance(by_zarr, zarr.Array)
        whole = np.asarray(by_zarr[:])
        np.testing.assert_array_equal(got, whole[np.array(rows, int), np.array(views, int)])


@quick
@given(st.data(), st.integers(1, 9), st.integers(1, 4), compressors)
def test_corruption_anywhere_in_a_shard_is_never_read_silently(
    data: st.DataObject, count: int, rows_per_shard: int, compressor: Compressor
) -> None:
    with written(count, rows_per_shard, compressor=compressor) as store:
        files = [store.stored("x").file(shard) for shard in sorted(store.stored("x").shards())]
        which = data.draw(st.integers(0, len(files) - 1))
        before = files[which].read_bytes()
        start = data.draw(st.integers(0, len(before) - 1))
        if data.draw(st.booleans()):
            after = before[:start] + data.draw(st.binary(min_size=1, max_size=8)) + before[start + 8 :]
        else:
            after = before[:start]
        files[which].write_bytes(after)
        if after == before:
            return
        [finding] = audit(store)
        assert finding.array == "x" and store.path / finding.file == files[which]
        reader, refused = store.reader(["x"]), []
        for row in range(count):
            for view in range(VIEWS):
                try:
                    got = reader.read([row], [view])["x"][0]
                except CorruptError as error:
                    refused.append((f"n{row:03d}", f"row {row}, view {view}", str(error)))
                else:
                    np.testing.assert_array_equal(got, content(row, view, (3,), "float16"))
        # Reading does not notice changes of bytes that belong to no sample, but audit does.
        assert refused or len(after) == len(before)
        assert [one for one in refused if one[0] not in finding.samples or one[1] not in one[2]] == []
        [discarded] = discard_refuted(store, [finding])
        assert store.missing("x", range(VIEWS)) == [discarded.shard]
