"""Start `dsu` as several processes with torchrun."""

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["HOUSE", "WAYS", "follow", "lines", "said", "shown", "torchrun"]

HOUSE = Path(__file__).parents[1]

WAYS = {"one machine": "--nproc-per-node 8 -m", "two machines": "--nnodes", "srun": "--ntasks", "array": "--part"}
"""For each way to start several processes: a word that identifies its line in docs/scale.md."""


def torchrun(
    arguments: Sequence[str], processes: int = 2, program: Sequence[str] = ("-m", "dsu"), threads: int = 1
) -> "subprocess.Popen[str]":
    """Start `torchrun -m dsu ...` in the working folder; its standard output contains both streams."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return _started([*launcher, *program, *arguments], OMP_NUM_THREADS=str(threads))


def _started(command: Sequence[str], **environment: str) -> "subprocess.Popen[str]":
    path = os.pathsep.join(map(str, (HOUSE, HOUSE / "cache", HOUSE / "cli")))
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(process: "subprocess.Popen[str]") -> str:
    return process.communicate(timeout=300)[0]


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def shown(command: str, way: str) -> str:
    """The line of docs/scale.md that starts a command in one of `WAYS`, without its comment."""
    text = (HOUSE / "docs" / "scale.md").read_text(encoding="utf-8").replace("\\\n", " ")
    found = [line.strip().partition("  #")[0] for line in text.splitlines() if line.startswith("    ")]
    [line] = [line for line in found if f"dsu {command}" in line and WAYS[way] in line]
    return line


def follow(line: str) -> list[str]:
    """Run a line of the documentation in a shell, with two processes instead of many; returns their outputs.

    Several machines, and those of `srun`, are all simulated on this machine.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    [way] = [way for way, word in WAYS.items() if word in line]
    line = line.replace("HOST:29500", f"127.0.0.1:{port}").replace("/16", "/2")
    line = line.replace("--nproc-per-node 8", f"--nproc-per-node {2 if way == 'one machine' else 1}")
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_ID": "0"}
    each: list[dict[str, str]] = {
        "one machine": [{}],
        "two machines": [{}, {}],
        "srun": [
            {**step, "SLURM_JOB_ID": str(port), "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ("0", "1")
        ],
        "array": [{"SLURM_ARRAY_TASK_ID": number} for number in ("1", "2")],
    }[way]
    python = shlex.quote(sys.executable)
    tools = f'torchrun() {{ {python} -m torch.distributed.run "$@"; }}; dsu() {{ {python} -m dsu "$@"; }}'
    srun = 'srun() { while [[ $1 == --* ]]; do if [[ $1 == --*=* ]]; then shift; else shift 2; fi; done; "$@"; }'
    processes = [_started(["bash", "-c", f"{tools}; {srun}; {line}"], OMP_NUM_THREADS="1", **more) for more in each]
    texts = [said(process) for process in processes]
    assert all(process.returncode == 0 for process in processes), texts
    return texts
