"""Who may touch a store: operating system's locks that a dead process cannot keep, and who holds them.

Some file systems (Lustre, some NFS) have no such locks, nor has Windows. There a file that only one process can create
stands for the lock, and its holder touches it every few seconds: one that has not been touched for two minutes is a
dead holder's.
"""

import errno
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import psutil

from dsu_cache.files import BusyError

fcntl: Final[Any] = import_module("fcntl") if find_spec("fcntl") else None
"""None on Windows."""

_BEAT: Final = 15.0
"""Seconds between two signs of life of a holder, where there are no locks."""
_DEAD: Final = 120.0
"""Seconds without one after which it counts as dead."""
_NO_LOCKS: Final = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})

_LOG: Final = logging.getLogger("dsu.cache")


@contextmanager
def locked(path: Path, what: str, patience: float = 0.3) -> Iterator[Callable[[], bool]]:
    """Hold the lock file `path` alone inside a `with`; `what` is what it guards and what is done, for the message.

    The lock belongs to the open file, not to the file's being there: when its process dies, it is free. The file's
    text says who holds it (process, host, since when, command) and is for people only. Not re-entrant.

    Yields a function that says whether `path` still leads to that file: if not, it or its folder was removed or
    renamed, and another process may hold what has its name now.

    Raises:
        BusyError: it is held already, for longer than `patience` in seconds; names the holder.
    """
    descriptor = _open(path)
    try:
        held = _try(descriptor, patience=patience)
        if held is None:
            with _beating(path, what):
                yield lambda: _is_at(path, descriptor)
            return
        if not held:
            raise BusyError(f"{what} by {_holders(path)}: wait until it ends, or stop it")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, _claim())
        try:
            yield lambda: _is_at(path, descriptor)
        finally:
            os.ftruncate(descriptor, 0)
            # Said outright, since a forked child may still have the file open.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


@contextmanager
def _beating(path: Path, what: str) -> Iterator[None]:
    """As `locked`, where the file system has no locks."""
    _say_without_locks(path.parent.resolve())
    sign = _sign(path)
    if _beats(sign):
        raise BusyError(f"{what} by {_holders(sign)}: wait until it ends, or stop it")
    sign.unlink(missing_ok=True)
    try:
        descriptor = os.open(sign, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError as error:
        raise BusyError(f"{what} by {_holders(sign)}: wait until it ends, or stop it") from error
    os.write(descriptor, _claim())
    os.close(descriptor)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT):
            with suppress(OSError):
                os.utime(sign)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        sign.unlink(missing_ok=True)


@cache
def _say_without_locks(folder: Path) -> None:
    _LOG.warning(
        "%s has no locks of the system: remove and rebuild no store that others read; what is killed on "
        "another host keeps its folder busy for two minutes",
        folder,
    )


def _sign(path: Path) -> Path:
    return path.with_name(f"{path.name}.held")


def _beats(sign: Path) -> bool:
    """Whether the holder of a lock without the system's help may be alive."""
    try:
        claim, age = sign.read_text(encoding="utf-8", errors="replace"), time.time() - sign.stat().st_mtime
    except FileNotFoundError:
        return False
    return age < _DEAD and _may_live(claim)


@contextmanager
def creating(folder: Path) -> Iterator[None]:
    """Hold a folder that is becoming a store, and has no lock file yet, inside a `with`.

    Raises:
        BusyError: another process holds it.
    """
    if fcntl is None:  # a folder can't be opened there
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if _try(descriptor) is False:  # without locks it is made by whoever comes: each step is atomic
            raise BusyError(f"{folder} is being made by another process: wait until it ends, or stop it")
        yield
    finally:
        os.close(descriptor)


def share(path: Path, what: str) -> int | None:
    """Hold the lock file `path` together with others who share it, until the descriptor returned is closed.

    Returns None where the file cannot be written (a read-only disk): there is no one to hold out.

    Raises:
        BusyError: someone holds it alone; names the holder.
    """
    try:
        descriptor = _open(path)
    except OSError:
        return None
    if _try(descriptor, patience=0):  # alone for a moment: then everyone named in the file is gone
        os.ftruncate(descriptor, 0)
    if _try(descriptor, shared=True) is False or _beats(_sign(path)):
        os.close(descriptor)
        raise BusyError(f"{what} by {_holders(path)}: wait until it ends, or stop it")
    os.write(descriptor, _claim())
    return descriptor


def holder(path: Path) -> str | None:
    """Say who holds the lock file `path` alone; None if no one does."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except PermissionError:
        return "another user, maybe: its lock can't be read"
    try:
        free = _try(descriptor, shared=True, patience=0)
        if free is None:
            path, free = _sign(path), not _beats(_sign(path))
        return None if free else _holders(path)
    finally:
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)


def _try(descriptor: int, *, shared: bool = False, patience: float = 0.3) -> bool | None:
    """Whether a lock could be had in so many seconds; None where there are none.

    Others may hold it for a moment, to see whether it is free.
    """
    if fcntl is None:
        return None
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            raise


def _claim() -> bytes:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]) or Path(sys.executable).name
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} since {since} ({command})\n".encode()


def _holders(path: Path) -> str:
    """Who has signed the file and may still be alive: a dead process leaves its line, not its lock."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return " and ".join(dict.fromkeys(line for line in lines if _may_live(line))) or "another process"


def _may_live(line: str) -> bool:
    words = line.split()
    if len(words) < 4 or not words[1].isdecimal() or words[3] != socket.gethostname():
        return bool(words)
    return bool(psutil.pid_exists(int(words[1])))
