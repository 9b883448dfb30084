"""A run that is stopped anywhere and gone on with is the run that was never stopped."""

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import TINY, Dsu

from dsu.batches import Batch
from dsu.training import Trainer


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Interrupt training before its `step`-th optimiser step (from 0)."""
    done = 0
    original = Trainer.step

    def counted(self: Trainer, batch: Batch) -> torch.Tensor:
        nonlocal done
        if done == step:
            raise KeyboardInterrupt
        done += 1
        return original(self, batch)

    monkeypatch.setattr(Trainer, "step", counted)


def rows(run: Path) -> list[dict[str, str]]:
    unmeasured = ("seconds", "images_per_second", "data_wait", "peak_memory_gb")
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in unmeasured} for row in csv.DictReader(file)]


def test_stopped_within_epochs_and_gone_on_with(dsu: Dsu, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 samples in batches of 4: three steps an epoch, a checkpoint every two."""
    dsu("cache-features", drawn, *TINY, "--levels", "V", "--quiet")
    train = ("train-head", "--epochs", 3, "--batch-size", 4, "--checkpoint-steps", 2, "--val-fraction", 0.01, "--quiet")
    dsu(*train, "--out", "whole")
    for stops in ((2,), (5, 1), (4, 2, 1)):
        out = "-".join(map(str, stops))
        for index, stop in enumerate(stops):
            with monkeypatch.context() as patch:
                stop_at(patch, stop)
                resume = ("--resume",) if index else ()
                said = dsu(*train, "--out", out, *resume, exit_code=130).output
                assert f"--resume --out {out}" in said, said
        dsu("train-head", "--resume", "--out", out, "--quiet")
        assert rows(Path(out)) == rows(Path("whole"))
        for name in ("head", "last", "best"):
            whole, gone_on = (load_file(Path(run) / f"{name}.safetensors") for run in ("whole", out))
            assert all(torch.equal(whole[key], gone_on[key]) for key in whole), name
