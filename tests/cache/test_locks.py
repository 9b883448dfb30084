from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsu_cache import BusyError
from dsu_cache.locks import holder, locked, share

HOLD = """
import sys
import time
from pathlib import Path
from dsu_cache.locks import holder, locked, share
with locked(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_named_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path) as process:
        with (
            pytest.raises(
                BusyError, match=rf"the toy is held by process {process.pid} on .* since 2\d\d\d-.* \(.*lock\)"
            ),
            locked(path, "the toy is held"),
        ):
            pytest.fail("two writers")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "process" in path.read_text(), "a killed process cleared up after itself"
    with locked(path, "the toy is held"):
        assert path.read_text().startswith(f"process {os.getpid()} ")


def test_a_second_lock_in_this_process_is_refused_and_the_first_stands(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    for _ in range(2):  # leaving frees it
        with locked(path, "the toy"), pytest.raises(BusyError, match=f"process {os.getpid()}"), locked(path, "it"):
            pytest.fail("two writers")


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("without_flock")
def test_without_the_systems_locks_two_holders_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, "the toy is held"):
        assert str(os.getpid()) in (holder(path) or "")
        with (
            pytest.raises(BusyError, match=rf"the toy is held by process {os.getpid()} "),
            locked(path, "the toy is held"),
        ):
            pass
        with pytest.raises(BusyError, match="the toy is read"):
            share(path, "the toy is read")
    assert holder(path) is None
    with locked(path, "the toy is held"):
        pass


@pytest.mark.usefixtures("without_flock")
@pytest.mark.parametrize(
    ("host", "age", "free"), [("elsewhere", 60, False), ("elsewhere", 121, True), ("here", 1, True)]
)
def test_without_the_systems_locks_a_dead_holder_is_noticed(tmp_path: Path, host: str, age: float, free: bool) -> None:
    """On this host by its process, on another one by how long it has given no sign."""
    sign = tmp_path / "lock.held"
    host = socket.gethostname() if host == "here" else host
    sign.write_text(f"process {2**22 + 17} on {host} since 2026-01-01 00:00:00 (dsu train-head)\n")
    os.utime(sign, (time.time() - age,) * 2)
    if free:
        with locked(tmp_path / "lock", "it is held"):
            assert str(os.getpid()) in sign.read_text()
        assert not sign.exists()
    else:
        with pytest.raises(BusyError, match="on elsewhere"), locked(tmp_path / "lock", "it is held"):
            pass


@pytest.mark.usefixtures("without_flock")
def test_a_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsu_cache.locks._BEAT", 0.01)
    with locked(tmp_path / "lock", "it is held"):
        os.utime(tmp_path / "lock.held", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / "lock.held").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "lock.held").stat().st_mtime > 0
