from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import pytest

from dsu_cache import ShardId, Store, audit
from dsu_cache.arrays import Commit

Fill = Callable[[Store, str, Sequence[int]], list[ShardId]]


def test_a_commit_records_rows_size_and_hash_of_a_shards_file(store: Store, fill: Fill) -> None:
    fill(store, "V", [0, 1])
    array, rows = store.stored("V"), {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [8, 9]}
    assert array.shards() == {ShardId(view, shard) for view in (0, 1) for shard in rows}
    for shard in array.shards():
        content = array.file(shard).read_bytes()
        assert array.commit(shard) == Commit(rows[shard.shard], len(content), hashlib.sha256(content).hexdigest())
    assert array.committed() == {shard: array.commit(shard) for shard in array.shards()}
    assert (store.path / "commits/V/0.2.json").exists() and array.commit(ShardId(2, 0)) is None


def test_a_commit_detects_truncated_and_changed_files(store: Store, fill: Fill) -> None:
    [shard, *_] = fill(store, "V", [0])
    array, file = store.stored("V"), store.stored("V").file(shard)
    commit, content = array.commit(shard), file.read_bytes()
    assert commit is not None and commit.fits(file) and array.is_intact(shard, commit)
    for damaged, fits in ((content[:-1] + bytes([content[-1] ^ 1]), True), (content[:-1], False)):
        file.write_bytes(damaged)
        assert commit.fits(file) is fits and not array.is_intact(shard, commit)
    file.unlink()
    assert not commit.fits(file) and not array.is_intact(shard, commit)


def test_a_torn_marker_does_not_count_and_can_be_removed(store: Store, fill: Fill) -> None:
    fill(store, "V", [0])
    array, shard = store.stored("V"), ShardId(0, 2)
    marker = array.marker(shard)
    marker.write_bytes(marker.read_bytes()[:-5])
    assert array.commit(shard) is None
    assert array.committed().keys() == array.shards() - {shard}
    array.discard(shard)
    assert not marker.exists()


def test_many_markers_are_packed_into_one_file(store: Store, fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    def markers(name: str) -> list[str]:
        return sorted(path.suffix for path in (store.path / "commits" / name).iterdir())

    def relocked() -> Store:
        with (again := Store.open(store.path)).lock():
            return again

    written = fill(store, "V", [0, 1])
    fill(store, "pixels", [0])
    commits = {shard: store.stored("V").commit(shard) for shard in written}
    monkeypatch.setattr("dsu_cache.arrays.PACKED_FROM", 4)
    opened = Store.open(store.path)
    assert markers("V") == [".json"] * 6
    packing = relocked()
    assert (markers("V"), markers("pixels")) == ([".safetensors"], [".json"] * 3)
    for seen in (opened, packing, Store.open(store.path)):  # including a store that was opened before
        assert not seen.missing("V", [0, 1]) and seen.stored("V").shards() == set(written)
        assert {shard: seen.stored("V").commit(shard) for shard in written} == commits

    # A discarded shard is missing for all, and stays so when more markers are packed; written again it counts again.
    packing.stored("V").discard(written[1])
    assert packing.missing("V", [0, 1]) == Store.open(store.path).missing("V", [0, 1]) == [written[1]]
    assert "not finished" in str(audit(Store.open(store.path))[0])
    fill(packing, "V", [2])
    fill(packing, "V", [3])
    packing = relocked()
    assert markers("V") == [".safetensors"]
    assert fill(packing, "V", [0, 1, 2, 3]) == [written[1]]
    assert packing.stored("V").commit(written[1]) == commits[written[1]]
    assert not Store.open(store.path).missing("V", range(4)) and not audit(Store.open(store.path))


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: b"x" + content])
def test_shards_with_damaged_packed_markers_are_missing(
    store: Store, fill: Fill, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    written = fill(store, "V", [0])
    monkeypatch.setattr("dsu_cache.arrays.PACKED_FROM", 1)
    with store.lock():
        pass
    [packed] = (store.path / "commits/V").iterdir()
    packed.write_bytes(damage(packed.read_bytes()))
    store = Store.open(store.path)
    assert store.missing("V", [0]) == written
    assert str(audit(store)[0]).startswith("commits/V/") and "the shards that it marks" in str(audit(store)[0])
    assert fill(store, "V", [0]) == written and not store.missing("V", [0])
