"""Commands killed at random moments (SIGKILL) and run again leave exactly what an uninterrupted run leaves.

`DSU_KILLS` says how often each is killed: 30 by default, `DSU_KILLS=300` for a thorough run.
"""

import csv
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kills import Forks, kill_at_random
from PIL import Image
from support import TINY

KILLS = int(os.environ.get("DSU_KILLS", "30"))

LOCKS = ("lock", "readers")
"""Text for people about who holds a store: process ids and times, left behind by whoever is killed."""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("killed")) as forks:
        yield forks


@pytest.fixture(scope="module")
def shapes(forks: Forks, drawn: Path) -> Path:
    """A data set in the working folder: small, since every kill costs a part of a run."""
    folder = forks.folder / "shapes"
    for part, count in (("train", 4), ("test", 4)):
        for inner in ("images", "masks"):
            (folder / part / inner).mkdir(parents=True)
            for path in sorted((drawn / part / inner).iterdir())[:count]:
                shutil.copy(path, folder / part / inner)
    return folder


def contents(root: Path) -> dict[str, bytes]:
    """Every file below stores by its path, the locks left out.

    A manifest's number counts its generations, one more after a kill between two of them: only its content counts.
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


def test_a_killed_stage_one_leaves_the_store_of_an_uninterrupted_one(
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
    """A head of one epoch, and the features of the test split."""
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


def test_a_killed_prediction_leaves_no_half_mask_and_is_finished_by_the_next(
    forks: Forks, head: Path, record_property: Callable[[str, object], None]
) -> None:
    out = forks.folder / "masks"
    command = ["predict", "--head", head, "--out", out, "--batch-size", 1, "--quiet"]
    command += ["--cache-root", forks.folder / "for-predict"]
    wanted: dict[str, bytes] = {}
    record: list[bytes] = []

    def check_killed() -> None:
        found = pictures(out)
        assert [name for name in found if found[name] != wanted[name]] == [], "a mask is there by half"

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
"""What differs between two runs of the same training: time and memory."""


def test_a_killed_training_goes_on_to_the_weights_of_an_uninterrupted_one(
    forks: Forks, shapes: Path, record_property: Callable[[str, object], None]
) -> None:
    """A checkpoint after every step of two epochs, of two batches each."""
    root, run = forks.folder / "for-training", forks.folder / "killed-run"
    cached = forks.run(["cache-features", shapes, *TINY, "--features", "V", "--cache-root", root, "--quiet"])
    assert cached.status == 0, cached.said
    wanted: dict[str, object] = {}

    def command() -> list[object]:
        train = ["train-head", shapes, "--cache-root", root, "--epochs", 2, "--batch-size", 2]
        go_on = ["--resume"] if (run / "checkpoint.pt").exists() else ["--overwrite"] if run.exists() else []
        return [*train, "--checkpoint-steps", 1, "--val-fraction", 0, "--out", run, "--quiet", *go_on]

    def check_finished() -> None:
        rows = [
            {name: value for name, value in row.items() if name not in UNMEASURED}
            for row in csv.DictReader((run / "metrics.csv").read_text().splitlines())
        ]
        found = {"rows": rows, "weights": (run / "head.safetensors").read_bytes()}
        wanted.update(wanted or found)
        assert found == wanted
        assert not list(run.glob(".*")), "a partial file was left"

    survived = kill_at_random(
        forks,
        command,
        kills=KILLS,
        seed=7,
        fresh=lambda: shutil.rmtree(run, ignore_errors=True),
        check_finished=check_finished,
    )
    record_property("kills survived by train-head", survived)
    assert survived == KILLS
