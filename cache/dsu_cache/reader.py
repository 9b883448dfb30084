"""Reading batches of samples from a store, in any order and fast."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dsu_cache.arrays import ArrayInfo
from dsu_cache.errors import CacheError, CorruptError
from dsu_cache.manifest import Manifest
from dsu_cache.sources import Source

Indices: TypeAlias = npt.NDArray[np.int64] | Sequence[int]
Views: TypeAlias = Indices | Mapping[str, Indices]
Batch: TypeAlias = dict[str, npt.NDArray[Any]]


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
        sources: Mapping[str, Source],
        arrays: Sequence[ArrayInfo],
        manifest: Manifest,
        rows_per_shard: int,
        sharing: int | None = None,
    ) -> None:
        """Read `arrays` from `sources`: see `Store.reader`; `sharing` is closed when the reader is."""
        self._release = weakref.finalize(self, os.close, sharing) if sharing is not None else None
        self._arrays = {info.name: info for info in arrays}
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
        errors = {name: end() for name, end in reading.items()}
        for name, error in errors.items():
            if error is not None:
                raise self._diagnosis(name, row, view[name], error) from error
        return batch

    def _views_of(self, info: ArrayInfo, views: Views, count: int) -> npt.NDArray[np.int64]:
        if info.views == 1:
            return np.zeros(count, np.int64)
        asked = views[info.name] if isinstance(views, Mapping) else views
        view = _checked(f"views of {info.name!r}", asked, info.views)
        if len(view) != count:
            raise ValueError(f"{count} rows and {len(view)} views of {info.name!r}: give one view a row")
        return view

    def _diagnosis(
        self, name: str, rows: npt.NDArray[np.int64], views: npt.NDArray[np.int64], error: BaseException
    ) -> CacheError:
        """Find which sample of a failed request is the bad one, by asking for each alone."""
        for row, view in zip(rows.tolist(), views.tolist(), strict=True):
            info = self._arrays[name]
            one = np.empty((1, *info.item_shape), info.dtype)
            alone = self._sources[name].begin(np.array([row]), np.array([view]), one)()
            if alone is not None:
                samples = ", ".join(map(repr, self._manifest.names_at(row))) or "no sample of the manifest"
                return CorruptError(
                    f"array {name!r}, row {row}, view {view} (shard {row // self._rows_per_shard}; {samples}) "
                    f"is damaged or was never written: discard the shard and compute it again. {alone}"
                )
        return CacheError(f"array {name!r} could not be read, yet each sample alone can be: try again. {error}")


def _checked(what: str, values: Indices, end: int) -> npt.NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{what} must be a list of whole numbers, not {array.dtype} of shape {array.shape}")
    if array.size and not 0 <= array.min() <= array.max() < end:
        raise ValueError(f"{what} must lie between 0 and {end - 1}, not {array.min()} to {array.max()}")
    return array.astype(np.int64)
