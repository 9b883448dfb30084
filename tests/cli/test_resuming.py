"""A run that is stopped anywhere and resumed equals an uninterrupted run."""

import csv
from pathlib import Path

import pytest
import torch
from house import House
from safetensors.torch import load_file
from stopping import stop_at
from support import TINY, Dsu


def rows(run: Path) -> list[dict[str, str]]:
    unmeasured = ("seconds", "images_per_second", "data_wait", "peak_memory_gb")
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in unmeasured} for row in csv.DictReader(file)]


def test_runs_stopped_within_epochs_resume_exactly(dsu: Dsu, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 samples in batches of 4: three steps per epoch, and a checkpoint every two steps."""
    dsu("cache-features", drawn, *TINY, "--features", "V", "--quiet")
    train = ("train-head", "--epochs", 3, "--batch-size", 4, "--checkpoint-steps", 2, "--val-fraction", 0.01, "--quiet")
    dsu(*train, "--out", "whole")
    for stops in ((2,), (5, 1), (4, 2, 1)):
        out = "-".join(map(str, stops))
        for index, stop in enumerate(stops):
            with monkeypatch.context() as patch:
                stop_at(patch, stop)
                resume = ("--resume",) if index else ()
                said = dsu(*train, "--out", out, *resume, exit_code=130).output
                assert f"--resume --out {out}" in said and said.count("error:") == 1, said
        dsu("train-head", "--resume", "--out", out, "--quiet")
        assert rows(Path(out)) == rows(Path("whole"))
        for name in ("head", "last", "best"):
            whole, gone_on = (load_file(Path(run) / f"{name}.safetensors") for run in ("whole", out))
            assert all(torch.equal(whole[key], gone_on[key]) for key in whole), name


def test_a_run_stopped_before_its_first_checkpoint_starts_again(
    dsu: Dsu, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = house.train("--out", "early", "--quiet")
    with monkeypatch.context() as patch:
        stop_at(patch, 0)
        said = dsu(*train, exit_code=130).output
    assert (
        "before the first checkpoint: run the same command again to start over." in said and said.count("error:") == 1
    )
    dsu(*train)


def test_a_finished_run_can_not_be_extended(dsu: Dsu, house: House) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in house.run.rglob("*.[!l]*"))
    for more in ((), ("--resume",)):
        command = ["train-head", house.data, "--cache-root", house.features, "--epochs", "9", "--out", house.run, *more]
        said = dsu(*command, exit_code=2).output
        for words in ("finished run", "can't extend", "cosine", f"--init-from {house.run}", "--overwrite"):
            assert words in said, said
    assert sorted((path, path.stat().st_mtime_ns) for path in house.run.rglob("*.[!l]*")) == before


def test_an_unfinished_run_is_resumed_or_overwritten(dsu: Dsu, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    (mine.run / "head.safetensors").unlink()
    assert "resume it (--resume)" in dsu(*mine.train("--out", mine.run), exit_code=2).output
    said = dsu("train-head", "--epochs", "9", "--resume", "--out", mine.run, "--cache-root", mine.features, exit_code=2)
    assert "epochs 1 -> 9" in said.output
