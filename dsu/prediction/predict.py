"""Masks for benchmarks, folders and files: decode or read, predict and write, overlapping."""

import io
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dsu.batches import Batch, prefetch
from dsu.data.decoding import DECODERS, Decoded, ImageProcessor
from dsu.data.images import (
    Depth,
    UnreadableImage,
    or_unreadable,
    read_image,
    read_image_and_head,
    read_rgba,
)
from dsu.data.tiles import Tiling, image_name
from dsu.errors import DsuError
from dsu.features.feature_dataset import FeatureDataset
from dsu.features.stores import FeatureStore
from dsu.files import atomic_write, make_folder
from dsu.heads.head_file import load_head
from dsu.network.network import DSUNet
from dsu.network.pretrained import load_network
from dsu.network.resume import ResumePoint
from dsu.pictures import cutout, overlay
from dsu.prediction.inference import (
    PixelBudget,
    Predictor,
    TiledImage,
    resize_logits,
    segment_tiles,
    stretch,
    tiled_image,
)
from dsu.prediction.record import LOCK_FILE, Seen, file_in, note_job, open_record, trained_on_marker
from dsu.prediction.targets import Job, Target
from dsu.prediction.verdicts import VerdictRow, find_verdict, read_table, write_table
from dsu.progress import SILENT, Progress
from dsu.runtime import Runtime
from dsu.settings import EncoderWeights, PredictionSettings
from dsu.thresholds import DEFAULT_THRESHOLD, level_of
from dsu_cache import locked

__all__ = ["Outcome", "predict", "predict_job"]

Size = tuple[int, int]
"""Width and height in pixels."""

_KEEP_EVERY: Final = 10.0
"""Seconds between writes of the table."""

_PIXELS_AT_ONCE: Final = 100_000_000
"""Of masks that are brought to their images' sizes and written: 400 MB on the device, about twice that beside it."""


@dataclass
class Outcome:
    """What came of a prediction.

    Attributes:
        folder: where the masks are; the file, where that was asked for.
        judgeable: whether ground truth of any set is known.
    """

    folder: Path
    judgeable: bool = False
    written: int = 0
    kept: int = 0
    """Predictions of the same head and settings that stood already."""
    broken: list[str] = field(default_factory=list)
    """One sentence for each image that could not be read or got no mask."""
    rows: dict[str, VerdictRow] = field(default_factory=dict)
    """The verdict of every image, by the file that was written."""
    before: dict[str, VerdictRow] = field(default_factory=dict, repr=False)
    """What the folder's table had already."""
    _kept_at: float = field(default_factory=time.monotonic, repr=False)

    def count(self, rows: Iterable[VerdictRow]) -> None:
        """Count what was written, or note what is wrong with it. Raises as `atomic_write`."""
        for row in rows:
            self.rows[row.file] = row
            self.written += not row.problem
            self.broken += [row.problem] if row.problem else []
        if time.monotonic() - self._kept_at > _KEEP_EVERY:  # a command that is killed loses no more
            self.keep_table()

    def keep_table(self) -> None:
        """Write the folder's table, with what has been found so far."""
        write_table(self.folder, self.before | self.rows)
        self._kept_at = time.monotonic()


def predict(
    jobs: Sequence[Job],
    head: Path,
    out: Path,
    settings: PredictionSettings,
    runtime: Runtime,
    weights: EncoderWeights,
    progress: Progress = SILENT,
) -> Outcome:
    """Write the masks of all jobs and a table of their verdicts; a broken image is named in the outcome and skipped.

    Files appear whole or not at all. The folder is held meanwhile: two commands at once would write over each other's
    record. Raises `DsuError` where `out` holds predictions made otherwise, and `BusyError` where another command
    predicts into it.
    """
    state, info = load_head(head)
    outcome = Outcome(out, settings.kind == "mask" and any(job.source is not None for job in jobs))
    network: DSUNet | None = None
    make_folder(out)
    with locked(out / LOCK_FILE, f"{out} is being predicted into"):
        record = open_record(out, head, info, settings)
        outcome.before = read_table(out) if record["sets"] else {}
        try:
            for job in jobs:
                outcome.broken += job.unread
                todo, rows = note_job(job, record, info, out, settings, outcome.before)
                outcome.kept += len(rows)
                outcome.rows |= rows
                if todo:
                    if network is None or network.hiera is None or network.dino is None:
                        loaded = load_network(state, info, weights, point=job.point, from_images=job.store is None)
                        network = runtime.place(loaded)
                    decoded = trained_on_marker(out, record, job.name, info)
                    predict_job(network, job, todo, settings, runtime, outcome, progress, decoded)
        except BaseException:  # of what a stopped command has written, too
            with suppress(DsuError):  # the disk is full, the folder is gone: what went wrong first is told
                outcome.keep_table()
            raise
        outcome.keep_table()
    return outcome


def predict_job(
    network: DSUNet,
    job: Job,
    todo: Sequence[Target],
    settings: PredictionSettings,
    runtime: Runtime,
    outcome: Outcome,
    progress: Progress,
    decoded: Seen | None = None,
) -> None:
    """Decode, predict and write `todo`, overlapping, and count in `outcome` what came of it.

    `decoded` is told what pixels hash to, where images are decoded, before a mask of theirs is written.
    """
    predictor = Predictor(network, runtime, job.point)
    # Of images in tiles memory holds one, a batch of its tiles, and what is written of the one before. Of others two
    # batches are decoded, one is computed and two are written at once: a GPU takes less time for one than a thread.
    whole = job.tiling is None
    ahead, readers, writers, kept = (3, 2, min(8, os.cpu_count() or 1), 2) if whole else (1, 1, 1, 1)
    work = (_batches if job.tiling is None else _tiled)(network, job, todo, settings.batch_size, decoded)
    budget = PixelBudget(_PIXELS_AT_ONCE)

    def row_of(target: Target) -> VerdictRow:
        return VerdictRow(job.name, target.name, "no mask", file=file_in(outcome.folder, target))

    def finish(target: Target, logits: Tensor, size: Size | None, seconds: float) -> VerdictRow:
        started = time.perf_counter()
        with budget.taken(logits.numel() if size is None else math.prod(size)):
            logits = logits if size is None else resize_logits(logits, size)
            row = _write(row_of(target), target, logits.sigmoid_().cpu().numpy(), job, settings)
        return replace(row, seconds=round(seconds + time.perf_counter() - started, 3))

    label = f"predicting {job.label}"
    with progress.task(label, len(todo)) as task, ThreadPoolExecutor(writers, thread_name_prefix="write") as writer:
        pending: deque[list[Future[VerdictRow]]] = deque()
        for loaded, reading in prefetch((partial(_timed, load) for load in work), ahead, readers):
            outcome.count(replace(row_of(target), problem=problem) for target, problem in loaded.broken)
            if loaded.targets:
                started = time.perf_counter()
                logits = list(loaded.segment(predictor))
                each = (reading + time.perf_counter() - started) / len(loaded.targets)
                if len(pending) == kept:
                    outcome.count(write.result() for write in pending.popleft())  # written while these were computed
                done = zip(loaded.targets, logits, loaded.sizes, strict=True)
                pending.append([writer.submit(finish, *one, each) for one in done])
            task.advance(len(loaded.broken) + len(loaded.targets))
        for writes in pending:
            outcome.count(write.result() for write in writes)


@dataclass(frozen=True)
class _Loaded:
    """Some images, and how their logits come of what was read of them; and why others can't be read.

    `sizes` are the images' own, to which logits are resized; None where they have it.
    """

    targets: Sequence[Target]
    segment: Callable[[Predictor], Iterable[Tensor]]
    sizes: Sequence[Size | None] = (None,)
    broken: Sequence[tuple[Target, str]] = ()


def _timed(load: Callable[[], _Loaded]) -> tuple[_Loaded, float]:
    """What is read, and how many seconds that took."""
    started = time.perf_counter()
    return load(), time.perf_counter() - started


def _batches(
    network: DSUNet, job: Job, todo: Sequence[Target], batch_size: int, decoded: Seen | None
) -> Iterator[Callable[[], _Loaded]]:
    """Reads whole images or their stored features, a batch at a time."""
    load = _from_images(network, job, decoded) if job.store is None else _from_store(job.store, job.point)
    return (partial(load, todo[start : start + batch_size]) for start in range(0, len(todo), batch_size))


def _from_store(store: FeatureStore, point: ResumePoint) -> Callable[[Sequence[Target]], _Loaded]:
    """Reads stored features, and the images' own sizes from the manifest."""
    samples, metadata = FeatureDataset(store, point.features, masks=False), store.metadata

    def load(targets: Sequence[Target]) -> _Loaded:
        names = [target.name for target in targets]
        batch = samples.read(names, [0] * len(names))
        return _Loaded(targets, lambda predictor: predictor(batch), [metadata[name].size for name in names])

    return load


def _from_images(network: DSUNet, job: Job, decoded: Seen | None) -> Callable[[Sequence[Target]], _Loaded]:
    """Decodes images."""
    processor = ImageProcessor(network.config, bool(job.point.guides))
    pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    @or_unreadable
    def decode(target: Target) -> tuple[Decoded, str]:
        picture, head = read_image_and_head(target.image, depth=job.depth, hashed=decoded is not None)
        return processor.fit(picture), head.pixels_sha256

    def load(targets: Sequence[Target]) -> _Loaded:
        found = list(zip(targets, pool.map(decode, targets), strict=True))
        broken = [(target, str(one)) for target, one in found if isinstance(one, UnreadableImage)]
        read = [(target, *one) for target, one in found if not isinstance(one, UnreadableImage)]
        if decoded is not None:
            decoded({target.name: pixels for target, _, pixels in read})
        good = {target: one for target, one, _ in read}
        batch = Batch.decoded([target.name for target in good], list(good.values()))
        return _Loaded(list(good), lambda predictor: predictor(batch), [one.size for one in good.values()], broken)

    return load


def _tiled(
    network: DSUNet, job: Job, todo: Sequence[Target], batch_size: int, decoded: Seen | None
) -> Iterator[Callable[[], _Loaded]]:
    """Opens images, or finds their stored features, to be read tile by tile."""
    assert job.tiling is not None
    open_tiles = (
        _tiles_of_images(network, job.tiling, job.depth, decoded)
        if job.store is None
        else _tiles_of_store(job.store, job.point)
    )

    def load(target: Target) -> _Loaded:
        tiles = open_tiles(target)
        if isinstance(tiles, UnreadableImage):
            return _Loaded([], lambda predictor: [], broken=[(target, str(tiles))])
        return _Loaded([target], lambda predictor: [segment_tiles(predictor, tiles, batch_size)])

    return (partial(load, target) for target in todo)


def _tiles_of_images(
    network: DSUNet, tiling: Tiling, depth: Depth | None, decoded: Seen | None
) -> Callable[[Target], TiledImage | UnreadableImage]:
    @or_unreadable
    def open_tiles(target: Target) -> TiledImage:
        picture, head = read_image_and_head(target.image, depth=depth, hashed=decoded is not None)
        if decoded is not None:
            decoded({target.name: head.pixels_sha256})
        return tiled_image(network, picture, tiling)

    return open_tiles


def _tiles_of_store(store: FeatureStore, point: ResumePoint) -> Callable[[Target], TiledImage]:
    samples, metadata = FeatureDataset(store, point.features, masks=False), store.metadata
    tiles = defaultdict(list)
    for name in store.manifest.names:
        tiles[image_name(name)].append(name)

    def open_tiles(target: Target) -> TiledImage:
        names = tiles[target.name]
        boxes = [metadata[name].box or (0, 0, *metadata[name].size) for name in names]
        return TiledImage(boxes, lambda start, stop: samples.read(names[start:stop], [0] * (stop - start)))

    return open_tiles


def _write(
    row: VerdictRow, target: Target, mask: NDArray[np.float32], job: Job, settings: PredictionSettings
) -> VerdictRow:
    """Write what is wanted of a mask (H, W), not stretched yet; its row, with a sentence where nothing is written."""
    if not np.isfinite(mask).all():
        problem = (
            f"{target.image} has no mask, as the network's output is not finite: try --precision fp32, or train the "
            f"head again."
        )
        return replace(row, problem=problem)
    row = find_verdict(row, _grey(mask), job.threshold)
    grey = _grey(stretch(mask) if job.normalization == "minmax" else mask)
    if settings.threshold is not None:
        grey = np.where(grey >= level_of(settings.threshold), np.uint8(255), np.uint8(0))
    picture = Image.fromarray(grey)
    if settings.kind != "mask":
        threshold = job.threshold if settings.threshold is None else DEFAULT_THRESHOLD  # what is cut is black or white
        try:
            picture = (
                overlay(read_image(target.image, depth=job.depth), grey, threshold)
                if settings.kind == "overlay"
                else cutout(read_rgba(target.image, job.depth), grey, threshold)
            )
        except UnreadableImage as error:
            return replace(row, verdict="no mask", problem=str(error))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    atomic_write(target.output, buffer.getvalue())
    return row


def _grey(mask: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (mask * 255).astype(np.uint8)
