"""Predict masks for sets of images: reading, computing and writing overlap."""

import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

from torch import Tensor

from dsu.batches import Batch, prefetch
from dsu.data.decoding import DECODERS, Decoded, ImageProcessor
from dsu.data.images import Depth, UnreadableImage, or_unreadable, read_image_and_head
from dsu.data.tiles import Tiling, image_name
from dsu.distributed import ALONE, World
from dsu.features.samples import FeatureDataset
from dsu.features.stores import FeatureStore
from dsu.heads.head_file import load_head
from dsu.network.network import DSUNet
from dsu.network.pretrained import load_network
from dsu.network.resume import ResumePoint
from dsu.prediction.inference import (
    PixelBudget,
    Predictor,
    TiledImage,
    resize_logits,
    segment_tiles,
    tiled_image,
)
from dsu.prediction.record import Seen
from dsu.prediction.targets import Job, Target
from dsu.prediction.verdicts import VerdictRow
from dsu.prediction.writing import Outcome, RunJob, row_of, write_jobs, write_mask
from dsu.progress import SILENT, Progress
from dsu.runtime import Runtime
from dsu.settings import EncoderWeights, PredictionSettings

Size = tuple[int, int]
"""Width and height in pixels."""

_PIXELS_AT_ONCE: Final = 100_000_000
"""Pixels of masks resized and written at once: 400 MB on the device, about twice that on the host."""


def predict(
    jobs: Sequence[Job],
    head: Path,
    out: Path,
    settings: PredictionSettings,
    runtime: Runtime,
    weights: EncoderWeights,
    progress: Progress = SILENT,
    world: World = ALONE,
) -> Outcome:
    """Write the masks of all jobs and a table of verdicts, as `write_jobs`; broken images are named in the outcome."""
    state, info = load_head(head)

    def prepare(unfinished: Sequence[Job]) -> RunJob:
        # For the job that needs most of it: one from images if there is any, else that from the earliest features.
        most = min(unfinished, key=lambda job: (job.store is not None, job.point.block))
        network = runtime.place(load_network(state, info, weights, point=most.point, from_images=most.store is None))
        return lambda job, todo, outcome, decoded: predict_job(
            network, job, todo, settings, runtime, outcome, progress, decoded, world
        )

    return write_jobs(jobs, head, info, out, settings, prepare, world, progress)


def predict_job(
    network: DSUNet,
    job: Job,
    todo: Sequence[Target],
    settings: PredictionSettings,
    runtime: Runtime,
    outcome: Outcome,
    progress: Progress,
    decoded: Seen | None = None,
    world: World = ALONE,
) -> None:
    """Decode, predict and write `todo` concurrently, and record the results in `outcome`.

    `decoded` receives the pixel hashes of decoded images before their masks are written. The processes of a `world`
    divide `todo`.
    """
    predictor = Predictor(network, runtime, job.point, settings.batch_size)
    # With tiles, memory contains one image, a few batches of its tiles, and the output of the previous image. Otherwise
    # two batches are decoded, one computed and two written at a time: a GPU is faster than a CPU thread.
    whole = job.tiling is None
    ahead, readers, writers, kept = (3, 2, min(8, os.cpu_count() or 1), 2) if whole else (1, 1, 1, 1)
    load = (_whole if whole else _tiled)(predictor, job, decoded)
    # Processes divide whole batches, since the last bits of a mask depend on its batch.
    size = predictor.batch_size if whole else 1
    batches = [todo[start : start + size] for start in range(0, len(todo), size)]
    own = batches[world.rank :: world.size] if world.connected else batches
    budget = PixelBudget(_PIXELS_AT_ONCE)

    def finish(target: Target, logits: Tensor, size: Size | None, seconds: float) -> VerdictRow:
        started = time.perf_counter()
        with budget.taken(logits.numel() if size is None else math.prod(size)):
            logits = logits if size is None else resize_logits(logits, size)
            row = write_mask(row_of(job, target, outcome), target, logits.sigmoid_().cpu().numpy(), job, settings)
        return replace(row, seconds=round(seconds + time.perf_counter() - started, 3))

    label = f"predicting {job.label}"
    with progress.task(label, len(todo)) as task, ThreadPoolExecutor(writers, thread_name_prefix="write") as writer:
        advance = world.shared_progress(task, label)
        pending: deque[list[Future[VerdictRow]]] = deque()
        for loaded, reading in prefetch((partial(_timed, load, one) for one in own), ahead, readers):
            outcome.add(replace(row_of(job, target, outcome), problem=problem) for target, problem in loaded.broken)
            if loaded.targets:
                started = time.perf_counter()
                logits = list(loaded.segment())
                each = (reading + time.perf_counter() - started) / len(loaded.targets)
                if len(pending) == kept:
                    outcome.add(write.result() for write in pending.popleft())  # written while these were computed
                done = zip(loaded.targets, logits, loaded.sizes, strict=True)
                pending.append([writer.submit(finish, *one, each) for one in done])
            advance(len(loaded.broken) + len(loaded.targets))
        for writes in pending:
            outcome.add(write.result() for write in writes)
    if predictor.refusal:
        progress.say(label + predictor.refusal)


@dataclass(frozen=True)
class _Loaded:
    """A set of images, how to compute their logits, and why others can't be read.

    `sizes` are the images' own sizes to resize logits to; None if the logits already have them.
    """

    targets: Sequence[Target]
    segment: Callable[[], Iterable[Tensor]]
    sizes: Sequence[Size | None] = (None,)
    broken: Sequence[tuple[Target, str]] = ()


_Load: TypeAlias = Callable[[Sequence[Target]], _Loaded]


def _timed(load: _Load, targets: Sequence[Target]) -> tuple[_Loaded, float]:
    """The loaded data, and the seconds it took."""
    started = time.perf_counter()
    return load(targets), time.perf_counter() - started


def _whole(predictor: Predictor, job: Job, decoded: Seen | None) -> _Load:
    """A function that loads a batch of whole images or their stored features."""
    return _from_images(predictor, job, decoded) if job.store is None else _from_store(predictor, job.store)


def _from_store(predictor: Predictor, store: FeatureStore) -> _Load:
    """A function that reads stored features, and the images' own sizes from the manifest."""
    samples, metadata = FeatureDataset(store, predictor.point.features, masks=False), store.metadata

    def load(targets: Sequence[Target]) -> _Loaded:
        names = [target.name for target in targets]
        batch = samples.read(names, [0] * len(names)).pinned_for(predictor.runtime.device)
        return _Loaded(targets, partial(predictor, batch), [metadata[name].size for name in names])

    return load


def _from_images(predictor: Predictor, job: Job, decoded: Seen | None) -> _Load:
    """A function that decodes images."""
    processor = ImageProcessor(predictor.network.config, bool(job.point.guides))
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
        if not good:
            return _Loaded([], list, broken=broken)
        batch = Batch.decoded([target.name for target in good], list(good.values()))
        batch = batch.pinned_for(predictor.runtime.device)
        return _Loaded(list(good), partial(predictor, batch), [one.size for one in good.values()], broken)

    return load


def _tiled(predictor: Predictor, job: Job, decoded: Seen | None) -> _Load:
    """A function that opens one image or its stored features, to read tile by tile."""
    assert job.tiling is not None
    open_tiles = (
        _tiles_of_images(predictor.network, job.tiling, job.depth, decoded)
        if job.store is None
        else _tiles_of_store(job.store, job.point)
    )

    def load(targets: Sequence[Target]) -> _Loaded:
        [target] = targets
        tiles = open_tiles(target)
        if isinstance(tiles, UnreadableImage):
            return _Loaded([], list, broken=[(target, str(tiles))])
        return _Loaded([target], lambda: [segment_tiles(predictor, tiles, predictor.batch_size)])

    return load


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
