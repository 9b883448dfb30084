"""Log a run to TensorBoard or Weights & Biases."""

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

TRACKING_FOLDER: Final = "tracking"
"""Subfolder of the run for trackers that write files; `tensorboard --logdir runs` finds it."""

STEPS: Final = 20
"""Optimiser steps between logged losses."""

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


OpenTracker: TypeAlias = tuple[Callable[[Mapping[str, float], int], None], Callable[[], None]]
"""Two functions: log values by tag at a step; flush and close at the end."""


def _tensorboard(out: Path, recipe: Mapping[str, Any]) -> OpenTracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / TRACKING_FOLDER))
    writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in recipe.items()))

    def log(values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            writer.add_scalar(tag, value, step)
        writer.flush()  # visible immediately

    return log, writer.close


def _wandb(out: Path, recipe: Mapping[str, Any]) -> OpenTracker:
    import wandb

    run = wandb.init(project="dsu", name=out.name, dir=str(out), config=dict(recipe))
    return lambda values, step: run.log(dict(values), step=step), run.finish


TRACKERS: Final = {"tensorboard": _tensorboard, "wandb": _wandb}
"""For each tracker's package, a function that opens it for a run folder and settings."""


def check_tracker(name: str) -> None:
    """Raise `DsuError` if a tracker's package is not installed."""
    if find_spec(name) is None:
        raise DsuError(f"--track {name} needs a package that is not installed: run `pip install {name}`.")


class Tracking(Callback):
    """Logs every epoch's values, and the loss every few steps, to one of `TRACKERS`.

    All use the same axis, optimiser steps since the start of the run: a resumed run continues its curves.
    """

    def __init__(self, tracker: str) -> None:
        self._tracker, self._noted = tracker, 0
        self._opened: OpenTracker | None = None

    def on_train_start(self, trainer: "Trainer") -> None:
        """Open the tracker. Raises `DsuError` if this fails (missing login, full disk)."""
        if not trainer.epoch and not trainer.step_in_epoch:  # a new run: remove logs of an earlier one in this folder
            rmtree(trainer.out / TRACKING_FOLDER, ignore_errors=True)
        recipe = {name: value for name, value in trainer.settings.model_dump(mode="json").items() if value is not None}
        with self._tracker_errors():
            self._opened = TRACKERS[self._tracker](trainer.out, recipe)

    def on_step_end(self, trainer: "Trainer", log: "EpochLog") -> None:
        """Log the latest fetched loss, if due."""
        done = _step(trainer)
        if done - self._noted >= STEPS and log.fetched:
            self._noted = done
            self._log({"step/loss": log.recent}, done)

    def on_epoch_end(self, trainer: "Trainer", row: Mapping[str, float]) -> None:
        """Log the epoch's row of `metrics.csv`."""
        self._log({tag: row[name] for name, tag in _EPOCH_TAGS.items() if name in row}, _step(trainer))

    def on_train_end(self, trainer: "Trainer") -> None:
        """Flush and close the tracker."""
        if self._opened is not None:
            self._opened[1]()

    def _log(self, values: Mapping[str, float], step: int) -> None:
        assert self._opened is not None
        with self._tracker_errors():
            self._opened[0](values, step)

    @contextmanager
    def _tracker_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # services raise anything for a missing login or connection
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise DsuError(
                f"The tracker {self._tracker} failed ({reason}): fix it, or resume without --track (--resume keeps "
                "finished epochs)."
            ) from error


def _step(trainer: "Trainer") -> int:
    """Optimiser steps since the start of the run."""
    an_epoch = -(-len(trainer.main.train.names) // trainer.settings.batch_size)
    return trainer.epoch * an_epoch + trainer.step_in_epoch
