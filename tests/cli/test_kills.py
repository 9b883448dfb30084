"""Commands that are killed at random moments (SIGKILL) and run again give the same files as an uninterrupted run.

`DSU_KILLS` is the number of kills of each command: 30 by default, `DSU_KILLS=300` for a thorough run.
"""

import csv
import os
import random
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from kills import Forks, Outcome, kill_at_random
from PIL import Image
from support import TINY

KILLS = int(os.environ.get("DSU_KILLS", "30"))

LOCKS = ("lock", "readers")
"""Files that name a store's holders, for people: process ids and times, left behind by killed processes."""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("killed")) as forks:
        yield forks


@pytest.fixture(scope="module")
def shapes(forks: Forks, drawn: Path) -> Path:
    """A data set in the working folder: small, since every kill takes a part of a run."""
    folder = forks.folder / "shapes"
    for part, count in (("train", 4), ("test", 4)):
        for inner in ("images", "masks"):
            (folder / part / inner).mkdir(parents=True)
            for path in sorted((drawn / part / inner).iterdir())[:count]:
                shutil.copy(path, folder / part / inner)
    return folder


def contents(root: Path) -> dict[str, bytes]:
    """The content of every file below stores, by path, without the locks.

    A manifest's number, which is higher after a kill between two generations, does not count, only its content.
    """
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not (path.parent.name == "manifest" and path.name in LOCKS):
            name = path.relative_to(root)
            generation = path.parent.name == "manifest" and path.stem.isdecimal()
            key = str(name.with_name("generation") if generation else name)
            assert key not in found, f"two generations of {key}"
            found[key] = path.read_bytes()
    return found


def test_stage_one_makes_the_same_store_after_kills(
    forks: Forks, shapes: Path, record_property: Callable[[str, object], None]
) -> None:
    root = forks.folder / "features"
    command = ["cache-features", shapes, *TINY, "--features", "V,S1", "--cache-root", root, "--quiet"]
    wanted: dict[str, bytes] = {}

    def check_finished() -> None:
        found = contents(root)
        wanted.update(wanted or found)
        assert found.keys() == wanted.keys()
        assert [name for name in found if found[name] != wanted[name]] == []

    survived = kill_at_random(
        forks,
        lambda: command,
        kills=KILLS,
        seed=5,
        fresh=lambda: shutil.rmtree(root, ignore_errors=True),
        check_finished=check_finished,
    )
    assert len(wanted) > 30 and not [name for name in wanted if "partial" in name]
    record_property("kills survived by cache-features", survived)
    assert survived == KILLS


@pytest.fixture(scope="module")
def head(forks: Forks, shapes: Path) -> Path:
    """A head trained for one epoch, and the features of the test split."""
    root = forks.folder / "for-predict"
    for command in (
        ["cache-features", shapes, *TINY, "--features", "V", "--views", 1, "--cache-root", root],
        ["train-head", shapes, "--cache-root", root, "--epochs", 1, "--views", 1, "--out", forks.folder / "run"],
    ):
        outcome = forks.run([*command, "--quiet"])
        assert outcome.status == 0, outcome.said
    return forks.folder / "run" / "head.safetensors"


def pictures(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.glob("*/*.png") if not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_killed_prediction_leaves_no_partial_mask_and_the_next_run_completes_it(
    forks: Forks, head: Path, record_property: Callable[[str, object], None]
) -> None:
    out = forks.folder / "masks"
    command = ["predict", "--head", head, "--out", out, "--batch-size", 1, "--quiet"]
    command += ["--cache-root", forks.folder / "for-predict"]
    wanted: dict[str, bytes] = {}
    record: list[bytes] = []

    def check_killed() -> None:
        found = pictures(out)
        assert [name for name in found if found[name] != wanted[name]] == [], "a mask is partial"

    def check_finished() -> None:
        wanted.update(wanted or pictures(out))
        record.append((out / "predictions.json").read_bytes())
        assert pictures(out) == wanted
        assert record[-1] == record[0]

    survived = kill_at_random(
        forks,
        lambda: command,
        kills=KILLS,
        seed=6,
        fresh=lambda: shutil.rmtree(out, ignore_errors=True),
        check_killed=check_killed,
        check_finished=check_finished,
    )
    assert len(wanted) == 5, "four of the test split, and the validation share"
    for path in out.glob("*/*.png"):
        Image.open(path).verify()
    record_property("kills survived by predict", survived)
    assert survived == KILLS


UNMEASURED = ("seconds", "images_per_second", "data_wait", "peak_memory_gb")
"""Columns that differ between two runs of the same training: time and memory."""


@pytest.fixture(scope="module")
def training(forks: Forks, shapes: Path) -> Callable[[Path], list[object]]:
    """The command that starts or resumes training in a folder: two epochs of two steps, each with a checkpoint."""
    root = forks.folder / "for-training"
    cached = forks.run(["cache-features", shapes, *TINY, "--features", "V", "--cache-root", root, "--quiet"])
    assert cached.status == 0, cached.said

    def command(run: Path) -> list[object]:
        train = ["train-head", shapes, "--cache-root", root, "--epochs", 2, "--batch-size", 2]
        go_on = ["--resume"] if (run / "checkpoint.pt").exists() else ["--overwrite"] if run.exists() else []
        return [*train, "--checkpoint-steps", 1, "--val-fraction", 0, "--out", run, "--quiet", *go_on]

    return command


def trained(run: Path) -> dict[str, bytes]:
    """The files of a run by path, without its checkpoint, and with a table without times."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name != "checkpoint.pt")
    found = {path.relative_to(run).as_posix(): path.read_bytes() for path in files}
    rows = [
        [value for name, value in row.items() if name not in UNMEASURED]
        for row in csv.DictReader(found["metrics.csv"].decode().splitlines())
    ]
    return found | {"metrics.csv": repr(rows).encode()}


def test_training_gives_the_same_weights_after_kills(
    forks: Forks, training: Callable[[Path], list[object]], record_property: Callable[[str, object], None]
) -> None:
    run = forks.folder / "killed-run"
    wanted: dict[str, bytes] = {}

    def check_finished() -> None:
        found = trained(run)
        wanted.update(wanted or found)
        assert found == wanted
        assert not list(run.glob(".*")), "a partial file was left"

    survived = kill_at_random(
        forks,
        lambda: training(run),
        kills=KILLS,
        seed=7,
        fresh=lambda: shutil.rmtree(run, ignore_errors=True),
        check_finished=check_finished,
    )
    record_property("kills survived by train-head", survived)
    assert survived == KILLS


# -- several processes, of which one is killed -------------------------------------------------------------------


class Crowd:
    """Several processes that run commands at the same time; one of them is killed."""

    def __init__(self, servers: Sequence[Forks]) -> None:
        self.servers = servers
        self._pool = ThreadPoolExecutor(len(servers))

    def run(self, commands: Sequence[Sequence[object]], victim: int, together: bool, **moment: float) -> list[Outcome]:
        """Run a command on each server; kill one at the given moment, and all others if they belong `together`."""
        running = [
            self._pool.submit(server.run, command, **(moment if number == victim else {}))  # type: ignore[arg-type]
            for number, (server, command) in enumerate(zip(self.servers, commands, strict=True))
        ]
        if running[victim].result().killed and together:
            for server in self.servers:
                for child in psutil.Process(server.pid).children():
                    child.send_signal(signal.SIGTERM)
        return [one.result() for one in running]


def killed(
    crowd: Crowd,
    commands: Callable[[], Sequence[Sequence[object]]],
    root: Path,
    together: bool,
    kills: int,
    seed: int,
    contents: Callable[[Path], dict[str, bytes]] = contents,
) -> int:
    """Kill one of several processes at random moments and run all again, until enough were killed; returns how many."""
    moments = random.Random(seed)
    whole = crowd.run(commands(), 0, together)
    assert all(one.status == 0 for one in whole), [one.said for one in whole]
    wanted, landed = contents(root), 0
    shutil.rmtree(root)
    while True:
        victim = moments.randrange(len(whole))
        moment: dict[str, float] = {"after": moments.uniform(0, whole[victim].seconds)}
        if landed % 3:
            moment = {"at_write": moments.randint(1, whole[victim].writes), "opened": landed % 3 == 2}
        outcomes = crowd.run(commands(), victim, together, **(moment if landed < kills else {}))
        if any(one.killed for one in outcomes):
            landed += 1
            others = [one for one in outcomes if not one.killed]
            assert together or all(one.status == 0 for one in others), [one.said for one in others]
            for one in others:  # processes that get SIGTERM before they are connected print nothing
                assert one.said.count("error: ") == (one.status == 1) and "Traceback" not in one.said, one.said
                assert not together or one.seconds < outcomes[victim].seconds + 60, "it hangs"
            continue
        assert all(one.status == 0 for one in outcomes), [one.said for one in outcomes]
        found = contents(root)
        assert sorted({*found, *wanted} - {name for name in found if found[name] == wanted.get(name)}) == []
        if landed >= kills:
            return landed
        shutil.rmtree(root)


@pytest.fixture
def few(drawn: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "few"
    for inner in ("images", "masks"):
        (folder / inner).mkdir(parents=True)
        for path in sorted((drawn / "train" / inner).iterdir())[:7]:
            shutil.copy(path, folder / inner)
    return folder


def test_killed_parts_give_the_same_store(
    few: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The other processes continue with their parts."""
    root = tmp_path / "features"
    command = ["cache-features", few, *TINY, "--features", "V,S1", "--cache-root", root]
    with ExitStack() as held:
        servers = [held.enter_context(Forks(tmp_path, "small_shards:run")) for _ in range(2)]
        commands = [[*command, "--part", f"{number}/2"] for number in (1, 2)]
        survived = killed(Crowd(servers), lambda: commands, root, together=False, kills=KILLS // 3, seed=8)
    record_property("kills survived by parts of cache-features", survived)


@contextmanager
def two_ranks(folder: Path) -> Iterator[list[Forks]]:
    """Two servers with commands that connect to each other, as with torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    with ExitStack() as held:
        ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        yield [held.enter_context(Forks(folder, "small_shards:run", rank)) for rank in ranks]


def test_killed_processes_give_the_same_store(
    few: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """All processes are ended, as by torchrun and `srun --kill-on-bad-exit=1`."""
    root = tmp_path / "features"
    with two_ranks(tmp_path) as servers:
        commands = [["cache-features", few, *TINY, "--features", "V,S1", "--cache-root", root]] * 2
        survived = killed(Crowd(servers), lambda: commands, root, together=True, kills=KILLS // 3, seed=9)
    record_property("kills survived by processes of cache-features", survived)


def test_killed_processes_give_the_same_predictions(
    head: Path, tmp_path: Path, few: Path, record_property: Callable[[str, object], None]
) -> None:
    out = tmp_path / "masks"

    def predictions(folder: Path) -> dict[str, bytes]:
        masks = {path.name: path.read_bytes() for path in folder.glob("*.png")}
        return masks | {"record": (folder / "predictions.json").read_bytes()}

    with two_ranks(tmp_path) as servers:
        commands = [["predict", few / "images", "--head", head, "--out", out, "--batch-size", 1]] * 2
        survived = killed(
            Crowd(servers), lambda: commands, out, together=True, kills=KILLS // 3, seed=10, contents=predictions
        )
    record_property("kills survived by processes of predict", survived)


def test_killed_processes_give_the_same_head(
    forks: Forks,
    training: Callable[[Path], list[object]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """All start again from the last checkpoint; weights, records and figures are byte-identical."""
    run = tmp_path / "run"
    with two_ranks(tmp_path) as servers:
        survived = killed(
            Crowd(servers),
            lambda: [[*training(run), "--sheet-every", 0]] * 2,
            run,
            together=True,
            kills=KILLS // 3,
            seed=11,
            contents=trained,
        )
    record_property("kills survived by processes of train-head", survived)
