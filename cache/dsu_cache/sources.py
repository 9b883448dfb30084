"""Two ways from an array's shards into memory: straight from the files, and through tensorstore.

A chunk is one sample. Where nothing is compressed it lies in its shard exactly as it will lie in memory, followed by
its checksum: one system call puts both where they belong, past Python's lock, and the checksum is computed while the
bytes are still in the processor's cache. tensorstore reads every array there is, through more copies.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import crc32c
import numpy as np
import numpy.typing as npt

from dsu_cache.arrays import ArrayInfo, Compressor, StoredArray
from dsu_cache.commits import ShardId
from dsu_cache.encoding import CHECKSUM, MISSING
from dsu_cache.errors import CacheError, CorruptError

__all__ = ["FileSource", "Source", "TensorStoreSource", "open_sources"]

Rows: TypeAlias = npt.NDArray[np.int64]
Finish: TypeAlias = Callable[[], BaseException | None]

OPEN_FILES: Final = 256
THREADS: Final = min(4, os.cpu_count() or 1)


class Source(Protocol):
    """Reads one array."""

    def begin(self, rows: Rows, views: Rows, target: npt.NDArray[Any]) -> Finish:
        """Start filling `target` (n, *item_shape); the function returned waits, and gives what went wrong, if any."""


class TensorStoreSource:
    """Any array, by tensorstore.

    Args:
        folder: of the array.
        context: the chunks and indices kept in memory, shared between arrays.

    Raises:
        CorruptError: the array cannot be opened.
    """

    def __init__(self, folder: Path, context: Any) -> None:
        import tensorstore as ts

        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            # Otherwise what is missing reads as zeros, silently.
            "fill_missing_data_reads": False,
            # Indices are written once: what was read since opening needs no second look.
            "recheck_cached_metadata": "open",
            "recheck_cached_data": "open",
        }
        try:
            self._array = ts.open(spec, read=True, context=context).result()
        except ValueError as error:
            raise CorruptError(f"array {folder.name!r} in {folder.parent} cannot be opened: {error}") from error

    def begin(self, rows: Rows, views: Rows, target: npt.NDArray[Any]) -> Finish:
        """See `Source.begin`; runs in tensorstore's own threads."""
        import tensorstore as ts

        # One request an array, straight into the batch: of the ways to ask, the one with the least work.
        future = ts.array(target, copy=False, write=True).write(self._array.vindex[rows, views])

        def finish() -> BaseException | None:
            error: BaseException | None = future.exception()
            return error

        return finish


def open_sources(
    arrays: Sequence[StoredArray], rows_per_shard: int, compressor: Compressor, cache_bytes: int
) -> dict[str, Source]:
    """A source for each array by name: from the files where chunks lie there as in memory, else by tensorstore.

    Raises:
        CorruptError: an array cannot be opened.
        CacheError: it is compressed, and this process was forked from one that has read through tensorstore.
    """
    if compressor is None and sys.byteorder == "little" and crc32c.hardware_based:
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read")
        return {
            array.info.name: FileSource(array.info, array.file, rows_per_shard, pool, keep=cache_bytes > 0)
            for array in arrays
        }
    if _started_in() != os.getpid():
        raise CacheError(
            f"{arrays[0].folder.parent} is compressed, and what reads it does not survive a fork: start this process "
            f"another way (multiprocessing_context='spawn'), or store without a compressor"
        )
    # Imported only here: most stores are not compressed, and it takes its time.
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    return {array.info.name: TensorStoreSource(array.folder, context) for array in arrays}


@cache
def _started_in() -> int:
    """The process in which tensorstore's threads run: the first one that reads through it."""
    return os.getpid()


class FileSource:
    """An array without compression, straight from its shards' files.

    Args:
        info: of the array.
        file: where a shard's data is.
        rows_per_shard: rows in a shard, written or not.
        keep: whether indices and open files are kept for the next read.
        pool: the threads that read.
    """

    def __init__(
        self,
        info: ArrayInfo,
        file: Callable[[ShardId], Path],
        rows_per_shard: int,
        pool: ThreadPoolExecutor,
        *,
        keep: bool,
    ) -> None:
        self._nbytes = info.item_nbytes
        self._file = file
        self._rows_per_shard = rows_per_shard
        self._keep = OPEN_FILES if keep else 0
        self._pool = pool
        self._open: OrderedDict[ShardId, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, rows: Rows, views: Rows, target: npt.NDArray[Any]) -> Finish:
        """See `Source.begin`."""
        chunks = target.reshape(len(rows), -1).view(np.uint8)
        futures = [
            self._pool.submit(self._fill, rows[part], views[part], chunks[part[0] : part[-1] + 1])
            for part in np.array_split(np.arange(len(rows)), min(THREADS, len(rows)))
        ]
        return lambda: _first_error(futures)

    def _fill(self, rows: Rows, views: Rows, chunks: npt.NDArray[np.uint8]) -> None:
        for row, view, chunk in zip(rows.tolist(), views.tolist(), chunks, strict=True):
            self._shard(ShardId(view, row // self._rows_per_shard)).read(row % self._rows_per_shard, chunk)

    def _shard(self, shard: ShardId) -> _Shard:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        opened = _Shard(self._file(shard), self._rows_per_shard, self._nbytes)
        with self._lock:
            self._open[shard] = opened
            while len(self._open) > self._keep:
                self._open.popitem(last=False)  # closed when the last read of it is over
        return opened


def _first_error(futures: list[Future[None]]) -> BaseException | None:
    """Waits for all: none may go on writing into a batch that was given up."""
    errors = [future.exception() for future in futures]
    return next((error for error in errors if error is not None), None)


class _Shard:
    """A shard's open file and its index, which lies at the end: (offset, bytes) a chunk, then its checksum.

    Raises `CorruptError` saying what is wrong with the file.
    """

    def __init__(self, path: Path, chunks: int, nbytes: int) -> None:
        self._path = path
        self._nbytes = nbytes
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CorruptError(f"{path} cannot be opened ({error.strerror}).") from error
        weakref.finalize(self, os.close, self._descriptor)
        size = 16 * chunks
        index = np.empty(size, np.uint8)
        self._read(index, os.fstat(self._descriptor).st_size - size - CHECKSUM, "its index")
        self._index = index.view("<u8").reshape(chunks, 2)

    def read(self, chunk: int, into: npt.NDArray[np.uint8]) -> None:
        """Fill `into`, the chunk's bytes, and verify them."""
        offset, nbytes = self._index[chunk].tolist()
        if offset == MISSING == nbytes:
            raise CorruptError(f"{self._path} has no chunk {chunk}.")
        if nbytes != self._nbytes + CHECKSUM:
            raise CorruptError(
                f"chunk {chunk} of {self._path} has {nbytes} bytes instead of {self._nbytes + CHECKSUM}."
            )
        self._read(into, offset, f"chunk {chunk}")

    def _read(self, into: npt.NDArray[np.uint8], offset: int, what: str) -> None:
        """Fill `into` from `offset` on, and compare with the checksum that follows."""
        checksum = bytearray(CHECKSUM)
        if offset < 0 or os.preadv(self._descriptor, [into.data, checksum], offset) != into.size + CHECKSUM:
            raise CorruptError(f"{what} of {self._path} is cut off.")
        if crc32c.crc32c(into.data) != int.from_bytes(checksum, "little"):
            raise CorruptError(f"{what} of {self._path} does not fit its checksum.")
