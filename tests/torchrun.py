"""Start `dsu` as several processes with torchrun."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["HOUSE", "lines", "said", "torchrun"]

HOUSE = Path(__file__).parents[1]


def torchrun(
    arguments: Sequence[str], processes: int = 2, program: Sequence[str] = ("-m", "dsu"), threads: int = 1
) -> "subprocess.Popen[str]":
    """Start `torchrun -m dsu ...` in the working folder; its standard output contains both streams."""
    path = os.pathsep.join(map(str, (HOUSE, HOUSE / "cache", HOUSE / "cli")))
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *program, *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(process: "subprocess.Popen[str]") -> str:
    return process.communicate(timeout=300)[0]


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]
