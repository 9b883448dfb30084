from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dsu_cache import ShardId, Store
from dsu_cache.arrays import Commit

Fill = Callable[[Store, str, Sequence[int]], list[ShardId]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(b"0123456789")
    return path


def test_a_commit_says_what_a_shards_file_holds(store: Store, fill: Fill) -> None:
    fill(store, "V", [0, 1])
    array, rows = store.stored("V"), {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [8, 9]}
    assert array.shards() == {ShardId(view, shard) for view in (0, 1) for shard in rows}
    for shard in array.shards():
        content = array.file(shard).read_bytes()
        assert array.commit(shard) == Commit(rows[shard.shard], len(content), hashlib.sha256(content).hexdigest())
    assert array.written_rows() == set(range(10))
    assert (store.path / "commits/V/0.2.json").exists() and array.commit(ShardId(2, 0)) is None


def test_a_commit_tells_a_short_file_from_a_whole_and_a_changed_one(data: Path) -> None:
    content = data.read_bytes()
    commit = Commit([0], len(content), hashlib.sha256(content).hexdigest())
    assert commit.fits(data)
    assert commit.matches(data)
    data.write_bytes(b"0123456780")
    assert commit.fits(data)
    assert not commit.matches(data)
    data.write_bytes(b"012345678")
    assert not commit.fits(data)
    data.unlink()
    assert not commit.fits(data)
    assert not commit.matches(data)


def test_a_torn_marker_is_none_and_can_be_removed(store: Store, fill: Fill) -> None:
    fill(store, "V", [0])
    array, shard = store.stored("V"), ShardId(0, 2)
    marker = array.marker(shard)
    marker.write_bytes(marker.read_bytes()[:-5])
    assert array.commit(shard) is None
    assert array.written_rows() == set(range(8))
    array.discard(shard)
    assert not marker.exists()
