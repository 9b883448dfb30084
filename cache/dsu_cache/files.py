"""Crash-safe files: each contains its own checksum, and the file and its folder are flushed to disk.

Records are small JSON files with a checksum line. Zarr metadata files contain a seal among their attributes: the
SHA-256 of all their other bytes. Zarr verifies chunks, but not the `zarr.json` that describes them, where a flipped bit
may give another valid shape, type or fingerprint. Zarr readers ignore the seal.

All errors of a store belong to one family of exceptions: those here, and `dsu_cache.fingerprints.StaleError`.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final, TypeAlias

JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None

METADATA: Final = "zarr.json"
_SEAL: Final = b'"seal": "'
_DIGITS: Final = 64


class CacheError(Exception):
    """A problem of a store that the user can fix; the message describes the problem and the fix."""


class CorruptError(CacheError):
    """Stored bytes are missing or differ from what was written."""


class BusyError(CacheError):
    """Another process is writing to the store."""


_encode: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
"""Created once, because `json.dumps` creates an encoder for every call."""


def canonical(value: JSON) -> str:
    """Return the canonical JSON text of `value`: sorted keys, no spaces, ASCII, no NaN or infinity.

    Raises:
        TypeError: `value` contains something that JSON does not support.
        ValueError: `value` contains a NaN or an infinity.
    """
    return _encode(value)


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's list of names, to disk.

    Some file systems (CIFS) can't flush folders, and Windows can't open them: there a power cut may lose the newest
    files, but never leaves partial ones.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` atomically, flushed to disk, when the `with` block ends."""
    remove_strays(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with beside.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def write_changed(path: Path, content: bytes) -> None:
    """Replace a small file atomically, unless it has this content already."""
    if not path.is_file() or path.read_bytes() != content:
        with replacing(path) as file:
            file.write(content)


def remove_strays(path: Path) -> None:
    """Remove temporary files that interrupted writes of `path` left next to it."""
    for stray in path.parent.glob(f"{path.name}.*.partial"):
        stray.unlink(missing_ok=True)


def make_folders(within: Path, relative: Path) -> None:
    """Create the missing folders of `relative` inside a folder; on return their names are on disk.

    Raises:
        FileNotFoundError: `within` does not exist.
    """
    for depth in range(len(relative.parts)):
        folder = within.joinpath(*relative.parts[: depth + 1])
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            sync(folder.parent)


def clear(*folders: Path) -> None:
    """Remove folders with all their content, in order; missing ones are skipped."""
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)
        sync(folder.parent)


def size_of(file: Path | str) -> int | None:
    """Return the size of a file in bytes; None if it is missing or not a regular file."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def file_sizes(folder: Path | str, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, int]:
    """Return the size of each file below a folder, by relative path; other processes may write and remove files
    meanwhile.

    `known` maps some folders to their only file (`a/b/` to `a/b/0/0`); these are searched only if that file is missing.
    """
    found, folders = {}, [""]
    while folders:
        inside = folders.pop()
        if inside in known and (nbytes := size_of(f"{folder}/{known[inside]}")) is not None:
            found[known[inside]] = nbytes
            continue
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(f"{folder}/{inside}") as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{inside}{entry.name}/")
                    continue
                with suppress(FileNotFoundError):
                    found[inside + entry.name] = entry.stat().st_size
    return found


def sha256(content: bytes) -> str:
    """Return the SHA-256 of `content` in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


# -- records -----------------------------------------------------------------------------------------------------


def write_record(path: Path, value: JSON) -> None:
    """Write `value` as JSON with a checksum line to the new file `path`; on return it is on disk.

    The checksum reveals a partial write, so the file is written in place, without a rename.

    Raises:
        FileExistsError: the file exists already.
    """
    with path.open("xb") as file:
        file.write(record_bytes(value))
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def replace_record(path: Path, value: JSON) -> None:
    """Like `write_record`, but replaces an existing record atomically."""
    with replacing(path) as file:
        file.write(record_bytes(value))


def record_bytes(value: JSON) -> bytes:
    """Return the content of a record's file: one line of JSON and one with its checksum."""
    body = canonical(value).encode() + b"\n"
    return body + _checksum(body)


def read_record(path: Path) -> Any:
    """Return the record in `path`, or None if it is missing or incomplete."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return parse_record(content)


def parse_record(content: bytes) -> Any:
    """Return the value of a record, or None if it is incomplete."""
    body, newline, checksum = content.partition(b"\n")
    return json.loads(body) if checksum == _checksum(body + newline) else None


def _checksum(body: bytes) -> bytes:
    return f"sha256:{sha256(body)}\n".encode()


# -- Zarr's metadata ---------------------------------------------------------------------------------------------


def group(attributes: Mapping[str, JSON]) -> dict[str, Any]:
    """Return the metadata of a Zarr v3 group."""
    return {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}


def write_metadata(folder: Path, document: Mapping[str, Any]) -> None:
    """Write `document` with its seal as the metadata of a Zarr folder, atomically; on return it is on disk."""
    # The last attribute, so that the seal can be found from the end, whatever the others contain.
    unsealed = {**document, "attributes": {**document["attributes"], "seal": ""}}
    before, key, after = json.dumps(unsealed, indent=2, allow_nan=False).encode().rpartition(_SEAL)
    write_changed(folder / METADATA, before + key + sha256(before + key + after).encode() + after)


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a Zarr folder as it was written, without the seal.

    Raises:
        CorruptError: it is missing, or does not match its seal.
    """
    path = folder / METADATA
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None
    before, key, after = content.rpartition(_SEAL)
    if after[:_DIGITS] != sha256(before + key + after[_DIGITS:]).encode():
        raise CorruptError(f"{path} is damaged (its bytes do not match their checksum)")
    document: dict[str, Any] = json.loads(content)
    del document["attributes"]["seal"]
    return document
