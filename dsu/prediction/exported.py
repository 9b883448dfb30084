"""Predict with models of `dsu export`, through their own runner and without torch."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.choices import Normalization, Precision
from dsu.data.datasets import Paths
from dsu.data.images import UnreadableImage, read_image_and_head
from dsu.data.tiles import Tiling
from dsu.errors import DsuError, UsageError
from dsu.heads.head_file import HeadInfo
from dsu.prediction.record import Seen
from dsu.prediction.segmenter import Segmenter
from dsu.prediction.targets import Job, Target, prepare_jobs
from dsu.prediction.verdicts import VerdictRow
from dsu.prediction.writing import Outcome, row_of, write_jobs, write_mask
from dsu.progress import SILENT, Progress, in_threads
from dsu.runner import Model, ModelError
from dsu.settings import PredictionSettings, RuntimeSettings

if TYPE_CHECKING:
    import torch

AT_ONCE: Final = 2
"""Images in progress: one is decoded or written while another one is computed."""


def predict_exported(
    sources: Sequence[str],
    path: Path,
    settings: PredictionSettings,
    asked: RuntimeSettings,
    paths: Paths,
    *,
    out: Path | None = None,
    progress: Progress = SILENT,
) -> Outcome:
    """Write masks with an exported model, like `dsu.prediction.predict.predict` with a head.

    Images are read one by one; `batch_size` is a number of tiles. Raises the same errors, and `DsuError` for a model
    that can't be loaded.
    """
    model = _load(path, asked.device, asked.precision)
    info = HeadInfo.model_validate_json(model.head)
    if settings.threshold is None:
        settings = settings.model_copy(update={"threshold": model.threshold})
    folder = out or path.with_name(f"{path.stem}-predictions")
    progress.say(f"{path} ({model.facts['precision']}) on {model.provider}")
    jobs = prepare_jobs(
        sources,
        path,
        info,
        folder,
        settings,
        None,
        paths=paths,
        end_to_end=True,
        mirror=out is not None and len(sources) == 1,
        progress=progress,
    )
    for job in jobs:
        progress.say(job.describe())

    def run(job: Job, todo: Sequence[Target], outcome: Outcome, decoded: Seen | None) -> None:
        cut = None if job.tiling is None else (job.tiling.size, job.tiling.overlap)

        def segment(target: Target) -> VerdictRow:
            started, row = time.perf_counter(), row_of(job, target, outcome)
            try:
                picture, head = read_image_and_head(target.image, depth=job.depth, hashed=decoded is not None)
            except UnreadableImage as error:
                return replace(row, problem=str(error))
            if decoded is not None:
                decoded({target.name: head.pixels_sha256})
            [mask] = model.segment([picture], "none", cut, settings.batch_size)
            row = write_mask(row, target, mask, job, settings)
            return replace(row, seconds=round(time.perf_counter() - started, 3))

        for row in in_threads(segment, todo, f"predicting {job.label}", progress, AT_ONCE):
            outcome.add([row])

    return write_jobs(jobs, path, info, folder, settings, lambda _: run, progress=progress)


class ExportedSegmenter(Segmenter):
    """A `Segmenter` that runs an exported model. Masks are binarised if the model has a threshold.

    Attributes:
        model: the model in its runner.
    """

    def __init__(self, path: Path, device: str = "auto", precision: Precision = "auto") -> None:
        self._path = path
        self.model = _load(path, device, precision)
        self.depth = self.model.depth
        self.tiling = Tiling.of(*self.model.tiling) if self.model.tiling else None

    def __repr__(self) -> str:
        return f"ExportedSegmenter({str(self._path)!r}, {self.model.provider})"

    def to(self, device: "str | torch.device") -> "Segmenter":
        """Load the model on another device; returns this segmenter. Raises `DsuError` for an absent one."""
        self.model = _load(self._path, str(device), "auto")
        return self

    def _predict(self, pictures: Sequence[Image.Image], normalization: Normalization) -> list[NDArray[np.float32]]:
        return [self.model.cut(mask) for mask in self.segment(pictures, normalization)]

    def segment(
        self, pictures: Sequence[Image.Image], normalization: Normalization = "none"
    ) -> list[NDArray[np.float32]]:
        """See `Segmenter.segment`."""
        cut = None if self.tiling is None else (self.tiling.size, self.tiling.overlap)
        return self.model.segment(pictures, normalization, cut)


def _load(path: Path, device: str, precision: Precision) -> Model:
    if precision != "auto":
        raise UsageError(f"{path} has the precision that it was exported with: omit --precision {precision}.")
    try:
        return Model(path, device)
    except ImportError as error:
        raise UsageError(
            "An exported model needs onnxruntime, which is not installed: run `pip install onnxruntime`."
        ) from error
    except ModelError as error:
        raise DsuError(str(error)) from error
