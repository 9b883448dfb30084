"""Callbacks of a training run: curves, and sheets that show the same images during training."""

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
from dsu.files import atomic_write, make_folder, sweep

if TYPE_CHECKING:
    from dsu.training.epoch_log import EpochLog
    from dsu.training.trainer import Trainer

CURVES_FILE: Final = "curves.png"
PROGRESS_FILE: Final = "progress.png"
SHEETS_FOLDER: Final = "sheets"
SHEET_IMAGES: Final = 6

_FAINT_LEVEL: Final = 26
"""Minimum grey level of circled objects: objects smaller than a pixel of the network's mask are faint."""

_PROGRESS_PIXELS: Final = 2400
"""Maximum width of `progress.png`; its cells shrink to fit."""


class Callback:
    """Observes a run without changing it; override the methods you need.

    All methods run in the training thread, so they should be fast. They must not draw random numbers or change the
    network. An error ends the run; the last checkpoint remains.
    """

    def on_train_start(self, trainer: "Trainer") -> None:
        """Called before training; in a resumed run, `trainer.epoch` epochs are already done."""

    def on_step_end(self, trainer: "Trainer", log: "EpochLog") -> None:
        """Called after every optimiser step. Reading `log` costs nothing; fetching tensors from the device does."""

    def on_validation_batch(self, names: Sequence[str], probability: NDArray[np.float64]) -> None:
        """Called for every validation batch with its samples' names and finest outputs (B, S, S) in [0, 1]."""

    def on_epoch_end(self, trainer: "Trainer", row: Mapping[str, float]) -> None:
        """Called after writing an epoch's row of `metrics.csv` and its checkpoint; `trainer.epoch` includes it."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """Called once at the end, however the run ended."""


class Curves(Callback):
    """Writes `curves.png` into the run's folder."""

    def on_train_start(self, trainer: "Trainer") -> None:
        """Draw missing curves, if the run was interrupted between its checkpoint and its curves."""
        if trainer.history:
            self.on_epoch_end(trainer, trainer.history[-1])

    def on_epoch_end(self, trainer: "Trainer", row: Mapping[str, float]) -> None:
        """Draw all epochs so far."""
        training_curves(trainer.history, trainer.out / CURVES_FILE)


def sheet_names(names: Sequence[str], seed: int) -> list[str]:
    """The samples for the sheets, sorted; a pure function of all names and the seed."""
    return sorted(epoch_order(seed, 0, names)[:SHEET_IMAGES])


class Sheets(Callback):
    """Draws a sheet of the same images every few epochs: image, ground truth, current prediction.

    Predictions come from validation; without validation, these few images are predicted separately. The files in the
    folder `sheets/` of the run: `epoch_0005.png`, ...; `progress.png` with the predictions of all these epochs next to
    each other; and in `maps/` the stacked predictions of each epoch, from which a resumed run redraws `progress.png`.

    Cells keep the images' aspect ratios, and small objects are circled in all cells of a row.

    Args:
        samples: pixels and masks of the images to draw.
        sizes: (width, height) of the images, in the samples' order.
        every: epochs between sheets; the last epoch always has one.
    """

    def __init__(self, samples: SampleDataset, sizes: Sequence[tuple[int, int]], every: int) -> None:
        self.names = list(samples.names)
        self._samples, self._sizes, self._every = samples, sizes, every
        self._labels = self.names
        self._maps: dict[str, NDArray[np.uint8]] = {}

    def on_train_start(self, trainer: "Trainer") -> None:
        """Remove sheets of later epochs (from an earlier run in this folder), and draw a missing one."""
        if trainer.main.validation is None:
            self._labels = [f"{name} (trained on)" for name in self.names]
        folder = trainer.out / SHEETS_FOLDER
        for place in (folder, folder / "maps"):
            sweep(place)
            for epoch, path in _epoch_files(place):
                if epoch > trainer.epoch:
                    path.unlink()
        if not trainer.epoch:
            (folder / PROGRESS_FILE).unlink(missing_ok=True)
        # A sheet can't be drawn later in the middle of an epoch, since the weights have changed.
        if trainer.epoch and not _sheet_file(folder, trainer.epoch).exists() and not trainer.step_in_epoch:
            self.on_epoch_end(trainer, {})

    def on_validation_batch(self, names: Sequence[str], probability: NDArray[np.float64]) -> None:
        """Keep the predictions for the images on the sheets."""
        for name, values in zip(names, probability, strict=True):
            if name in self.names:
                self._maps[name] = (values * 255).astype(np.uint8)

    def on_epoch_end(self, trainer: "Trainer", row: Mapping[str, float]) -> None:
        """Draw this epoch's sheet and the progress of all epochs, if due."""
        if trainer.epoch % self._every == 0 or trainer.epoch == trainer.settings.epochs:
            missing = [name for name in self.names if name not in self._maps]
            samples = trainer.phase.validation or trainer.phase.train
            for names, outputs, _ in trainer.evaluated(samples, missing):
                self.on_validation_batch(names, probability_of(outputs))
            self._draw(trainer.out / SHEETS_FOLDER, trainer.epoch)
        self._maps = {}

    def _draw(self, folder: Path, epoch: int) -> None:
        batch = self._samples.read(self.names, [0] * len(self.names))
        if not {"pixels", "mask"} <= batch.images.keys():
            raise RuntimeError("a sheet needs samples with pixels and masks")
        maps = [self._maps[name] for name in self.names]
        pixels, masks = (batch.images[name].numpy() for name in ("pixels", "mask"))
        for place in (folder, folder / "maps"):
            make_folder(place, parents=False)  # do not create a removed run folder again
        _write_maps(_maps_file(folder, epoch), maps)
        shown: dict[str, Sequence[NDArray[np.uint8]]] = {"image": list(pixels), "truth": list(masks)}
        shown |= {f"epoch {kept}": before for kept, before in _kept_maps(folder, maps)} | {f"epoch {epoch}": maps}
        columns = {
            title: [_with_aspect_ratio(image, size) for image, size in zip(images, self._sizes, strict=True)]
            for title, images in shown.items()
        }
        cell = max(64, min(192, _PROGRESS_PIXELS // len(columns)))
        self._write(folder / PROGRESS_FILE, columns, masks, cell)
        # Written last: if this file exists, all others do.
        now = {title: columns[title] for title in ("image", "truth", f"epoch {epoch}")}
        self._write(_sheet_file(folder, epoch), now, masks, 192)

    def _write(
        self, path: Path, columns: Mapping[str, Sequence[Image.Image]], masks: NDArray[np.uint8], cell: int
    ) -> None:
        rows = list(zip(*columns.values(), strict=True))
        sheet(rows, list(columns), path, self._labels, marked=list(masks >= _FAINT_LEVEL), cell=cell)


def _with_aspect_ratio(image: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """Resize a square array, (S, S) or (S, S, 3), to the aspect ratio of its original image, (width, height)."""
    width, height = (max(1, round(len(image) * length / max(size))) for length in size)
    return Image.fromarray(image).resize((width, height), reducing_gap=3.0)


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
    """Yield epochs with their maps, in order; skips damaged files and those of other images."""
    for epoch, path in _epoch_files(folder / "maps"):
        with suppress(UnreadableImage):
            strip = read_mask(path)
            if strip.shape == np.concatenate(like).shape:
                yield epoch, np.split(strip, len(like))
