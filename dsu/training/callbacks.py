"""Following a run of stage two without changing it: curves, and sheets of the same images as the run learns."""

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
"""Grey level from which a pixel is of an object that is ringed: objects of less than a pixel are faint."""

_PROGRESS_PIXELS: Final = 2400
"""Width that `progress.png` keeps to by making its cells smaller."""


class Callback:
    """Someone who follows a run and leaves it as it is; what does not matter to them is left as here.

    All methods are called on the training thread, so they should be quick, and they neither draw random numbers nor
    change the network. A failure ends the run: its state was kept before.
    """

    def on_train_start(self, trainer: "Trainer") -> None:
        """Called before anything is trained; `trainer.epoch` epochs are done already where a run is resumed."""

    def on_step_end(self, trainer: "Trainer", log: "EpochLog") -> None:
        """Called after an optimiser step. Reading `log` costs nothing; fetching from the device would."""

    def on_validation_batch(self, names: Sequence[str], probability: NDArray[np.float64]) -> None:
        """Called with every batch of a validation: its samples' names and finest outputs (B, S, S) in [0, 1]."""

    def on_epoch_end(self, trainer: "Trainer", row: Mapping[str, float]) -> None:
        """Called when an epoch's row of `metrics.csv` and its checkpoint stand; `trainer.epoch` counts it already."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """Called once at last, however the run ended."""


class Curves(Callback):
    """Keeps `curves.png` in the run's folder."""

    def on_train_start(self, trainer: "Trainer") -> None:
        """Draw what a run that was stopped between its checkpoint and its curves lacks."""
        if trainer.history:
            self.on_epoch_end(trainer, trainer.history[-1])

    def on_epoch_end(self, trainer: "Trainer", row: Mapping[str, float]) -> None:
        """Draw all epochs so far."""
        training_curves(trainer.history, trainer.out / CURVES_FILE)


def sheet_names(names: Sequence[str], seed: int) -> list[str]:
    """The few samples whose sheets are drawn: a pure function of all names and the seed, in order."""
    return sorted(epoch_order(seed, 0, names)[:SHEET_IMAGES])


class Sheets(Callback):
    """Every few epochs a sheet of the same images (image, truth, prediction now), so that one sees the head learn.

    Predictions are those that validation computes; only where an epoch was not validated, or nothing is held out,
    the few images are run by themselves. Written to `sheets/` in the run's folder: `epoch_0005.png`, ...;
    `progress.png` with the predictions of all these epochs side by side; and below `maps/` the predictions alone,
    one above the other, from which a resumed run draws `progress.png` whole.

    Pictures have their images' proportions, and small objects are ringed in all of a row.

    Args:
        pictures: gives the pixels and masks of its names, which are the images drawn.
        sizes: of the images, (width, height), in the order of their names.
        every: epochs between two sheets; the last epoch has one too.
    """

    def __init__(self, pictures: SampleDataset, sizes: Sequence[tuple[int, int]], every: int) -> None:
        self.names = list(pictures.names)
        self._pictures, self._sizes, self._every = pictures, sizes, every
        self._labels = self.names
        self._maps: dict[str, NDArray[np.uint8]] = {}

    def on_train_start(self, trainer: "Trainer") -> None:
        """Remove sheets of epochs that have not been (of a run that is started anew); draw one that is lacking."""
        if trainer.main.validation is None:
            self._labels = [f"{name} (trained on)" for name in self.names]
        folder = trainer.out / SHEETS_FOLDER
        for place in (folder, folder / "maps"):
            for epoch, path in _epoch_files(place):
                if epoch > trainer.epoch:
                    path.unlink()
        if not trainer.epoch:
            (folder / PROGRESS_FILE).unlink(missing_ok=True)
        # Within an epoch the weights are no longer those that the epoch before ended with.
        if trainer.epoch and not _sheet_file(folder, trainer.epoch).exists() and not trainer.step_in_epoch:
            self.on_epoch_end(trainer, {})

    def on_validation_batch(self, names: Sequence[str], probability: NDArray[np.float64]) -> None:
        """Keep the maps of the images drawn."""
        for name, values in zip(names, probability, strict=True):
            if name in self.names:
                self._maps[name] = (values * 255).astype(np.uint8)

    def on_epoch_end(self, trainer: "Trainer", row: Mapping[str, float]) -> None:
        """Draw this epoch's sheet and all epochs' progress, if one is due."""
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
            raise RuntimeError("a sheet was asked for of samples without pixels or masks")
        maps = [self._maps[name] for name in self.names]
        pixels, masks = (batch.images[name].numpy() for name in ("pixels", "mask"))
        for place in (folder, folder / "maps"):
            make_folder(place, parents=False)  # a run's folder that was removed is not made anew
        _write_maps(_maps_file(folder, epoch), maps)
        shown: dict[str, Sequence[NDArray[np.uint8]]] = {"image": list(pixels), "truth": list(masks)}
        shown |= {f"epoch {kept}": before for kept, before in _kept_maps(folder, maps)} | {f"epoch {epoch}": maps}
        columns = {
            title: [_in_proportion(one, size) for one, size in zip(pictures, self._sizes, strict=True)]
            for title, pictures in shown.items()
        }
        cell = max(64, min(192, _PROGRESS_PIXELS // len(columns)))
        self._write(folder / PROGRESS_FILE, columns, masks, cell)
        # Last, since where this one stands nothing is lacking.
        now = {title: columns[title] for title in ("image", "truth", f"epoch {epoch}")}
        self._write(_sheet_file(folder, epoch), now, masks, 192)

    def _write(
        self, path: Path, columns: Mapping[str, Sequence[Image.Image]], masks: NDArray[np.uint8], cell: int
    ) -> None:
        rows = list(zip(*columns.values(), strict=True))
        sheet(rows, list(columns), path, self._labels, marked=list(masks >= _FAINT), cell=cell)


def _in_proportion(picture: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """What the network sees, (S, S) or (S, S, 3), as wide to its height as its image of (width, height)."""
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
    """The epochs' files in a folder with their epochs, in order; other files are none of ours."""
    named = [(path.stem.removeprefix("epoch_"), path) for path in folder.glob("epoch_*.png")]
    return sorted((int(epoch), path) for epoch, path in named if epoch.isdecimal())


def _write_maps(path: Path, maps: Sequence[NDArray[np.uint8]]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(maps)).save(buffer, "PNG")
    atomic_write(path, buffer.getvalue())


def _kept_maps(folder: Path, like: Sequence[NDArray[np.uint8]]) -> Iterator[tuple[int, list[NDArray[np.uint8]]]]:
    """Epochs with their maps, in order; those that are of other images by now, or damaged, are passed over."""
    for epoch, path in _epoch_files(folder / "maps"):
        with suppress(UnreadableImage):
            strip = read_mask(path)
            if strip.shape == np.concatenate(like).shape:
                yield epoch, np.split(strip, len(like))
