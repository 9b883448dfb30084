"""One array of a store in Zarr v3 format: one chunk per sample and view, `rows_per_shard` chunks per file (shard).

Next to it are its commit markers. A shard counts only if it has a marker, which is written after the shard's data is on
disk. Many markers are packed into one file of columns; a single marker takes precedence over a packed one.

A shard has Zarr's layout: one chunk per row, then an index of the chunks, each followed by its checksum. Zarr itself
writes and reads a shard slowly: in an event loop that all threads share, with three copies. Here each thread encodes
and decodes on its own, and the slow parts release Python's global interpreter lock.
"""

import hashlib
import json
import math
import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, NamedTuple, TypeAlias

import crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import Blosc, Zstd

from dsu_cache.columns import COLUMNS, Column, load_tables, save_tables
from dsu_cache.files import (
    METADATA,
    CorruptError,
    clear,
    file_sizes,
    make_folders,
    read_metadata,
    read_record,
    replace_record,
    replacing,
    sha256,
    size_of,
    sync,
    write_metadata,
    write_record,
)
from dsu_cache.fingerprints import Fingerprint

Compressor: TypeAlias = Literal["zstd", "blosc"] | None
Rows: TypeAlias = npt.NDArray[np.int64]

_CHECKSUM: Final = 4
"""Size of a CRC32C in bytes; it follows every chunk and every index, little-endian."""
_MISSING: Final = 2**64 - 1
"""Offset and length, in an index, of a missing chunk."""
_SEEK_LOCK: Final = threading.Lock()
"""Held if a file must be read with seek and read (no `preadv`)."""
LEVEL: Final = 3
"""Compression level."""

RESERVED: Final = ("manifest", "commits")  # the store's own folders, next to the arrays

PACKED_FROM: Final = 1000
"""From this number on, an array's markers are packed into one file."""

COMPRESSORS: Final[tuple[Compressor, ...]] = (None, "zstd", "blosc")


class ShardId(NamedTuple):
    """One shard of an array: rows [shard * rows_per_shard, (shard + 1) * rows_per_shard) of one view."""

    view: int
    shard: int


@dataclass(frozen=True)
class ArrayInfo:
    """One array of a store: for each row and view a tensor of shape `item_shape` and type `dtype`.

    Raises:
        ValueError: a name, type or shape that Zarr or the store's folders do not support.
    """

    name: str
    item_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    views: int
    fingerprint: Fingerprint

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name) or self.name in RESERVED:
            raise ValueError(
                f"{self.name!r} cannot name an array: use letters, digits, '_', '.' and '-', and none of {RESERVED}"
            )
        if self.dtype.kind not in "biufc" or not self.dtype.isnative:
            raise ValueError(
                f"array {self.name!r} has the unsupported type {self.dtype}: use a plain NumPy number type"
            )
        if min(self.item_shape, default=1) < 1 or self.views < 1:
            raise ValueError(
                f"array {self.name!r} of shape {self.item_shape} in {self.views} views is empty: every side, and the "
                "number of views, must be at least 1"
            )

    @property
    def item_nbytes(self) -> int:
        """Size of one row in one view, uncompressed."""
        return math.prod(self.item_shape) * self.dtype.itemsize

    def empty(self, count: int) -> npt.NDArray[Any]:
        """An empty array for `count` rows in one view, (count, *item_shape), in the files' byte order."""
        return np.empty((count, *self.item_shape), self.dtype.newbyteorder("<"))


@dataclass(frozen=True)
class Commit:
    """A marker's record of a shard's data file."""

    rows: list[int]
    nbytes: int
    sha256: str

    def holds(self, rows: list[int], nbytes: int | None) -> bool:
        """Whether the shard contains `rows` and its data file has the committed size; `nbytes`: the file's actual
        size."""
        return nbytes == self.nbytes and set(rows).issubset(self.rows)

    def fits(self, file: Path) -> bool:
        """Whether `file` exists and has its size: a fast check that detects interrupted copies."""
        return size_of(file) == self.nbytes


class StoredArray:
    """An array's folders: the Zarr array, and the commit markers of its shards.

    Args:
        folder: the folder of an array created by `create`.
        commits: the folder of its commits.
        rows_per_shard, compressor: the store's.

    Raises:
        CorruptError: its metadata is missing or damaged.
    """

    def __init__(self, folder: Path, commits: Path, rows_per_shard: int, compressor: Compressor) -> None:
        self.folder: Final = folder
        self.commits: Final = commits
        self.rows_per_shard: Final = rows_per_shard
        # A thread that finds a folder created by another one must also find its name on disk.
        self._making_folders: Final = threading.Lock()
        self._packed_paths: list[Path] = []
        self._packed_read: Mapping[ShardId, Commit] | None = None
        document = read_metadata(folder)
        _, views, *item_shape = document["shape"]
        kind = np.dtype(document["data_type"])
        fingerprint = Fingerprint(**document["attributes"]["fingerprint"])
        self.info: Final = ArrayInfo(folder.name, tuple(item_shape), kind, views, fingerprint)
        self._codec: Final = codec_of(compressor, kind.itemsize)

    @classmethod
    def create(
        cls, info: ArrayInfo, folder: Path, commits: Path, rows: int, rows_per_shard: int, compressor: Compressor
    ) -> "StoredArray":
        """Create the array that `info` describes, with `rows` rows, all missing."""
        import zarr  # imported only here, since it takes longer to load than most reading commands run
        from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
        from zarr.core.buffer import default_buffer_prototype

        codecs: dict[Compressor, Any] = {
            "zstd": [ZstdCodec(level=LEVEL)],
            "blosc": [BloscCodec(cname="zstd", clevel=LEVEL)],
        }
        # In memory, only for its metadata, which is written to disk with its seal at once.
        pattern: zarr.Array[Any] = zarr.create_array(
            {},
            shape=(rows, info.views, *info.item_shape),
            dtype=info.dtype,
            chunks=(1, 1, *info.item_shape),
            shards=(rows_per_shard, 1, *info.item_shape),
            filters=[],
            compressors=[*codecs.get(compressor, []), Crc32cCodec()],
            fill_value=0,
            attributes={"fingerprint": vars(info.fingerprint)},
        )
        described = pattern.metadata.to_buffer_dict(default_buffer_prototype())[METADATA]
        for made in (commits, folder):
            made.mkdir()
            sync(made.parent)
        write_metadata(folder, json.loads(described.to_bytes()))
        return cls(folder, commits, rows_per_shard, compressor)

    def grow(self, rows: int) -> None:
        """Make the array at least `rows` rows long. Changes only metadata, no data."""
        document = read_metadata(self.folder)
        if document["shape"][0] < rows:
            document["shape"][0] = rows
            write_metadata(self.folder, document)

    def remove(self) -> None:
        """Remove the array with all its data."""
        # First its metadata, then the markers: an array that is partly removed is never taken for a complete one.
        (self.folder / METADATA).unlink()
        sync(self.folder)
        clear(self.commits, self.folder)

    def write(self, shard: ShardId, rows: Rows, values: npt.NDArray[Any]) -> None:
        """Write a shard: `values` (n, *item_shape) in `rows` (n,), ascending. On return it is on disk.

        Remains of an interrupted write are removed first. Other rows take no space.
        """
        digest, nbytes = hashlib.sha256(), 0
        with self._rewriting(shard) as stream:
            for piece in encode(rows, values, self.rows_per_shard, self._codec):
                digest.update(piece)
                nbytes += stream.write(piece)
        self._write_marker(shard, Commit(rows.tolist(), nbytes, digest.hexdigest()))

    def restore(self, shard: ShardId, commit: Commit, content: bytes) -> None:
        """Write a copy of a shard from its bytes. On return it is on disk."""
        with self._rewriting(shard) as stream:
            stream.write(content)
        self._write_marker(shard, commit)

    @contextmanager
    def _rewriting(self, shard: ShardId) -> Iterator[BinaryIO]:
        self.discard(shard)
        file = self.file(shard)
        with self._making_folders:
            make_folders(self.folder, file.parent.relative_to(self.folder))
        file.unlink(missing_ok=True)
        with replacing(file) as stream:
            yield stream

    def _write_marker(self, shard: ShardId, commit: Commit) -> None:
        write = replace_record if self.marker(shard).exists() else write_record
        write(self.marker(shard), vars(commit))

    def content(self, shard: ShardId) -> bytes:
        """Return the verified bytes of a committed shard. Raises `CorruptError` if they have changed or are missing."""
        file, commit = self.file(shard), self.commit(shard)
        content = file.read_bytes() if commit is not None and commit.fits(file) else b""
        if commit is None or sha256(content) != commit.sha256:
            raise CorruptError(f"{file} does not contain the bytes that were written")
        return content

    def open_shard(self, shard: ShardId) -> "ShardFile":
        """Open a shard for reading. Raises `CorruptError` describing what is wrong with its file."""
        return ShardFile(self.file(shard), self.rows_per_shard, self._codec)

    def discard(self, shard: ShardId) -> None:
        """Mark a shard as missing by removing its marker, damaged or intact, so that it can be written again."""
        if shard in self._packed:
            replace_record(self.marker(shard), {})
            return
        self.marker(shard).unlink(missing_ok=True)
        sync(self.commits)

    def commit(self, shard: ShardId) -> Commit | None:
        """Return the commit of a shard, or None if it has none or its marker is damaged."""
        if not self.marker(shard).exists():
            return self._packed.get(shard)
        record = read_record(self.marker(shard))
        return Commit(**record) if record else None

    def holds(self, shard: ShardId, rows: Rows) -> bool:
        """Whether the shard is committed and contains all of `rows` (n,)."""
        commit = self.commit(shard)
        return commit is not None and commit.holds(rows.tolist(), self.nbytes(shard))

    def nbytes(self, shard: ShardId) -> int | None:
        """Return the size of a shard's data in bytes; None if there is no data file."""
        return size_of(self.file(shard))

    def is_intact(self, shard: ShardId, commit: Commit) -> bool:
        """Whether a shard's data is exactly what was committed; reads all of it."""
        if not commit.fits(self.file(shard)):
            return False
        with self.file(shard).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == commit.sha256

    def committed(self) -> dict[ShardId, Commit]:
        """Return the commits of all shards with intact markers."""
        self.refresh()
        loose = {shard: self.commit(shard) for shard in marked_shards(self.commits)}
        return {shard: commit for shard, commit in {**self._packed, **loose}.items() if commit is not None}

    def data_files(self) -> dict[str, str]:
        """Return the data file of each committed shard by its folder, both as paths in the store."""
        folders = (f"{self.info.name}/c/{shard.shard}/{shard.view}/" for shard in self.committed())
        inside = "/".join("0" for _ in self.info.item_shape)
        return {folder: folder + inside for folder in folders}

    def sizes(self, files: Mapping[str, int]) -> dict[ShardId, int]:
        """Return the size of each shard's data file in bytes, given the sizes of the array's files by path."""
        paths, depth = {path: path.split("/") for path in files}, len(self.info.item_shape) + 3
        return {
            ShardId(int(parts[2]), int(parts[1])): files[path]
            for path, parts in paths.items()
            if len(parts) == depth and parts[-1].isdecimal()
        }

    def shards(self) -> set[ShardId]:
        """Return the shards that have a data file or a marker, intact or not."""
        self.refresh()
        return {*self.sizes(file_sizes(self.folder)), *marked_shards(self.commits), *self._packed}

    @property
    def _packed(self) -> Mapping[ShardId, Commit]:
        if self._packed_read is None:
            self.refresh()
        return self._packed_read or {}

    def refresh(self) -> None:
        """Reload the packed markers: another process may have packed more since."""
        paths = sorted(packed(self.commits))
        if paths != self._packed_paths or self._packed_read is None:
            found: dict[ShardId, Commit] = {}
            for path in paths:
                with suppress(CorruptError):
                    found |= _load_commits(path, self.rows_per_shard)
            self._packed_paths, self._packed_read = paths, found

    def pack(self) -> None:
        """Pack the markers into one file if there are many. No other process may write meanwhile."""
        loose = marked_shards(self.commits)
        if len(loose) < max(PACKED_FROM, len(self._packed) // 4):
            return
        made = save_commits(self.commits, dict(sorted(self.committed().items())), self.rows_per_shard)
        # Removed before the single markers: as long as it exists, these override it.
        for path in self._packed_paths:
            if path != made:
                path.unlink()
        sync(self.commits)
        for shard in loose:
            self.marker(shard).unlink()
        self.refresh()

    def file(self, shard: ShardId) -> Path:
        """Return the path of a shard's data."""
        # The path is Zarr's default chunk key.
        return self.folder / f"c/{shard.shard}/{shard.view}{'/0' * len(self.info.item_shape)}"

    def marker(self, shard: ShardId) -> Path:
        """Return the path of a shard's marker."""
        return self.commits / f"{shard.view}.{shard.shard}.json"


def marked_shards(commits: Path) -> set[ShardId]:
    """Return the shards that have a marker, damaged or intact, in an array's folder of commits."""
    names = [path.name.split(".") for path in commits.glob("*.json")]
    return {ShardId(int(n[0]), int(n[1])) for n in names if len(n) == 3 and n[0].isdecimal() and n[1].isdecimal()}


def packed(commits: Path) -> list[Path]:
    """Return the files of packed markers in an array's folder of commits."""
    return list(commits.glob(f"*{COLUMNS}"))


def save_commits(folder: Path, found: Mapping[ShardId, Commit], rows_per_shard: int) -> Path:
    """Write commits to a file of columns. Rows are relative to the shard's first row: most shards are full."""
    rows = [[row - shard.shard * rows_per_shard for row in commit.rows] for shard, commit in found.items()]
    table = {
        "view": Column.of([shard.view for shard in found]),
        "shard": Column.of([shard.shard for shard in found]),
        "rows": Column.of(rows),
        "nbytes": Column.of([commit.nbytes for commit in found.values()]),
        "sha256": Column.of([commit.sha256 for commit in found.values()]),
    }
    return save_tables(folder, {"commits": table})


def _load_commits(path: Path, rows_per_shard: int) -> dict[ShardId, Commit]:
    columns = load_tables(path)["commits"]
    found = {}
    fields = (columns[name].values() for name in ("view", "shard", "rows", "nbytes", "sha256"))
    for view, shard, rows, nbytes, digest in zip(*fields, strict=True):
        first = shard * rows_per_shard
        found[ShardId(view, shard)] = Commit([first + row for row in rows], nbytes, digest)
    return found


# -- the bytes of a shard ----------------------------------------------------------------------------------------


def codec_of(compressor: Compressor, itemsize: int) -> Any:
    """Return the codec for chunks of numbers with `itemsize` bytes, exactly as Zarr uses it; None for no
    compression."""
    if compressor == "blosc":
        shuffle = Blosc.BITSHUFFLE if itemsize == 1 else Blosc.SHUFFLE
        return Blosc(cname="zstd", clevel=LEVEL, shuffle=shuffle, typesize=itemsize)
    return Zstd(level=LEVEL) if compressor == "zstd" else None


def encode(rows: Rows, values: npt.NDArray[Any], rows_per_shard: int, codec: Any) -> Iterator[bytes | memoryview]:
    """Yield a shard's bytes in pieces: `values` (n, *item_shape) in `rows` (n,), ascending.

    The shard's other rows take no space. A row of zeros is written like any other: if omitted, it would look like a
    missing row.
    """
    index = np.full((rows_per_shard, 2), _MISSING, "<u8")
    offset = 0
    for row, value in zip(rows.tolist(), values, strict=True):
        chunk = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
        encoded = chunk if codec is None else codec.encode(chunk)
        index[row % rows_per_shard] = offset, len(encoded) + _CHECKSUM
        offset += len(encoded) + _CHECKSUM
        yield encoded
        yield _checksum(encoded)
    yield index.tobytes()
    yield _checksum(index.tobytes())


class ShardFile:
    """A shard's open file and its index: (offset, bytes) for each chunk.

    Without compression, a chunk has the same bytes in the file and in memory: one system call reads it and its checksum
    into place, and the checksum is computed while the bytes are still in the processor's cache.

    Args:
        path: the file.
        chunks: number of chunk slots.
        codec: from `codec_of`.

    Raises:
        CorruptError: the message describes what is wrong with the file.
    """

    def __init__(self, path: Path, chunks: int, codec: Any) -> None:
        self._path = path
        self._codec = codec
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise CorruptError(f"{path} cannot be opened ({error.strerror}).") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._index = self._read_index(chunks, os.fstat(self._descriptor).st_size)

    def _read_index(self, chunks: int, nbytes: int) -> npt.NDArray[np.uint64]:
        """The index, (chunks, 2), of a file with `nbytes` bytes."""
        index = np.empty(16 * chunks, np.uint8)
        self._read(index, nbytes - index.size - _CHECKSUM, "its index")
        return index.view("<u8").reshape(chunks, 2)

    def read(self, chunk: int, into: npt.NDArray[np.uint8]) -> None:
        """Read the chunk into `into` and verify it."""
        offset, nbytes = self._index[chunk].tolist()
        if offset == _MISSING == nbytes:
            raise CorruptError(f"{self._path} has no chunk {chunk}.")
        if self._codec is not None:
            encoded = np.empty(nbytes - _CHECKSUM, np.uint8)
            self._read(encoded, offset, f"chunk {chunk}")
            self._codec.decode(encoded, out=into)
        elif nbytes == into.size + _CHECKSUM:
            self._read(into, offset, f"chunk {chunk}")
        else:
            wanted = into.size + _CHECKSUM
            raise CorruptError(f"chunk {chunk} of {self._path} has {nbytes} bytes instead of {wanted}.")

    def _read(self, into: npt.NDArray[np.uint8], offset: int, what: str) -> None:
        """Read `into` from `offset` and compare it with the checksum that follows."""
        checksum = bytearray(_CHECKSUM)
        if offset < 0 or self._fill([into.data, memoryview(checksum)], offset) != into.size + _CHECKSUM:
            raise CorruptError(f"{what} of {self._path} is truncated.")
        if _checksum(into.data) != checksum:
            raise CorruptError(f"{what} of {self._path} does not match its checksum.")

    def _fill(self, buffers: list[Any], offset: int) -> int:
        """Read from `offset` into the buffers; return the number of bytes read."""
        return _read_at(self._descriptor, buffers, offset)


def _read_at(descriptor: int, buffers: list[Any], offset: int) -> int:
    """Read from `offset` into the buffers, like `os.preadv`, which Windows lacks."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, buffers, offset)
    with _SEEK_LOCK:
        os.lseek(descriptor, offset, os.SEEK_SET)
        parts = [os.read(descriptor, len(buffer)) for buffer in buffers]
    for buffer, part in zip(buffers, parts, strict=True):
        buffer[: len(part)] = part
    return sum(map(len, parts))


def _checksum(content: bytes | memoryview) -> bytes:
    return crc32c.crc32c(content).to_bytes(_CHECKSUM, "little")
