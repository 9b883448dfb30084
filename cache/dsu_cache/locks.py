"""One writer at a time: an operating system's lock that a dead process cannot keep."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsu_cache.errors import BusyError


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` inside a `with`; `what` is what it guards, for the message.

    The lock belongs to the open file, not to the file's being there: when its process dies, it is free. The file
    holds the process id and the command of the holder. Not re-entrant.

    Raises:
        BusyError: it is held already; names the holder.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BusyError(f"{what} is being written by {holder}: wait until it ends, or stop it") from None
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} ({' '.join(sys.argv) or sys.executable})\n")
            file.flush()
            yield
        finally:
            file.truncate(0)
            # Said outright, since a forked child may still have the file open.
            fcntl.flock(file, fcntl.LOCK_UN)
