"""A run's figures in TensorBoard or Weights & Biases, as callbacks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any, Final

from dsu.errors import DsuError
from dsu.training.callbacks import Callback

if TYPE_CHECKING:
    from dsu.training.epoch_log import EpochLog
    from dsu.training.trainer import Trainer

__all__ = ["TRACKERS", "TRACKING_FOLDER", "Tracker", "check_tracker"]

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


class Tracker(Callback, ABC):
    """Notes every epoch's figures, and the loss every few steps.

    All are noted over the same axis, the optimiser's steps since the run began, so that a run that is gone on with
    goes on where it was.
    """

    _noted = 0
    _opened = False

    @abstractmethod
    def open(self, out: Path, recipe: Mapping[str, Any]) -> None:
        """Begin with the run in the folder `out`; `recipe` is its settings."""

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Note figures by their tags."""

    @abstractmethod
    def close(self) -> None:
        """Write out what is pending."""

    def on_train_start(self, trainer: "Trainer") -> None:
        """Open the tracker. Raises `DsuError` where it can't be (a service that wants a login, a full disk)."""
        if not trainer.epoch and not trainer.step_in_epoch:  # another run's, started anew in its folder
            rmtree(trainer.out / TRACKING_FOLDER, ignore_errors=True)
        recipe = {name: value for name, value in trainer.settings.model_dump(mode="json").items() if value is not None}
        try:
            self.open(trainer.out, recipe)
        except Exception as error:  # whatever a service makes of a missing login or connection
            raise _failed(trainer, error) from error
        self._opened = True

    def on_step_end(self, trainer: "Trainer", log: "EpochLog") -> None:
        """Note the loss, if it is time; it was fetched from the device already."""
        done = _step(trainer)
        if done - self._noted >= STEPS and log.fetched:
            self._noted = done
            self._log(trainer, {"step/loss": log.recent})

    def on_epoch_end(self, trainer: "Trainer", row: Mapping[str, float]) -> None:
        """Note the epoch's row of `metrics.csv`."""
        self._log(trainer, {tag: row[name] for name, tag in _EPOCH_TAGS.items() if name in row})

    def on_train_end(self, trainer: "Trainer") -> None:
        """Close the tracker."""
        if self._opened:
            self.close()

    def _log(self, trainer: "Trainer", values: Mapping[str, float]) -> None:
        try:
            self.log(values, _step(trainer))
        except Exception as error:
            raise _failed(trainer, error) from error


class TensorBoard(Tracker):
    """Event files in the run's folder."""

    def open(self, out: Path, recipe: Mapping[str, Any]) -> None:
        """The settings are noted as a text."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / TRACKING_FOLDER))
        lines = [f"    {name}: {value}" for name, value in recipe.items()]
        self._writer.add_text("settings", "\n".join(lines))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One scalar a tag, to be seen at once."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write out what is pending."""
        self._writer.close()


class WeightsAndBiases(Tracker):
    """A run of that name in the project `dsu`."""

    def open(self, out: Path, recipe: Mapping[str, Any]) -> None:
        """The settings are the run's config."""
        import wandb

        self._run = wandb.init(project="dsu", name=out.name, dir=str(out), config=dict(recipe))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One row a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is pending."""
        self._run.finish()


TRACKERS: Final[Mapping[str, type[Tracker]]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""By the name of `--track`, which is that of the package, too."""


def check_tracker(name: str) -> None:
    """Raise `DsuError` for a tracker whose package is not installed."""
    if find_spec(name) is None:
        raise DsuError(f"--track {name} wants a package that is not installed: run `pip install {name}`.")


def _step(trainer: "Trainer") -> int:
    """Optimiser steps since the run began."""
    an_epoch = -(-len(trainer.main.train.names) // trainer.settings.batch_size)
    return trainer.epoch * an_epoch + trainer.step_in_epoch


def _failed(trainer: "Trainer", error: Exception) -> DsuError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return DsuError(
        f"The tracker {trainer.settings.track} has failed ({reason}): mend it, or go on without --track (--resume "
        f"keeps what is finished)."
    )
