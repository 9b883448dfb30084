"""Heads that are loaded to be served, and what they answer to several requests at once."""

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
from dsu.prediction.writing import OutputStyle, verdict_of
from dsu.progress import SILENT, Progress
from dsu.serving.uploads import Upload
from dsu.settings import EncoderWeights, PredictionSettings, RuntimeSettings

__all__ = ["Answer", "Asked", "ServedHead", "load_heads"]

Answer = bytes | VerdictRow
"""A picture as PNG, or an image's row of the table."""


@dataclass(frozen=True)
class Asked:
    """An image, and what is wanted of it.

    Attributes:
        threshold: as `dsu predict --threshold` has it; None: the head's own.
    """

    image: Upload
    kind: ServedKind = "mask"
    threshold: float | None = None


@dataclass(frozen=True, eq=False)
class ServedHead:
    """A head with its encoders.

    Attributes:
        encoders: what they are called.
        runs_on: device and precision, or provider, in words.
        threshold: of verdicts and pictures.
        cut: where masks are cut; None leaves them soft.
    """

    name: str
    segmenter: Segmenter = field(repr=False)
    encoders: str
    runs_on: str
    threshold: float
    cut: float | None = None

    def answers(self, asked: Sequence[Asked], pool: Executor) -> list[Answer | DsuError]:
        """What `dsu predict` makes of images, which run together, or why it can't; `pool` reads and draws them."""
        started = time.perf_counter()
        read = list(pool.map(self._read, asked))
        pictures = [one for one in read if not isinstance(one, UnreadableImage)]
        masks = iter(self.segmenter.segment(pictures) if pictures else ())
        found = [one if isinstance(one, UnreadableImage) else next(masks) for one in read]
        return list(pool.map(partial(self._finish, (time.perf_counter() - started) / len(asked)), asked, found))

    @or_unreadable
    def _read(self, asked: Asked) -> Image.Image:
        return read_image(Path(asked.image.name), asked.image.data, self.segmenter.depth)

    def _finish(self, seconds: float, asked: Asked, found: NDArray[np.float32] | UnreadableImage) -> Answer | DsuError:
        if isinstance(found, UnreadableImage):
            return found
        image, started = Path(asked.image.name), time.perf_counter()
        threshold = self.threshold if asked.threshold is None else asked.threshold
        row = verdict_of(VerdictRow("", asked.image.name, "no mask"), image, found, threshold)
        if row.problem:
            return DsuError(row.problem)
        if asked.kind == "table":
            return replace(row, seconds=round(seconds + time.perf_counter() - started, 3))
        cut = None if asked.kind == "map" else self.cut if asked.threshold is None else asked.threshold
        kind = "mask" if asked.kind == "map" else asked.kind
        try:
            return OutputStyle(kind, cut, threshold, depth=self.segmenter.depth).png(image, found, asked.image.data)
        except UnreadableImage as error:
            return error


def load_heads(
    given: Sequence[str | Path],
    asked: RuntimeSettings,
    weights: EncoderWeights,
    progress: Progress = SILENT,
) -> dict[str, ServedHead]:
    """Heads with their encoders, by names: a run's, a model's file's, or OWNER/NAME; none given: the newest run's.

    Raises `UsageError` for a head that is named twice, and as `Segmenter.load`.
    """
    texts: list[str | Path | None] = list(given) or [None]
    files = [resolve_head(text) for text in texts]
    names = [str(text) if is_hub_name(text or "") else _own_name(file) for text, file in zip(texts, files, strict=True)]
    heads: dict[str, ServedHead] = {}
    for text, file, name in zip(texts, files, names, strict=True):
        name = name if names.count(name) == 1 else str(text)
        if name in heads:
            raise UsageError(f"--head names {name} twice: give every head once.")
        progress.say(f"loading {file}")
        heads[name] = _load(name, file, asked, weights)
        progress.say(f"{name}: {heads[name].encoders} on {heads[name].runs_on}")
    return heads


def _own_name(file: Path) -> str:
    own = Path(os.path.realpath(file.parent)) if file.name == HEAD_FILE else file.with_suffix("")
    return printable(Path(own.name))


def _load(name: str, file: Path, asked: RuntimeSettings, weights: EncoderWeights) -> ServedHead:
    if is_exported(file):
        exported = ExportedSegmenter(file, asked.device, asked.precision)
        info, cut = HeadInfo.model_validate_json(exported.model.head), exported.model.threshold
        threshold = decided_by(PredictionSettings(threshold=cut), info)
        return ServedHead(name, exported, info.config.encoders_name, exported.model.provider, threshold, cut)
    info = read_head_info(file)
    precision = precision_of(info, file) if asked.precision == "auto" else asked.precision
    segmenter = Segmenter.load(
        file, device=asked.device, precision=precision, hiera_weights=weights.hiera, dino_weights=weights.dino
    )
    threshold = decided_by(PredictionSettings(), info)
    return ServedHead(name, segmenter, info.config.encoders_name, segmenter.runtime.describe(), threshold)
