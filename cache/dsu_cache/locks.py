"""Locks on a store, which the operating system releases when a process dies, and who holds them.

Some file systems (Lustre, some NFS) and Windows have no such locks. There a lock is a file that only one process can
create, and whose holder touches it every few seconds. If it was not touched for two minutes, its holder counts as dead.

Several processes may share a lock, each as one part of a division (3 of 16 parts). Each also holds its own file next to
the lock file: so no part runs twice, and the parts are known on file systems without locks.
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
from typing import Any, Final, TypeAlias

import psutil

from dsu_cache.files import BusyError

fcntl: Final[Any] = import_module("fcntl") if find_spec("fcntl") else None
"""None on Windows."""

_HEARTBEAT_SECONDS: Final = 15.0
"""Seconds between two heartbeats of a holder, on file systems without locks."""
_DEAD_AFTER_SECONDS: Final = 120.0
"""Seconds without a heartbeat after which a holder counts as dead."""
_HEARTBEAT_SUFFIX: Final = ".held"
"""Suffix of the file that replaces a lock."""
_SHARE_SEPARATOR: Final = "-of-"
"""Separates number and division in the name of a share's file."""
_UNSUPPORTED: Final = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})

_LOG: Final = logging.getLogger("dsu.cache")

Share: TypeAlias = tuple[int, str]
"""A process's number and the division that shares a lock: `(3, "16 parts")`."""


@contextmanager
def locked(path: Path, what: str, patience: float = 0.3, share: Share | None = None) -> Iterator[Callable[[], bool]]:
    """Hold the lock file `path` inside a `with`; `what` says for the message what it guards and what is being done.

    It is held exclusively, or with a `share` together with the other parts of the division.

    The lock belongs to the open file: when its process dies, it is released, even though the file remains. The file's
    text names the holder (process, host, start, command) and is for people only. Not re-entrant.

    Yields a function that returns whether `path` is still that file. If not, the file or its folder was removed or
    renamed, and another process may hold a new lock of that name.

    Raises:
        BusyError: another process holds it for longer than `patience` seconds; names the holders.
    """
    descriptor, held = _open_lock_file(path), None
    try:
        held = _try_lock(descriptor, shared=share is not None, patience=patience)
        if held is False or not _is_same_file(path, descriptor):
            raise _busy_error(what, path)
        if share is not None:
            with _hold_share(path, what, share):
                yield lambda: _is_same_file(path, descriptor)
            return
        if held is None:
            with _hold_by_heartbeat(path, what):
                yield lambda: _is_same_file(path, descriptor)
            return
        _remove_shares(path)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, _holder_line())
        try:
            yield lambda: _is_same_file(path, descriptor)
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        if held:
            # Unlocked explicitly, since a forked child may still have the file open.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextmanager
def _hold_share(path: Path, what: str, share: Share) -> Iterator[None]:
    """Hold the file of this process's share inside a `with`.

    The file is created before the others are checked, so of two conflicting processes at least one sees the other.
    """
    number, division = share
    own = path.with_name(f"{path.name}.{number}{_SHARE_SEPARATOR}{division.replace(' ', '-')}")
    with locked(own, f"{what} as {number} of {division}"):
        try:
            if _may_be_held(_heartbeat_file(path)):
                raise _busy_error(what, path)
            for other in _share_files(path):
                if other.name.partition(_SHARE_SEPARATOR)[2] != own.name.partition(_SHARE_SEPARATOR)[2] and holder(
                    other
                ):
                    raise _busy_error(f"{what} in another division", other)
            yield
        finally:
            with suppress(OSError):  # Windows can't remove open files
                own.unlink()


@contextmanager
def _hold_by_heartbeat(path: Path, what: str) -> Iterator[None]:
    """Like an exclusive `locked`, on file systems without locks."""
    _warn_without_locks(path.parent.resolve())
    sign = _heartbeat_file(path)
    if _may_be_held(sign):
        raise _busy_error(what, path)
    sign.unlink(missing_ok=True)
    try:
        descriptor = os.open(sign, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError as error:
        raise _busy_error(what, path) from error
    os.write(descriptor, _holder_line())
    os.close(descriptor)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(sign)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    try:
        for own in _share_files(path):
            if _may_be_held(_heartbeat_file(own)):
                raise _busy_error(what, own)
        _remove_shares(path)
        yield
    finally:
        ended.set()
        sign.unlink(missing_ok=True)


@cache
def _warn_without_locks(folder: Path) -> None:
    _LOG.warning(
        "the file system of %s does not support locks: don't remove or rebuild a store while others read it; a "
        "process killed on another host keeps its folder locked for two minutes",
        folder,
    )


def _heartbeat_file(path: Path) -> Path:
    return path.with_name(f"{path.name}{_HEARTBEAT_SUFFIX}")


def _share_files(path: Path) -> list[Path]:
    """The files of processes that share a lock, or did."""
    return sorted(
        own for own in path.parent.glob(f"{path.name}.*{_SHARE_SEPARATOR}*") if own.suffix != _HEARTBEAT_SUFFIX
    )


def _may_be_held(sign: Path) -> bool:
    """Whether the holder of a lock may be alive, on file systems without locks."""
    try:
        claim, age = sign.read_text(encoding="utf-8", errors="replace"), time.time() - sign.stat().st_mtime
    except FileNotFoundError:
        return False
    return age < _DEAD_AFTER_SECONDS and _may_be_running(claim)


def _remove_shares(path: Path) -> None:
    """Remove the share files of dead processes, while the lock is held exclusively."""
    for own in _share_files(path):
        own.unlink(missing_ok=True)
        _heartbeat_file(own).unlink(missing_ok=True)


@contextmanager
def creating(folder: Path) -> Iterator[None]:
    """Hold a folder in which a store is being created, and which has no lock file yet, inside a `with`.

    Raises:
        BusyError: another process holds it.
    """
    if fcntl is None:  # folders can't be opened there
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if _try_lock(descriptor) is False:  # without locks, several processes may create it: each step is atomic
            raise BusyError(f"another process is creating {folder}: wait until it ends, or stop it")
        yield
    finally:
        os.close(descriptor)


def share(path: Path, what: str) -> int | None:
    """Hold the lock file `path` together with other readers, until the returned descriptor is closed.

    Returns None if the file can't be written (a read-only disk): then nobody can write to the store either.

    Raises:
        BusyError: another process holds it exclusively; names the holder.
    """
    try:
        descriptor = _open_lock_file(path)
    except OSError:
        return None
    if _try_lock(descriptor, patience=0):  # exclusively for a moment: then every process named in the file is gone
        os.ftruncate(descriptor, 0)
    if _try_lock(descriptor, shared=True) is False or _may_be_held(_heartbeat_file(path)):
        os.close(descriptor)
        raise _busy_error(what, path)
    os.write(descriptor, _holder_line())
    return descriptor


def holder(path: Path) -> str | None:
    """Return who holds the lock file `path`, exclusively or shared; None if nobody does."""
    found = [one for file in (path, *_share_files(path)) if (one := _holder_of_file(file))]
    return " and ".join(dict.fromkeys(found)) or None


def _holder_of_file(path: Path) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except PermissionError:
        return "maybe another user: the lock can't be read"
    try:
        free = _try_lock(descriptor, shared=True, patience=0)
        if free is None:
            free = not _may_be_held(_heartbeat_file(path))
        return None if free else _describe_holders(path)
    finally:
        os.close(descriptor)


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _open_lock_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)


def _try_lock(descriptor: int, *, shared: bool = False, patience: float = 0.3) -> bool | None:
    """Whether a lock could be acquired within `patience` seconds; None on file systems without locks.

    Other processes may hold it for a moment to check whether it is free.
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
            if error.errno in _UNSUPPORTED:
                return None
            raise


def _holder_line() -> bytes:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]) or Path(sys.executable).name
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} since {since} ({command})\n".encode()


def _busy_error(what: str, path: Path) -> BusyError:
    return BusyError(f"{what} by {_describe_holders(path)}: wait until it ends, or stop it")


def _describe_holders(path: Path) -> str:
    """Processes named in the file, or in a share's, that may still be alive: a dead process leaves its line, but not
    its lock."""
    lines: list[str] = []
    for file in (path, *_share_files(path)):
        for signed in (file, _heartbeat_file(file)):
            with suppress(FileNotFoundError):
                lines += signed.read_text(encoding="utf-8", errors="replace").splitlines()
    named = list(dict.fromkeys(line for line in lines if _may_be_running(line)))
    more = [f"{len(named) - 2:,} more"] if len(named) > 2 else []
    return " and ".join(named[:2] + more) or "another process"


def _may_be_running(line: str) -> bool:
    words = line.split()
    if len(words) < 4 or not words[1].isdecimal() or words[3] != socket.gethostname():
        return bool(words)
    return bool(psutil.pid_exists(int(words[1])))
