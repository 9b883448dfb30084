"""Evaluation on several processes: the same scores, files and table as with one process."""

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from evaluations import draw_cases
from support import Dsu
from torchrun import lines, said, torchrun

NAMES = [f"{number:02}" for number in range(21)]
"""A number of images that gives three chunks, of which the first of two processes gets two."""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that evaluates the predictions of two runs."""
    monkeypatch.chdir(tmp_path)
    words = ["eval", "--truth", "drawn", "--metrics", "S,F_mean,E_max,MAE,Dice"]
    for run, cases in (("a", draw_cases(tmp_path / "drawn", NAMES)), ("b", draw_cases(tmp_path / "x", NAMES, seed=9))):
        folder = tmp_path / run / "predictions"
        folder.mkdir(parents=True)
        for case in cases:
            case.prediction.rename(folder / case.prediction.name)
        words += ["--predictions", run]
    return words


def files(folder: str) -> list[str]:
    """Options that write all kinds of output files."""
    named = {"--out": "table.md", "--json": "scores.json", "--csv": "scores.csv", "--per-image": "images.csv"}
    return [
        word for option, name in {**named, "--report": "page.html"}.items() for word in (option, f"{folder}/{name}")
    ]


def contents(folder: str) -> dict[str, str]:
    """The contents of the files in a folder, without the page's date."""
    now = re.compile(r"\d\d \w+ \d{4}, \d\d:\d\d")
    return {path.name: now.sub("now", path.read_text()) for path in Path(folder).iterdir()}


@pytest.mark.parametrize(
    ("processes", "workers"),
    [(2, 1), pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(4, 1, marks=pytest.mark.slow)],
)
def test_several_processes_give_the_same_scores(dsu: Dsu, runs: list[str], processes: int, workers: int) -> None:
    """Missing predictions are named once."""
    Path("a/predictions/20.png").unlink()
    table = dsu(*runs, *files("one"), "--quiet", exit_code=1).stdout
    several = torchrun([*runs, *files("many"), "--quiet", "--workers", str(workers)], processes)
    told = said(several)
    assert several.returncode and told.count("20 has no prediction") == 1, told
    assert table and told.count(table) == 1, told
    assert contents("many") == contents("one") and len(contents("one")) == 5


def test_an_error_in_one_process_ends_all_with_one_line(runs: list[str]) -> None:
    """The second process has the ninth image."""
    Path("b/predictions/08.png").write_bytes(b"no picture")
    process = torchrun([*runs, "--json", "scores.json"])
    told = said(process)
    [line] = lines(told, "error:")
    assert process.returncode and "b/predictions/08.png" in line and not Path("scores.json").exists()


def test_workers_end_with_a_killed_evaluation(runs: list[str], tmp_path: Path) -> None:
    draw_cases(tmp_path / "large", [f"{number:03}" for number in range(100)], size=(600, 400))
    words = ["eval", "--predictions", "large/maps", "--truth", "large/masks", "--workers", "2"]
    with subprocess.Popen([sys.executable, "-m", "dsu", *words], stderr=subprocess.DEVNULL) as process:
        workers: list[psutil.Process] = []
        while len(workers) < 2:
            assert process.poll() is None
            time.sleep(0.1)
            children = psutil.Process(process.pid).children()
            workers = [child for child in children if any("spawn_main" in word for word in child.cmdline())]
        process.kill()
    assert not psutil.wait_procs(workers, 60)[1]
