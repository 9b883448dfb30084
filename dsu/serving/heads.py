"""Loaded heads, and their answers to batches of requests."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.choices import ServedKind
from dsu.data.images import UnreadableImage, or_unreadable, printable, read_image
from dsu.errors import DsuError, UsageError
from dsu.heads.head_file import HEAD_FILE, HeadInfo, is_exported, precision_of, read_head_info, resolve_head
from dsu.hub import is_hub_name
from dsu.prediction.exported import ExportedSegmenter
from dsu.prediction.segmenter import Segmenter
from dsu.prediction.targets import decided_by
from dsu.prediction.verdicts import VerdictRow
from dsu.prediction.writing import png_of, verdict_of
from dsu.progress import SILENT, Progress
from dsu.serving.uploads import Upload
from dsu.settings import EncoderWeights, PredictionSettings, RuntimeSettings

Answer = bytes | VerdictRow
"""A PNG file, or an image's row of the verdict table."""


@dataclass(frozen=True)
class PredictRequest:
    """An image and the requested output.

    Attributes:
        threshold: as for `dsu predict --threshold`; None: the head's own.
    """

    image: Upload
    kind: ServedKind = "mask"
    threshold: float | None = None


@dataclass(frozen=True, eq=False)
class ServedHead:
    """A head with its encoders.

    Attributes:
        encoders: the name of its encoders.
        runs_on: device and precision, or the ONNX provider, in words.
        threshold: default threshold for verdicts, overlays and cutouts.
        cut: threshold at which masks are binarised; None: masks stay soft.
    """

    name: str
    segmenter: Segmenter = field(repr=False)
    encoders: str
    runs_on: str
    threshold: float
    cut: float | None = None

    def answers(self, requests: Sequence[PredictRequest], pool: Executor) -> list[Answer | DsuError]:
        """Predict for several images in one batch, as `dsu predict` would; `pool` decodes and encodes images.

        An unreadable image, or one with an output that is not finite, gets an error instead of an answer.
        """
        started = time.perf_counter()
        read = list(pool.map(self._read, requests))
        images = [one for one in read if not isinstance(one, UnreadableImage)]
        masks = iter(self.segmenter.segment(images) if images else ())
        found = [one if isinstance(one, UnreadableImage) else next(masks) for one in read]
        return list(pool.map(partial(self._finish, (time.perf_counter() - started) / len(requests)), requests, found))

    @or_unreadable
    def _read(self, request: PredictRequest) -> Image.Image:
        return read_image(Path(request.image.name), request.image.data, self.segmenter.depth)

    def _finish(
        self, seconds: float, request: PredictRequest, found: NDArray[np.float32] | UnreadableImage
    ) -> Answer | DsuError:
        if isinstance(found, UnreadableImage):
            return found
        image, started = Path(request.image.name), time.perf_counter()
        threshold = self.threshold if request.threshold is None else request.threshold
        row = verdict_of(VerdictRow("", request.image.name, "no mask"), image, found, threshold)
        if row.problem:
            return DsuError(row.problem)
        if request.kind == "table":
            return replace(row, seconds=round(seconds + time.perf_counter() - started, 3))
        cut = None if request.kind == "map" else self.cut if request.threshold is None else request.threshold
        kind = "mask" if request.kind == "map" else request.kind
        try:
            return png_of(image, found, kind, cut, threshold, depth=self.segmenter.depth, data=request.image.data)
        except UnreadableImage as error:
            return error


def load_heads(
    given: Sequence[str | Path],
    settings: RuntimeSettings,
    weights: EncoderWeights,
    progress: Progress = SILENT,
) -> dict[str, ServedHead]:
    """Load heads with their encoders, by name: of the run's folder or the model file, or OWNER/NAME on the hub.

    Without any given head, the newest run's is loaded. Raises `UsageError` if a head is given twice, and as
    `Segmenter.load`.
    """
    texts: list[str | Path | None] = list(given) or [None]
    files = [resolve_head(text) for text in texts]
    names = [str(text) if is_hub_name(text or "") else _own_name(file) for text, file in zip(texts, files, strict=True)]
    heads: dict[str, ServedHead] = {}
    for text, file, name in zip(texts, files, names, strict=True):
        name = name if names.count(name) == 1 else str(text)
        if name in heads:
            raise UsageError(f"--head contains {name} twice: give each head once.")
        progress.say(f"loading {file}")
        heads[name] = _load(name, file, settings, weights)
        progress.say(f"{name}: {heads[name].encoders} on {heads[name].runs_on}")
    return heads


def _own_name(file: Path) -> str:
    own = Path(os.path.realpath(file.parent)) if file.name == HEAD_FILE else file.with_suffix("")
    return printable(Path(own.name))


def _load(name: str, file: Path, settings: RuntimeSettings, weights: EncoderWeights) -> ServedHead:
    if is_exported(file):
        exported = ExportedSegmenter(file, settings.device, settings.precision)
        info, cut = HeadInfo.model_validate_json(exported.model.head), exported.model.threshold
        threshold = decided_by(PredictionSettings(threshold=cut), info)
        return ServedHead(name, exported, info.config.encoders_name, exported.model.provider, threshold, cut)
    info = read_head_info(file)
    precision = precision_of(info, file, settings.precision)
    segmenter = Segmenter.load(
        file, device=settings.device, precision=precision, hiera_weights=weights.hiera, dino_weights=weights.dino
    )
    threshold = decided_by(PredictionSettings(), info)
    return ServedHead(name, segmenter, info.config.encoders_name, segmenter.runtime.describe(), threshold)
