"""Kill real commands at random moments, and run them again until they have finished.

`Forks` starts one process that imports everything once and forks a child for each command, so a kill hits the command's
work, not seconds of imports. A moment is a time, or a write: the nth time that the child opens a file for writing,
renames, removes or creates something. The kill is just before that, or after the file was opened and before it is
written.
"""

import gc
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

__all__ = ["Forks", "Outcome", "kill_at_random"]

DSU: Final = "dsu_cli.main:run"
_WRITES: Final = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate")


@dataclass(frozen=True)
class Outcome:
    """The result of a command: exit status (-9 if it was killed), seconds, number of writes, and its output."""

    status: int
    seconds: float
    writes: int
    said: str

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class Forks:
    """Runs commands in a working folder, each in a separate process.

    Args:
        folder: the working folder.
        program: `module:function` that reads `sys.argv`; by default `dsu` itself.
        environment: further environment variables for it.

    Example:
        >>> with Forks(tmp_path) as forks:
        ...     whole = forks.run(["cache-features", "shapes"])
        ...     forks.run(["cache-features", "shapes"], at_write=whole.writes // 2).killed
        True
    """

    def __init__(self, folder: Path, program: str = DSU, environment: Mapping[str, str] | None = None) -> None:
        self.folder, self._program, self._environment = folder, program, environment or {}

    @property
    def pid(self) -> int:
        """The process id of the server, whose children are the commands."""
        return self._server.pid

    def __enter__(self) -> "Forks":
        # Without variables that would send a command to other folders.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DSU_")}
        self._server = subprocess.Popen(
            [sys.executable, __file__, self._program],
            cwd=self.folder,
            env=environment | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} | self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()

    def run(
        self, command: Sequence[object], after: float | None = None, at_write: int | None = None, opened: bool = False
    ) -> Outcome:
        """Run the program with these arguments.

        Kill it `after` some seconds, or `at_write`, its nth write (with the file `opened`, or just before), unless it
        ends earlier.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        order = {"command": [str(word) for word in command], "after": after, "at_write": at_write, "opened": opened}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return Outcome(**json.loads(self._server.stdout.readline()))


def kill_at_random(
    forks: Forks,
    command: Callable[[], Sequence[object]],
    *,
    kills: int,
    seed: int,
    fresh: Callable[[], None],
    check_killed: Callable[[], None] = lambda: None,
    check_finished: Callable[[], None],
) -> int:
    """Kill a command at random moments of its run, and run it again each time, until it was killed often enough.

    A third of the kills is at a time, a third just before a write, a third with a file opened and nothing written.
    Whenever a run finishes, its result is checked, removed, and everything starts again.

    Args:
        forks: runs the commands.
        command: returns the next command; may look at the files of the last run (whether it can be resumed).
        kills: the number of successful kills.
        seed: of the moments.
        fresh: removes everything that the command creates.
        check_killed: called after every kill.
        check_finished: called after every finished run; the last run always finishes.

    Returns:
        The number of successful kills.
    """
    moments = random.Random(seed)
    fresh()
    whole = forks.run(command())
    assert whole.status == 0, whole.said
    check_finished()
    fresh()
    landed = 0
    while True:
        alive = landed == kills
        if alive:
            outcome = forks.run(command())
        elif landed % 3 == 0:
            outcome = forks.run(command(), after=moments.uniform(0, whole.seconds))
        else:
            number = moments.randint(1, whole.writes)
            outcome = forks.run(command(), at_write=number, opened=landed % 3 == 2)
        if outcome.killed:
            landed += 1
            check_killed()
            continue
        assert outcome.status == 0, outcome.said
        check_finished()
        if alive:
            return landed
        fresh()


def _serve(program: str) -> None:
    module, _, function = program.partition(":")
    if program in (DSU, "small_shards:run"):
        _warm_up()
    run = getattr(importlib.import_module(module), function)
    gc.freeze()  # so that garbage collection in a child does not copy all these objects
    for line in sys.stdin:
        print(json.dumps(_fork(run, **json.loads(line))), flush=True)
    os._exit(0)  # some imported libraries print errors at shutdown


def _warm_up() -> None:
    """Import and run what is slow the first time, before forking; nothing may start a thread here."""
    import timm.models.vision_transformer  # noqa: F401
    from PIL import Image

    import dsu.training.run_notes  # noqa: F401
    import dsu_cli.cache  # noqa: F401
    from dsu.config import build_config
    from dsu.encoders.weights import load_encoders
    from dsu.network.network import DSUNet
    from dsu.settings import EncoderWeights

    # Slow the first time: loading of plugins, and checks against abstract classes.
    Image.init()
    toy = build_config("toy", hiera_size=128, dino_size=126)
    DSUNet(toy, *load_encoders(toy, EncoderWeights(), hiera=True, dino=True)[:2])


def _fork(
    run: Callable[[], None], command: list[str], after: float | None, at_write: int | None, opened: bool
) -> dict[str, Any]:
    read, write = os.pipe()
    log = Path(f"{os.getpid()}.log").absolute()
    log.touch()  # the child may be killed before it creates it
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        _become(run, command, at_write, opened, write, log)
    os.close(write)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)  # harmless if the child has ended but was not waited for
    _, ended = os.waitpid(child, 0)
    seconds = time.monotonic() - started
    with os.fdopen(read) as pipe:
        writes = int(pipe.read() or 0)
    said = log.read_text()
    log.unlink()
    return {"status": os.waitstatus_to_exitcode(ended), "seconds": seconds, "writes": writes, "said": said}


def _become(
    run: Callable[[], None], command: list[str], at_write: int | None, opened: bool, report: int, log: Path
) -> None:
    """Run the program in the child; never returns."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    # Unlike a power failure, a kill loses no written data, so fsync is not needed.
    os.fsync = lambda fd: None
    writes = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal writes
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if opens or event in _WRITES:
            writes += 1
            if writes == at_write:
                if opens and opened and isinstance(arguments[0], str | bytes):
                    os.open(arguments[0], arguments[2], 0o666)  # creates the file, or truncates it
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    sys.argv = ["dsu", *command]
    status: Any = 0
    try:
        run()
    except SystemExit as left:
        status = left.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(report, str(writes).encode())
        os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1])
