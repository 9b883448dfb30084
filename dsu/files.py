"""Atomic file writing."""

import hashlib
import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

from dsu.errors import DsuError

PARTIAL: Final = ".partial"
"""Suffix of temporary files."""


def make_folder(path: Path, *, parents: bool = True) -> None:
    """Create a folder, optionally with its parents, unless it exists. Raises `DsuError` naming it."""
    try:
        path.mkdir(parents=parents, exist_ok=True)
    except OSError as error:
        reason = "a file has that name" if isinstance(error, FileExistsError) else error.strerror or error
        raise DsuError(
            f"The folder {path} can't be created ({reason}): correct the path or free some space, and run again."
        ) from error


def atomic_write(path: Path, content: bytes) -> None:
    """Write a temporary file, flush it, then rename it: readers see either the old or the new content.

    The folder must exist: after a disk was unmounted, files must not be written elsewhere. Raises `DsuError` naming
    the file, and removes the temporary file.
    """
    # Unique for each file and writer. The hash is short: the file's own name may already have the maximum length.
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    temporary = path.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}{PARTIAL}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise DsuError(
            f"{path} can't be written ({error.strerror or error}): free some space or fix the folder, and run again; "
            "finished work is kept."
        ) from error


def write_json(path: Path, value: object, indent: int = 1) -> None:
    """Write one JSON document, as `atomic_write`."""
    atomic_write(path, (json.dumps(value, indent=indent) + "\n").encode())


def sweep(folder: Path) -> None:
    """Remove temporary files of killed writers. Call this only while holding the folder's lock."""
    for stray in folder.glob(f".*{PARTIAL}"):
        writer = stray.name.split(".")[2]
        # A command without a lock, such as `dsu eval`, may be writing here: then its process still exists.
        if writer.isdecimal() and not psutil.pid_exists(int(writer)):
            with suppress(OSError):
                stray.unlink()
