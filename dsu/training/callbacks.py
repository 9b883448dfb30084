"""Callbacks of a training run: curves, and sheets of the same images during training."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dsu.data.images import UnreadableImage, read_mask
from dsu.data.views import epoch_order
from dsu.datasets import SampleDataset
from dsu.drawing import sheet, training_curves
from dsu.files import atomic_write, make_folder

if TYPE_CHECKING:
    from dsu.training.epoch_log import EpochLog
    from dsu.training.trainer import Trainer

__all__ = ["CURVES_FILE", "PROGRESS_FILE", "SHEETS_FOLDER", "Callback", "Curves", "Sheets", "sheet_names"]

CURVES_FILE: Final = "curves.png"
PROGRESS_FILE: Final = "progress.png"
SHEETS_FOLDER: Final = "sheets"
SHEET_IMAGES: Final = 6

_FAINT: Final = 26
"""Grey level from which a pixel belongs to a circled object: objects smaller than a pixel are faint."""

_PROGRESS_PIXELS: Final = 2400
"""Maximum width of `progress.png`; its cells shrink to fit."""


class Callback:
    """Observes a run without changing it; override the methods you need.

    All methods run on the training thread, so they should be quick. They must not draw random numbers or change the
    network. An error ends the run, after its state was saved.
    """

    def on_train_start(self, trainer: "Trainer") -> None:
        """Called before training; in a resumed run, `trainer.epoch` epochs are already done."""

    def on_step_end(self, trainer: "Trainer", log: "EpochLog") -> None:
        """Called after an optimiser step. Reading `log` is free; fetching from the device is not."""

    def on_validation_batch(self, names: Sequence[str], probability: NDArray[np.float64]) -> None:
        """Called for every validation batch with its samples' names and finest outputs (B, S, S) in [0, 1]."""

    def on_epoch_end(self, trainer: "Trainer", row: Mapping[str, float]) -> None:
        """Called after writing an epoch's row of `metrics.csv` and its checkpoint; `trainer.epoch` includes it."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """Called once at the end, however the run ended."""


class Curves(Callback):
    """Writes `curves.png` into the run's folder."""

    def on_train_start(self, trainer: "Trainer") -> None:
        """Draw missing curves if a run stopped between its checkpoint and its curves."""
        if trainer.history:
            self.on_epoch_end(trainer, trainer.history[-1])

    def on_epoch_end(self, trainer: "Trainer", row: Mapping[str, float]) -> None:
        """Draw all epochs so far."""
        training_curves(trainer.history, trainer.out / CURVES_FILE)


def sheet_names(names: Sequence[str], seed: int) -> list[str]:
    """The samples for the sheets, in order: a pure function of all names and the seed."""
    return sorted(epoch_order(seed, 0, names)[:SHEET_IMAGES])


class Sheets(Callback):
    """Every few epochs, a sheet of the same images (image, ground truth, current prediction) to watch the head learn.

    Predictions come from validation; without validation, the few images are predicted separately. Written to `sheets/`
    in the run's folder: `epoch_0005.png`, ...; `progress.png` with the predictions of all these epochs side by side;
    and below `maps/` the predictions only, stacked, from which a resumed run redraws `progress.png`.

    Pictures keep their images' aspect ratios, and small objects are circled in the whole row.

    Args:
        pictures: pixels and masks of the images to draw.
        sizes: sizes of the images, (width, height), in the order of their names.
        every: epochs between sheets; the last epoch always has one.
    """

    def __init__(self, pictures: SampleDataset, sizes: Sequence[tuple[int, int]], every: int) -> None:
        self.names = list(pictures.names)
        self._pictures, self._sizes, self._every = pictures, sizes, every
        self._labels = self.names
        self._maps: dict[str, NDArray[np.uint8]] = {}

    def on_train_start(self, trainer: "Trainer") -> None:
        """Remove sheets of later epochs (from a run that was restarted); draw a missing one."""
        if trainer.main.validation is None:
            self._labels = [f"{name} (trained on)" for name in self.names]
        folder = trainer.out / SHEETS_FOLDER
        for place in (folder, folder / "maps"):
            for epoch, path in _epoch_files(place):
                if epoch > trainer.epoch:
                    path.unlink()
        if not trainer.epoch:
            (folder / PROGRESS_FILE).unlink(missing_ok=True)
        # In the middle of an epoch, the weights are no longer those at the end of the previous one.
        if trainer.epoch and not _sheet_file(folder, trainer.epoch).exists() and not trainer.step_in_epoch:
            self.on_epoch_end(trainer, {})

    def on_validation_batch(self, names: Sequence[str], probability: NDArray[np.float64]) -> None:
        """Keep the maps of the drawn images."""
        for name, values in zip(names, probability, strict=True):
            if name in self.names:
                self._maps[name] = (values * 255).astype(np.uint8)

    def on_epoch_end(self, trainer: "Trainer", row: Mapping[str, float]) -> None:
        """Draw this epoch's sheet and the progress of all epochs, if due."""
        if trainer.epoch % self._every == 0 or trainer.epoch == trainer.settings.epochs:
            lacking = [name for name in self.names if name not in self._maps]
            samples = trainer.phase.validation or trainer.phase.train
            for names, outputs, _ in trainer.evaluated(samples, lacking):
                self.on_validation_batch(names, probability_of(outputs))
            self._draw(trainer.out / SHEETS_FOLDER, trainer.epoch)
        self._maps = {}

    def _draw(self, folder: Path, epoch: int) -> None:
        batch = self._pictures.read(self.names, [0] * len(self.names))
        if not {"pixels", "mask"} <= batch.images.keys():
            raise RuntimeError("a sheet needs samples with pixels and masks")
        maps = [self._maps[name] for name in self.names]
        pixels, masks = (batch.images[name].numpy() for name in ("pixels", "mask"))
        for place in (folder, folder / "maps"):
            make_folder(place, parents=False)  # a removed run folder is not created again
        _write_maps(_maps_file(folder, epoch), maps)
        shown: dict[str, Sequence[NDArray[np.uint8]]] = {"image": list(pixels), "truth": list(masks)}
        shown |= {f"epoch {kept}": before for kept, before in _kept_maps(folder, maps)} | {f"epoch {epoch}": maps}
        columns = {
            title: [_in_proportion(one, size) for one, size in zip(pictures, self._sizes, strict=True)]
            for title, pictures in shown.items()
        }
        cell = max(64, min(192, _PROGRESS_PIXELS // len(columns)))
        self._write(folder / PROGRESS_FILE, columns, masks, cell)
        # Last: if this file exists, nothing is missing.
        now = {title: columns[title] for title in ("image", "truth", f"epoch {epoch}")}
        self._write(_sheet_file(folder, epoch), now, masks, 192)

    def _write(
        self, path: Path, columns: Mapping[str, Sequence[Image.Image]], masks: NDArray[np.uint8], cell: int
    ) -> None:
        rows = list(zip(*columns.values(), strict=True))
        sheet(rows, list(columns), path, self._labels, marked=list(masks >= _FAINT), cell=cell)


def _in_proportion(picture: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """The network's view, (S, S) or (S, S, 3), resized to the aspect ratio of its image (width, height)."""
    width, height = (max(1, round(len(picture) * length / max(size))) for length in size)
    return Image.fromarray(picture).resize((width, height), reducing_gap=3.0)


def probability_of(outputs: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """The finest output's probabilities, (B, S, S) in [0, 1], from logits (B, 1, S, S)."""
    probability: NDArray[np.float64] = outputs[-1].float().sigmoid().cpu().double().numpy()
    return probability[:, 0]


def _sheet_file(folder: Path, epoch: int) -> Path:
    return folder / f"epoch_{epoch:04}.png"


def _maps_file(folder: Path, epoch: int) -> Path:
    return _sheet_file(folder / "maps", epoch)


def _epoch_files(folder: Path) -> list[tuple[int, Path]]:
    """The epoch files in a folder with their epochs, in order, ignoring other files."""
    named = [(path.stem.removeprefix("epoch_"), path) for path in folder.glob("epoch_*.png")]
    return sorted((int(epoch), path) for epoch, path in named if epoch.isdecimal())


def _write_maps(path: Path, maps: Sequence[NDArray[np.uint8]]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(maps)).save(buffer, "PNG")
    atomic_write(path, buffer.getvalue())


def _kept_maps(folder: Path, like: Sequence[NDArray[np.uint8]]) -> Iterator[tuple[int, list[NDArray[np.uint8]]]]:
    """Epochs with their maps, in order, without damaged ones and those of other images."""
    for epoch, path in _epoch_files(folder / "maps"):
        with suppress(UnreadableImage):
            strip = read_mask(path)
            if strip.shape == np.concatenate(like).shape:
                yield epoch, np.split(strip, len(like))
