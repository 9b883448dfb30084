"""Masks for benchmarks, folders and files: decode or read, predict and write, overlapping."""

import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dsu.batches import Batch, prefetch
from dsu.data.decoding import Decoded, ImageProcessor
from dsu.data.images import UnreadableImage, file_sha256, or_unreadable, read_image
from dsu.encoders.weights import EncoderWeights
from dsu.errors import DsuError
from dsu.features.feature_dataset import FeatureDataset
from dsu.features.stores import FeatureStore
from dsu.files import atomic_write, make_folder
from dsu.heads.head_file import HeadInfo, load_head
from dsu.network.network import DSUNet
from dsu.network.pretrained import load_network
from dsu.network.resume import ResumePoint
from dsu.pictures import cutout, overlay
from dsu.prediction.inference import Predictor, finish_mask, mask_of
from dsu.prediction.targets import Job, Target
from dsu.prediction.tiled_prediction import predict_tiled
from dsu.progress import SILENT, Progress, Task
from dsu.runtime import Runtime
from dsu.settings import PredictionSettings

__all__ = ["RECORD_FILE", "Outcome", "predict", "predict_job"]

Size = tuple[int, int]
"""Width and height in pixels."""

RECORD_FILE: Final = "predictions.json"
"""Beside the sets' folders: which head made them, how, and where their ground truth is."""


@dataclass
class Outcome:
    """What came of a prediction."""

    written: int = 0
    kept: int = 0
    """Predictions of the same head and settings that stood already."""
    broken: list[str] = field(default_factory=list)
    """One sentence for each image that could not be read or got no mask."""

    def settle(self, writes: Iterable[Future[str | None]]) -> None:
        """Wait for masks to be written, and count them or note what is wrong with them. Raises as `atomic_write`."""
        for complaint in [write.result() for write in writes]:
            if complaint is None:
                self.written += 1
            else:
                self.broken.append(complaint)


def predict(
    jobs: Sequence[Job],
    head: Path,
    out: Path,
    settings: PredictionSettings,
    runtime: Runtime,
    weights: EncoderWeights,
    progress: Progress = SILENT,
) -> dict[str, Outcome]:
    """Write the masks of all jobs; a broken image is named in the outcome and skipped.

    Files appear whole or not at all. Raises `DsuError` where `out` holds predictions made otherwise.
    """
    state, info = load_head(head)
    make_folder(out)
    record = _open_record(out, _record_of(head, info, settings), settings.overwrite)
    outcomes = {}
    network: DSUNet | None = None
    for job in jobs:
        outcome = outcomes[job.name] = Outcome()
        how = {
            "normalization": job.normalization,
            "from": "images" if job.store is None else "store",
            "tiling": job.tiling and str(job.tiling),
            "random": info.random,
            "source": None if job.source is None else vars(job.source),
        }
        before = record["sets"].get(job.name, {})
        same = all(before.get(key) == how[key] for key in ("normalization", "from", "tiling"))
        stamps = {target.name: _stamp(target.image) for target in job.targets}
        unchanged = {name for name, stamp in before.get("stamps", {}).items() if stamp == stamps.get(name)}
        todo = [
            t
            for t in job.targets
            if not (same and not settings.overwrite and t.name in unchanged and t.output.exists())
        ]
        standing = [] if same or settings.overwrite else [t.output for t in todo if t.output.exists()]
        if standing:
            raise DsuError(f"{standing[0]} stands already: give --overwrite or another --out.")
        outcome.kept = len(job.targets) - len(todo)
        for target in todo:  # of an image that has changed since: gone before the record calls it new
            target.output.unlink(missing_ok=True)
        for folder in {target.output.parent for target in todo}:
            make_folder(folder)
        record["sets"][job.name] = {**how, "names": list(stamps), "stamps": stamps}
        atomic_write(out / RECORD_FILE, (json.dumps(record, indent=1) + "\n").encode())
        if todo and (network is None or (network.hiera is None or network.dino is None)):
            network = load_network(state, info, weights, point=job.point, from_images=job.store is None)
            runtime.place(network)
        if todo and network is not None:
            predict_job(network, job, todo, settings, runtime, outcome, progress)
    return outcomes


def _stamp(image: Path) -> list[int] | None:
    """Size in bytes and time of change: by these an image is known to be the one that was predicted."""
    try:
        stat = image.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def predict_job(
    network: DSUNet,
    job: Job,
    todo: Sequence[Target],
    settings: PredictionSettings,
    runtime: Runtime,
    outcome: Outcome,
    progress: Progress,
) -> None:
    """Decode, predict and write `todo`, overlapping, and count in `outcome` what came of it."""
    with progress.task(f"predicting {job.name or 'files'}", len(todo)) as task:
        if job.tiling is None:
            return _predict_whole(network, job, todo, settings, runtime, outcome, task)

        def finish(logits: Tensor, target: Target) -> str | None:
            return _write(target, mask_of(logits, job.normalization), settings)

        predictor = Predictor(network, runtime, job.point)
        outcome.broken += predict_tiled(predictor, job, todo, settings.batch_size, finish, outcome.settle, task)


def _predict_whole(
    network: DSUNet,
    job: Job,
    todo: Sequence[Target],
    settings: PredictionSettings,
    runtime: Runtime,
    outcome: Outcome,
    task: Task,
) -> None:
    def finish(logits: Tensor, target: Target, size: Size) -> str | None:
        return _write(target, finish_mask(logits, size, job.normalization), settings)

    predictor = Predictor(network, runtime, job.point)
    load = _from_images(network, job.point) if job.store is None else _from_store(job.store, job.point)
    chunks = [todo[start : start + settings.batch_size] for start in range(0, len(todo), settings.batch_size)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="write") as writer:
        pending: list[Future[str | None]] = []
        for loaded in prefetch(partial(load, chunk) for chunk in chunks):
            outcome.broken += loaded.broken
            if loaded.batch is not None:
                logits = predictor(loaded.batch)
                outcome.settle(pending)  # of the batch before, written while this one was computed
                good = zip(logits, loaded.targets, loaded.sizes, strict=True)
                pending = [writer.submit(finish, *one) for one in good]
            task.advance(len(loaded.broken) + len(loaded.targets))
        outcome.settle(pending)


class _Loaded(NamedTuple):
    """Some images to predict, their own sizes and what the network reads of them; and why others can't be read."""

    targets: Sequence[Target]
    sizes: Sequence[Size]
    batch: Batch | None
    broken: Sequence[str] = ()


def _from_store(store: FeatureStore, point: ResumePoint) -> Callable[[Sequence[Target]], _Loaded]:
    """Reads stored features, and the images' own sizes from the manifest."""
    samples, metadata = FeatureDataset(store, point.features, masks=False), store.metadata

    def load(targets: Sequence[Target]) -> _Loaded:
        names = [target.name for target in targets]
        sizes = [metadata[name].size for name in names]
        return _Loaded(targets, sizes, samples.read(names, [0] * len(names)))

    return load


def _from_images(network: DSUNet, point: ResumePoint) -> Callable[[Sequence[Target]], _Loaded]:
    """Decodes images."""
    processor = ImageProcessor(network.config, bool(point.guides))
    pool = ThreadPoolExecutor(4, thread_name_prefix="decode")
    decode = or_unreadable(lambda target: processor.fit(read_image(target.image)))

    def load(targets: Sequence[Target]) -> _Loaded:
        found = list(zip(targets, pool.map(decode, targets), strict=True))
        broken = [str(one) for _, one in found if isinstance(one, UnreadableImage)]
        good = {target: one for target, one in found if isinstance(one, Decoded)}
        batch = Batch.decoded([target.name for target in good], list(good.values())) if good else None
        return _Loaded(list(good), [one.size for one in good.values()], batch, broken)

    return load


def _write(target: Target, mask: NDArray[np.float32], settings: PredictionSettings) -> str | None:
    """Write one mask; the sentence that says why there is none."""
    if not np.isfinite(mask).all():
        return (
            f"{target.image} has no mask, as the network's output is not finite: try --precision fp32, or train the "
            f"head again."
        )
    if settings.threshold is not None:
        mask = (mask >= settings.threshold).astype(np.float32)
    grey = (mask * 255).astype(np.uint8)
    if settings.kind == "mask":
        picture = Image.fromarray(grey)
    else:
        make = overlay if settings.kind == "overlay" else cutout
        try:
            picture = make(read_image(target.image), grey)
        except UnreadableImage as error:
            return str(error)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    atomic_write(target.output, buffer.getvalue())
    return None


def _record_of(head: Path, info: HeadInfo, settings: PredictionSettings) -> dict[str, Any]:
    return {
        "head": str(head),
        "head_sha256": file_sha256(head),
        "version": info.version,
        "kind": settings.kind,
        "threshold": settings.threshold,
        "sets": {},
    }


def _open_record(out: Path, record: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The record of `out`, gone on with where it is of the same head and settings."""
    path = out / RECORD_FILE
    if not path.exists():
        return record
    try:
        before = json.loads(path.read_text())
        same = all(before[key] == record[key] for key in ("head_sha256", "kind", "threshold"))
        sets = before["sets"]
    except (OSError, ValueError, KeyError, TypeError):
        same, sets = False, {}
    if not same and not overwrite:
        raise DsuError(
            f"{out} holds predictions of another head or made with other settings: give --overwrite or another --out."
        )
    return {**record, "sets": sets if same else {}}
