"""Fast reading of batches of samples from a store, in any order."""

import errno
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import psutil

from dsu_cache.arrays import ArrayInfo, Rows, ShardFile, ShardId, StoredArray
from dsu_cache.files import CacheError, CorruptError
from dsu_cache.manifest import Manifest
from dsu_cache.storage import RemoteError

resource: Final[Any] = import_module("resource") if find_spec("resource") else None
"""None on Windows, where the limit of open files is high."""

Indices: TypeAlias = npt.NDArray[np.int64] | Sequence[int]
Views: TypeAlias = Indices | Mapping[str, Indices]
Batch: TypeAlias = dict[str, npt.NDArray[Any]]

OPEN_FILES: Final = 512
"""Maximum number of shards that a reader keeps open."""
_SPARE_FILES: Final = 64
"""Number of files reserved for everything else in this process."""
_SYSTEM_ERRORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM})
THREADS: Final = min(4, os.cpu_count() or 1)


class Reader:
    """Reads samples of some arrays of a store by row; created by `Store.reader`.

    Every chunk's checksum is verified. Reading runs in separate threads without Python's global interpreter lock.
    Create the reader in the process that uses it, since threads do not survive a fork. It reads the store as of its
    creation and does not check commits: call `Store.missing` first.

    Args:
        arrays: the arrays to read.
        manifest: the samples of the store.
        keep_open: whether the most recently read shards, with their indices, stay open for the next read.
        sharing: a descriptor that is closed together with the reader.

    Example:
        >>> reader = store.reader(["pixels", "V"])
        >>> reader.read(rows=[7, 2], views=[0, 3])["V"].shape
        (2, 11, 11, 1024)
    """

    def __init__(
        self, arrays: Sequence[StoredArray], manifest: Manifest, *, keep_open: bool, sharing: int | None
    ) -> None:
        self._release = weakref.finalize(self, os.close, sharing) if sharing is not None else None
        self._arrays = {array.info.name: array for array in arrays}
        self._manifest = manifest
        self._max_open = _max_open_files() if keep_open else 0
        self._open: OrderedDict[tuple[str, ShardId], ShardFile] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read")

    def close(self) -> None:
        """Allow other processes to remove arrays again. A reader that is not closed does this when it is
        garbage-collected."""
        if self._release is not None:
            self._release()

    def read(self, rows: Indices, views: Views) -> Batch:
        """Read one batch, all arrays and samples in parallel.

        Args:
            rows: the row of each sample, (n,).
            views: the view of each sample, (n,): one list for all arrays, or one per array by name. For an array with
                one view, that view is read, whatever is requested.

        Returns:
            For each array a new array (n, *item_shape) of its dtype, in the order of `rows`.

        Raises:
            CorruptError: a sample is damaged or was never written; names array, row, shard and sample.
            ValueError: a row or view is not in the store, or the numbers of views and rows differ.
        """
        row = _as_rows("rows", rows, self._manifest.next_row)
        view = {name: _views_of(array.info, views, len(row)) for name, array in self._arrays.items()}
        batch = {name: array.info.empty(len(row)) for name, array in self._arrays.items()}
        futures = [
            (name, part) for name in batch if len(row) for part in self._submit(name, row, view[name], batch[name])
        ]
        # Wait for all before raising an error, so that none writes into a discarded batch.
        errors = [(name, future.exception()) for name, future in futures]
        for name, error in errors:
            if error is not None:
                raise self._diagnose(name, row, view[name], error) from error
        return batch

    def _submit(self, name: str, rows: Rows, views: Rows, target: npt.NDArray[Any]) -> list[Future[None]]:
        """Start filling `target` (n, *item_shape)."""
        parts = np.array_split(np.arange(len(rows)), min(THREADS, len(rows)))
        return [
            self._pool.submit(self._fill, name, rows[part], views[part], target[part[0] : part[-1] + 1])
            for part in parts
        ]

    def _fill(self, name: str, rows: Rows, views: Rows, target: npt.NDArray[Any]) -> None:
        chunks, size = target.reshape(len(rows), -1).view(np.uint8), self._arrays[name].rows_per_shard
        for row, view, chunk in zip(rows.tolist(), views.tolist(), chunks, strict=True):
            self._shard(name, ShardId(view, row // size)).read(row % size, chunk)

    def _shard(self, name: str, shard: ShardId) -> ShardFile:
        with self._lock:
            if (name, shard) in self._open:
                self._open.move_to_end((name, shard))
                return self._open[name, shard]
        opened = self._arrays[name].open_shard(shard)
        with self._lock:
            self._open[name, shard] = opened
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)  # closed when its last read is done
        return opened

    def _diagnose(self, name: str, rows: Rows, views: Rows, error: BaseException) -> CacheError:
        """Find the damaged sample of a failed request by reading each one alone."""
        if isinstance(error, RemoteError):
            return error
        if _is_system_error(error):
            return CacheError(
                f"array {name!r} can't be read ({error}), but no data is known to be damaged: close other programs, "
                "or raise the limit (`ulimit -n 4096`)."
            )
        array = self._arrays[name]
        for at, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
            try:
                self._fill(name, rows[at : at + 1], views[at : at + 1], array.info.empty(1))
            except Exception as alone:  # errors of the disk or the decompressor
                if isinstance(alone, RemoteError) or _is_system_error(alone):
                    return self._diagnose(name, rows, views, alone)
                samples = ", ".join(map(repr, self._manifest.names_at(row))) or "no sample in the manifest"
                return CorruptError(
                    f"array {name!r}, row {row}, view {view} (shard {row // array.rows_per_shard}; {samples}) "
                    f"is damaged or was never written: discard the shard and compute it again. {alone}"
                )
        return CacheError(f"array {name!r} could not be read, but each sample alone could: try again. {error}")


def _max_open_files() -> int:
    """How many shards may stay open: raises the soft limit if allowed, and leaves some files to others."""
    if resource is None:
        return OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = int(psutil.Process().num_fds())
    wanted = used + OPEN_FILES + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):  # not allowed
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return max(0, min(OPEN_FILES, int(soft) - used - _SPARE_FILES))
    return OPEN_FILES


def _is_system_error(error: BaseException) -> bool:
    """Whether a read failed for lack of file handles, memory or permission, which does not imply damage."""
    return isinstance(error, OSError) and error.errno in _SYSTEM_ERRORS


def _views_of(info: ArrayInfo, views: Views, count: int) -> Rows:
    if info.views == 1:
        return np.zeros(count, np.int64)
    asked = views[info.name] if isinstance(views, Mapping) else views
    view = _as_rows(f"views of {info.name!r}", asked, info.views)
    if len(view) != count:
        raise ValueError(f"{count} rows and {len(view)} views of {info.name!r}: give one view per row")
    return view


def _as_rows(what: str, values: Indices, end: int) -> Rows:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{what} must be a list of whole numbers, not {array.dtype} of shape {array.shape}")
    if array.size and not 0 <= array.min() <= array.max() < end:
        raise ValueError(f"{what} must lie between 0 and {end - 1}, not {array.min()} to {array.max()}")
    return array.astype(np.int64)
