from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from dsu_cache import BusyError
from dsu_cache.locks import holder, locked, share

HOLD = """
import sys
import time
from pathlib import Path
from dsu_cache.locks import holder, locked, share
with locked(Path(sys.argv[1]), "it", share=(int(sys.argv[2]), "3 parts") if sys.argv[2:] else None):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: Path, *part: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(path), *part]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_holder_is_named_and_its_death_releases_the_lock(tmp_path: Path) -> None:
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
    assert "process" in path.read_text(), "the killed process cleaned up"
    with locked(path, "the toy is held"):
        assert path.read_text().startswith(f"process {os.getpid()} ")


def test_a_second_lock_in_this_process_is_refused_and_the_first_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    for _ in range(2):  # leaving the context releases it
        with locked(path, "the toy"), pytest.raises(BusyError, match=f"process {os.getpid()}"), locked(path, "it"):
            pytest.fail("two writers")


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("without_flock")
def test_without_the_systems_locks_a_second_holder_is_refused(tmp_path: Path) -> None:
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
    """On this host by its process id, on another host by the age of its last heartbeat."""
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
def test_a_holder_sends_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsu_cache.locks._HEARTBEAT_SECONDS", 0.01)
    with locked(tmp_path / "lock", "it is held"):
        os.utime(tmp_path / "lock.held", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / "lock.held").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "lock.held").stat().st_mtime > 0


PARTS = "3 parts"


@pytest.fixture(params=["with flock", "without flock"])
def either_way(request: pytest.FixtureRequest) -> None:
    if request.param == "without flock":
        request.getfixturevalue("without_flock")


@pytest.mark.usefixtures("either_way")
def test_processes_that_share_a_lock_keep_others_out_and_leave_no_files(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with ExitStack() as held:
        for number in (1, 3):
            held.enter_context(locked(path, "the toy is written", share=(number, PARTS)))
        assert f"process {os.getpid()}" in (holder(path) or "")
        for share_, said in (
            (None, rf"the toy is written by process {os.getpid()} "),
            ((3, PARTS), rf"the toy is written as 3 of 3 parts by process {os.getpid()} "),
            ((2, "4 parts"), "the toy is written in another division by process"),
            ((1, "3 processes"), "the toy is written in another division by process"),
        ):
            with pytest.raises(BusyError, match=said), locked(path, "the toy is written", share=share_):
                pytest.fail(f"{share_} got in")
        with locked(path, "the toy is written", share=(2, PARTS)):
            pass
    assert holder(path) is None
    with (
        locked(path, "the toy is written"),
        pytest.raises(BusyError, match="is written by process"),
        locked(path, "the toy is written", share=(1, PARTS)),
    ):
        pytest.fail("a share next to an exclusive holder")
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]


def test_the_share_of_a_dead_process_keeps_nobody_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path, "2") as process:
        with locked(path, "it", share=(1, PARTS)):
            pass
        with pytest.raises(BusyError, match=rf"it by process {process.pid} "), locked(path, "it"):
            pytest.fail("an exclusive holder next to a share")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "lock.2-of-3-parts").exists(), "the killed process cleaned up"
    with locked(path, "it"):
        assert [file.name for file in tmp_path.iterdir()] == ["lock"]


@pytest.mark.usefixtures("without_flock")
def test_without_the_systems_locks_the_share_of_a_dead_process_is_noticed(tmp_path: Path) -> None:
    path, own = tmp_path / "lock", tmp_path / "lock.2-of-3-parts"
    own.touch()
    sign = own.with_name(f"{own.name}.held")
    for host, free in (("elsewhere", False), (socket.gethostname(), True)):
        sign.write_text(f"process {2**22 + 17} on {host} since 2026-01-01 00:00:00 (dsu cache-features)\n")
        if free:
            with locked(path, "it"):
                assert not own.exists() and not sign.exists()
        else:
            with pytest.raises(BusyError, match="on elsewhere"), locked(path, "it"):
                pytest.fail("an exclusive holder next to a share")
            assert "on elsewhere" in (holder(path) or "")


def test_a_lock_on_a_removed_file_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    flock = fcntl.flock

    def removing(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        path.unlink(missing_ok=True)

    monkeypatch.setattr(fcntl, "flock", removing)
    with pytest.raises(BusyError), locked(path, "it"):
        pytest.fail("held a file that is gone")
