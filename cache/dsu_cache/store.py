"""The store: one Zarr v3 group with the arrays of a split, and a record of their content."""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from dsu_cache.arrays import (
    COMPRESSORS,
    RESERVED,
    ArrayInfo,
    Compressor,
    Rows,
    ShardId,
    StoredArray,
    marked_shards,
    packed,
)
from dsu_cache.files import (
    JSON,
    METADATA,
    BusyError,
    CacheError,
    CorruptError,
    clear,
    group,
    read_metadata,
    remove_strays,
    sync,
    write_changed,
    write_metadata,
)
from dsu_cache.fingerprints import FieldDifference, Fingerprint, StaleError
from dsu_cache.locks import Share, creating, holder, locked, share
from dsu_cache.manifest import Manifest, generations, keeps_contents, load_manifest, save_manifest
from dsu_cache.reader import Reader
from dsu_cache.remote import Remote, RemoteArray, url_of

FORMAT: Final = 3


class Store:
    """A folder that any Zarr v3 reader can read, with a record of which samples are complete.

    The folder may also be the mirror of a store on S3 (`dsu_cache.remote`), which is used in the same way.

    The folder contains one Zarr array for each `ArrayInfo`, of shape (rows, views, *item_shape), and:

    * `manifest/`: the manifest's newest generation with its segments, and the locks;
    * `commits/<array>/<view>.<shard>.json`: a marker for each complete shard, with its rows and its file's size and
        SHA-256. It is written last: a shard without a marker counts as missing, whatever its file contains. More than a
        thousand markers are packed into one file of columns.

    Every `zarr.json` has a seal (`dsu_cache.files`); manifest, markers, and the chunks and indices of shards have
    checksums: every byte of a store is verified when read. An array with damaged metadata is listed in `damaged`
    instead of `arrays`, and can be added again.

    The shard is the unit of writing and is written once, as a whole. Several processes may write different shards at
    the same time if they share the store's lock; all other changes need the lock exclusively. Readers hold a separate
    lock, which only prevents removal.

    Attributes:
        path: its folder.
        rows_per_shard, compressor: as created.
        attributes: its owner's notes.
        manifest: the samples and their rows, as of opening, locking or setting it.
        damaged: the damage of arrays' metadata, by name.
        remote: the S3 store that the folder mirrors; None for a local store.

    Example:
        >>> store = Store.create(folder, {"dataset": "DUTS"})
        >>> with store.lock():
        ...     store.set_manifest(store.manifest.assign(entries, store.rows_per_shard))
        ...     store.add_array("mask", (352, 352), "uint8", views=1, fingerprint=Fingerprint({"size": 352}))
        ...     for view, shard in store.missing("mask", [0]):
        ...         rows = store.rows_in_shard(shard)
        ...         store.write_shard("mask", view, shard, rows, compute(rows))
    """

    def __init__(self, path: Path) -> None:
        """Use `create` or `open`."""
        self.remote: Final = _remote(path)
        if self.remote is not None:
            self.remote.look()
        noted = _read_layout(path)
        self.path: Final = path
        self._layout: Final[Mapping[str, Any]] = noted["store"]
        self.rows_per_shard: Final[int] = self._layout["rows_per_shard"]
        self.compressor: Final[Compressor] = self._layout["compressor"]
        self.attributes: Mapping[str, Any] = noted["attributes"]
        self._load()

    def _load(self, *, tidy: bool = False) -> None:
        self.manifest = load_manifest(self.path / "manifest", tidy=tidy)
        self._arrays: dict[str, StoredArray] = {}
        self.damaged: dict[str, str] = {}
        for name in _named_arrays(self.path):
            try:
                self._arrays[name] = self._open_array(name)
            except CorruptError as error:
                self.damaged[name] = str(error)

    @classmethod
    def create(
        cls, path: Path | str, attributes: Mapping[str, JSON], rows_per_shard: int = 64, compressor: Compressor = None
    ) -> Self:
        """Create an empty store in the folder `path`, which must be new or empty.

        Raises:
            CacheError: `path` is not empty.
            BusyError: another process is creating a store there.
            ValueError: `rows_per_shard` is below 1, or the compressor is unknown.
        """
        path, remote = Path(path), _remote(Path(path))
        if rows_per_shard < 1 or compressor not in COMPRESSORS:
            raise ValueError(
                f"a store can't have {rows_per_shard} rows per shard and compressor {compressor!r}: "
                "use at least 1 row, and None, 'zstd' or 'blosc'"
            )
        if path.exists() and not path.is_dir():
            raise CacheError(f"{path} exists and is not a folder: choose a new or empty folder for the store")
        path.mkdir(parents=True, exist_ok=True)
        with creating(path):
            if remote is not None:
                remote.make_way()
            if (path / METADATA).is_file():
                raise CacheError(
                    f"the store {path} already exists: if another process has just created it, run the same command "
                    "again"
                )
            # An interrupted creation leaves only the store's own folders: the group's metadata is written last.
            partial = [entry.name for entry in path.glob(f"{METADATA}.*.partial")]
            if not {entry.name for entry in path.iterdir()}.issubset((*RESERVED, *partial)):
                raise CacheError(f"{path} already exists: open it, or choose a new or empty folder for the store")
            clear(*(path / name for name in RESERVED if (path / name).exists()))
            _write_groups(path)
            save_manifest(path / "manifest", Manifest())
            layout = {"format": FORMAT, "rows_per_shard": rows_per_shard, "compressor": compressor}
            write_metadata(path, group({"store": layout, "attributes": attributes}))
            if remote is not None:
                remote.publish(
                    generations(path / "manifest")[0]
                )  # or another process was first: then its store is opened
        return cls.open(path)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open the store in the folder `path`.

        Raises:
            CacheError: there is none, or it has another format.
            CorruptError: its metadata or manifest is damaged.
        """
        return cls(Path(path))

    @classmethod
    def exists(cls, path: Path) -> bool:
        """Whether a folder contains a store: maybe damaged, but not unfinished."""
        remote = _remote(path)
        return remote.exists() if remote is not None else (path / METADATA).is_file()

    def set_attributes(self, attributes: Mapping[str, JSON]) -> None:
        """Replace `attributes` on disk."""
        self._publish(lambda: write_metadata(self.path, group({"store": self._layout, "attributes": attributes})))
        self.attributes = read_metadata(self.path)["attributes"]["attributes"]
        os.utime(self.path)  # writing the same attributes again also counts as a change

    def set_manifest(self, manifest: Manifest) -> None:
        """Replace the store's manifest on disk, and extend every array to its rows."""
        before = self.manifest

        def change() -> None:
            # If another process has published a manifest since, new contents get new rows.
            now = self.manifest
            following = manifest if now is before else now.assign(dict(manifest.samples()), self.rows_per_shard)
            # First the arrays: rows without an entry in the manifest are harmless, but entries without rows could not
            # be read.
            for array in self._arrays.values():
                array.grow(following.next_row)
            save_manifest(self.path / "manifest", following, now)
            self.manifest = following

        self._publish(change)

    def take_metadata(self, source: "Store") -> None:
        """Take over samples, attributes and arrays of another store, byte for byte; own arrays stay.

        Raises:
            CacheError: this store is not an earlier state of that one, or its arrays of the same names were made
                differently.
        """

        def change() -> None:
            self._check_older_than(source)
            for name in source.arrays.keys() - self.arrays.keys():
                for folder in (self.path / "commits" / name, self.path / name):
                    folder.mkdir(exist_ok=True)
                    sync(folder.parent)
                write_changed(self.path / name / METADATA, (source.path / name / METADATA).read_bytes())
            for array in self._arrays.values():
                array.grow(source.manifest.next_row)
            if self.manifest != source.manifest:
                save_manifest(self.path / "manifest", source.manifest, self.manifest)
            write_changed(self.path / METADATA, (source.path / METADATA).read_bytes())

        self._publish(change)
        self.attributes = source.attributes
        self._load()

    def _check_older_than(self, source: "Store") -> None:
        for name in self.arrays.keys() & source.arrays.keys():
            mine, other = self.arrays[name], source.arrays[name]
            self.check({name: other.fingerprint}, f"{self.path} and {source.path} are different stores.")
            if (mine.item_shape, mine.dtype, mine.views) != (other.item_shape, other.dtype, other.views):
                raise CacheError(f"{name} has another shape in {self.path} than in {source.path}: copy it elsewhere")
        if dict(self._layout) != dict(source._layout) or not keeps_contents(self.manifest, source.manifest):
            raise CacheError(
                f"{self.path} contains samples that {source.path} lacks, so it can't become a copy: copy in the "
                "other direction first, or elsewhere"
            )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Prevent other processes from removing the store's content inside a `with`."""
        sharing = share(self.path / "manifest" / "readers", f"the store {self.path} is being rebuilt")
        try:
            yield
        finally:
            if sharing is not None:
                os.close(sharing)

    def _publish(self, change: Callable[[], None]) -> None:
        """Change metadata; on S3 as the next generation, repeated if another process has published one meanwhile."""
        if self.remote is None:
            change()
            return
        with self.remote.alone():
            while True:
                if self.remote.bring_up_to_date():
                    self._load()
                self.remote.begin()
                change()
                if self.remote.publish(generations(self.path / "manifest")[0]):
                    return

    @contextmanager
    def lock(self, share: Share | None = None) -> Iterator[None]:
        """Hold the store's lock inside a `with`; on entry, manifest and arrays are reloaded.

        With a `share` such as `(3, "16 parts")`, the lock is shared with the other parts of that division, and only
        shards may be written. Without, it is exclusive: metadata and manifests that interrupted writers left are
        removed, and on exit many markers are packed into one file.

        Raises:
            BusyError: another process holds it; the message gives its id, host, start and command.
        """
        with _exclude_writers(self.path, share):
            if share is None:
                for folder in (self.path, *self.path.glob("*/")):
                    remove_strays(folder / METADATA)
                _write_groups(self.path)
            if self.remote is not None:
                self.remote.look()
            self._load(tidy=share is None)
            yield
            if share is None:
                for array in self._arrays.values():
                    array.pack()

    def look(self) -> None:
        """Reload what other processes have written to S3 since; for a local store this is not needed."""
        if self.remote is not None:
            self.remote.look()
            self._load()

    def check_readable(self) -> None:
        """Check everything that the chunks' checksums do not cover, before anything is read.

        Raises:
            BusyError: another process is writing to the store; names it.
            CorruptError: metadata is damaged or missing; names the file.
        """
        writer = writer_of(self.path)
        if writer is not None:
            raise BusyError(f"the store {self.path} is being written by {writer}: wait until it ends, or stop it")
        for folder in (self.path, *(self.path / name for name in RESERVED)):
            read_metadata(folder)
        for reason in self.damaged.values():
            raise CorruptError(reason)

    # -- arrays --------------------------------------------------------------------------------------------------

    @property
    def arrays(self) -> Mapping[str, ArrayInfo]:
        """The arrays by name."""
        return {name: array.info for name, array in self._arrays.items()}

    def add_array(
        self, name: str, item_shape: Sequence[int], dtype: npt.DTypeLike, views: int, fingerprint: Fingerprint
    ) -> None:
        """Add an array without any rows written; replaces a damaged one of that name.

        Raises:
            CacheError: the name exists.
            BusyError: another process is reading the store.
            ValueError: the name, shape, type or number of views is not supported.
        """
        info = ArrayInfo(name, tuple(item_shape), np.dtype(dtype), views, fingerprint)
        folder, commits = self.path / name, self.path / "commits" / name

        def change() -> None:
            if self.remote is not None and self.arrays.get(name) == info:
                return  # another process has added it
            if (folder / METADATA).exists() and name not in self.damaged:
                raise CacheError(f"the store {self.path} already has an array {name!r}: remove it first")
            if folder.exists() or commits.exists():
                with _exclude_readers(self.path):
                    clear(folder, commits)  # remains of an interrupted removal, or an array with damaged metadata
            self.damaged.pop(name, None)
            StoredArray.create(info, folder, commits, self.manifest.next_row, self.rows_per_shard, self.compressor)

        self._publish(change)
        self._arrays[name] = self._open_array(name)

    def remove_array(self, name: str) -> None:
        """Remove an array with all its data.

        Raises:
            CacheError: there is no such array.
            BusyError: another process is reading the store.
        """

        def change() -> None:
            with _exclude_readers(self.path):
                self.stored(name).remove()

        self._publish(change)
        del self._arrays[name]

    def check(self, wanted: Mapping[str, Fingerprint], advice: str = "") -> tuple[FieldDifference, ...]:
        """Compare the fingerprints of arrays with the expected ones; return the recorded fields that differ.

        Raises:
            StaleError: fields that decide validity differ; the message lists them and ends with `advice`.
            CacheError: an array in `wanted` does not exist.
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
            CacheError: there is no such array.
        """
        if name in self.damaged:
            raise CorruptError(self.damaged[name])
        if name not in self._arrays:
            there = ", ".join(self._arrays) or "none"
            raise CacheError(f"the store {self.path} has no array {name!r} (it has {there}): add it first")
        return self._arrays[name]

    def _open_array(self, name: str) -> StoredArray:
        place = self.path / name, self.path / "commits" / name, self.rows_per_shard, self.compressor
        return StoredArray(*place) if self.remote is None else RemoteArray(self.remote, *place)

    def _with_views(self, array: str, views: Sequence[int]) -> StoredArray:
        stored = self.stored(array)
        for view in views:
            if not 0 <= view < stored.info.views:
                raise CacheError(
                    f"array {array!r} has no view {view}: choose one of its {stored.info.views}, from 0 on"
                )
        return stored

    # -- shards --------------------------------------------------------------------------------------------------

    def rows_in_shard(self, shard: int) -> Rows:
        """Return the rows in use in a shard, ascending, int64 (n,)."""
        first = shard * self.rows_per_shard
        in_use = self.manifest.rows_in_use
        begin, end = np.searchsorted(in_use, (first, first + self.rows_per_shard))
        rows: Rows = in_use[begin:end]
        return rows

    def missing(self, array: str, views: Sequence[int], sizes: Mapping[ShardId, int] | None = None) -> list[ShardId]:
        """Return the shards of `views` that have rows in use and are not committed, ordered by view and shard.

        `sizes` are the sizes of all shards' data files in bytes, if known; None reads each file's size.
        """
        stored = self._with_views(array, views)
        commits, nbytes = stored.committed(), stored.nbytes if sizes is None else sizes.get

        def is_committed(shard: ShardId) -> bool:
            commit = commits.get(shard)
            if commit is None:
                return False
            full = len(commit.rows) == self.rows_per_shard  # then it contains any rows in use
            return commit.holds([] if full else self.rows_in_shard(shard.shard).tolist(), nbytes(shard))

        in_use = np.unique(self.manifest.rows_in_use // self.rows_per_shard).tolist()
        wanted = [ShardId(view, shard) for view in sorted(set(views)) for shard in in_use]
        return [shard for shard in wanted if not is_committed(shard)]

    def write_shard(self, array: str, view: int, shard: int, rows: npt.ArrayLike, values: npt.NDArray[Any]) -> None:
        """Write a complete shard, flush it to disk and commit it.

        Args:
            rows: the rows in use in the shard, from `rows_in_shard`, (n,).
            values: their content, (n, *item_shape), of the array's dtype.

        Raises:
            ValueError: wrong rows, shape or dtype.
            CacheError: the shard is committed already, or there is no such array or view.
        """
        stored, info = self._with_views(array, [view]), self.stored(array).info
        wanted = self.rows_in_shard(shard)
        if not np.array_equal(wanted, rows) or not len(wanted):
            raise ValueError(
                f"shard {shard} of array {array!r} has {len(wanted)} rows in use: give exactly those that "
                "rows_in_shard returns"
            )
        if values.dtype != info.dtype or values.shape != (len(wanted), *info.item_shape):
            raise ValueError(
                f"array {array!r} needs {info.dtype} {(len(wanted), *info.item_shape)} for shard {shard}, not "
                f"{values.dtype} {values.shape}: convert the values first"
            )
        if stored.holds(ShardId(view, shard), wanted):
            raise CacheError(
                f"shard {shard} of array {array!r}, view {view}, is already written: discard it to write it again"
            )
        stored.write(ShardId(view, shard), wanted, values)

    def reader(
        self, names: Sequence[str], keep_open: bool = True, views: Mapping[str, Collection[int]] | None = None
    ) -> Reader:
        """Open arrays for reading batches.

        Args:
            names: the arrays to read.
            keep_open: whether the most recently read shards stay open for the next read, and on S3 are downloaded as a
                whole.
            views: the views to read of each array (None: any); for a store on S3, whether they fit into the scratch
                folder is logged at once.

        Raises:
            CacheError: an array in `names` does not exist.
            CorruptError: an array's metadata is damaged.
            BusyError: arrays are being removed, or were rebuilt since the store was opened.
        """
        arrays = [self.stored(name) for name in names]
        # From here on no process can remove arrays, so the comparison stays valid.
        sharing = share(self.path / "manifest" / "readers", f"the store {self.path} is being rebuilt")
        if self.remote is not None and keep_open:
            self.remote.prepare([array for array in arrays if isinstance(array, RemoteArray)], views)
        reader = Reader(arrays, self.manifest, keep_open=keep_open, sharing=sharing)
        if any(self._open_array(name).info != self.arrays[name] for name in names):
            raise BusyError(f"the store {self.path} was rebuilt since it was opened: run the same command again")
        return reader


def is_store(path: Path) -> bool:
    """Whether a folder is a store, maybe damaged or unfinished: it has at least two of a store's typical files."""
    return sum(((path / METADATA).is_file(), *((path / name).is_dir() for name in RESERVED))) >= 2


def writer_of(path: Path) -> str | None:
    """Return who is writing to the store in a folder, damaged or not; None if nobody is."""
    return holder(path / "manifest" / "lock")


def remove_store(path: Path) -> None:
    """Remove a store with all its data, and the folder.

    Raises:
        CacheError: the folder is not a store, or also contains other files.
        BusyError: another process is writing to the store or reading it.
    """
    if not is_store(path):
        raise CacheError(f"{path} is not a store, so it is not removed: check the name")
    arrays = {*RESERVED, *_named_arrays(path), *(folder.parent.name for folder in path.glob("*/c/"))}
    foreign = sorted(e.name for e in path.iterdir() if e.name not in arrays and not e.name.startswith(METADATA))
    if foreign:
        raise CacheError(
            f"{path} contains {', '.join(foreign[:3])}, which is not part of a store: move it elsewhere first"
        )
    (path / "manifest").mkdir(exist_ok=True)
    remote = _remote(path)
    with _exclude_writers(path), _exclude_readers(path):
        if remote is not None:
            remote.remove()
        # The metadata first, and last the files that identify a store: an interrupted removal can be repeated.
        (path / METADATA).unlink(missing_ok=True)
        sync(path)
        clear(*(path / name for name in sorted(arrays - {"manifest"}) if (path / name).exists()), path / "manifest")
        remove_strays(path / METADATA)
    path.rmdir()


def _remote(path: Path) -> Remote | None:
    url = url_of(path)
    return Remote(path, url) if url else None


def _exclude_writers(path: Path, share: Share | None = None) -> AbstractContextManager[object]:
    """Exclude writers inside a `with`, except those that share the lock."""
    return locked(path / "manifest" / "lock", f"the store {path} is being written", share=share)


def _exclude_readers(path: Path) -> AbstractContextManager[object]:
    """Exclude readers inside a `with`, to remove data that they might be reading."""
    return locked(path / "manifest" / "readers", f"the store {path} is being read")


def _read_layout(path: Path) -> dict[str, Any]:
    """A store's metadata: its layout as `store`, its owner's notes as `attributes`."""
    if not (path / METADATA).is_file() and not (path / "manifest").is_dir():
        raise CacheError(f"there is no store in {path}: create one, or correct the path")
    try:
        attributes: dict[str, Any] = read_metadata(path)["attributes"]
    except CorruptError:
        _refuse_other_formats(path)
        raise
    if attributes.get("store", {}).get("format") != FORMAT:
        _refuse_other_formats(path)
    return attributes


def _refuse_other_formats(path: Path) -> None:
    """Raise `CacheError` for an intact store of another format: it has no seal, or another one."""
    try:
        found = json.loads((path / METADATA).read_bytes())["attributes"].get("store", {}).get("format")
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return
    if found != FORMAT:
        raise CacheError(
            f"{path} is not a store of format {FORMAT} but {found}: use the version of the program that wrote it, or "
            "create the store again"
        )


def _write_groups(path: Path) -> None:
    """Write the store's own folders, as Zarr groups too, so that Zarr lists no unknown names."""
    for name in RESERVED:
        (path / name).mkdir(parents=True, exist_ok=True)
        write_metadata(path / name, group({}))


def _named_arrays(path: Path) -> list[str]:
    """The arrays that have metadata or any marker."""
    with_metadata = {file.parent.name for file in path.glob(f"*/{METADATA}")} - set(RESERVED)
    with_markers = {folder.name for folder in (path / "commits").glob("*/") if marked_shards(folder) or packed(folder)}
    return sorted(with_metadata | with_markers)
