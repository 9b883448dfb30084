"""The store: one Zarr v3 group with a dataset split's arrays side by side, and the record of what is in them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from dsu_cache.arrays import ArrayInfo, Compressor, Rows, StoredArray, clear
from dsu_cache.commits import ShardId
from dsu_cache.errors import BusyError, CacheError, CorruptError, StaleError
from dsu_cache.fingerprints import FieldDifference, Fingerprint
from dsu_cache.layout import lay_out, named_arrays, read_layout, tidy
from dsu_cache.locks import locked, share
from dsu_cache.manifest import Manifest, load_manifest, save_manifest
from dsu_cache.metadata import METADATA, group, write_metadata
from dsu_cache.reader import Reader
from dsu_cache.records import JSON
from dsu_cache.sources import open_sources


class Store:
    """A folder that any Zarr v3 reader can read, and that knows which of its samples are whole.

    Beside one Zarr array for each `ArrayInfo`, of shape (rows, views, *item_shape), the folder holds:

    * `manifest/`: the manifest's newest generation, and the locks;
    * `commits/<array>/<view>.<shard>.json`: a marker for each shard that is whole, with the rows it holds and its
      file's size and sha256. It is written last: a shard without one counts as missing, whatever is in its file.

    Every `zarr.json` carries a seal (`dsu_cache.metadata`), manifest and markers their checksum, chunks and indices
    of shards theirs: no byte of a store is read unchecked. An array whose metadata is damaged is not among `arrays`
    but in `damaged`, and can be added anew.

    The shard is the unit of writing, written once and whole. Several processes may write different shards at a time;
    everything else that changes a store wants its lock. Readers hold a lock of theirs, against removal only.

    Example:
        >>> store = Store.create(folder, {"dataset": "DUTS"})
        >>> with store.lock():
        ...     store.set_manifest(store.manifest.assign(entries, store.rows_per_shard))
        ...     store.add_array("mask", (352, 352), "uint8", views=1, fingerprint=Fingerprint({"size": 352}))
        ...     for view, shard in store.missing("mask", [0]):
        ...         rows = store.rows_in_shard(shard)
        ...         store.write_shard("mask", view, shard, rows, compute(rows))
    """

    def __init__(self, attributes: Mapping[str, Any], path: Path) -> None:
        """Wrap the store of which `attributes` is the layout: use `create` or `open`."""
        self.path: Final = path
        self._layout: Final[JSON] = attributes["store"]
        self._attributes: Mapping[str, JSON] = attributes["attributes"]
        self.rows_per_shard: Final[int] = attributes["store"]["rows_per_shard"]
        self.compressor: Final[Compressor] = attributes["store"]["compressor"]
        self._load()

    def _load(self) -> None:
        self._manifest = load_manifest(self.path / "manifest")
        self._arrays: dict[str, StoredArray] = {}
        self.damaged: dict[str, str] = {}
        """What is wrong with the metadata of arrays, by name."""
        for name in named_arrays(self.path):
            try:
                self._arrays[name] = StoredArray(*self._folders(name))
            except CorruptError as error:
                self.damaged[name] = str(error)

    @classmethod
    def create(
        cls, path: Path | str, attributes: Mapping[str, JSON], rows_per_shard: int = 64, compressor: Compressor = None
    ) -> Self:
        """Make an empty store in the folder `path`, which must be new or empty.

        Raises:
            CacheError: there is something at `path`.
            BusyError: another process is making a store there.
            ValueError: `rows_per_shard` is below 1, or no such compressor.
        """
        lay_out(Path(path), attributes, rows_per_shard, compressor)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open the store in the folder `path`.

        Raises:
            CacheError: there is none, or one of another format.
            CorruptError: its own metadata or its manifest is damaged.
        """
        return cls(read_layout(Path(path)), Path(path))

    # -- what the store says of itself ---------------------------------------------------------------------------

    @property
    def attributes(self) -> Mapping[str, JSON]:
        """What the store's owner notes about it."""
        return self._attributes

    def set_attributes(self, attributes: Mapping[str, JSON]) -> None:
        """Replace `attributes`."""
        write_metadata(self.path, group({"store": self._layout, "attributes": dict(attributes)}))
        self._attributes = read_layout(self.path)["attributes"]
        os.utime(self.path)  # the same attributes again are a sign of life, too

    @property
    def manifest(self) -> Manifest:
        """The samples and their rows, as of opening, locking or setting it."""
        return self._manifest

    def set_manifest(self, manifest: Manifest) -> None:
        """Make `manifest` the store's, on the disk, and let every array grow to its rows."""
        # First the arrays: rows that no manifest knows are harmless, the other way round they could not be read.
        for array in self._arrays.values():
            array.grow(manifest.next_row)
        save_manifest(self.path / "manifest", manifest)
        self._manifest = manifest

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store's lock inside a `with`; on entering, manifest and arrays are looked up anew.

        What interrupted writers left of metadata and manifests is removed.

        Raises:
            BusyError: another process holds it; names its id, host, time and command.
        """
        with locked(self.path / "manifest" / "lock", f"the store {self.path} is being written"):
            tidy(self.path)
            self._load()
            yield

    @contextmanager
    def _unread(self) -> Iterator[None]:
        """Keep readers away inside a `with`: for what takes away data that they may be reading."""
        with locked(self.path / "manifest" / "readers", f"the store {self.path} is being read"):
            yield

    # -- arrays --------------------------------------------------------------------------------------------------

    @property
    def arrays(self) -> Mapping[str, ArrayInfo]:
        """The arrays by name."""
        return {name: array.info for name, array in self._arrays.items()}

    def add_array(
        self, name: str, item_shape: Sequence[int], dtype: npt.DTypeLike, views: int, fingerprint: Fingerprint
    ) -> ArrayInfo:
        """Add an array in which every row is missing, in place of a damaged one of that name.

        Raises:
            CacheError: there is one of that name.
            BusyError: another process is reading the store.
            ValueError: a name, shape, type or number of views that a store cannot hold.
        """
        info = ArrayInfo(name, tuple(item_shape), np.dtype(dtype), views, fingerprint)
        folder, commits = self._folders(name)
        if (folder / METADATA).exists() and name not in self.damaged:
            raise CacheError(f"the store {self.path} has an array {name!r} already: remove it first")
        if folder.exists() or commits.exists():
            with self._unread():
                clear(folder, commits)  # what an interrupted removal left, or an array whose metadata is damaged
        self.damaged.pop(name, None)
        self._arrays[name] = StoredArray.create(
            info, folder, commits, self.manifest.next_row, self.rows_per_shard, self.compressor
        )
        return info

    def remove_array(self, name: str) -> None:
        """Remove an array with all its data.

        Raises:
            CacheError: there is none of that name.
            BusyError: another process is reading the store.
        """
        with self._unread():
            self.stored(name).remove()
        del self._arrays[name]

    def check(self, wanted: Mapping[str, Fingerprint], advice: str = "") -> tuple[FieldDifference, ...]:
        """Compare the fingerprints of arrays with the wanted ones, and return the recorded fields that differ.

        Raises:
            StaleError: fields that decide validity differ; its message lists them and ends with `advice`.
            CacheError: there is no array of a name in `wanted`.
        """
        stored = {name: self.stored(name).info.fingerprint for name in wanted}
        differences = tuple(d for name in wanted for d in stored[name].differences(wanted[name], name))
        if differences:
            raise StaleError(differences, advice)
        return tuple(d for name in wanted for d in stored[name].drift(wanted[name], name))

    def stored(self, name: str) -> StoredArray:
        """Return the files of an array.

        Raises:
            CorruptError: its metadata is damaged.
            CacheError: there is none of that name.
        """
        if name in self.damaged:
            raise CorruptError(self.damaged[name])
        if name not in self._arrays:
            there = ", ".join(self._arrays) or "none"
            raise CacheError(f"the store {self.path} has no array {name!r} ({there} there): add it first")
        return self._arrays[name]

    # -- shards --------------------------------------------------------------------------------------------------

    def rows_in_shard(self, shard: int) -> Rows:
        """Return the rows in use in a shard, ascending, int64 (n,)."""
        first = shard * self.rows_per_shard
        in_use = self.manifest.rows_in_use
        begin, end = np.searchsorted(in_use, (first, first + self.rows_per_shard))
        rows: Rows = in_use[begin:end]
        return rows

    def missing(self, array: str, views: Sequence[int]) -> list[ShardId]:
        """Return the shards of `views` that hold rows in use and are not committed, ordered by view and shard."""
        in_use = np.unique(self.manifest.rows_in_use // self.rows_per_shard).tolist()
        wanted = [ShardId(view, shard) for view in sorted(set(views)) for shard in in_use]
        return [shard for shard in wanted if not self._is_committed(array, shard)]

    def views_complete(self, array: str) -> tuple[int, ...]:
        """Return the views of `array` in which every row in use is committed."""
        views = range(self.stored(array).info.views)
        lacking = {shard.view for shard in self.missing(array, views)}
        return tuple(view for view in views if view not in lacking)

    def write_shard(self, array: str, view: int, shard: int, rows: npt.ArrayLike, values: npt.NDArray[Any]) -> None:
        """Write a shard as a whole, flush it to the disk and commit it.

        Args:
            rows: the rows in use in the shard, as `rows_in_shard` gives them, (n,).
            values: what they hold, (n, *item_shape), of the array's dtype.

        Raises:
            ValueError: other rows, another shape or another dtype.
            CacheError: the shard is committed already, or there is no such array or view.
        """
        stored, info = self.stored(array), self.stored(array).info
        wanted = self.rows_in_shard(shard)
        if not np.array_equal(wanted, rows) or not len(wanted):
            raise ValueError(
                f"shard {shard} of array {array!r} holds {len(wanted)} rows in use: a shard is written whole, "
                "so give exactly those that rows_in_shard returns"
            )
        if values.dtype != info.dtype or values.shape != (len(wanted), *info.item_shape):
            raise ValueError(
                f"array {array!r} wants {info.dtype} {(len(wanted), *info.item_shape)} for shard {shard}, "
                f"not {values.dtype} {values.shape}: convert the values before writing"
            )
        if self._is_committed(array, ShardId(view, shard)):
            raise CacheError(
                f"shard {shard} of array {array!r}, view {view}, is written already: discard it to write it again"
            )
        stored.write(ShardId(view, shard), wanted, values)

    def discard(self, array: str, view: int, shard: int) -> None:
        """Make a shard count as missing, so that it can be written again."""
        self.stored(array).discard(ShardId(view, shard))

    def _is_committed(self, array: str, shard: ShardId) -> bool:
        views = self.stored(array).info.views
        if not 0 <= shard.view < views:
            raise CacheError(f"array {array!r} has no view {shard.view}: choose one of its {views}, from 0 on")
        return self.stored(array).holds(shard, self.rows_in_shard(shard.shard))

    def _folders(self, name: str) -> tuple[Path, Path]:
        return self.path / name, self.path / "commits" / name

    # -- reading -------------------------------------------------------------------------------------------------

    def reader(self, names: Sequence[str], cache_bytes: int = 64 << 20) -> Reader:
        """Open arrays for reading batches.

        Args:
            names: the arrays to read.
            cache_bytes: memory for the shards' indices and the chunks read last. With none, each chunk's read is
                preceded by one of its shard's index.

        Raises:
            CacheError: there is no array of a name in `names`.
            CorruptError: an array's metadata is damaged.
            BusyError: arrays are being removed, or were made anew since the store was opened.
        """
        infos = [self.stored(name).info for name in names]
        # From here on no one removes arrays, so what is compared now stays so.
        sharing = share(self.path / "manifest" / "readers", f"the store {self.path} is being made anew")
        sources = open_sources([self.stored(name) for name in names], self.rows_per_shard, self.compressor, cache_bytes)
        reader = Reader(sources, infos, self.manifest, self.rows_per_shard, sharing)
        if [StoredArray(*self._folders(name)).info for name in names] != infos:
            raise BusyError(f"the store {self.path} was made anew since it was opened: run the same command again")
        return reader
