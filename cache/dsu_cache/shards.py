"""A shard's bytes: its chunks as Zarr's codecs give them, then an index of them, then the index's checksum.

Written from memory, and where nothing is compressed read straight from the file.
"""

import asyncio
import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ShardingCodec
from zarr.core.array_spec import ArrayConfig
from zarr.core.buffer import default_buffer_prototype
from zarr.core.codec_pipeline import BatchedCodecPipeline

from dsu_cache.errors import CorruptError

ZarrArray: TypeAlias = "zarr.Array[Any]"
Rows: TypeAlias = npt.NDArray[np.int64]

_CHECKSUM: Final = 4
"""Bytes of a CRC32C, little-endian, behind every chunk and every index."""
_MISSING: Final = 2**64 - 1
"""Offset and length, in an index, of a chunk that is not there."""
TOGETHER: Final = 8
"""Chunks encoded at a time: their memory is used again for the next ones, and is warm in the processor's cache."""


class ShardId(NamedTuple):
    """One shard of an array: rows [shard * rows_per_shard, (shard + 1) * rows_per_shard) of one view."""

    view: int
    shard: int


class Encoder:
    """Encodes shards of one array, exactly as Zarr would write them.

    Zarr writes a shard through an event loop that all threads share, and copies it three times; here each thread
    encodes for itself, a few chunks at a time. Not for use inside a running event loop.

    Args:
        array: one chunk a row and view, as `StoredArray.create` makes it.
    """

    def __init__(self, array: ZarrArray) -> None:
        [sharding] = array.metadata.codecs  # type: ignore[union-attr]  # of Zarr v3, always
        assert isinstance(sharding, ShardingCodec)
        assert array.shards is not None
        self._rows: Final = array.shards[0]
        self._codecs = BatchedCodecPipeline.from_codecs(sharding.codecs, batch_size=TOGETHER)
        prototype = default_buffer_prototype()
        shard = array.metadata.get_chunk_spec((0,) * array.ndim, ArrayConfig.from_dict({}), prototype)
        self._chunk = replace(shard, shape=sharding.chunk_shape)
        self._wrap = prototype.nd_buffer.from_numpy_array

    def pieces(self, rows: Rows, values: npt.NDArray[Any]) -> Iterator[bytes | bytearray | memoryview]:
        """Yield a shard's bytes, piece by piece: `values` (n, *item_shape) in `rows` (n,), ascending.

        The shard's other rows take no space. A row of only zeros is written like any other: left out, it could not be
        told from one that is missing.
        """
        index = np.full((self._rows, 2), _MISSING, "<u8")
        offset = 0
        with asyncio.Runner() as runner:
            for start in range(0, len(rows), TOGETHER):
                part = slice(start, start + TOGETHER)
                chunks = [(self._wrap(value[None, None]), self._chunk) for value in values[part]]
                encoded = runner.run(self._codecs.encode(chunks))
                for row, buffer in zip(rows[part].tolist(), encoded, strict=True):
                    assert buffer is not None
                    index[row % self._rows] = offset, len(buffer)
                    offset += len(buffer)
                    yield buffer.as_buffer_like()
        yield index.tobytes()
        yield crc32c.crc32c(index.tobytes()).to_bytes(_CHECKSUM, "little")


class ShardFile:
    """A shard without compression: its open file and its index, (offset, bytes) a chunk.

    A chunk lies there exactly as it will lie in memory, followed by its checksum: one system call puts both where they
    belong, past Python's lock, and the checksum is computed while the bytes are still in the processor's cache.

    Args:
        path: the file.
        chunks: how many it has room for.
        nbytes: of a chunk.

    Raises:
        CorruptError: saying what is wrong with the file.
    """

    def __init__(self, path: Path, chunks: int, nbytes: int) -> None:
        self._path = path
        self._nbytes = nbytes
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
        wanted = self._nbytes + _CHECKSUM
        if offset == _MISSING == nbytes:
            raise CorruptError(f"{self._path} has no chunk {chunk}.")
        if nbytes != wanted:
            raise CorruptError(f"chunk {chunk} of {self._path} has {nbytes} bytes instead of {wanted}.")
        self._read(into, offset, f"chunk {chunk}")

    def _read(self, into: npt.NDArray[np.uint8], offset: int, what: str) -> None:
        """Fill `into` from `offset` on, and compare with the checksum that follows."""
        checksum = bytearray(_CHECKSUM)
        if offset < 0 or os.preadv(self._descriptor, [into.data, checksum], offset) != into.size + _CHECKSUM:
            raise CorruptError(f"{what} of {self._path} is cut off.")
        if crc32c.crc32c(into.data) != int.from_bytes(checksum, "little"):
            raise CorruptError(f"{what} of {self._path} does not fit its checksum.")
