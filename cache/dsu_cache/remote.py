"""A store on S3, used through its mirror: a local folder with its metadata, and a scratch folder for downloaded shards.

`s3://bucket/path/SPLIT/ENCODERS/` contains these immutable objects:

* `manifest/<number>.json`: generations, each with all of the store's metadata: the `zarr.json` files, the names of the
    manifest's segments, and the store's random id. The next generation is written only if absent. A writer that loses
    the race loads the other's generation, repeats its change on top of it and tries the next number. So no lock is
    needed.
* `manifest/<sha256>.safetensors`: the manifest's segments.
* `<array>/<id>/<view>.<shard>.<rows>.<bytes>.<sha256>`: a shard's data, complete or absent. Its name is its marker. The
    id is derived from store, type, shape and fingerprint, so that a new array never uses objects of an earlier one.

Objects that are no longer referenced stay; `Remote.orphans` counts them. The mirror is an ordinary store folder without
shards. Shards that are read are downloaded once, verified, and shared by all processes; if they do not fit within the
limit, single chunks are read from S3.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dsu_cache.arrays import RESERVED, ArrayInfo, Commit, Rows, ShardFile, ShardId, StoredArray, encode
from dsu_cache.columns import COLUMNS
from dsu_cache.files import (
    METADATA,
    BusyError,
    CacheError,
    CorruptError,
    parse_record,
    read_record,
    record_bytes,
    sha256,
    sync,
    write_changed,
)
from dsu_cache.locks import creating, locked
from dsu_cache.storage import SCHEME, Bucket, ListedObject

_MIRRORS: Final = "s3:"
"""The folder of the mirrors in the scratch folder."""
_POOL: Final = "shards"
_SIDE_FILES: Final = ("splits.json",)
"""Files next to stores, in their splits' folders, that belong to them."""
_PUBLISHED_FILE: Final = "published"
"""A mirror's file with its generation; absent while the mirror may match none."""
_OBJECT: Final = re.compile(r"([^/]+)/([0-9a-f]{16})/(\d+)\.(\d+)\.([0-9a-f]+)\.(\d+)\.([0-9a-f]{64})")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_GENERATION: Final = re.compile(r"manifest/(\d{8})\.json")
_UNITS: Final = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

_LOG: Final = logging.getLogger("dsu.cache")
_REPORTED: Final = set[tuple[str, int, bool]]()


# -- paths of mirrors -------------------------------------------------------------------------------------------


def scratch() -> Path:
    """The folder for downloads: `DSU_SCRATCH`, or one in the user's cache folder."""
    named = os.environ.get("DSU_SCRATCH")
    return Path(os.path.abspath(named)) if named else Path.home() / ".cache" / "dsu" / "scratch"


def mirror_of(url: str) -> Path:
    """The local mirror folder of `s3://bucket/path`."""
    return scratch() / _MIRRORS / Bucket(url).url.removeprefix(SCHEME)


def url_of(folder: Path) -> str | None:
    """The URL that a folder mirrors, if it is a mirror."""
    mirrors = scratch() / _MIRRORS
    absolute = Path(os.path.abspath(folder))
    return SCHEME + absolute.relative_to(mirrors).as_posix() if mirrors in absolute.parents else None


def with_urls(text: str) -> str:
    """A text for people in which folders of mirrors are replaced by their URLs."""
    return text.replace(f"{scratch() / _MIRRORS}/", SCHEME)


def folder_of(place: Path | str) -> Path:
    """The local folder of a path or URL: the path itself, or the mirror of `s3://bucket/path`, even if it was turned
    into a `Path`."""
    named = re.match(r"s3:/+(.*)", str(place))  # which has only one slash
    return mirror_of(SCHEME + named[1]) if named else Path(place)


def mirror_folder(root: Path | str) -> Path:
    """The local folder of a cache root: the folder itself, or its mirror after bringing that up to date."""
    folder = folder_of(root)
    return folder if folder == Path(root) else attach(url_of(folder) or "")


def attach(url: str) -> Path:
    """The mirror of a cache root, with a folder for each of its stores; other folders are emptied.

    Raises:
        RemoteError: it can't be listed, or the bucket is gone.
    """
    root, bucket = mirror_of(url), Bucket(url)
    there = set()
    for split in filter(_is_safe_name, bucket.folders()):
        for name in _SIDE_FILES:
            _fetch_side_file(bucket, root, f"{split}/{name}")
        for encoders in filter(_is_safe_name, bucket.folders(split)):
            found = [one for one in bucket.list(f"{split}/{encoders}/manifest") if one.key.endswith(".json")]
            if found:
                there.add(root / split / encoders)
                for name in RESERVED:
                    (root / split / encoders / name).mkdir(parents=True, exist_ok=True)
                changed = max(one.changed for one in found).timestamp()
                os.utime(root / split / encoders, (changed, changed))
    for folder in set(root.glob("*/*/")) - there:
        with suppress(BusyError), creating(folder):  # or one that is being created
            remote = Remote(folder, f"{url}/{folder.relative_to(root).as_posix()}")
            if not remote.exists():
                remote.empty()
    root.mkdir(parents=True, exist_ok=True)
    return root


def keep_beside(path: Path) -> None:
    """Upload a changed file that is next to stores, if its folder is a mirror.

    Raises:
        CacheError: another process has changed it since it was downloaded.
    """
    url, fetched = url_of(path.parent), path.with_name(f".{path.name}.fetched")
    if url is None:
        return
    content, before = path.read_bytes(), fetched.read_bytes() if fetched.exists() else None
    if not Bucket(url).put_if_unchanged(path.name, content, before):
        raise CacheError(f"{url}/{path.name} was changed by another run at the same time: run the same command again")
    write_changed(fetched, content)


def _fetch_side_file(bucket: Bucket, root: Path, key: str) -> None:
    with suppress(FileNotFoundError):
        content = bucket.get(key)
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        write_changed(path.with_name(f".{path.name}.fetched"), content)
        write_changed(path, content)


# -- one store ---------------------------------------------------------------------------------------------------


class Remote:
    """The S3 store behind a mirror.

    Attributes:
        folder, url: the mirror and its store.
        number: the mirror's generation; 0 if there is none.
        pool: where shards are downloaded to; None: single chunks are read from S3 instead.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.bucket: Final = Bucket(url)
        self.number = 0
        self.pool: Pool | None = None
        self._record: dict[str, Any] = {}
        self._damage = ""
        self._listed: list[ListedObject] = []

    def look(self) -> None:
        """List all objects, and update the mirror to the newest intact generation.

        Raises:
            CorruptError: none is intact.
            CacheError: there is none.
            RemoteError: S3 can't be read.
        """
        with self.alone():
            self._listed = [*self.bucket.list()]
            self._mirror()

    def alone(self) -> AbstractContextManager[object]:
        """Lock the mirror's metadata against other processes of this machine inside a `with`."""
        (self.folder / "manifest").mkdir(parents=True, exist_ok=True)
        return locked(self.folder / "manifest" / "mirror", f"{self.folder} is being updated", patience=600)

    def bring_up_to_date(self) -> bool:
        """Like `look`, but only for generations; returns whether there was a newer one. The caller must hold the lock
        (`alone`)."""
        data = [one for one in self._listed if not one.key.startswith("manifest/")]
        self._listed = [*data, *self.bucket.list("manifest")]
        before = self.number
        self._mirror()
        return self.number != before

    def exists(self) -> bool:
        """Whether there is a store, intact or damaged."""
        return any(_GENERATION.fullmatch(one.key) for one in self.bucket.list("manifest"))

    def make_way(self) -> None:
        """Update the mirror if there is a store, else empty it."""
        if self.exists():
            self.look()
            return
        self.bucket.check_conditions("manifest/probe")
        self.empty()

    def empty(self) -> None:
        """Remove the mirror's content."""
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _mirror(self) -> None:
        tags = {int(match[1]): one.tag for one in self._listed if (match := _GENERATION.fullmatch(one.key))}
        if not tags:
            raise CacheError(f"there is no store in {self.url}: create one, or correct the path")
        newest, state, reason = max(tags), self.folder / "manifest" / _PUBLISHED_FILE, ""
        known = read_record(state)
        if known and (known["number"], known["tag"]) == (newest, tags[newest]):
            self.number, self._record, self._damage = newest, known["record"], ""
            self._restore(newest, self._record)
            return
        for number in sorted(tags, reverse=True):
            try:
                record = self._read_generation(number)
                self._restore(number, record)
            except (CorruptError, FileNotFoundError) as error:
                reason = reason or str(error)
                continue
            self.number, self._record, self._damage = newest, record, reason
            if not reason:
                write_changed(state, record_bytes({"number": newest, "tag": tags[newest], "record": record}))
            return
        raise CorruptError(f"{self.url} contains no intact manifest ({reason}): create the store again")

    def _read_generation(self, number: int) -> dict[str, Any]:
        record: dict[str, Any] | None = parse_record(self.bucket.get(_generation(number)))
        if record is None:
            raise CorruptError(f"{self.url}/{_generation(number)} is damaged (its bytes do not match their checksum)")
        # These become file names here, and anyone can compute a checksum.
        arrays, hashes = record["metadata"].keys() - {""}, [one["sha256"] for one in record["segments"]]
        if not all(map(_NAME.fullmatch, arrays)) or not all(map(_HASH.fullmatch, hashes)):
            raise CorruptError(f"{self.url}/{_generation(number)} was not written by this program")
        return record

    def _restore(self, number: int, record: Mapping[str, Any]) -> None:
        """Write a generation's metadata to the mirror. Raises as `look` if segments are lost."""
        manifest = self.folder / "manifest"
        for one in record["segments"]:
            name = f"{one['sha256']}{COLUMNS}"
            if not (manifest / name).is_file() or sha256((manifest / name).read_bytes()) != one["sha256"]:
                content = self.bucket.get(f"manifest/{name}")
                if sha256(content) != one["sha256"]:
                    raise CorruptError(f"{self.url}/manifest/{name} is damaged (its bytes do not match their checksum)")
                write_changed(manifest / name, content)
        arrays = record["metadata"].keys() - {"", *RESERVED}
        for gone in {path.parent.name for path in self.folder.glob(f"*/{METADATA}")} - arrays - set(RESERVED):
            shutil.rmtree(self.folder / gone, ignore_errors=True)
        for name, text in sorted(record["metadata"].items(), reverse=True):  # the store's own last
            (self.folder / name).mkdir(exist_ok=True)
            (self.folder / "commits" / (name if name in arrays else "")).mkdir(exist_ok=True)
            write_changed(self.folder / name / METADATA, text.encode())
        path = manifest / f"{number:08d}.json"
        write_changed(path, record_bytes({"segments": record["segments"], "next_row": record["next_row"]}))
        for other in manifest.glob("*.json"):
            if other not in (path, manifest / METADATA):
                other.unlink(missing_ok=True)

    def begin(self) -> None:
        """Record that the mirror is about to change: unless the change is published, the mirror is rebuilt."""
        (self.folder / "manifest" / _PUBLISHED_FILE).unlink(missing_ok=True)
        sync(self.folder / "manifest")

    def publish(self, generation: Path) -> bool:
        """Publish the mirror's metadata, with this generation of its manifest, as the next generation; False if another
        process was first.

        Raises:
            CorruptError: the newest generation is damaged, so the rows it assigned are unknown and none can be
                assigned.
        """
        if self._damage:
            raise CorruptError(
                f"{self._damage}, so nothing can be written: copy the store (`dsu cache pull`), remove it (`dsu cache "
                f"remove`) and push the copy"
            )
        written = parse_record(generation.read_bytes())
        folders = [name for name in ("", *RESERVED) if (self.folder / name / METADATA).exists()]
        folders += [path.parent.name for path in self.folder.glob(f"*/{METADATA}") if path.parent.name not in RESERVED]
        record = {
            "id": self._record.get("id") or os.urandom(16).hex(),
            "metadata": {name: (self.folder / name / METADATA).read_text() for name in sorted(folders)},
            "segments": written["segments"],
            "next_row": written["next_row"],
        }
        known = {one["sha256"] for one in self._record.get("segments", ())}
        for one in record["segments"]:
            if one["sha256"] not in known:
                name = f"{one['sha256']}{COLUMNS}"
                self.bucket.put_named(f"manifest/{name}", (self.folder / "manifest" / name).read_bytes())
        if record != self._record:
            if not self.bucket.put_if_absent(_generation(self.number + 1), record_bytes(record)):
                return False
            self.number, self._record = self.number + 1, record
        return True

    def remove(self) -> None:
        """Remove all objects, generations last, so that an interrupted removal can be repeated."""
        keys = [one.key for one in self.bucket.list()]
        self.bucket.delete([key for key in keys if not _GENERATION.fullmatch(key)])
        self.bucket.delete([key for key in keys if _GENERATION.fullmatch(key)])

    def prepare(self, arrays: Sequence["RemoteArray"], views: Mapping[str, Collection[int]] | None) -> None:
        """Decide how to read shards, and log it: download them if all of these views fit, else read chunk by chunk."""
        wanted = {
            commit.sha256: commit.nbytes
            for array in arrays
            for shard, commit in array.known.items()
            if array.info.views == 1 or views is None or shard.view in views[array.info.name]
        }
        pool = Pool(scratch_limit())
        fit = pool.make_room(wanted)
        self.pool = pool if fit else None
        nbytes = sum(wanted.values())
        if (self.url, nbytes, fit) not in _REPORTED:
            _REPORTED.add((self.url, nbytes, fit))
            size, limit = (f"{count / 1e9:.3g} GB" for count in (nbytes, pool.limit))
            how = "all of it fits" if fit else "it does not fit, so samples are read one by one from S3"
            _LOG.info("%s: %s to read, limit %s in %s: %s", self.url, size, limit, scratch(), how)

    # -- shards --------------------------------------------------------------------------------------------------

    def prefix(self, info: ArrayInfo) -> str:
        """The prefix of an array's shards."""
        made_of = [self._record["id"], info.item_shape, info.dtype.str, info.views, vars(info.fingerprint)]
        return f"{info.name}/{sha256(json.dumps(made_of, sort_keys=True).encode())[:16]}/"

    def shards(self, info: ArrayInfo, rows_per_shard: int) -> dict[ShardId, Commit]:
        """The listed shards of an array. If a shard has several objects, all valid, the one with the most rows is
        used."""
        prefix, found = self.prefix(info), dict[ShardId, Commit]()
        for one in sorted(self._listed, key=lambda one: one.key):
            match = _OBJECT.fullmatch(one.key) if one.key.startswith(prefix) else None
            if match is None or int(match[6]) != one.nbytes:
                continue
            shard, bits = ShardId(int(match[3]), int(match[4])), int(match[5], 16)
            rows = [shard.shard * rows_per_shard + at for at in range(rows_per_shard) if bits >> at & 1]
            if shard not in found or len(rows) > len(found[shard].rows):
                found[shard] = Commit(rows, one.nbytes, match[7])
        return found

    def key(self, info: ArrayInfo, rows_per_shard: int, shard: ShardId, commit: Commit) -> str:
        """The object of a shard."""
        bits = sum(1 << row % rows_per_shard for row in commit.rows)
        return f"{self.prefix(info)}{shard.view}.{shard.shard}.{bits:x}.{commit.nbytes}.{commit.sha256}"

    @property
    def sizes(self) -> dict[str, int]:
        """The listed size of all objects by key."""
        return {one.key: one.nbytes for one in self._listed}

    @property
    def changed(self) -> datetime:
        """When an object was last written, according to the listing."""
        return max(one.changed for one in self._listed)

    def orphans(self, arrays: Iterable["RemoteArray"]) -> tuple[int, int]:
        """Number and size of unreferenced objects in the listing, including those that only older generations need."""
        named = {self.key(a.info, a.rows_per_shard, shard, commit) for a in arrays for shard, commit in a.known.items()}
        named |= {_generation(self.number), *(f"manifest/{one['sha256']}{COLUMNS}" for one in self._record["segments"])}
        lost = [one.nbytes for one in self._listed if one.key not in named]
        return len(lost), sum(lost)

    def damage(self) -> Iterator[tuple[str, str]]:
        """Read the newest generation and its segments; yield the keys of damaged objects, with the reason."""
        try:
            record = self._read_generation(self.number)
        except (CorruptError, FileNotFoundError):
            yield _generation(self.number), "is damaged, so an older one is used"
            return
        for one in record["segments"]:
            key = f"manifest/{one['sha256']}{COLUMNS}"
            with suppress(FileNotFoundError):
                if sha256(self.bucket.get(key)) == one["sha256"]:
                    continue
            yield key, "is damaged or lost"


class RemoteArray(StoredArray):
    """An array whose shards are on S3.

    Attributes:
        remote: of the store.
        known: the existing shards.
    """

    def __init__(self, remote: Remote, folder: Path, commits: Path, rows_per_shard: int, compressor: Any) -> None:
        self.remote = remote
        self.known: dict[ShardId, Commit] = {}
        super().__init__(folder, commits, rows_per_shard, compressor)
        self.known = remote.shards(self.info, rows_per_shard)

    def key(self, shard: ShardId) -> str:
        """The object of an existing shard."""
        return self.remote.key(self.info, self.rows_per_shard, shard, self.known[shard])

    def write(self, shard: ShardId, rows: Rows, values: npt.NDArray[Any]) -> None:
        """See `StoredArray.write`. A different object that another process wrote meanwhile becomes an orphan."""
        content = b"".join(encode(rows, values, self.rows_per_shard, self._codec))
        self.restore(shard, Commit(rows.tolist(), len(content), sha256(content)), content)

    def restore(self, shard: ShardId, commit: Commit, content: bytes) -> None:
        """See `StoredArray.restore`."""
        key = self.remote.key(self.info, self.rows_per_shard, shard, commit)
        self.remote.bucket.put_named(key, content)
        self.known[shard] = commit

    def content(self, shard: ShardId) -> bytes:
        """See `StoredArray.content`."""
        commit, where = self.known[shard], f"{self.remote.url}/{self.key(shard)}"
        try:
            content = self.remote.bucket.get(self.key(shard))
        except FileNotFoundError as error:
            raise CorruptError(f"{error}.") from None
        if sha256(content) != commit.sha256:
            raise CorruptError(f"{where} does not contain the bytes that were written.")
        return content

    def open_shard(self, shard: ShardId) -> ShardFile:
        """See `StoredArray.open_shard`."""
        commit = self.known.get(shard)
        if commit is None:
            raise CorruptError(f"view {shard.view}, shard {shard.shard} is not in {self.remote.url}/{self.info.name}.")
        if self.remote.pool is not None:
            with suppress(CorruptError):  # single chunks of it may be intact
                path = self.remote.pool.fetched(commit, partial(self.content, shard))
                if path is not None:
                    return _FetchedShard(path, self, shard)
        return _RangedShard(self, shard)

    def discard(self, shard: ShardId) -> None:
        """See `StoredArray.discard`: removes the object."""
        if shard in self.known:
            self.remote.bucket.delete([self.key(shard)])
            del self.known[shard]

    def commit(self, shard: ShardId) -> Commit | None:
        """See `StoredArray.commit`."""
        return self.known.get(shard)

    def nbytes(self, shard: ShardId) -> int | None:
        """See `StoredArray.nbytes`."""
        return self.known[shard].nbytes if shard in self.known else None

    def is_intact(self, shard: ShardId, commit: Commit) -> bool:
        """See `StoredArray.is_intact`."""
        try:
            self.content(shard)
        except CorruptError:
            return False
        return True

    def committed(self) -> dict[ShardId, Commit]:
        """See `StoredArray.committed`."""
        return self.known

    def sizes(self, files: Mapping[str, int]) -> dict[ShardId, int]:
        """See `StoredArray.sizes`."""
        return {shard: commit.nbytes for shard, commit in self.known.items()}

    def shards(self) -> set[ShardId]:
        """See `StoredArray.shards`."""
        return set(self.known)

    def refresh(self) -> None:
        """Does nothing: all objects are listed together when the store is opened or locked."""

    def pack(self) -> None:
        """Does nothing: the objects' names are the markers."""


# -- reading -----------------------------------------------------------------------------------------------------


class _RangedShard(ShardFile):
    """A shard whose single chunks are read from S3, each verified."""

    def __init__(self, array: RemoteArray, shard: ShardId) -> None:
        self._path = Path(f"view {shard.view}, shard {shard.shard} of {array.info.name}")
        self._codec = array._codec
        self._bucket, self._key = array.remote.bucket, array.key(shard)
        self._index = self._read_index(array.rows_per_shard, array.known[shard].nbytes)

    def _fill(self, buffers: list[Any], offset: int) -> int:
        try:
            content = memoryview(self._bucket.get_range(self._key, offset, sum(map(len, buffers))))
        except FileNotFoundError as error:
            raise CorruptError(f"{error}.") from None
        at = 0
        for buffer in buffers:
            part = content[at : at + len(buffer)]
            buffer[: len(part)] = part
            at += len(part)
        return len(content)


class _FetchedShard(ShardFile):
    """A downloaded shard. If its file was damaged since, the file is removed and chunks are read from S3."""

    def __init__(self, path: Path, array: RemoteArray, shard: ShardId) -> None:
        self._ranged = partial(_RangedShard, array, shard)
        try:
            super().__init__(path, array.rows_per_shard, array._codec)
        except CorruptError:
            path.unlink(missing_ok=True)
            raise

    def read(self, chunk: int, into: npt.NDArray[np.uint8]) -> None:
        try:
            super().read(chunk, into)
        except (CorruptError, ValueError, RuntimeError):  # the latter from the decompressor
            self._path.unlink(missing_ok=True)
            self._ranged().read(chunk, into)


def scratch_limit() -> int:
    """The size limit of the scratch folder in bytes: `DSU_SCRATCH_LIMIT`, or half of the free space and of what it
    already uses.

    Raises:
        CacheError: the variable is no number of bytes.
    """
    given = os.environ.get("DSU_SCRATCH_LIMIT", "").strip()
    if given:
        match = re.fullmatch(r"([\d.]+)\s*([KMGT]?B?)", given.upper())
        try:
            return int(float(match[1]) * _UNITS[match[2]]) if match else int("no number")
        except (ValueError, KeyError):
            raise CacheError(f"DSU_SCRATCH_LIMIT={given} is not a number of bytes: write 200GB, for example") from None
    folder = scratch()
    folder.mkdir(parents=True, exist_ok=True)
    return (shutil.disk_usage(folder).free + Pool(0).used()) // 2


class Pool:
    """The downloaded shards: files named by their SHA-256, shared by all stores and processes.

    Args:
        limit: their maximum total size in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.folder: Final = scratch() / _POOL
        self._counted, self._since = limit, 0  # size of all files when last counted, and downloads since

    def used(self) -> int:
        """The total size of all downloaded shards."""
        return sum(nbytes for _, nbytes, _ in self._files())

    def _files(self) -> list[tuple[float, int, str]]:
        """When each file was last used, its size and its name."""
        found = []
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.is_file() and not entry.name.startswith("."):
                        found.append((entry.stat().st_mtime, entry.stat().st_size, entry.name))
        return found

    def make_room(self, wanted: Mapping[str, int]) -> bool:
        """Whether shards, sizes by SHA-256, all fit; removes the least recently used files if that makes enough
        room."""
        if sum(wanted.values()) > self.limit:
            return False
        files = sorted(self._files())
        excess = sum(nbytes for _, nbytes, _ in files) - self.limit
        excess += sum(wanted.values()) - sum(nbytes for _, nbytes, name in files if name in wanted)
        for _, nbytes, name in files:
            if excess > 0 and name not in wanted:
                (self.folder / name).unlink(missing_ok=True)
                excess -= nbytes
        return True

    def fetched(self, commit: Commit, fetch: Callable[[], bytes]) -> Path | None:
        """The file of a shard, downloaded by `fetch` unless it exists; None if there is no room."""
        path = self.folder / commit.sha256
        if not commit.fits(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / f".lock-{commit.sha256[:2]}", f"{path} is being downloaded", patience=3600):
                if not commit.fits(path):
                    if not self._has_room(commit.nbytes):
                        return None
                    write_changed(path, fetch())
        with suppress(OSError):
            os.utime(path)
        return path

    def _has_room(self, nbytes: int) -> bool:
        """Whether `nbytes` more fit. There may be many files, so they are recounted only occasionally."""
        self._since += nbytes
        if self._since > self.limit // 64 or self._counted + self._since > self.limit:
            self._counted, self._since = self.used(), nbytes
        return self._counted + self._since <= self.limit


def _is_safe_name(name: str) -> bool:
    """Whether a name is valid for a folder; `..` would lead elsewhere."""
    return bool(name.strip(".")) and name.isprintable() and not set(name) & set("/\\")


def _generation(number: int) -> str:
    return f"manifest/{number:08d}.json"
