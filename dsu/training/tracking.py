"""A run's figures in TensorBoard and its like, through accelerate's trackers."""

from collections.abc import Mapping
from shutil import rmtree
from typing import TYPE_CHECKING, Any, Final

from dsu.errors import DsuError, UsageError, did_you_mean
from dsu.training.callbacks import Callback

if TYPE_CHECKING:
    from dsu.training.epoch_log import EpochLog
    from dsu.training.trainer import Trainer

__all__ = ["TRACKING_FOLDER", "Tracking", "check_tracker"]

TRACKING_FOLDER: Final = "tracking"
"""In the run's folder: for trackers that write files. `tensorboard --logdir runs` finds it."""

PROJECT: Final = "dsu"
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


def check_tracker(name: str) -> None:
    """Raise `UsageError` for a tracker that accelerate does not know, `DsuError` for one that is not installed."""
    from accelerate.tracking import (  # type: ignore[import-untyped]
        LOGGER_TYPE_TO_CLASS,
        get_available_trackers,
    )
    from accelerate.utils import LoggerType  # type: ignore[import-untyped]

    known = sorted(LOGGER_TYPE_TO_CLASS)
    if name not in known:
        near = did_you_mean(name, known)
        raise UsageError(f"--track can't be {name!r}: give {', '.join(known)}{near or '.'}")
    # Trackers that a program has registered itself are there by definition.
    built_in = {kind.value for kind in LoggerType}
    if name in built_in and name not in {str(kind) for kind in get_available_trackers()}:
        wanted = "'dsu[tracking]'" if name == "tensorboard" else name
        raise DsuError(f"--track {name} wants a package that is not installed: run `pip install {wanted}`.")


class Tracking(Callback):
    """Notes every epoch's figures, and the loss every few steps, with one of accelerate's trackers.

    All are noted over the same axis, the optimiser's steps since the run began, so that a run that is gone on with
    goes on where it was.

    Args:
        tracker: as accelerate calls it, `tensorboard` for instance; see `check_tracker`.
    """

    def __init__(self, tracker: str) -> None:
        self._tracker = tracker
        self._accelerator: Any = None
        self._noted = 0

    def on_train_start(self, trainer: "Trainer") -> None:
        """Open the tracker. Raises `DsuError` where it can't be (a service that wants a login, a full disk)."""
        from accelerate import Accelerator  # type: ignore[import-untyped]
        from accelerate.utils import ProjectConfiguration

        folder = trainer.out / TRACKING_FOLDER
        if not trainer.epoch and not trainer.step_in_epoch:  # another run's, started anew in its folder
            rmtree(folder, ignore_errors=True)
        recipe = {name: value for name, value in trainer.settings.model_dump(mode="json").items() if value is not None}
        try:
            # Of accelerate this uses the trackers alone: device and precision are the trainer's own.
            self._accelerator = Accelerator(
                cpu=trainer.runtime.device.type == "cpu",
                mixed_precision="no",
                log_with=self._tracker,
                project_config=ProjectConfiguration(project_dir=str(trainer.out), logging_dir=str(folder)),
            )
            names = {"wandb": {"name": trainer.out.name, "dir": str(trainer.out)}}
            self._accelerator.init_trackers(PROJECT, config=recipe, init_kwargs=names)
        except Exception as error:  # whatever a service makes of a missing login or connection
            raise self._failed(error) from error

    def on_step_end(self, trainer: "Trainer", log: "EpochLog") -> None:
        """Note the loss, if it is time; it was fetched from the device already."""
        done = self._step(trainer)
        if done - self._noted >= STEPS and log.fetched:
            self._noted = done
            self._log({"step/loss": log.recent}, done)

    def on_epoch_end(self, trainer: "Trainer", row: Mapping[str, float]) -> None:
        """Note the epoch's row of `metrics.csv`."""
        self._log({tag: row[name] for name, tag in _EPOCH_TAGS.items() if name in row}, self._step(trainer))

    def on_train_end(self, trainer: "Trainer") -> None:
        """Write out what is pending and close the tracker."""
        if self._accelerator is not None:
            self._accelerator.end_training()
            self._accelerator = None

    def _step(self, trainer: "Trainer") -> int:
        """Optimiser steps since the run began."""
        an_epoch = -(-len(trainer.main.train.names) // trainer.settings.batch_size)
        return trainer.epoch * an_epoch + trainer.step_in_epoch

    def _log(self, values: Mapping[str, float], step: int) -> None:
        try:
            self._accelerator.log(dict(values), step=step)
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> DsuError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        return DsuError(
            f"The tracker {self._tracker} has failed ({reason}): mend it, or go on without --track (--resume keeps "
            f"what is finished)."
        )
