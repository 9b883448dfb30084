"""A run's figures in TensorBoard or Weights & Biases."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from dsu.errors import DsuError
from dsu.training.callbacks import Callback

if TYPE_CHECKING:
    from dsu.training.epoch_log import EpochLog
    from dsu.training.trainer import Trainer

__all__ = ["TRACKERS", "TRACKING_FOLDER", "Tracking", "check_tracker"]

TRACKING_FOLDER: Final = "tracking"
"""In the run's folder: for trackers that write files. `tensorboard --logdir runs` finds it."""

STEPS: Final = 20
"""Optimiser steps between two losses noted."""

_EPOCH_TAGS: Final = {
    "loss": "epoch/loss",
    "loss_D1": "epoch/loss_D1",
    "loss_D2": "epoch/loss_D2",
    "loss_D3": "epoch/loss_D3",
    "lr": "epoch/lr",
    "val_loss": "validation/loss",
    "val_S": "validation/S",
    "val_MAE": "validation/MAE",
    "val_IoU": "validation/IoU",
    "images_per_second": "speed/images_per_second",
    "data_wait": "speed/data_wait",
    "peak_memory_gb": "speed/peak_memory_gb",
    "epoch": "epoch/number",
}


Opened: TypeAlias = tuple[Callable[[Mapping[str, float], int], None], Callable[[], None]]
"""What notes figures by their tags at a step, and what writes out the pending ones at the end."""


def _tensorboard(out: Path, recipe: Mapping[str, Any]) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / TRACKING_FOLDER))
    writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in recipe.items()))

    def log(values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            writer.add_scalar(tag, value, step)
        writer.flush()  # to be seen at once

    return log, writer.close


def _wandb(out: Path, recipe: Mapping[str, Any]) -> Opened:
    import wandb

    run = wandb.init(project="dsu", name=out.name, dir=str(out), config=dict(recipe))
    return lambda values, step: run.log(dict(values), step=step), run.finish


TRACKERS: Final = {"tensorboard": _tensorboard, "wandb": _wandb}
"""How each is opened for the run in a folder, with its settings; called like its package."""


def check_tracker(name: str) -> None:
    """Raise `DsuError` for a tracker whose package is not installed."""
    if find_spec(name) is None:
        raise DsuError(f"--track {name} wants a package that is not installed: run `pip install {name}`.")


class Tracking(Callback):
    """Notes every epoch's figures, and the loss every few steps, in one of `TRACKERS`.

    All are noted over the same axis, the optimiser's steps since the run began, so that a resumed run
    goes on where it was.
    """

    def __init__(self, tracker: str) -> None:
        self._tracker, self._noted = tracker, 0
        self._opened: Opened | None = None

    def on_train_start(self, trainer: "Trainer") -> None:
        """Open the tracker. Raises `DsuError` where it can't be (a service that wants a login, a full disk)."""
        if not trainer.epoch and not trainer.step_in_epoch:  # another run's, started anew in its folder
            rmtree(trainer.out / TRACKING_FOLDER, ignore_errors=True)
        recipe = {name: value for name, value in trainer.settings.model_dump(mode="json").items() if value is not None}
        with self._failing():
            self._opened = TRACKERS[self._tracker](trainer.out, recipe)

    def on_step_end(self, trainer: "Trainer", log: "EpochLog") -> None:
        """Note the loss, if it is time; it was fetched from the device already."""
        done = _step(trainer)
        if done - self._noted >= STEPS and log.fetched:
            self._noted = done
            self._log({"step/loss": log.recent}, done)

    def on_epoch_end(self, trainer: "Trainer", row: Mapping[str, float]) -> None:
        """Note the epoch's row of `metrics.csv`."""
        self._log({tag: row[name] for name, tag in _EPOCH_TAGS.items() if name in row}, _step(trainer))

    def on_train_end(self, trainer: "Trainer") -> None:
        """Write out what is pending and close the tracker."""
        if self._opened is not None:
            self._opened[1]()

    def _log(self, values: Mapping[str, float], step: int) -> None:
        assert self._opened is not None
        with self._failing():
            self._opened[0](values, step)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a service makes of a missing login or connection
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise DsuError(
                f"The tracker {self._tracker} has failed ({reason}): mend it, or go on without --track (--resume keeps "
                f"what is finished)."
            ) from error


def _step(trainer: "Trainer") -> int:
    """Optimiser steps since the run began."""
    an_epoch = -(-len(trainer.main.train.names) // trainer.settings.batch_size)
    return trainer.epoch * an_epoch + trainer.step_in_epoch
