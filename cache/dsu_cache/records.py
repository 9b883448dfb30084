"""Small JSON records that survive a crash: each carries its own checksum and is flushed down to its folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeAlias

JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None


def canonical(value: JSON) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, ASCII, and no NaN or infinity.

    Raises:
        TypeError: `value` holds something that JSON has no word for.
        ValueError: `value` holds a NaN or an infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` once the `with` is left: whole, and on the disk, or not at all."""
    remove_strays(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with beside.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def remove_strays(path: Path) -> None:
    """Remove what interrupted writes of `path` left beside it."""
    for stray in path.parent.glob(f"{path.name}.*.partial"):
        stray.unlink(missing_ok=True)


def make_folders(within: Path, relative: Path) -> None:
    """Make what is missing of the folders `relative` inside a folder; on return their names are on the disk.

    Raises:
        FileNotFoundError: `within` is not there.
    """
    for depth in range(len(relative.parts)):
        folder = within.joinpath(*relative.parts[: depth + 1])
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            sync(folder.parent)


def write_record(path: Path, value: JSON) -> None:
    """Write `value` as JSON and a checksum line to the new file `path`; on return it is on the disk.

    The checksum makes a torn write visible, so the file is written in place: no rename is needed.

    Raises:
        FileExistsError: there is a file of that name already.
    """
    body = canonical(value).encode() + b"\n"
    with path.open("xb") as file:
        file.write(body + _checksum(body))
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def read_record(path: Path) -> JSON:
    """Return the record in `path`, or None where there is none or only part of one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    body, newline, checksum = content.partition(b"\n")
    if checksum != _checksum(body + newline):
        return None
    value: JSON = json.loads(body)
    return value


def _checksum(body: bytes) -> bytes:
    return b"sha256:" + hashlib.sha256(body).hexdigest().encode() + b"\n"
