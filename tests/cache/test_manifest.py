from __future__ import annotations

import tempfile
from collections.abc import ItemsView, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsu_cache import JSON, CacheError, CorruptError, Entry, Manifest
from dsu_cache.files import read_record
from dsu_cache.manifest import load_manifest, save_manifest

samples = st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from("123456").map(Entry), max_size=8)
histories = st.lists(samples, min_size=1, max_size=5)


def entries(**keys: str) -> dict[str, Entry]:
    return {name: Entry(key) for name, key in keys.items()}


def test_new_samples_get_rows_in_the_order_of_their_names() -> None:
    manifest = Manifest().assign(entries(c="3", a="1", b="2"), 4)
    assert [manifest.row(name) for name in "abc"] == [0, 1, 2]
    assert manifest.names == ("a", "b", "c")


def test_added_samples_begin_on_a_fresh_shard() -> None:
    before = Manifest().assign(entries(b="2", c="3"), 4)
    after = before.assign(entries(a="1", b="2", c="3", d="4"), 4)
    assert [after.row(name) for name in "abcd"] == [4, 0, 1, 5]
    assert after.next_row == 6


def test_changed_content_gets_a_new_row() -> None:
    before = Manifest().assign(entries(a="1", b="2"), 4)
    after = before.assign(entries(a="1", b="9"), 4)
    assert (after.row("a"), after.row("b"), after.rows_in_use.tolist()) == (0, 4, [0, 4])


def test_a_renamed_sample_keeps_its_row() -> None:
    before = Manifest().assign(entries(a="1", b="2"), 4)
    after = before.assign(entries(a="1", z="2"), 4)
    assert (after.row("z"), after.next_row) == (1, 2)


def test_equal_samples_share_a_row() -> None:
    manifest = Manifest().assign(entries(a="1", b="1", c="2"), 4)
    assert [manifest.row(name) for name in "abc"] == [0, 0, 1]
    assert (manifest.names_at(0), manifest.names_at(3)) == (("a", "b"), ())
    assert manifest.names_at(1, 3, 0) == ("a", "b", "c")


def test_names_of_all_rows_are_found_in_one_pass_over_the_samples() -> None:
    class Watched(dict[str, Entry]):
        passes = 0

        def __iter__(self) -> Iterator[str]:
            self.passes += 1
            return super().__iter__()

        def items(self) -> ItemsView[str, Entry]:
            self.passes += 1
            return super().items()

    watched = Watched(entries(**{f"n{i}": str(i) for i in range(100)}))
    manifest = Manifest(watched, {str(i): i for i in range(100)}, 100)
    watched.passes = 0
    assert [manifest.names_at(row) for row in range(100)] == [(f"n{i}",) for i in range(100)]
    assert len([manifest.names for _ in range(100)]) == 100
    assert watched.passes == 2


def test_content_that_was_gone_has_its_row_again_when_it_returns() -> None:
    manifest = Manifest().assign(entries(a="1", b="2"), 4)
    without = manifest.assign(entries(a="1"), 4)
    assert without.rows_in_use.tolist() == [0] and without.next_row == 2
    assert without.assign(entries(a="1", b="2"), 4) == manifest


def test_other_info_is_no_change_and_is_kept() -> None:
    before = Manifest().assign({"a": Entry("1", {"size": 5})}, 4)
    after = before.assign({"a": Entry("1", {"size": 6})}, 4)
    assert after.entries["a"].info == {"size": 6}


def test_an_unknown_sample_is_named() -> None:
    with pytest.raises(CacheError, match="'zebra' is not in the manifest"):
        Manifest().row("zebra")


@pytest.mark.parametrize(
    ("rows", "next_row"), [({}, 4), ({"1": 0, "2": 0}, 4), ({"1": 0, "2": 4}, 4), ({"1": -1, "2": 0}, 4)]
)
def test_a_manifest_that_contradicts_itself_is_refused(rows: dict[str, int], next_row: int) -> None:
    with pytest.raises(ValueError, match="a manifest"):
        Manifest(entries(a="1", b="2"), rows, next_row)


@settings(deadline=None)
@given(histories, st.integers(1, 5))
def test_rows_are_never_moved_and_never_given_twice(history: list[dict[str, Entry]], rows_per_shard: int) -> None:
    manifest = Manifest()
    written: dict[int, str] = {}  # the content that each row was given out for, ever
    for wanted in history:
        before = manifest
        manifest = before.assign(wanted, rows_per_shard)
        assert {name: entry.key for name, entry in manifest.entries.items()} == {n: e.key for n, e in wanted.items()}
        fresh = sorted(set(manifest.rows.values()) - set(before.rows.values()))
        for key, row in manifest.rows.items():
            assert before.rows.get(key, row) == row
            assert written.setdefault(row, key) == key
        if fresh:
            assert fresh == list(range(fresh[0], manifest.next_row))
            assert fresh[0] >= before.next_row
            assert fresh[0] % rows_per_shard == 0
        else:
            assert manifest.next_row == before.next_row
        assert manifest.rows_in_use.tolist() == sorted({manifest.row(name) for name in manifest.names})
        assert manifest.assign(wanted, rows_per_shard) == manifest


@settings(deadline=None)
@given(histories)
def test_a_manifest_reads_as_saved(history: list[dict[str, Entry]]) -> None:
    manifest = Manifest()
    for wanted in history:
        manifest = manifest.assign({name: Entry(entry.key, {"of": [name]}) for name, entry in wanted.items()}, 4)
    with tempfile.TemporaryDirectory() as folder:
        save_manifest(Path(folder), manifest)
        assert load_manifest(Path(folder)) == manifest


def test_only_the_newest_generation_is_kept(tmp_path: Path) -> None:
    for key in "123":
        save_manifest(tmp_path, Manifest().assign(entries(a=key), 4))
    assert [path.name for path in tmp_path.iterdir()] == ["00000003.json"]
    assert load_manifest(tmp_path).entries["a"].key == "3"


def test_a_torn_generation_is_passed_over_and_then_replaced(tmp_path: Path) -> None:
    save_manifest(tmp_path, Manifest().assign(entries(a="1"), 4))
    whole = (tmp_path / "00000001.json").read_bytes()
    (tmp_path / "00000002.json").write_bytes(whole[:-20])
    assert load_manifest(tmp_path).entries["a"].key == "1"
    save_manifest(tmp_path, Manifest().assign(entries(a="3"), 4))
    assert [path.name for path in tmp_path.iterdir()] == ["00000003.json"]
    assert load_manifest(tmp_path).entries["a"].key == "3"


def test_a_generation_replaced_while_it_is_read_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_manifest(tmp_path, Manifest().assign(entries(a="1"), 4))

    def replaced(path: Path) -> JSON:
        monkeypatch.undo()
        save_manifest(tmp_path, Manifest().assign(entries(a="2"), 4))
        return read_record(path)

    monkeypatch.setattr("dsu_cache.manifest.read_record", replaced)
    assert load_manifest(tmp_path).entries["a"].key == "2"


@pytest.mark.parametrize("content", [None, b"", b'{"entries":{}}\n'])
def test_without_a_whole_generation_the_manifest_is_corrupt(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "00000001.json").write_bytes(content)
    with pytest.raises(CorruptError, match="holds no whole manifest"):
        load_manifest(tmp_path)
