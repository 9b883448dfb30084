"""Reading batches of samples from a store, in any order and fast.

A `Source` brings one array's samples into memory: straight from the files where nothing is compressed, else through
tensorstore, which reads every array there is, through more copies.
"""

import os
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import crc32c
import numpy as np
import numpy.typing as npt

from dsu_cache.arrays import ArrayInfo, Compressor, StoredArray
from dsu_cache.errors import CacheError, CorruptError
from dsu_cache.manifest import Manifest
from dsu_cache.shards import Rows, ShardFile, ShardId

Indices: TypeAlias = npt.NDArray[np.int64] | Sequence[int]
Views: TypeAlias = Indices | Mapping[str, Indices]
Batch: TypeAlias = dict[str, npt.NDArray[Any]]

OPEN_FILES: Final = 256
THREADS: Final = min(4, os.cpu_count() or 1)


class Source(Protocol):
    """Reads one array."""

    def begin(self, rows: Rows, views: Rows, target: npt.NDArray[Any]) -> Iterable[Any]:
        """Start filling `target` (n, *item_shape); its futures' `exception()` waits, and gives what went wrong."""


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

    def begin(self, rows: Rows, views: Rows, target: npt.NDArray[Any]) -> list[Any]:
        """See `Source.begin`; runs in tensorstore's own threads."""
        import tensorstore as ts

        # One request an array, straight into the batch: of the ways to ask, the one with the least work.
        return [ts.array(target, copy=False, write=True).write(self._array.vindex[rows, views])]


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
        return {array.info.name: FileSource(array, rows_per_shard, pool, keep=cache_bytes > 0) for array in arrays}
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
        array: its files.
        rows_per_shard: rows in a shard, written or not.
        pool: the threads that read.
        keep: whether indices and open files are kept for the next read.
    """

    def __init__(self, array: StoredArray, rows_per_shard: int, pool: ThreadPoolExecutor, *, keep: bool) -> None:
        self._array = array
        self._rows_per_shard = rows_per_shard
        self._pool = pool
        self._keep = OPEN_FILES if keep else 0
        self._open: OrderedDict[ShardId, ShardFile] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, rows: Rows, views: Rows, target: npt.NDArray[Any]) -> list[Future[None]]:
        """See `Source.begin`."""
        chunks = target.reshape(len(rows), -1).view(np.uint8)
        return [
            self._pool.submit(self._fill, rows[part], views[part], chunks[part[0] : part[-1] + 1])
            for part in np.array_split(np.arange(len(rows)), min(THREADS, len(rows)))
        ]

    def _fill(self, rows: Rows, views: Rows, chunks: npt.NDArray[np.uint8]) -> None:
        for row, view, chunk in zip(rows.tolist(), views.tolist(), chunks, strict=True):
            self._shard(ShardId(view, row // self._rows_per_shard)).read(row % self._rows_per_shard, chunk)

    def _shard(self, shard: ShardId) -> ShardFile:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        opened = ShardFile(self._array.file(shard), self._rows_per_shard, self._array.info.item_nbytes)
        with self._lock:
            self._open[shard] = opened
            while len(self._open) > self._keep:
                self._open.popitem(last=False)  # closed when the last read of it is over
        return opened


class Reader:
    """Reads samples of some arrays of a store by row; made by `Store.reader`.

    Every chunk's checksum is verified. Reading runs in threads of its own, past Python's lock; make the reader in the
    process that uses it, since threads do not survive a fork. It sees the store as it was when the reader was made,
    and knows nothing of commits: ask `Store.missing` first.

    Example:
        >>> reader = store.reader(["pixels", "V"])
        >>> reader.read(rows=[7, 2], views=[0, 3])["V"].shape
        (2, 11, 11, 1024)
    """

    def __init__(
        self,
        arrays: Sequence[StoredArray],
        sources: Mapping[str, Source],
        manifest: Manifest,
        rows_per_shard: int,
        sharing: int | None,
    ) -> None:
        """Read `arrays` from `sources`: see `Store.reader`; `sharing` is closed when the reader is."""
        self._release = weakref.finalize(self, os.close, sharing) if sharing is not None else None
        self._arrays = {array.info.name: array.info for array in arrays}
        self._sources = sources
        self._manifest = manifest
        self._rows_per_shard = rows_per_shard

    def close(self) -> None:
        """Let others remove arrays again; what is not closed is when no one uses it any more."""
        if self._release is not None:
            self._release()

    def read(self, rows: Indices, views: Views) -> Batch:
        """Read one batch, all arrays and samples at a time.

        Args:
            rows: the row of each sample, (n,).
            views: the view of each sample, (n,): one list for all arrays, or one for each by name. An array with
                one view has its only view read, whatever is asked for.

        Returns:
            For each array a new (n, *item_shape) of the array's dtype, in the order of `rows`.

        Raises:
            CorruptError: a sample is damaged, or was never written; names array, row, shard and sample.
            ValueError: a row or view that is not in the store, or not as many views as rows.
        """
        row = _checked("rows", rows, self._manifest.next_row)
        view = {name: self._views_of(info, views, len(row)) for name, info in self._arrays.items()}
        batch = {name: np.empty((len(row), *info.item_shape), info.dtype) for name, info in self._arrays.items()}
        reading = {name: self._sources[name].begin(row, view[name], batch[name]) for name in batch if len(row)}
        # All are waited for before one is complained of: none may go on writing into a batch given up.
        errors = [(name, future.exception()) for name, futures in reading.items() for future in futures]
        for name, error in errors:
            if error is not None:
                raise self._diagnosis(name, row, view[name], error) from error
        return batch

    def _views_of(self, info: ArrayInfo, views: Views, count: int) -> Rows:
        if info.views == 1:
            return np.zeros(count, np.int64)
        asked = views[info.name] if isinstance(views, Mapping) else views
        view = _checked(f"views of {info.name!r}", asked, info.views)
        if len(view) != count:
            raise ValueError(f"{count} rows and {len(view)} views of {info.name!r}: give one view a row")
        return view

    def _diagnosis(self, name: str, rows: Rows, views: Rows, error: BaseException) -> CacheError:
        """Find which sample of a failed request is the bad one, by asking for each alone."""
        for row, view in zip(rows.tolist(), views.tolist(), strict=True):
            info = self._arrays[name]
            one = np.empty((1, *info.item_shape), info.dtype)
            [future] = self._sources[name].begin(np.array([row]), np.array([view]), one)
            alone = future.exception()
            if alone is not None:
                samples = ", ".join(map(repr, self._manifest.names_at(row))) or "no sample of the manifest"
                return CorruptError(
                    f"array {name!r}, row {row}, view {view} (shard {row // self._rows_per_shard}; {samples}) "
                    f"is damaged or was never written: discard the shard and compute it again. {alone}"
                )
        return CacheError(f"array {name!r} could not be read, yet each sample alone can be: try again. {error}")


def _checked(what: str, values: Indices, end: int) -> Rows:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{what} must be a list of whole numbers, not {array.dtype} of shape {array.shape}")
    if array.size and not 0 <= array.min() <= array.max() < end:
        raise ValueError(f"{what} must lie between 0 and {end - 1}, not {array.min()} to {array.max()}")
    return array.astype(np.int64)
