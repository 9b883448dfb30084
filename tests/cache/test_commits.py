from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from dsu_cache import ShardId
from dsu_cache.commits import Commit, read_commit, read_commits, remove_commit, write_commit


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(b"0123456789")
    return path


def commit_of(data: Path, rows: tuple[int, ...]) -> Commit:
    content = data.read_bytes()
    return Commit(rows, len(content), hashlib.sha256(content).hexdigest())


def test_a_commit_reads_as_written_and_in_order(tmp_path: Path, data: Path) -> None:
    commit = commit_of(data, (4, 5, 7))
    shards = [ShardId(0, 2), ShardId(0, 10), ShardId(1, 1)]
    for shard in reversed(shards):
        write_commit(tmp_path, shard, commit)
    assert (commit.rows, commit.nbytes) == ((4, 5, 7), 10)
    assert list(read_commits(tmp_path)) == [(shard, commit) for shard in shards]
    assert (tmp_path / "0.10.json").exists()


def test_a_commit_tells_a_short_file_from_a_whole_and_a_changed_one(data: Path) -> None:
    commit = commit_of(data, (0,))
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


def test_a_torn_marker_is_none_and_can_be_removed(tmp_path: Path, data: Path) -> None:
    shard = ShardId(0, 0)
    write_commit(tmp_path, shard, commit_of(data, (0,)))
    marker = tmp_path / "0.0.json"
    marker.write_bytes(marker.read_bytes()[:-5])
    assert read_commit(tmp_path, shard) is None
    assert list(read_commits(tmp_path)) == []
    remove_commit(tmp_path, shard)
    assert not marker.exists()
