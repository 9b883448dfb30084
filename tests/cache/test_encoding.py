"""Shards have the same bytes as those that Zarr writes."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from dsu_cache import Compressor
from dsu_cache.arrays import codec_of, encode

ROWS = 19
CODECS: dict[Compressor, list[BytesBytesCodec]] = {
    None: [],
    "zstd": [ZstdCodec(level=3)],
    "blosc": [BloscCodec(cname="zstd", clevel=3)],
}
SHAPES: list[tuple[tuple[int, ...], str]] = [
    ((), "int64"),
    ((5, 3), "uint8"),
    ((4, 4, 8), "float16"),
    ((7,), "float32"),
]


def drawn(rows: int, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Random numbers, with zeros in row 2."""
    values = np.asarray(np.random.default_rng(0).integers(0, 9, (rows, *shape)), dtype)
    values[2] = 0
    return values


def written_by_zarr(
    folder: Path, compressor: Compressor, length: int, rows: Iterable[int], values: np.ndarray[Any, np.dtype[Any]]
) -> bytes:
    """The bytes of the second shard's file, written row by row."""
    array = zarr.create_array(
        folder,
        shape=(length, 1, *values.shape[1:]),
        dtype=values.dtype,
        chunks=(1, 1, *values.shape[1:]),
        shards=(ROWS, 1, *values.shape[1:]),
        filters=[],
        compressors=[*CODECS[compressor], Crc32cCodec()],
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    for row, value in zip(rows, values, strict=True):
        array[row, 0] = value
    [file] = (path for path in (folder / "c" / "1").rglob("*") if path.is_file())
    return file.read_bytes()


def encoded(rows: np.ndarray[Any, Any], values: np.ndarray[Any, Any], compressor: Compressor = None) -> bytes:
    return b"".join(encode(rows, values, ROWS, codec_of(compressor, values.itemsize)))


@pytest.mark.parametrize("compressor", CODECS)
@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
@pytest.mark.parametrize(
    "kept",
    [range(ROWS), range(ROWS - 5), [0, 2, 3, 4, 11, ROWS - 1], [7]],
    ids=["full", "partial", "with holes", "one row"],
)
def test_a_shard_has_the_bytes_that_zarr_writes(
    tmp_path: Path, compressor: Compressor, shape: tuple[int, ...], dtype: str, kept: Iterable[int]
) -> None:
    rows = ROWS + np.array(kept)
    values = drawn(ROWS, shape, dtype)[kept]
    expected = written_by_zarr(tmp_path / "zarr", compressor, int(rows[-1]) + 1, rows.tolist(), values)
    assert encoded(rows, values, compressor) == expected


def test_a_non_contiguous_array_is_encoded_like_its_copy() -> None:
    values = drawn(4, (2, 3), "float16").transpose(0, 2, 1)
    assert not values.flags.c_contiguous
    rows = np.arange(4)
    assert encoded(rows, values) == encoded(rows, values.copy("C"))


def test_threads_encode_at_the_same_time() -> None:
    rows = np.arange(ROWS)
    drawings = [drawn(ROWS, (40, 40), "float32") + turn for turn in range(8)]
    expected = [encoded(rows, values, "zstd") for values in drawings]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda values: encoded(rows, values, "zstd"), drawings)) == expected
