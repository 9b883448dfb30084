from __future__ import annotations

from pathlib import Path

import pytest
import zarr

from dsu_cache import CorruptError
from dsu_cache.metadata import METADATA, group, read_metadata, write_metadata
from dsu_cache.records import remove_strays

NASTY = {"of the seal": '"seal": "', "nested": {"seal": "0" * 64}, "é": [1e-05, None]}
"""Attributes that could be taken for the seal."""


def test_metadata_reads_as_written_and_zarr_reads_it_too(tmp_path: Path) -> None:
    write_metadata(tmp_path, group(NASTY))
    assert read_metadata(tmp_path) == group(NASTY)
    opened = zarr.open_group(tmp_path, mode="r")
    assert {name: opened.attrs[name] for name in NASTY} == NASTY
    stamp = (tmp_path / "zarr.json").stat().st_mtime_ns
    write_metadata(tmp_path, group(NASTY))
    assert (tmp_path / "zarr.json").stat().st_mtime_ns == stamp, "the same again is not written"


def test_every_single_bit_counts(tmp_path: Path) -> None:
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


def test_what_an_interrupted_write_left_is_removed(tmp_path: Path) -> None:
    write_metadata(tmp_path, group({}))
    (tmp_path / "zarr.json.123.partial").write_bytes(b"{")
    remove_strays(tmp_path / METADATA)
    assert [path.name for path in tmp_path.iterdir()] == ["zarr.json"]
