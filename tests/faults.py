"""A full disk: every operation that writes below a folder fails, from the n-th on."""

import builtins
import errno
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

__all__ = ["FullDisk"]


class FullDisk:
    """Counts write operations below `root`, and lets them fail from operation `full_at` (counted from 1) on.

    An operation is a write of bytes (of which half still reach the disk), a flush to the disk, a new folder, or a
    renamed file. Reading and removing still work, as on a full disk.
    """

    def __init__(self, root: Path, full_at: int | None = None) -> None:
        self.operations = 0
        self._root, self._full_at, self._lock = os.path.realpath(root), full_at, threading.Lock()

    @contextmanager
    def mounted(self) -> Iterator["FullDisk"]:
        """Patch all of Python's writing inside a `with` (Zarr's and dsu's; nothing else writes)."""
        with pytest.MonkeyPatch.context() as patch:
            for module in (io, builtins):
                patch.setattr(module, "open", self._opening(io.open))
            for name in ("mkdir", "replace", "rename", "link"):
                patch.setattr(os, name, self._failing(getattr(os, name)))
            patch.setattr(os, "fsync", self._flushing(os.fsync))
            yield self

    def operate(self, path: Any) -> None:
        """Count an operation on `path`; raises if the disk is full."""
        with self._lock:
            self.operations += 1
            full = self._full_at is not None and self.operations >= self._full_at
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))

    def _holds(self, path: Any) -> bool:
        if isinstance(path, int):
            return False
        return os.path.realpath(os.fsdecode(path)).startswith(self._root + os.sep)

    def _failing(self, real: Any) -> Any:
        def failing(path: Any, *more: Any, **options: Any) -> Any:
            if self._holds(path):
                self.operate(path)
            return real(path, *more, **options)

        return failing

    def _flushing(self, real: Any) -> Any:
        def fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if self._holds(path):
                self.operate(path)
            real(descriptor)

        return fsync

    def _opening(self, real: Any) -> Any:
        def opening(file: Any, mode: str = "r", *more: Any, **options: Any) -> IO[Any]:
            if not set(mode) & set("wxa+") or not self._holds(file):
                return real(file, mode, *more, **options)  # type: ignore[no-any-return]
            raw = _Raw(self, os.fspath(file), mode.replace("b", "").replace("t", ""))
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, options.get("encoding"), newline=options.get("newline"))

        return opening


class _Raw(io.FileIO):
    def __init__(self, disk: FullDisk, path: str, mode: str) -> None:
        self._disk = disk
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        try:
            self._disk.operate(self.name)
        except OSError:
            super().write(memoryview(data)[: len(data) // 2])
            raise
        return super().write(data)
