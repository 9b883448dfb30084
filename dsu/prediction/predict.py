"""Masks for benchmarks, folders and files: decode or read, predict and write, overlapping."""

import io
import json
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dsu.batches import Batch, prefetch
from dsu.data.decoding import DECODERS, Decoded, ImageProcessor
from dsu.data.images import (
    Depth,
    UnreadableImage,
    file_bytes_and_time,
    file_sha256,
    or_unreadable,
    read_image,
    read_rgba,
)
from dsu.data.tiles import Tiling, image_name
from dsu.errors import DsuError
from dsu.features.feature_dataset import FeatureDataset
from dsu.features.stores import FeatureStore
from dsu.files import atomic_write, make_folder, sweep
from dsu.heads.head_file import HeadInfo, load_head
from dsu.network.network import DSUNet
from dsu.network.pretrained import load_network
from dsu.network.resume import ResumePoint
from dsu.pictures import cutout, overlay
from dsu.prediction.inference import Predictor, TiledImage, mask_of, resize_logits, segment_tiles, tiled_image
from dsu.prediction.targets import RECORD_FILE, Job, Target
from dsu.progress import SILENT, Progress
from dsu.runtime import Runtime
from dsu.settings import EncoderWeights, PredictionSettings
from dsu_cache import locked

__all__ = [
    "FIGURE_FILES",
    "LOCK_FILE",
    "RECORD_FILE",
    "Outcome",
    "check_noted",
    "predict",
    "predict_job",
]

Size = tuple[int, int]
"""Width and height in pixels."""

LOCK_FILE: Final = ".predictions.lock"

FIGURE_FILES: Final = ("metrics.json", "metrics.csv")
"""What `dsu eval` writes beside a record: the figures of its sets."""


@dataclass
class Outcome:
    """What came of a prediction.

    Attributes:
        folder: where the masks are.
        judgeable: whether ground truth of any set is known.
    """

    folder: Path
    judgeable: bool = False
    written: int = 0
    kept: int = 0
    """Predictions of the same head and settings that stood already."""
    broken: list[str] = field(default_factory=list)
    """One sentence for each image that could not be read or got no mask."""

    def count(self, writes: Iterable[Future[str | None]]) -> None:
        """Wait for masks to be written, and count them or note what is wrong with them. Raises as `atomic_write`."""
        complaints = [write.result() for write in writes]
        self.written += complaints.count(None)
        self.broken += filter(None, complaints)


def predict(
    jobs: Sequence[Job],
    head: Path,
    out: Path,
    settings: PredictionSettings,
    runtime: Runtime,
    weights: EncoderWeights,
    progress: Progress = SILENT,
) -> Outcome:
    """Write the masks of all jobs; a broken image is named in the outcome and skipped.

    Files appear whole or not at all. The folder is held meanwhile: two commands at once would write over each other's
    record. Raises `DsuError` where `out` holds predictions made otherwise, and `BusyError` where another command
    predicts into it.
    """
    state, info = load_head(head)
    outcome = Outcome(out, settings.kind == "mask" and any(job.source is not None for job in jobs))
    network: DSUNet | None = None
    make_folder(out)
    with locked(out / LOCK_FILE, f"{out} is being predicted into"):
        record = _open_record(out, head, info, settings)
        for job in jobs:
            todo = _note(job, record, info, out, settings, outcome)
            if todo:
                if network is None or network.hiera is None or network.dino is None:
                    loaded = load_network(state, info, weights, point=job.point, from_images=job.store is None)
                    network = runtime.place(loaded)
                predict_job(network, job, todo, settings, runtime, outcome, progress)
    return outcome


def _note(
    job: Job, record: dict[str, Any], info: HeadInfo, out: Path, settings: PredictionSettings, outcome: Outcome
) -> list[Target]:
    """Write into the record what a job is about to predict; gives what is not there yet.

    Raises `DsuError` where predictions of it were made otherwise.
    """
    how = {
        "normalization": job.normalization,
        "from": "images" if job.store is None else "store",
        "tiling": job.tiling and str(job.tiling),
        "random": info.random,
        "share": job.share,
        "source": None if job.source is None else vars(job.source),
    }
    before = record["sets"].get(job.name, {})
    if not settings.overwrite:
        _check_places(job, before, out)
    same = not settings.overwrite and all(before.get(key) == how[key] for key in ("normalization", "from", "tiling"))
    stamps = {target.name: _stamp(target.image) for target in job.targets}
    noted = before.get("stamps", {}) if same else {}
    todo = [t for t in job.targets if noted.get(t.name, ()) != stamps[t.name] or not t.output.exists()]
    standing = [] if same or settings.overwrite else [t.output for t in todo if t.output.exists()]
    if standing:
        raise DsuError(f"{standing[0]} stands already: give --overwrite or another --out.")
    outcome.kept += len(job.targets) - len(todo)
    for folder in {target.output.parent for target in todo}:
        make_folder(folder)
        sweep(folder)
    if todo:
        _forget_figures(out, job.name)
    for target in todo:  # of an image that has changed since: gone before the record calls it new
        target.output.unlink(missing_ok=True)
    stamps = {**noted, **stamps}
    new = {target.name for target in todo}
    trained_on = {name for name in before.get("trained_on", ()) if name in noted and name not in new}
    record["sets"][job.name] = {
        **how,
        "names": list(stamps),
        "stamps": stamps,
        "places": {**(before.get("places", {}) if same else {}), **job.places},
        "trained_on": sorted(trained_on | _trained_on(job, todo, info)),
    }
    atomic_write(out / RECORD_FILE, (json.dumps(record, indent=1) + "\n").encode())
    return todo


def _forget_figures(out: Path, name: str) -> None:
    """Take away what `dsu eval` wrote of a set whose maps are about to be others."""
    figures, table = (out / file for file in FIGURE_FILES)
    try:
        kept = {known: found for known, found in json.loads(figures.read_text()).items() if known != name}
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError):  # not as it was written
        kept = {}
    table.unlink(missing_ok=True)  # the next `dsu eval` writes it, of all sets
    if kept:
        atomic_write(figures, (json.dumps(kept, indent=2) + "\n").encode())
    else:
        figures.unlink()


def _check_places(job: Job, before: Mapping[str, Any], out: Path) -> None:
    """Raise `DsuError` where a folder's predictions are of images of the same name elsewhere.

    What was moved is no other: then its old place is gone.
    """
    for name, place in before.get("places", {}).items():
        if job.places.get(name, place) != place and Path(place, name).exists():
            raise DsuError(
                f"{out / job.name} holds predictions of {Path(place, name)}, not of {Path(job.places[name], name)}: "
                f"give --overwrite or another --out."
            )


def _trained_on(job: Job, todo: Sequence[Target], info: HeadInfo) -> set[str]:
    """Names of images to predict that the head was trained on, by their content."""
    if not info.trained_on:
        return set()
    if job.store is not None:
        facts = job.store.metadata.items()
        contents = {image_name(name) if job.tiling else name: fact.image_sha256 for name, fact in facts}
        return {target.name for target in todo if info.was_trained_on(contents[target.name])}
    digest = or_unreadable(file_sha256)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda target: digest(target.image), todo)
        return {
            target.name
            for target, content in zip(todo, found, strict=True)
            if isinstance(content, str) and info.was_trained_on(content)
        }


def _stamp(image: Path) -> list[int] | None:
    """Size in bytes and time of change: by these an image is known to be the one that was predicted."""
    found = or_unreadable(file_bytes_and_time)(image)
    return None if isinstance(found, UnreadableImage) else list(found)


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
    predictor = Predictor(network, runtime, job.point)
    # Of images in tiles memory holds one, a batch of its tiles, and what is written of the one before. Of others two
    # batches are decoded, one is computed and two are written at once: a GPU takes less time for one than a thread.
    whole = job.tiling is None
    ahead, readers, writers, kept = (3, 2, min(8, os.cpu_count() or 1), 2) if whole else (1, 1, 1, 1)
    work = (_batches if job.tiling is None else _tiled)(network, job, todo, settings.batch_size)

    def finish(target: Target, logits: Tensor, size: Size | None) -> str | None:
        logits = logits if size is None else resize_logits(logits, size)
        return _write(target, mask_of(logits, job.normalization), settings, job.depth)

    label = f"predicting {job.name or 'files'}"
    with progress.task(label, len(todo)) as task, ThreadPoolExecutor(writers, thread_name_prefix="write") as writer:
        pending: deque[list[Future[str | None]]] = deque()
        for loaded in prefetch(work, ahead, readers):
            outcome.broken += loaded.broken
            if loaded.targets:
                logits = loaded.segment(predictor)
                if len(pending) == kept:
                    outcome.count(pending.popleft())  # written while these were computed
                done = zip(loaded.targets, logits, loaded.sizes, strict=True)
                pending.append([writer.submit(finish, *one) for one in done])
            task.advance(len(loaded.broken) + len(loaded.targets))
        for writes in pending:
            outcome.count(writes)


@dataclass(frozen=True)
class _Loaded:
    """Some images, and how their logits come of what was read of them; and why others can't be read.

    `sizes` are the images' own, to which logits are resized; None where they have it.
    """

    targets: Sequence[Target]
    segment: Callable[[Predictor], Iterable[Tensor]]
    sizes: Sequence[Size | None] = (None,)
    broken: Sequence[str] = ()


def _batches(network: DSUNet, job: Job, todo: Sequence[Target], batch_size: int) -> Iterator[Callable[[], _Loaded]]:
    """Reads whole images or their stored features, a batch at a time."""
    load = _from_images(network, job) if job.store is None else _from_store(job.store, job.point)
    return (partial(load, todo[start : start + batch_size]) for start in range(0, len(todo), batch_size))


def _from_store(store: FeatureStore, point: ResumePoint) -> Callable[[Sequence[Target]], _Loaded]:
    """Reads stored features, and the images' own sizes from the manifest."""
    samples, metadata = FeatureDataset(store, point.features, masks=False), store.metadata

    def load(targets: Sequence[Target]) -> _Loaded:
        names = [target.name for target in targets]
        batch = samples.read(names, [0] * len(names))
        return _Loaded(targets, lambda predictor: predictor(batch), [metadata[name].size for name in names])

    return load


def _from_images(network: DSUNet, job: Job) -> Callable[[Sequence[Target]], _Loaded]:
    """Decodes images."""
    processor = ImageProcessor(network.config, bool(job.point.guides))
    pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
    decode = or_unreadable(lambda target: processor.fit(read_image(target.image, depth=job.depth)))

    def load(targets: Sequence[Target]) -> _Loaded:
        found = list(zip(targets, pool.map(decode, targets), strict=True))
        broken = [str(one) for _, one in found if isinstance(one, UnreadableImage)]
        good = {target: one for target, one in found if isinstance(one, Decoded)}
        batch = Batch.decoded([target.name for target in good], list(good.values()))
        return _Loaded(list(good), lambda predictor: predictor(batch), [one.size for one in good.values()], broken)

    return load


def _tiled(network: DSUNet, job: Job, todo: Sequence[Target], batch_size: int) -> Iterator[Callable[[], _Loaded]]:
    """Opens images, or finds their stored features, to be read tile by tile."""
    assert job.tiling is not None
    open_tiles = (
        _tiles_of_images(network, job.tiling, job.depth) if job.store is None else _tiles_of_store(job.store, job.point)
    )

    def load(target: Target) -> _Loaded:
        tiles = open_tiles(target)
        if isinstance(tiles, UnreadableImage):
            return _Loaded([], lambda predictor: [], broken=[str(tiles)])
        return _Loaded([target], lambda predictor: [segment_tiles(predictor, tiles, batch_size)])

    return (partial(load, target) for target in todo)


def _tiles_of_images(
    network: DSUNet, tiling: Tiling, depth: Depth | None
) -> Callable[[Target], TiledImage | UnreadableImage]:
    return or_unreadable(lambda target: tiled_image(network, read_image(target.image, depth=depth), tiling))


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


def _write(target: Target, mask: NDArray[np.float32], settings: PredictionSettings, depth: Depth | None) -> str | None:
    """Write one mask; the sentence that says why there is none."""
    if not np.isfinite(mask).all():
        return (
            f"{target.image} has no mask, as the network's output is not finite: try --precision fp32, or train the "
            f"head again."
        )
    if settings.threshold is not None:
        mask = (mask >= settings.threshold).astype(np.float32)
    grey = (mask * 255).astype(np.uint8)
    picture = Image.fromarray(grey)
    if settings.kind != "mask":
        try:
            picture = (
                overlay(read_image(target.image, depth=depth), grey)
                if settings.kind == "overlay"
                else cutout(read_rgba(target.image, depth), grey)
            )
        except UnreadableImage as error:
            return str(error)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    atomic_write(target.output, buffer.getvalue())
    return None


def _open_record(out: Path, head: Path, info: HeadInfo, settings: PredictionSettings) -> dict[str, Any]:
    """The record of `out`, gone on with where it is of the same head and settings."""
    record = {
        "head": str(head),
        "head_sha256": file_sha256(head),
        "version": info.version,
        "kind": settings.kind,
        "threshold": settings.threshold,
    }
    path, damaged = out / RECORD_FILE, False
    if not path.exists():
        return {**record, "sets": {}}
    try:
        before = json.loads(path.read_text())
        same, sets = all(before[key] == record[key] for key in ("head_sha256", "kind", "threshold")), before["sets"]
        for how in sets.values():
            check_noted(how)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        same, damaged, sets = False, True, {}
    if not same and not settings.overwrite:
        why = (
            f"{path} is damaged" if damaged else f"{out} holds predictions of another head or made with other settings"
        )
        raise DsuError(f"{why}: give --overwrite or another --out.")
    if not same:
        for file in FIGURE_FILES:
            (out / file).unlink(missing_ok=True)
    return {**record, "sets": sets if same else {}}


def check_noted(how: Mapping[str, Any]) -> None:
    """Raise `KeyError`, `TypeError` or `AttributeError` for what `dsu predict` never notes of a set."""
    stamps, trained_on = how.get("stamps", {}), how.get("trained_on", [])
    places, names = how.get("places", {}), how["names"]
    texts = [*names, *trained_on, *places, *places.values()]
    numbers = [number for stamp in stamps.values() if stamp is not None for number in stamp]
    if not (
        isinstance(names, list)
        and isinstance(trained_on, list)
        and all(isinstance(text, str) for text in texts)
        and all(type(number) is int for number in numbers)
    ):
        raise TypeError("the names of a record are texts, and its stamps numbers")
