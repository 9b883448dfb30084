from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsu_cache import BusyError
from dsu_cache.locks import locked

HOLD = """
import sys
from pathlib import Path
from dsu_cache.locks import locked
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
    with hold(path) as holder:
        with (
            pytest.raises(
                BusyError, match=rf"the toy is held by process {holder.pid} on .* since 2\d\d\d-.* \(.*lock\)"
            ),
            locked(path, "the toy is held"),
        ):
            pytest.fail("two writers")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert "process" in path.read_text(), "a killed process cleared up after itself"
    with locked(path, "the toy is held"):
        assert path.read_text().startswith(f"process {os.getpid()} ")


def test_a_second_lock_in_this_process_is_refused_and_the_first_stands(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    for _ in range(2):  # leaving frees it
        with locked(path, "the toy"), pytest.raises(BusyError, match=f"process {os.getpid()}"), locked(path, "it"):
            pytest.fail("two writers")
