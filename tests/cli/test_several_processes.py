"""`dsu` in several processes, started by torchrun."""

import csv
import signal
import time
from pathlib import Path

import psutil
import pytest
from support import TINY, Dsu
from torchrun import WAYS, follow, lines, said, shown, torchrun

RECIPE = ("--adapt-last", "1", "--batch-size", "4", "--val-fraction", "0.2")


def table(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def stored(dsu: Dsu, drawn: Path) -> Dsu:
    dsu("cache-features", drawn, *TINY, "--features", "V,S1,S2,S3", "--level-views", "flips", "--quiet")
    return dsu


def test_two_processes_train_the_same_head_and_only_the_first_prints(stored: Dsu) -> None:
    process = torchrun(["train-head", *RECIPE, "--epochs", "2", "--out", "two"])
    text = said(process)
    assert process.returncode == 0, text
    assert len(lines(text, "processes")) == len(lines(text, "Next: ")) == len(lines(text, "epoch 2/2: ")) == 1, text
    assert "2 divide batches of 4" in text and "other version" not in text
    stored("train-head", *RECIPE, "--epochs", 2, "--out", "one", "--quiet")
    assert {path.name for path in Path("two").iterdir()} == {path.name for path in Path("one").iterdir()}
    for one, two in zip(table(Path("one")), table(Path("two")), strict=True):
        for name in ("loss", "loss_D1", "val_loss", "val_S", "val_MAE"):
            assert float(one[name]) == pytest.approx(float(two[name]), abs=5e-3), name
    assert "finished run" in stored("train-head", "--resume", "--epochs", 3, "--out", "two", exit_code=2).output


def test_a_killed_process_ends_all_and_one_process_can_resume(stored: Dsu) -> None:
    process = torchrun(["train-head", *RECIPE, "--epochs", "500", "--out", "run", "--sheet-every", "0"])
    deadline = time.monotonic() + 200
    while not Path("run/checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
        time.sleep(0.2)
    workers = psutil.Process(process.pid).children()
    [victim] = [one for one in workers if one.environ().get("RANK") == "1"]
    victim.send_signal(signal.SIGKILL)
    text = said(process)
    assert process.returncode != 0
    [line] = lines(text, "error:")
    assert "A process of this run ended" in line and "--resume" in line
    done = len(table(Path("run")))
    assert done > 0
    rest = torchrun(["train-head", "--resume", "--out", "run"], processes=1)
    while len(table(Path("run"))) <= done:
        assert rest.poll() is None, said(rest)
        time.sleep(0.2)
    rest.terminate()
    assert not lines(said(rest), "error:")


def test_an_error_in_all_processes_is_printed_once(dsu: Dsu) -> None:
    for arguments, reason in (
        (["train-head", "nowhere"], "There are no training features"),
        (["train-head", "--epochs", "many"], "Invalid value"),
        (["eval"], "There are no predictions below"),  # before the processes connect
        (["doctor"], "runs in one process, but 2 were started"),
    ):
        process = torchrun(arguments)
        text = said(process)
        assert process.returncode != 0 and text.count(reason) == 1, text


@pytest.mark.slow
def test_documented_commands_for_several_processes(stored: Dsu) -> None:
    """One machine, two machines and Slurm give the same head and scores."""
    options = f"{' '.join(RECIPE)} --epochs 2 --sheet-every 0"
    for way in list(WAYS)[:3]:
        follow(f"{shown('train-head', way)} {options} --out 'runs/{way}'")
    assert len({path.read_bytes() for path in Path("runs").glob("*/head.safetensors")}) == 1
    follow(shown("predict", "one machine"))
    follow(shown("eval", "two machines"))
    [scores] = Path("runs").glob("*/predictions/metrics.json")
    found = scores.read_bytes()
    stored("predict", "--overwrite", "--quiet")
    stored("eval", "--quiet")
    assert scores.read_bytes() == found
