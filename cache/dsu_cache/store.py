"""The store: one Zarr v3 group with a dataset split's arrays side by side, and the record of what is in them."""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from dsu_cache.arrays import COMPRESSORS, RESERVED, ArrayInfo, Compressor, Rows, ShardId, StoredArray, marked, packed
from dsu_cache.files import (
    JSON,
    METADATA,
    BusyError,
    CacheError,
    CorruptError,
    clear,
    copy_file,
    group,
    read_metadata,
    remove_strays,
    sync,
    write_metadata,
)
from dsu_cache.fingerprints import FieldDifference, Fingerprint, StaleError
from dsu_cache.locks import Share, creating, holder, locked, share
from dsu_cache.manifest import Manifest, generations, keeps_contents, load_manifest, save_manifest
from dsu_cache.reader import Reader
from dsu_cache.remote import Remote, RemoteArray, url_of

FORMAT: Final = 3


class Store:
    """A folder that any Zarr v3 reader can read, and that knows which of its samples are whole.

    Or the mirror of a store on S3 (`dsu_cache.remote`), which is used in the same way.

    Beside one Zarr array for each `ArrayInfo`, of shape (rows, views, *item_shape), the folder holds:

    * `manifest/`: the manifest's newest generation with its segments, and the locks;
    * `commits/<array>/<view>.<shard>.json`: a marker for each shard that is whole, with the rows it holds and its
      file's size and sha256. It is written last: a shard without one counts as missing, whatever is in its file. Where
      there are more than a thousand, one file of columns holds them.

    Every `zarr.json` carries a seal (`dsu_cache.files`), manifest and markers their checksum, chunks and indices
    of shards theirs: no byte of a store is read unchecked. An array whose metadata is damaged is not among `arrays`
    but in `damaged`, and can be added anew.

    The shard is the unit of writing, written once and whole. Several processes may write different shards at a time,
    and share the store's lock; everything else that changes a store wants it alone. Readers hold a lock of theirs,
    against removal only.

    Attributes:
        path: its folder.
        rows_per_shard, compressor: as it was created.
        attributes: what its owner notes about it.
        manifest: the samples and their rows, as of opening, locking or setting it.
        damaged: what is wrong with the metadata of arrays, by name.
        remote: what the folder is the mirror of; None where the store itself lies in it.

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
        """Make an empty store in the folder `path`, which must be new or empty.

        Raises:
            CacheError: there is something at `path`.
            BusyError: another process is making a store there.
            ValueError: `rows_per_shard` is below 1, or no such compressor.
        """
        path, remote = Path(path), _remote(Path(path))
        if rows_per_shard < 1 or compressor not in COMPRESSORS:
            raise ValueError(
                f"a store cannot have {rows_per_shard} rows a shard and compressor {compressor!r}: "
                "use at least 1 row, and None, 'zstd' or 'blosc'"
            )
        if path.exists() and not path.is_dir():
            raise CacheError(f"{path} is there already and is no folder: choose a new or empty folder for the store")
        path.mkdir(parents=True, exist_ok=True)
        with creating(path):
            if remote is not None:
                remote.make_way()
            if (path / METADATA).is_file():
                raise CacheError(
                    f"the store {path} is there already: if another process has just made it, run the same command "
                    "again"
                )
            # An interrupted creation leaves no more than the store's own folders: the group's file comes last.
            partial = [entry.name for entry in path.glob(f"{METADATA}.*.partial")]
            if not {entry.name for entry in path.iterdir()}.issubset((*RESERVED, *partial)):
                raise CacheError(f"{path} is there already: open it, or choose a new or empty folder for the store")
            clear(*(path / name for name in RESERVED if (path / name).exists()))
            _write_groups(path)
            save_manifest(path / "manifest", Manifest())
            layout = {"format": FORMAT, "rows_per_shard": rows_per_shard, "compressor": compressor}
            write_metadata(path, group({"store": layout, "attributes": attributes}))
            if remote is not None:
                remote.publish(generations(path / "manifest")[0])  # or another was first: then that one is opened
        return cls.open(path)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open the store in the folder `path`.

        Raises:
            CacheError: there is none, or one of another format.
            CorruptError: its own metadata or its manifest is damaged.
        """
        return cls(Path(path))

    @classmethod
    def exists(cls, path: Path) -> bool:
        """Whether there is a store in a folder, which may be damaged, but is no unfinished one."""
        remote = _remote(path)
        return remote.exists() if remote is not None else (path / METADATA).is_file()

    def set_attributes(self, attributes: Mapping[str, JSON]) -> None:
        """Replace `attributes`, on the disk."""
        self._publish(lambda: write_metadata(self.path, group({"store": self._layout, "attributes": attributes})))
        self.attributes = read_metadata(self.path)["attributes"]["attributes"]
        os.utime(self.path)  # the same attributes again are a sign of life, too

    def set_manifest(self, manifest: Manifest) -> None:
        """Make `manifest` the store's, on the disk, and let every array grow to its rows."""
        before = self.manifest

        def change() -> None:
            # Where another has published one since, contents that are new get rows again.
            now = self.manifest
            following = manifest if now is before else now.assign(dict(manifest.samples()), self.rows_per_shard)
            # First the arrays: rows that no manifest knows are harmless, the other way round they could not be read.
            for array in self._arrays.values():
                array.grow(following.next_row)
            save_manifest(self.path / "manifest", following, now)
            self.manifest = following

        self._publish(change)

    def take_metadata(self, source: "Store") -> None:
        """Have samples, attributes and arrays of another store, byte for byte; arrays of one's own stay.

        Raises:
            CacheError: this store is no older state of that one, or has arrays of the same names made otherwise.
        """

        def change() -> None:
            self._check_older_than(source)
            for name in source.arrays.keys() - self.arrays.keys():
                for folder in (self.path / "commits" / name, self.path / name):
                    folder.mkdir(exist_ok=True)
                    sync(folder.parent)
                copy_file(source.path / name / METADATA, self.path / name / METADATA)
            for array in self._arrays.values():
                array.grow(source.manifest.next_row)
            if self.manifest != source.manifest:
                save_manifest(self.path / "manifest", source.manifest, self.manifest)
            copy_file(source.path / METADATA, self.path / METADATA)

        self._publish(change)
        self.attributes = source.attributes
        self._load()

    def _check_older_than(self, source: "Store") -> None:
        for name in self.arrays.keys() & source.arrays.keys():
            mine, other = self.arrays[name], source.arrays[name]
            self.check({name: other.fingerprint}, f"{self.path} and {source.path} can't be one store.")
            if (mine.item_shape, mine.dtype, mine.views) != (other.item_shape, other.dtype, other.views):
                raise CacheError(f"{name} is of another shape in {self.path} than in {source.path}: copy it elsewhere")
        if dict(self._layout) != dict(source._layout) or not keeps_contents(self.manifest, source.manifest):
            raise CacheError(
                f"{self.path} holds samples that {source.path} does not know, so that would not be a copy: copy the "
                f"other way first, or elsewhere"
            )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep others from removing what is in the store, inside a `with`."""
        sharing = share(self.path / "manifest" / "readers", f"the store {self.path} is being made anew")
        try:
            yield
        finally:
            if sharing is not None:
                os.close(sharing)

    def _publish(self, change: Callable[[], None]) -> None:
        """Change metadata; of a store on S3 as its next generation, again if another has published one meanwhile."""
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
        """Hold the store's lock inside a `with`; on entering, manifest and arrays are looked up anew.

        With a `share`, as `(3, "16 parts")`, it is held together with the others of that division, and nothing but
        shards may be written. Alone, what interrupted writers left of metadata and manifests is removed, and in the end
        many markers become one file.

        Raises:
            BusyError: another process holds it; names its id, host, time and command.
        """
        with _unwritten(self.path, share):
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
        """Look what others have written to S3 since; in a folder that is seen without."""
        if self.remote is not None:
            self.remote.look()
            self._load()

    def check_readable(self) -> None:
        """Check what chunks' checksums do not cover, before anything is read.

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
        """Add an array in which every row is missing, in place of a damaged one of that name.

        Raises:
            CacheError: there is one of that name.
            BusyError: another process is reading the store.
            ValueError: a name, shape, type or number of views that a store cannot hold.
        """
        info = ArrayInfo(name, tuple(item_shape), np.dtype(dtype), views, fingerprint)
        folder, commits = self.path / name, self.path / "commits" / name

        def change() -> None:
            if self.remote is not None and self.arrays.get(name) == info:
                return  # another has added it
            if (folder / METADATA).exists() and name not in self.damaged:
                raise CacheError(f"the store {self.path} has an array {name!r} already: remove it first")
            if folder.exists() or commits.exists():
                with _unread(self.path):
                    clear(folder, commits)  # what an interrupted removal left, or an array whose metadata is damaged
            self.damaged.pop(name, None)
            StoredArray.create(info, folder, commits, self.manifest.next_row, self.rows_per_shard, self.compressor)

        self._publish(change)
        self._arrays[name] = self._open_array(name)

    def remove_array(self, name: str) -> None:
        """Remove an array with all its data.

        Raises:
            CacheError: there is none of that name.
            BusyError: another process is reading the store.
        """

        def change() -> None:
            with _unread(self.path):
                self.stored(name).remove()

        self._publish(change)
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
        """Return the shards of `views` that hold rows in use and are not committed, ordered by view and shard.

        `sizes` are the bytes of all shards' files, where these are known; else each file is looked at.
        """
        stored = self._with_views(array, views)
        commits, nbytes = stored.committed(), stored.nbytes if sizes is None else sizes.get

        def is_committed(shard: ShardId) -> bool:
            commit = commits.get(shard)
            if commit is None:
                return False
            full = len(commit.rows) == self.rows_per_shard  # so it has the rows in use, whichever they are
            return commit.holds([] if full else self.rows_in_shard(shard.shard).tolist(), nbytes(shard))

        in_use = np.unique(self.manifest.rows_in_use // self.rows_per_shard).tolist()
        wanted = [ShardId(view, shard) for view in sorted(set(views)) for shard in in_use]
        return [shard for shard in wanted if not is_committed(shard)]

    def write_shard(self, array: str, view: int, shard: int, rows: npt.ArrayLike, values: npt.NDArray[Any]) -> None:
        """Write a shard as a whole, flush it to the disk and commit it.

        Args:
            rows: the rows in use in the shard, as `rows_in_shard` gives them, (n,).
            values: what they hold, (n, *item_shape), of the array's dtype.

        Raises:
            ValueError: other rows, another shape or another dtype.
            CacheError: the shard is committed already, or there is no such array or view.
        """
        stored, info = self._with_views(array, [view]), self.stored(array).info
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
        if stored.holds(ShardId(view, shard), wanted):
            raise CacheError(
                f"shard {shard} of array {array!r}, view {view}, is written already: discard it to write it again"
            )
        stored.write(ShardId(view, shard), wanted, values)

    def reader(
        self, names: Sequence[str], keep_open: bool = True, views: Mapping[str, Collection[int]] | None = None
    ) -> Reader:
        """Open arrays for reading batches.

        Args:
            names: the arrays to read.
            keep_open: whether the shards read last are kept open for the next read, and of S3, fetched whole.
            views: which are going to be read of each array (None: any): whether they fit into the scratch folder is
                said at once, where the store lies on S3.

        Raises:
            CacheError: there is no array of a name in `names`.
            CorruptError: an array's metadata is damaged.
            BusyError: arrays are being removed, or were made anew since the store was opened.
        """
        arrays = [self.stored(name) for name in names]
        # From here on no one removes arrays, so what is compared now stays so.
        sharing = share(self.path / "manifest" / "readers", f"the store {self.path} is being made anew")
        if self.remote is not None and keep_open:
            self.remote.prepare([array for array in arrays if isinstance(array, RemoteArray)], views)
        reader = Reader(arrays, self.manifest, keep_open=keep_open, sharing=sharing)
        if any(self._open_array(name).info != self.arrays[name] for name in names):
            raise BusyError(f"the store {self.path} was made anew since it was opened: run the same command again")
        return reader


def is_store(path: Path) -> bool:
    """Whether a folder is a store, perhaps a damaged or unfinished one: has two of what only stores have together."""
    return sum(((path / METADATA).is_file(), *((path / name).is_dir() for name in RESERVED))) >= 2


def writer_of(path: Path) -> str | None:
    """Say who is writing to the store in a folder, damaged or not; None if no one is."""
    return holder(path / "manifest" / "lock")


def remove_store(path: Path) -> None:
    """Remove a store with all its data, and the folder.

    Raises:
        CacheError: the folder is no store, or holds something else besides.
        BusyError: another process is writing to the store or reading it.
    """
    if not is_store(path):
        raise CacheError(f"{path} is no store, so it is not removed: check the name")
    arrays = {*RESERVED, *_named_arrays(path), *(folder.parent.name for folder in path.glob("*/c/"))}
    foreign = sorted(e.name for e in path.iterdir() if e.name not in arrays and not e.name.startswith(METADATA))
    if foreign:
        raise CacheError(f"{path} holds {', '.join(foreign[:3])}, no part of a store: move it elsewhere first")
    (path / "manifest").mkdir(exist_ok=True)
    remote = _remote(path)
    with _unwritten(path), _unread(path):
        if remote is not None:
            remote.remove()
        # First what makes it a store, last what tells that it was one: an interrupted removal can be done again.
        (path / METADATA).unlink(missing_ok=True)
        sync(path)
        clear(*(path / name for name in sorted(arrays - {"manifest"}) if (path / name).exists()), path / "manifest")
        remove_strays(path / METADATA)
    path.rmdir()


def _remote(path: Path) -> Remote | None:
    url = url_of(path)
    return Remote(path, url) if url else None


def _unwritten(path: Path, share: Share | None = None) -> AbstractContextManager[object]:
    """Keep writers away inside a `with`, but those that share the lock."""
    return locked(path / "manifest" / "lock", f"the store {path} is being written", share=share)


def _unread(path: Path) -> AbstractContextManager[object]:
    """Keep readers away inside a `with`: for what takes away data that they may be reading."""
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
    """Raise `CacheError` for what is whole but not of this format: it has no seal, or another one."""
    try:
        found = json.loads((path / METADATA).read_bytes())["attributes"].get("store", {}).get("format")
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return
    if found != FORMAT:
        raise CacheError(
            f"{path} is not a store of format {FORMAT} but {found}: "
            "use the version of the program that wrote it, or make the store again"
        )


def _write_groups(path: Path) -> None:
    """Write the store's own folders: Zarr groups too, so that who lists the store finds nothing without a name."""
    for name in RESERVED:
        (path / name).mkdir(parents=True, exist_ok=True)
        write_metadata(path / name, group({}))


def _named_arrays(path: Path) -> list[str]:
    """The arrays that have metadata or any marker: an interrupted removal leaves neither for long."""
    with_metadata = {file.parent.name for file in path.glob(f"*/{METADATA}")} - set(RESERVED)
    with_markers = {folder.name for folder in (path / "commits").glob("*/") if marked(folder) or packed(folder)}
    return sorted(with_metadata | with_markers)
