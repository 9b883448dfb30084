"""A shard's bytes, as Zarr lays them out: its chunks, one a row, then an index of them; behind each its checksum.

Zarr itself writes a shard through an event loop that all threads share, copying it three times, and reads it as
slowly. Here each thread encodes and decodes for itself, and what takes time runs past Python's lock.
"""

import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import Blosc, Zstd

from dsu_cache.errors import CorruptError

Compressor: TypeAlias = Literal["zstd", "blosc"] | None
Rows: TypeAlias = npt.NDArray[np.int64]

_CHECKSUM: Final = 4
"""Bytes of a CRC32C, little-endian, behind every chunk and every index."""
_MISSING: Final = 2**64 - 1
"""Offset and length, in an index, of a chunk that is not there."""
LEVEL: Final = 3
"""How hard is compressed."""


class ShardId(NamedTuple):
    """One shard of an array: rows [shard * rows_per_shard, (shard + 1) * rows_per_shard) of one view."""

    view: int
    shard: int


def codec_of(compressor: Compressor, itemsize: int) -> Any:
    """Return what compresses chunks of numbers of so many bytes, exactly as Zarr does; None without a compressor."""
    if compressor == "blosc":
        shuffle = Blosc.BITSHUFFLE if itemsize == 1 else Blosc.SHUFFLE
        return Blosc(cname="zstd", clevel=LEVEL, shuffle=shuffle, typesize=itemsize)
    return Zstd(level=LEVEL) if compressor == "zstd" else None


def encode(rows: Rows, values: npt.NDArray[Any], rows_per_shard: int, codec: Any) -> Iterator[bytes | memoryview]:
    """Yield a shard's bytes, piece by piece: `values` (n, *item_shape) in `rows` (n,), ascending.

    The shard's other rows take no space. A row of only zeros is written like any other: left out, it could not be
    told from one that is missing.
    """
    index = np.full((rows_per_shard, 2), _MISSING, "<u8")
    offset = 0
    for row, value in zip(rows.tolist(), values, strict=True):
        chunk = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
        encoded = chunk if codec is None else codec.encode(chunk)
        index[row % rows_per_shard] = offset, len(encoded) + _CHECKSUM
        offset += len(encoded) + _CHECKSUM
        yield encoded
        yield _checksum(encoded)
    yield index.tobytes()
    yield _checksum(index.tobytes())


class ShardFile:
    """A shard's open file and its index, (offset, bytes) a chunk.

    Without compression a chunk lies there exactly as it will lie in memory: one system call puts it and its checksum
    where they belong, and the checksum is computed while the bytes are still in the processor's cache.

    Args:
        path: the file.
        chunks: how many it has room for.
        codec: as `codec_of` gives it.

    Raises:
        CorruptError: saying what is wrong with the file.
    """

    def __init__(self, path: Path, chunks: int, codec: Any) -> None:
        self._path = path
        self._codec = codec
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CorruptError(f"{path} cannot be opened ({error.strerror}).") from error
        weakref.finalize(self, os.close, self._descriptor)
        index = np.empty(16 * chunks, np.uint8)
        self._read(index, os.fstat(self._descriptor).st_size - index.size - _CHECKSUM, "its index")
        self._index = index.view("<u8").reshape(chunks, 2)

    def read(self, chunk: int, into: npt.NDArray[np.uint8]) -> None:
        """Fill `into`, the chunk's bytes, and verify them."""
        offset, nbytes = self._index[chunk].tolist()
        if offset == _MISSING == nbytes:
            raise CorruptError(f"{self._path} has no chunk {chunk}.")
        if self._codec is not None:
            encoded = np.empty(nbytes - _CHECKSUM, np.uint8)
            self._read(encoded, offset, f"chunk {chunk}")
            self._codec.decode(encoded, out=into)
        elif nbytes == into.size + _CHECKSUM:
            self._read(into, offset, f"chunk {chunk}")
        else:
            wanted = into.size + _CHECKSUM
            raise CorruptError(f"chunk {chunk} of {self._path} has {nbytes} bytes instead of {wanted}.")

    def _read(self, into: npt.NDArray[np.uint8], offset: int, what: str) -> None:
        """Fill `into` from `offset` on, and compare with the checksum that follows."""
        checksum = bytearray(_CHECKSUM)
        if offset < 0 or os.preadv(self._descriptor, [into.data, checksum], offset) != into.size + _CHECKSUM:
            raise CorruptError(f"{what} of {self._path} is cut off.")
        if _checksum(into.data) != checksum:
            raise CorruptError(f"{what} of {self._path} does not fit its checksum.")


def _checksum(content: bytes | memoryview) -> bytes:
    return crc32c.crc32c(content).to_bytes(_CHECKSUM, "little")
