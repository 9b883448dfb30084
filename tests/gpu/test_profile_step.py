"""The profiling script runs on a CPU, before it is used on a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "profile_step.py"


@pytest.mark.slow
def test_every_kind_of_case_runs() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "toy", "allx2", "2x2", "0x2", "allx2e"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "allx2e: " in done.stdout
