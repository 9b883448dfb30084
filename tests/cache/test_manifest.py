from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from dsu_cache import JSON, CacheError, CorruptError, Entry, Manifest
from dsu_cache.columns import ABSENT, Column, equal, load_tables, save_tables
from dsu_cache.files import canonical, read_record
from dsu_cache.manifest import damage, load_manifest, save_manifest

samples = st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from("123456").map(Entry), max_size=8)
histories = st.lists(samples, min_size=1, max_size=5)


def entries(**keys: str) -> dict[str, Entry]:
    return {name: Entry(key) for name, key in keys.items()}


def test_new_samples_get_rows_in_the_order_of_their_names() -> None:
    manifest = Manifest().assign(entries(c="3", a="1", b="2"), 4)
    assert [manifest.row(name) for name in "abc"] == [0, 1, 2]
    assert manifest.names == ("a", "b", "c")


def test_added_samples_begin_on_a_new_shard() -> None:
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


def test_content_that_returns_gets_its_old_row() -> None:
    manifest = Manifest().assign(entries(a="1", b="2"), 4)
    without = manifest.assign(entries(a="1"), 4)
    assert without.rows_in_use.tolist() == [0] and without.next_row == 2
    assert without.assign(entries(a="1", b="2"), 4) == manifest


def test_changed_info_does_not_change_the_row_and_is_stored() -> None:
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


@given(histories, st.integers(1, 5))
def test_rows_never_change_and_are_never_reused(history: list[dict[str, Entry]], rows_per_shard: int) -> None:
    manifest = Manifest()
    written: dict[int, str] = {}  # the content of each row that was ever assigned
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


@given(histories)
def test_a_manifest_is_loaded_as_saved(history: list[dict[str, Entry]]) -> None:
    manifest = Manifest()
    for wanted in history:
        manifest = manifest.assign({name: Entry(entry.key, {"of": [name]}) for name, entry in wanted.items()}, 4)
    with tempfile.TemporaryDirectory() as folder:
        save_manifest(Path(folder), manifest)
        assert load_manifest(Path(folder)) == manifest


def test_only_the_newest_generation_is_kept(tmp_path: Path) -> None:
    for key in "123":
        save_manifest(tmp_path, Manifest().assign(entries(a=key), 4))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert (tmp_path / "00000003.json").exists()
    assert load_manifest(tmp_path).entries["a"].key == "3"


def test_a_torn_generation_is_skipped_and_then_replaced(tmp_path: Path) -> None:
    save_manifest(tmp_path, Manifest().assign(entries(a="1"), 4))
    whole = (tmp_path / "00000001.json").read_bytes()
    (tmp_path / "00000002.json").write_bytes(whole[:-20])
    assert load_manifest(tmp_path).entries["a"].key == "1"
    save_manifest(tmp_path, Manifest().assign(entries(a="3"), 4))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert (tmp_path / "00000003.json").exists()
    assert load_manifest(tmp_path).entries["a"].key == "3"


def test_loading_is_repeated_if_the_generation_was_replaced_meanwhile(
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
    with pytest.raises(CorruptError, match="contains no intact manifest"):
        load_manifest(tmp_path)


@given(histories, st.integers(1, 5))
def test_segments_add_up_to_the_manifest(history: list[dict[str, Entry]], rows_per_shard: int) -> None:
    """A manifest saved in steps, each one as a change of the last, equals one saved at once."""
    before = Manifest()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_manifest(folder, before)
        for index, wanted in enumerate(history):
            noted = {n: Entry(entry.key, {"step": index if n < "d" else 0}) for n, entry in wanted.items()}
            manifest = before.assign(noted, rows_per_shard)
            save_manifest(folder, manifest, before)
            before = load_manifest(folder)
            assert before == manifest and dict(before.samples()) == dict(manifest.entries) == noted
            assert before.rows == manifest.rows


def test_the_size_of_a_write_depends_on_the_number_of_added_samples(tmp_path: Path) -> None:
    def some(first: int, count: int) -> dict[str, Entry]:
        named = {f"{hashlib.sha256(str(i).encode()).hexdigest()}": i for i in range(first, first + count)}
        return {key: Entry(key, {"number": i}) for key, i in named.items()}

    def segments() -> dict[str, int]:
        return {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}

    samples = some(0, 20_000)
    manifest = Manifest().assign(samples, 64)
    save_manifest(tmp_path, manifest)
    first = segments()
    written = 0
    for step in range(12):
        samples |= some(20_000 + 100 * step, 100)
        grown, known = manifest.assign(samples, 64), segments()
        save_manifest(tmp_path, grown, manifest)
        manifest = grown
        written += sum(size for name, size in segments().items() if name not in known)
    assert first.items() <= segments().items(), "the large segment was rewritten"
    assert len(segments()) <= 6 and written < sum(first.values()) / 2
    assert load_manifest(tmp_path) == manifest


def test_a_manifest_with_replaced_contents_is_written_completely(tmp_path: Path) -> None:
    save_manifest(tmp_path, Manifest(entries(a="1"), {"1": 0}, 1))
    other = Manifest(entries(a="2"), {"2": 0}, 1)
    assert other != load_manifest(tmp_path)
    save_manifest(tmp_path, other, load_manifest(tmp_path))
    assert load_manifest(tmp_path) == other


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_damaged_segment_is_never_read(tmp_path: Path, cut: int) -> None:
    save_manifest(tmp_path, Manifest().assign(entries(a="1", b="2"), 4))
    (segment,) = tmp_path.glob("*.safetensors")
    segment.write_bytes(segment.read_bytes()[:cut])
    with pytest.raises(CorruptError, match="no intact manifest"):
        load_manifest(tmp_path)
    assert "lost segment" in damage(tmp_path / "00000001.json")


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
    st.sampled_from(["0" * 64, "ab" * 32, "AB" * 32, " " * 64]),
    st.lists(st.integers(0, 9), max_size=2),
    st.just(ABSENT),
)


def as_text(found: list[Any]) -> list[str]:
    return ["" if value is ABSENT else canonical(value) for value in found]


@given(st.lists(values, max_size=9), st.lists(values, max_size=9), st.lists(values, max_size=9))
def test_columns_store_any_values_exactly(one: list[Any], other: list[Any], third: list[Any]) -> None:
    column, both = Column.of(one), Column.of(one).joined(Column.of(other)).trimmed()
    assert as_text(column.values()) == as_text([column.value(i) for i in range(len(one))]) == as_text(one)
    assert as_text(both.values()) == as_text([*one, *other])
    with tempfile.TemporaryDirectory() as folder:
        table = {"x": both, "y": both.take(slice(None, None, -1))}
        path = save_tables(Path(folder), {"here": table, "there": {"z": Column.of(third)}})
        found = load_tables(path)
        assert as_text(found["here"]["x"].values()) == as_text([*one, *other])
        assert as_text(found["here"]["y"].values()) == as_text([*one, *other][::-1])
        assert as_text(found["there"]["z"].values()) == as_text(third)
    if one:
        padded = Column.of([other[i] if i < len(other) else None for i in range(len(one))])
        wanted = [a == b for a, b in zip(as_text(one), as_text(padded.values()), strict=True)]
        assert equal({"x": column}, {"x": padded}).tolist() == wanted


def test_columns_are_small() -> None:
    digests = Column.of([hashlib.sha256(str(i).encode()).hexdigest() for i in range(100)])
    assert (digests.data.nbytes, Column.of(list(range(100))).data.nbytes) == (3200, 100)
