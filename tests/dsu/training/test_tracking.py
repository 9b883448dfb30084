"""Figures in a tracker: what is noted, when, and what a missing package is called."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from safetensors.torch import load_file
from support import TINY, Dsu

from dsu.errors import DsuError, UsageError
from dsu.training.tracking import check_tracker

NOTED: list[tuple[int, dict[str, float]]] = []
CONFIGS: list[dict[str, Any]] = []


class Notebook(GeneralTracker):  # type: ignore[misc]
    """A tracker that keeps what it is given."""

    name = "notebook"
    requires_logging_directory = False
    finished = 0

    def __init__(self, run_name: str, **options: Any) -> None:
        super().__init__()
        self.run_name = run_name

    @property
    def tracker(self) -> "Notebook":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        CONFIGS.append(values)

    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        assert step is not None
        if any(value != value for value in values.values()):
            raise RuntimeError("the notebook is full")
        NOTED.append((step, values))

    def finish(self) -> None:
        type(self).finished += 1


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    NOTED.clear(), CONFIGS.clear()
    Notebook.finished = 0
    return Notebook


def test_figures_are_noted_over_the_steps_of_the_run(
    dsu: Dsu, drawn: Path, notebook: type[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsu.training.tracking.STEPS", 2)
    dsu("cache-features", drawn, *TINY, "--features", "V", "--quiet")
    train = ("train-head", "--epochs", 2, "--batch-size", 4, "--val-fraction", 0.1, "--quiet", "--track", "notebook")
    dsu(*train, "--out", "run")
    [config] = CONFIGS
    assert config["epochs"] == 2 and None not in config.values()
    steps = [step for step, values in NOTED if "step/loss" in values]
    epochs = [(step, values) for step, values in NOTED if "epoch/loss" in values]
    assert steps == [2, 4, 6]
    assert [(step, values["epoch/number"]) for step, values in epochs] == [(3, 1), (6, 2)]
    wanted = {"epoch/loss_D1", "epoch/lr", "validation/S", "validation/loss", "speed/images_per_second"}
    assert wanted | {"speed/data_wait"} <= epochs[0][1].keys()
    assert Notebook.finished == 1
    dsu(*train[:-2], "--out", "untracked")
    tracked, untracked = (load_file(Path(run) / "last.safetensors") for run in ("run", "untracked"))
    assert all(tracked[name].equal(untracked[name]) for name in untracked)


def test_a_tracker_that_fails_is_one_sentence(
    dsu: Dsu, drawn: Path, notebook: type[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V", "--quiet")

    def full(self: Notebook, *given: Any, **options: Any) -> None:
        raise RuntimeError("the notebook is full")

    monkeypatch.setattr(Notebook, "log", full)
    said = dsu("train-head", "--epochs", 1, "--out", "run", "--track", "notebook", exit_code=1).output
    assert "notebook has failed (the notebook is full)" in said and "--resume" in said
    assert Notebook.finished == 1
    monkeypatch.undo()
    dsu("train-head", "--resume", "--out", "run", exit_code=None)


def test_unknown_and_missing_trackers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"can't be 'tensorbord': give .*did you mean 'tensorboard'"):
        check_tracker("tensorbord")
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(DsuError, match=r"pip install 'dsu\[tracking\]'"):
        check_tracker("tensorboard")
    with pytest.raises(DsuError, match="pip install wandb"):
        check_tracker("wandb")


def test_the_command_refuses_a_tracker_before_any_work(dsu: Dsu) -> None:
    said = dsu("train-head", "--track", "paper", exit_code=2).output
    assert "--track can't be 'paper'" in said


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_what_was_noted(dsu: Dsu, drawn: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    dsu("cache-features", drawn, *TINY, "--features", "V", "--quiet")
    dsu("train-head", "--epochs", 2, "--out", "run", "--quiet", "--track", "tensorboard")
    events = EventAccumulator(str(Path("run/tracking/dsu")))
    events.Reload()
    assert [event.step for event in events.Scalars("epoch/loss")] == [2, 4]
    assert {"validation/S", "epoch/lr", "speed/images_per_second"} <= set(events.Tags()["scalars"])
