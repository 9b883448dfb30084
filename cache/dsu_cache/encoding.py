"""A shard's bytes, made in memory: its chunks as Zarr's codecs give them, then an index of them, then its checksum."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final, TypeAlias

import crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ShardingCodec
from zarr.core.array_spec import ArrayConfig
from zarr.core.buffer import default_buffer_prototype
from zarr.core.codec_pipeline import BatchedCodecPipeline

__all__ = ["CHECKSUM", "MISSING", "Encoder"]

ZarrArray: TypeAlias = "zarr.Array[Any]"

CHECKSUM: Final = 4
"""Bytes of a CRC32C, little-endian, behind every chunk and every index."""
MISSING: Final = 2**64 - 1
"""Offset and length, in an index, of a chunk that is not there."""
TOGETHER: Final = 8
"""Chunks encoded at a time: their memory is used again for the next ones, and is warm in the processor's cache."""


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

    def pieces(self, rows: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> Iterator[bytes | bytearray | memoryview]:
        """Yield a shard's bytes, piece by piece: `values` (n, *item_shape) in `rows` (n,), ascending.

        The shard's other rows take no space. A row of only zeros is written like any other: left out, it could not be
        told from one that is missing.
        """
        index = np.full((self._rows, 2), MISSING, "<u8")
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
        yield crc32c.crc32c(index.tobytes()).to_bytes(CHECKSUM, "little")
