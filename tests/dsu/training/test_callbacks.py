"""Sheets and curves follow a run without changing it, and go on where a stopped run was."""

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
    """The command, in a folder where stage one has been."""
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
def test_sheets_change_nothing_of_what_is_trained(stored: Dsu, held_out: float) -> None:
    """Held out or not; epochs 2, 3 and 4 are drawn, of which 3 is not validated."""
    train = ("train-head", *RECIPE, "--val-fraction", held_out, "--val-every", 2)
    stored(*train, "--sheet-every", 0, "--out", "plain")
    stored(*train, "--sheet-every", 1, "--out", "watched")
    assert same_weights("plain", "watched")
    assert not (Path("plain") / "sheets").exists()
    names = {"progress.png", *(f"{part}epoch_000{epoch}.png" for part in ("", "maps/") for epoch in (1, 2, 3, 4))}
    assert sheets("watched").keys() == names


def test_predictions_are_those_of_the_head_then(stored: Dsu) -> None:
    stored("train-head", *RECIPE, "--sheet-every", 3, "--out", "run")
    assert {name for name in sheets("run") if name.startswith("epoch")} == {"epoch_0003.png", "epoch_0004.png"}
    maps = np.asarray(Image.open("run/sheets/maps/epoch_0004.png"))
    held_out = len(maps) // 128
    assert maps.shape == (128 * held_out, 128) and 1 <= held_out <= 6
    first, last = (np.asarray(Image.open(f"run/sheets/maps/epoch_000{epoch}.png")) for epoch in (3, 4))
    assert not np.array_equal(first, last)


def test_sheets_keep_proportions_and_ring_what_is_tiny(stored: Dsu, tmp_path: Path) -> None:
    """Two images twice as wide as high, of which one has an object of 3 pixels."""
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
    assert len(np.flatnonzero(np.diff(across) > 50)) == 2, "a ring in each of three columns"
    rows = np.flatnonzero(yellow.any(axis=1))
    assert rows.min() > len(pixels) / 2 and len(rows) < 40, "in the second row alone"
    black = (pixels < 20).all(axis=2)[: len(pixels) // 2, 200:385]
    high, wide = (np.ptp(np.flatnonzero(black.sum(axis=axis) > 30)) for axis in (1, 0))
    assert wide / high == pytest.approx(2, rel=0.1)


def test_a_run_that_is_gone_on_with_has_the_sheets_of_one_that_was_not_stopped(
    stored: Dsu, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ("train-head", *RECIPE, "--sheet-every", 1, "--val-fraction", 0.4)
    stored(*train, "--out", "whole")
    original = Trainer._save_state

    def save_and_stop(self: Trainer) -> None:
        original(self)
        raise KeyboardInterrupt  # the checkpoint stands, its sheet does not

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_state", save_and_stop)
        stored(*train, "--out", "stopped", exit_code=130)
        stored("train-head", "--resume", "--out", "stopped", "--quiet", exit_code=130)
    stored("train-head", "--resume", "--out", "stopped", "--quiet")
    assert same_weights("whole", "stopped")
    assert sheets("whole") == sheets("stopped")


def test_a_run_started_anew_shows_nothing_of_the_one_before(stored: Dsu) -> None:
    stored("train-head", *RECIPE, "--sheet-every", 1, "--out", "run")
    (Path("run") / "sheets" / "epoch_mine.txt").write_text("a note")
    stored("train-head", "--epochs", 2, "--quiet", "--out", "run", "--overwrite")
    assert sheets("run").keys() == {"epoch_0002.png", "maps/epoch_0002.png", "progress.png"}


def test_the_images_shown_depend_on_names_and_seed_alone() -> None:
    names = [f"n{index:02}" for index in range(40)]
    assert sheet_names(names, 1) == sheet_names(names[::-1], 1) != sheet_names(names, 2)
    assert len(sheet_names(names, 1)) == 6
    assert sheet_names(names[:2], 1) == names[:2]


def test_watchers_are_told_in_order_and_of_the_end_even_of_a_run_that_fails(
    stored: Dsu, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Diary(Callback):
        def on_train_start(self, trainer: Trainer) -> None:
            told.append("started")

        def on_step_end(self, trainer: Trainer, log: EpochLog) -> None:
            told.append(f"step {log.steps}")
            if trainer.epoch == 1:
                raise KeyboardInterrupt

        def on_epoch_end(self, trainer: Trainer, row: Mapping[str, float]) -> None:
            told.append(f"epoch {trainer.epoch}")

        def on_train_end(self, trainer: Trainer) -> None:
            told.append("ended")

    monkeypatch.setattr("dsu.training.callbacks.Curves", Diary)
    stored("train-head", "--epochs", 3, "--batch-size", 8, "--val-fraction", 0, "--out", "run", exit_code=130)
    assert told == ["started", "step 1", "step 2", "epoch 1", "step 1", "ended"]


def test_losses_so_far_are_means_over_what_was_fetched() -> None:
    log = EpochLog(every=2)
    assert log.losses == (0, 0, 0, 0)
    log.add(("a", "b"), torch.tensor([1.0, 2, 3, 4]), 0.0)
    assert (log.fetched, log.losses) == (0, (0, 0, 0, 0))
    log.add(("c",), torch.tensor([4.0, 5, 6, 7]), 0.0)
    assert (log.fetched, log.losses) == (3, (2, 3, 4, 5))
    again = EpochLog.of(log.state(), every=2)
    assert (again.fetched, again.losses) == (3, (2, 3, 4, 5))
