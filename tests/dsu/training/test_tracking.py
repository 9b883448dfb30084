"""Trackers: logged values and steps, and errors."""

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from support import TINY, Dsu

from dsu.errors import DsuError
from dsu.training.tracking import TRACKERS, OpenTracker, check_tracker

LOGGED: list[tuple[int, dict[str, float]]] = []
CONFIGS: list[dict[str, Any]] = []


class FakeTracker:
    """A tracker that records its calls."""

    finished = 0

    @classmethod
    def opened(cls, out: Path, recipe: Mapping[str, Any]) -> OpenTracker:
        CONFIGS.append(dict(recipe))
        return lambda values, step: cls.log(values, step), cls.close

    @staticmethod
    def log(values: Mapping[str, float], step: int) -> None:
        LOGGED.append((step, dict(values)))

    @classmethod
    def close(cls) -> None:
        cls.finished += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeTracker]:
    """A replacement for TensorBoard, which need not be installed."""
    monkeypatch.setitem(TRACKERS, "tensorboard", FakeTracker.opened)
    monkeypatch.setattr("dsu.training.tracking.find_spec", lambda name: object())
    LOGGED.clear(), CONFIGS.clear()
    FakeTracker.finished = 0
    return FakeTracker


def test_trackers_log_values_over_steps(
    dsu: Dsu, drawn: Path, fake: type[FakeTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsu.training.tracking.STEPS", 2)
    dsu("cache-features", drawn, *TINY, "--features", "V", "--quiet")
    train = ("train-head", "--epochs", 2, "--batch-size", 4, "--val-fraction", 0.1, "--quiet", "--track", "tensorboard")
    dsu(*train, "--out", "run")
    [config] = CONFIGS
    assert config["epochs"] == 2 and None not in config.values()
    steps = [step for step, values in LOGGED if "step/loss" in values]
    epochs = [(step, values) for step, values in LOGGED if "epoch/loss" in values]
    assert steps == [2, 4, 6]
    assert [(step, values["epoch/number"]) for step, values in epochs] == [(3, 1), (6, 2)]
    wanted = {"epoch/loss_D1", "epoch/lr", "validation/S", "validation/loss", "speed/images_per_second"}
    assert wanted | {"speed/data_wait"} <= epochs[0][1].keys()
    assert FakeTracker.finished == 1
    dsu(*train[:-2], "--out", "untracked")
    tracked, untracked = (load_file(Path(run) / "last.safetensors") for run in ("run", "untracked"))
    assert all(tracked[name].equal(untracked[name]) for name in untracked)


def test_a_failing_tracker_gives_an_error_of_one_sentence(
    dsu: Dsu, drawn: Path, fake: type[FakeTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V", "--quiet")

    def full(*given: Any) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(FakeTracker, "log", full)
    said = dsu("train-head", "--epochs", 1, "--out", "run", "--track", "tensorboard", exit_code=1).output
    assert "tensorboard failed (the disk is full)" in said and "--resume" in said
    assert FakeTracker.finished == 1
    monkeypatch.undo()
    dsu("train-head", "--resume", "--out", "run", exit_code=None)


def test_missing_trackers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsu.training.tracking.find_spec", lambda name: None)
    for name in TRACKERS:
        with pytest.raises(DsuError, match=f"--track {name} needs .*: run `pip install {name}`"):
            check_tracker(name)


def test_wandb_receives_the_settings_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    run = SimpleNamespace(log=lambda values, step: seen.append((step, values)), finish=lambda: seen.append(("end",)))
    wandb = ModuleType("wandb")
    wandb.init = lambda **given: seen.append((given["project"], given["name"], given["config"])) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log, close = TRACKERS["wandb"](tmp_path / "run", {"epochs": 2})
    log({"epoch/loss": 0.5}, 4)
    close()
    assert seen == [("dsu", "run", {"epochs": 2}), (4, {"epoch/loss": 0.5}), ("end",)]


def test_an_unknown_tracker_is_refused_at_once(dsu: Dsu) -> None:
    said = dsu("train-head", "--track", "tensorbord", exit_code=2).output
    assert "--track must be 'tensorboard' or 'wandb', not 'tensorbord'; did you mean 'tensorboard'?" in said


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_the_logged_values(dsu: Dsu, drawn: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    dsu("cache-features", drawn, *TINY, "--features", "V", "--quiet")
    dsu("train-head", "--epochs", 2, "--out", "run", "--quiet", "--track", "tensorboard")
    events = EventAccumulator(str(Path("run/tracking")))
    events.Reload()
    assert [event.step for event in events.Scalars("epoch/loss")] == [2, 4]
    assert {"validation/S", "epoch/lr", "speed/images_per_second"} <= set(events.Tags()["scalars"])
