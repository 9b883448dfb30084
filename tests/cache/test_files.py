from __future__ import annotations

from pathlib import Path

import pytest
import zarr

from dsu_cache import CorruptError
from dsu_cache.files import (
    METADATA,
    canonical,
    group,
    make_folders,
    read_metadata,
    read_record,
    remove_strays,
    replacing,
    write_metadata,
    write_record,
)


def test_a_record_reads_as_written(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "é\n"}
    write_record(tmp_path / "r.json", value)
    assert read_record(tmp_path / "r.json") == value


def test_canonical_does_not_depend_on_order() -> None:
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1}) == '{"a":2,"b":1}'


def test_canonical_refuses_values_that_are_not_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical(float("nan"))
    with pytest.raises(TypeError, match="set"):
        canonical({"a": {1}})  # type: ignore[dict-item]


def test_a_missing_record_is_read_as_none(tmp_path: Path) -> None:
    assert read_record(tmp_path / "r.json") is None


def test_a_truncated_record_is_read_as_none(tmp_path: Path) -> None:
    write_record(tmp_path / "r.json", {"rows": [1, 2, 3]})
    whole = (tmp_path / "r.json").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "r.json").write_bytes(whole[:length])
        assert read_record(tmp_path / "r.json") is None


def test_a_record_with_a_flipped_bit_is_read_as_none(tmp_path: Path) -> None:
    write_record(tmp_path / "r.json", {"rows": [1, 2, 3]})
    whole = (tmp_path / "r.json").read_bytes()
    for i in range(len(whole)):
        (tmp_path / "r.json").write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        assert read_record(tmp_path / "r.json") is None


def test_a_record_is_never_overwritten(tmp_path: Path) -> None:
    write_record(tmp_path / "r.json", 1)
    with pytest.raises(FileExistsError):
        write_record(tmp_path / "r.json", 2)
    assert read_record(tmp_path / "r.json") == 1


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"first", b"second"):
        with replacing(path) as stream:
            stream.write(content)
        assert path.read_bytes() == content
    with pytest.raises(TypeError), replacing(path) as stream:
        stream.write("text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"second"
    with replacing(path) as stream:  # removes the rest of the interrupted write
        stream.write(b"third")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_missing_folders_are_created(tmp_path: Path) -> None:
    for relative in ("c/0/1", "c/0/2", "c/0/2"):
        make_folders(tmp_path, Path(relative))
        assert (tmp_path / relative).is_dir()


def test_folders_are_not_created_below_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make_folders(tmp_path / "gone", Path("c/0"))
    assert not (tmp_path / "gone").exists()


CONFUSING = {"of the seal": '"seal": "', "nested": {"seal": "0" * 64}, "é": [1e-05, None]}
"""Attributes that could be mistaken for the seal."""


def test_metadata_reads_as_written_and_zarr_reads_it_too(tmp_path: Path) -> None:
    write_metadata(tmp_path, group(CONFUSING))
    assert read_metadata(tmp_path) == group(CONFUSING)
    opened = zarr.open_group(tmp_path, mode="r")
    assert {name: opened.attrs[name] for name in CONFUSING} == CONFUSING
    stamp = (tmp_path / "zarr.json").stat().st_mtime_ns
    write_metadata(tmp_path, group(CONFUSING))
    assert (tmp_path / "zarr.json").stat().st_mtime_ns == stamp, "equal metadata is not written again"


def test_every_flipped_bit_in_metadata_is_found(tmp_path: Path) -> None:
    write_metadata(tmp_path, group({"size": 1e-05, "é": "x"}))
    path = tmp_path / "zarr.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            with pytest.raises(CorruptError, match=r"zarr\.json is damaged"):
                read_metadata(tmp_path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptError, match=r"zarr\.json is damaged"):
            read_metadata(tmp_path)
    path.unlink()
    with pytest.raises(CorruptError, match=r"zarr\.json is missing"):
        read_metadata(tmp_path)


def test_the_rest_of_an_interrupted_write_is_removed(tmp_path: Path) -> None:
    write_metadata(tmp_path, group({}))
    (tmp_path / "zarr.json.123.partial").write_bytes(b"{")
    remove_strays(tmp_path / METADATA)
    assert [path.name for path in tmp_path.iterdir()] == ["zarr.json"]
