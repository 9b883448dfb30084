"""Sheets, curves and other callbacks: they do not change training, and a resumed run continues them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import TINY, Dsu

from dsu.training.callbacks import Callback, sheet_names
from dsu.training.epoch_log import EpochLog
from dsu.training.trainer import Trainer

RECIPE = ("--epochs", 4, "--batch-size", 4, "--quiet")


@pytest.fixture
def stored(dsu: Dsu, drawn: Path) -> Dsu:
    """The command in a folder with stored features."""
    dsu("cache-features", drawn, *TINY, "--features", "V", "--quiet")
    return dsu


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "last.safetensors")


def same_weights(first: str, second: str) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def sheets(run: str) -> dict[str, bytes]:
    folder = Path(run) / "sheets"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


@pytest.mark.parametrize("held_out", [0, 0.4])
def test_sheets_do_not_change_training(stored: Dsu, held_out: float) -> None:
    """With and without validation; epochs 1 and 3 have sheets but no validation."""
    train = ("train-head", *RECIPE, "--val-fraction", held_out, "--val-every", 2)
    stored(*train, "--sheet-every", 0, "--out", "plain")
    stored(*train, "--sheet-every", 1, "--out", "watched")
    assert same_weights("plain", "watched")
    assert not (Path("plain") / "sheets").exists()
    names = {"progress.png", *(f"{part}epoch_000{epoch}.png" for part in ("", "maps/") for epoch in (1, 2, 3, 4))}
    assert sheets("watched").keys() == names


def test_sheets_show_the_predictions_of_their_epoch(stored: Dsu) -> None:
    stored("train-head", *RECIPE, "--sheet-every", 3, "--out", "run")
    assert {name for name in sheets("run") if name.startswith("epoch")} == {"epoch_0003.png", "epoch_0004.png"}
    maps = np.asarray(Image.open("run/sheets/maps/epoch_0004.png"))
    held_out = len(maps) // 128
    assert maps.shape == (128 * held_out, 128) and 1 <= held_out <= 6
    first, last = (np.asarray(Image.open(f"run/sheets/maps/epoch_000{epoch}.png")) for epoch in (3, 4))
    assert not np.array_equal(first, last)


def test_sheets_keep_aspect_ratios_and_circle_tiny_objects(stored: Dsu, tmp_path: Path) -> None:
    """Two images, twice as wide as high; one of them has an object of 3 pixels."""
    for part, grey in (("images", 90), ("masks", 0)):
        (tmp_path / "wide" / part).mkdir(parents=True)
        for name, box in (("large", (100, 50, 300, 150)), ("tiny", (300, 100, 303, 103))):
            picture = Image.new("L", (400, 200), grey)
            picture.paste(255, box)
            picture.save(tmp_path / "wide" / part / f"{name}.png")
    stored("cache-features", tmp_path / "wide", *TINY, "--features", "V", "--quiet")
    one_epoch = ("--epochs", 1, "--val-fraction", 0, "--quiet")
    stored("train-head", tmp_path / "wide", *one_epoch, "--sheet-every", 1, "--out", "run")
    with Image.open("run/sheets/epoch_0001.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    yellow = (np.abs(pixels - (255, 212, 0)) < 40).all(axis=2)
    across = np.flatnonzero(yellow.any(axis=0))
    assert len(np.flatnonzero(np.diff(across) > 50)) == 2, "a circle in each of three columns"
    rows = np.flatnonzero(yellow.any(axis=1))
    assert rows.min() > len(pixels) / 2 and len(rows) < 40, "only in the second row"
    black = (pixels < 20).all(axis=2)[: len(pixels) // 2, 200:385]
    high, wide = (np.ptp(np.flatnonzero(black.sum(axis=axis) > 30)) for axis in (1, 0))
    assert wide / high == pytest.approx(2, rel=0.1)


def test_a_resumed_run_has_the_same_sheets_as_an_uninterrupted_one(
    stored: Dsu, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ("train-head", *RECIPE, "--sheet-every", 1, "--val-fraction", 0.4)
    stored(*train, "--out", "whole")
    original = Trainer._save_state

    def save_and_stop(self: Trainer) -> None:
        original(self)
        raise KeyboardInterrupt  # after the checkpoint, before its sheet

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_state", save_and_stop)
        stored(*train, "--out", "stopped", exit_code=130)
        stored("train-head", "--resume", "--out", "stopped", "--quiet", exit_code=130)
    stored("train-head", "--resume", "--out", "stopped", "--quiet")
    assert same_weights("whole", "stopped")
    assert sheets("whole") == sheets("stopped")


def test_an_overwritten_run_leaves_no_sheets(stored: Dsu) -> None:
    stored("train-head", *RECIPE, "--sheet-every", 1, "--out", "run")
    (Path("run") / "sheets" / "epoch_mine.txt").write_text("a note")
    stored("train-head", "--epochs", 2, "--quiet", "--out", "run", "--overwrite")
    assert sheets("run").keys() == {"epoch_0002.png", "maps/epoch_0002.png", "progress.png"}


def test_sheet_names_depend_only_on_names_and_seed() -> None:
    names = [f"n{index:02}" for index in range(40)]
    assert sheet_names(names, 1) == sheet_names(names[::-1], 1) != sheet_names(names, 2)
    assert len(sheet_names(names, 1)) == 6
    assert sheet_names(names[:2], 1) == names[:2]


def test_callbacks_are_called_in_order_and_also_at_the_end_of_a_failed_run(
    stored: Dsu, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Recorder(Callback):
        def on_train_start(self, trainer: Trainer) -> None:
            calls.append("started")

        def on_step_end(self, trainer: Trainer, log: EpochLog) -> None:
            calls.append(f"step {log.steps}")
            if trainer.epoch == 1:
                raise KeyboardInterrupt

        def on_epoch_end(self, trainer: Trainer, row: Mapping[str, float]) -> None:
            calls.append(f"epoch {trainer.epoch}")

        def on_train_end(self, trainer: Trainer) -> None:
            calls.append("ended")

    monkeypatch.setattr("dsu.training.callbacks.Curves", Recorder)
    stored("train-head", "--epochs", 3, "--batch-size", 8, "--val-fraction", 0, "--out", "run", exit_code=130)
    assert calls == ["started", "step 1", "step 2", "epoch 1", "step 1", "ended"]


def test_losses_are_means_over_fetched_samples() -> None:
    log = EpochLog(every=2)
    assert log.losses == (0, 0, 0, 0)
    log.add(("a", "b"), torch.tensor([1.0, 2, 3, 4]), 0.0)
    assert (log.fetched, log.losses) == (0, (0, 0, 0, 0))
    log.add(("c",), torch.tensor([4.0, 5, 6, 7]), 0.0)
    assert (log.fetched, log.losses) == (3, (2, 3, 4, 5))
    again = EpochLog.of(log.state(), every=2)
    assert (again.fetched, again.losses) == (3, (2, 3, 4, 5))
