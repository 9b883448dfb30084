"""Masks for benchmarks, folders and files: what to predict, from where, and the files that come of it."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dsu.batches import Batch, Samples, StoredSamples, prefetch
from dsu.datasets import find_dataset, find_images, is_benchmark
from dsu.encoders.weights import EncoderWeights
from dsu.errors import DsuError, UsageError
from dsu.heads import HeadInfo, load_head, write_durably
from dsu.images import UnreadableImage, read_image, resize_image
from dsu.network.network import DSUNet
from dsu.network.resume import ResumePoint, earliest, resume_point
from dsu.pictures import cutout, overlay
from dsu.progress import SILENT, Progress
from dsu.runtime import Runtime
from dsu.segmenter import Normalization, finish_mask, load_network, predict_logits
from dsu.stores import (
    SourceFolder,
    available_points,
    check_arrays,
    check_samples,
    encoders_name,
    find_store,
)
from dsu_cache import Store

__all__ = ["RECORD_FILE", "Job", "Kind", "Outcome", "PredictionSettings", "predict", "prepare_jobs"]

RECORD_FILE: Final = "predictions.json"
"""Beside the sets' folders: which head made them, how, and where their ground truth is."""

Kind = Literal["mask", "overlay", "cutout"]


@dataclass(frozen=True)
class PredictionSettings:
    """How masks are made and written.

    Attributes:
        kind: an 8-bit mask, the image under a coloured mask, or the object with alpha.
        threshold: in [0, 1]; None keeps the soft mask.
        normalization: None takes min-max for benchmarks and none for everything else.
        overwrite: write over predictions of another head or other settings.
        batch_size: images the network sees at once.
    """

    kind: Kind = "mask"
    threshold: float | None = None
    normalization: Normalization | None = None
    overwrite: bool = False
    batch_size: int = 8


@dataclass(frozen=True)
class Target:
    """One image to predict and the file to write."""

    name: str
    image: Path
    output: Path


@dataclass(frozen=True)
class Job:
    """One set of images.

    Attributes:
        name: of the set; its predictions lie in a folder of this name (files given alone: none).
        targets: its images.
        normalization: resolved.
        source: where the ground truth is, for a data set.
        store: where its features are; None predicts from the images.
        point: where the network resumes.
    """

    name: str
    targets: tuple[Target, ...]
    normalization: Normalization
    source: SourceFolder | None
    store: Store | None
    point: ResumePoint


@dataclass
class Outcome:
    """What came of a prediction."""

    written: int = 0
    kept: int = 0
    """Predictions of the same head and settings that stood already."""
    broken: list[str] = field(default_factory=list)
    """One sentence for each image that could not be read."""


def prepare_jobs(
    sources: Sequence[str],
    head: Path,
    out: Path,
    settings: PredictionSettings,
    runtime: Runtime,
    *,
    data_root: Path,
    cache_root: Path,
    end_to_end: bool,
    images: str | None = None,
    masks: str | None = None,
    progress: Progress = SILENT,
) -> list[Job]:
    """Find what is meant by `sources`; without any, the test splits (or held-out share) of the head's data set.

    A benchmark's name means its test splits, from their stores unless `end_to_end`; a folder or a file is always
    predicted from its pixels. Raises `UsageError` where a source is unknown or an output would fall on an input.
    """
    _, info = load_head(head)
    finder = _Finder(info, out, settings, runtime, data_root, cache_root, end_to_end, images, masks, progress)
    jobs: list[Job] = []
    files = [Path(source) for source in sources if Path(source).is_file()]
    for source in sources:
        if Path(source).is_file():
            continue
        if is_benchmark(source) or not Path(source).is_dir():
            jobs += finder.named(source)
        else:
            jobs.append(finder.folder(Path(source)))
    if files:
        jobs.append(finder.files(files))
    if not sources:
        jobs += finder.of_the_head()
    _check_outputs(jobs)
    return jobs


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
    record = _open_record(out, _record_of(head, info, settings), settings.overwrite)
    outcomes = {}
    network: DSUNet | None = None
    for job in jobs:
        outcome = outcomes[job.name] = Outcome()
        how = {"normalization": job.normalization, "source": None if job.source is None else vars(job.source)}
        same = record["sets"].get(job.name, {}).get("normalization") == job.normalization
        todo = [t for t in job.targets if not (same and not settings.overwrite and t.output.exists())]
        standing = [] if same or settings.overwrite else [t.output for t in todo if t.output.exists()]
        if standing:
            raise DsuError(f"{standing[0]} stands already: give --overwrite or another --out.")
        outcome.kept = len(job.targets) - len(todo)
        record["sets"][job.name] = {**how, "names": [target.name for target in job.targets]}
        write_durably(out / RECORD_FILE, (json.dumps(record, indent=1) + "\n").encode())
        if todo and (network is None or (network.hiera is None or network.dino is None)):
            network = load_network(state, info, weights, point=job.point, from_images=job.store is None)
            network.to(runtime.device)
        if todo and network is not None:
            _predict_job(network, job, todo, settings, runtime, outcome, progress)
    return outcomes


def _predict_job(
    network: DSUNet,
    job: Job,
    todo: Sequence[Target],
    settings: PredictionSettings,
    runtime: Runtime,
    outcome: Outcome,
    progress: Progress,
) -> None:
    """Decode, predict and write, overlapping."""
    loader = _ImageLoader(network, job.point) if job.store is None else _StoreLoader(job.store, job.point)
    with (
        progress.task(f"predicting {job.name}", len(todo)) as task,
        ThreadPoolExecutor(2, thread_name_prefix="write") as writer,
    ):
        pending: list[Future[None]] = []
        for loaded in prefetch(loader.calls(todo, settings.batch_size)):
            outcome.broken += loaded.broken
            task.advance(len(loaded.broken))
            for future in pending:
                future.result()
            pending = []
            if not loaded.targets:
                continue
            assert loaded.batch is not None
            logits = predict_logits(network, runtime, loaded.batch, job.point).float().cpu()
            for target, size, one in zip(loaded.targets, loaded.sizes, logits, strict=True):
                mask = finish_mask(one, size, job.normalization)
                pending.append(writer.submit(_write, target, mask, settings))
            outcome.written += len(loaded.targets)
            task.advance(len(loaded.targets))
        for future in pending:
            future.result()


@dataclass(frozen=True)
class _Loaded:
    targets: tuple[Target, ...]
    sizes: tuple[tuple[int, int], ...]
    batch: Batch | None
    broken: list[str]


class _StoreLoader:
    """Batches of stored features, with the images' own sizes from the manifest."""

    def __init__(self, store: Store, point: ResumePoint) -> None:
        self._manifest = store.manifest
        self._samples: Samples = StoredSamples(store, store.manifest.names, point.reads, masks=False)

    def calls(self, targets: Sequence[Target], size: int) -> Iterator[Callable[[], _Loaded]]:
        for start in range(0, len(targets), size):
            part = tuple(targets[start : start + size])
            yield lambda part=part: self._load(part)  # type: ignore[misc]

    def _load(self, targets: tuple[Target, ...]) -> _Loaded:
        names = [target.name for target in targets]
        sizes = tuple(tuple(self._manifest.entries[name].info["size"]) for name in names)  # type: ignore[arg-type]
        return _Loaded(targets, sizes, self._samples.fetch(names, [0] * len(names)), [])  # type: ignore[arg-type]


class _ImageLoader:
    """Batches of decoded images; those that can't be read are left out and named."""

    def __init__(self, network: DSUNet, point: ResumePoint) -> None:
        architecture = network.architecture
        self._size = architecture.hiera_size
        self._dino_size = architecture.dino_size if point.maps else None
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="decode")

    def calls(self, targets: Sequence[Target], size: int) -> Iterator[Callable[[], _Loaded]]:
        for start in range(0, len(targets), size):
            part = tuple(targets[start : start + size])
            yield lambda part=part: self._load(part)  # type: ignore[misc]

    def _load(self, targets: tuple[Target, ...]) -> _Loaded:
        decoded = list(self._pool.map(self._decode, targets))
        good = [(target, item) for target, item in zip(targets, decoded, strict=True) if not isinstance(item, str)]
        broken = [item for item in decoded if isinstance(item, str)]
        if not good:
            return _Loaded((), (), None, broken)
        kept = tuple(target for target, _ in good)
        pixels = torch.from_numpy(np.stack([item[1] for _, item in good]))
        dino = None if self._dino_size is None else torch.from_numpy(np.stack([item[2] for _, item in good]))
        names = tuple(target.name for target in kept)
        batch = Batch(names, (0,) * len(names), pixels, None, dino, {})
        return _Loaded(kept, tuple(item[0] for _, item in good), batch, broken)

    def _decode(self, target: Target) -> tuple[tuple[int, int], NDArray[np.uint8], Any] | str:
        try:
            image = read_image(target.image)
        except UnreadableImage as error:
            return str(error)
        dino = None if self._dino_size is None else resize_image(image, self._dino_size)
        return image.size, resize_image(image, self._size), dino


def _write(target: Target, mask: NDArray[np.float32], settings: PredictionSettings) -> None:
    if settings.threshold is not None:
        mask = (mask >= settings.threshold).astype(np.float32)
    grey = (mask * 255).astype(np.uint8)
    if settings.kind == "mask":
        picture = Image.fromarray(grey)
    else:
        make = overlay if settings.kind == "overlay" else cutout
        picture = make(read_image(target.image), grey)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    write_durably(target.output, buffer.getvalue())


@dataclass(frozen=True)
class _Finder:
    """From what a user names to jobs."""

    info: HeadInfo
    out: Path
    settings: PredictionSettings
    runtime: Runtime
    data_root: Path
    cache_root: Path
    end_to_end: bool
    images: str | None
    masks: str | None
    progress: Progress

    def named(self, name: str) -> list[Job]:
        """A data set's test splits (a split's own name: that split)."""
        if not self.end_to_end:
            try:
                return self._from_stores(name)
            except UsageError:
                pass  # No store has it: predict from its images, as long as they are there.
        splits = find_dataset(name, self.data_root, self.images, self.masks)
        chosen = [split for split in splits if split.kind != "train"] or list(splits)
        return [
            self._images_job(
                split.name,
                [(pair.name, pair.image) for pair in split.pairs],
                SourceFolder.of(split, name, self.data_root, self.images, self.masks),
            )
            for split in chosen
        ]

    def folder(self, folder: Path) -> Job:
        """All images below a folder, subfolders kept."""
        name = folder.resolve().name
        found = [(path.relative_to(folder).as_posix(), path) for path in find_images(folder)]
        if not found:
            raise UsageError(f"There is no image below {folder}: give a folder that holds some.")
        return self._images_job(name, found, None)

    def files(self, files: Sequence[Path]) -> Job:
        """Image files given one by one; their masks lie in OUT itself."""
        return self._images_job("", [(path.name, path) for path in files], None)

    def of_the_head(self) -> list[Job]:
        """What the head was not trained on: its data set's test splits, else the share held out."""
        source = SourceFolder(**{k: v for k, v in self.info.dataset.items() if k != "held_out"})
        splits = find_dataset(source.reference, Path(source.data_root), source.images, source.masks)
        tests = [split for split in splits if split.kind == "test"]
        if tests:
            return [job for split in tests for job in self.named_by(split.name, source)]
        held_out = set(self.info.dataset.get("held_out", ()))
        if not held_out:
            raise UsageError(
                f"{source.dataset} has neither a test split nor a held-out share: name what to predict, a benchmark, "
                f"a folder or image files."
            )
        pairs = [(pair.name, pair.image) for split in splits for pair in split.pairs if pair.name in held_out]
        return [self._images_job(f"{source.split}-VAL", pairs, source)]

    def named_by(self, split: str, like: SourceFolder) -> list[Job]:
        """A split found the way another one was."""
        again = _Finder(**{**vars(self), "data_root": Path(like.data_root), "images": like.images, "masks": like.masks})
        if like.benchmark:
            return again.named(split)
        splits = find_dataset(like.reference, Path(like.data_root), like.images, like.masks)
        found = next(item for item in splits if item.name == split)
        if not self.end_to_end:
            try:
                return self._from_stores(split)
            except UsageError:
                pass
        pairs = [(pair.name, pair.image) for pair in found.pairs]
        source = SourceFolder.of(found, like.reference, Path(like.data_root), like.images, like.masks)
        return [self._images_job(split, pairs, source)]

    def _from_stores(self, name: str) -> list[Job]:
        """Jobs from the stores of a data set's test splits."""
        splits = _stored_splits(self.cache_root, name, encoders_name(self.info.architecture))
        jobs = []
        for store, source in splits:
            architecture = self.info.architecture
            point = resume_point(architecture, available_points(store, 1))
            check_arrays(store, point, self.info.encoders, self.runtime, self.info.stored or "float16")
            check_samples(store, source, self.progress)
            split = source.find()
            paths = {} if split is None else {pair.name: pair.image for pair in split.pairs}
            targets = [(n, paths.get(n, Path(n))) for n in store.manifest.names]
            jobs.append(self._job(source.split, targets, source, store, point))
        return jobs

    def _images_job(self, name: str, images: Sequence[tuple[str, Path]], source: SourceFolder | None) -> Job:
        return self._job(name, images, source, None, earliest(self.info.architecture))

    def _job(
        self,
        name: str,
        images: Sequence[tuple[str, Path]],
        source: SourceFolder | None,
        store: Store | None,
        point: ResumePoint,
    ) -> Job:
        benchmark = source is not None and source.benchmark
        normalization = self.settings.normalization or ("minmax" if benchmark else "none")
        stems = [str(Path(item).with_suffix("")) if source is None else item for item, _ in images]
        targets = []
        for (item, path), stem in zip(images, stems, strict=True):
            # a.jpg and a.png of one folder must not meet in a.png.
            written = stem if stems.count(stem) == 1 else item.replace(".", "_")
            output = (self.out / name / f"{written}.png") if name else self.out / f"{written}.png"
            targets.append(Target(item, path, output))
        return Job(name, tuple(targets), normalization, source, store, point)


def _stored_splits(cache_root: Path, name: str, encoders: str) -> list[tuple[Store, SourceFolder]]:
    """The stores of a data set's test splits, or of the one split that is named."""
    from dsu.stores import find_stores

    found = find_stores(cache_root, name, encoders)
    tests = [(store, source) for store, source in found if source.kind == "test"] or found
    if not tests:
        find_store(cache_root, name, ("test",), encoders)
    return tests


def _check_outputs(jobs: Sequence[Job]) -> None:
    """No prediction may fall on an input or on another prediction."""
    inputs = {target.image.resolve() for job in jobs for target in job.targets}
    outputs: set[Path] = set()
    for job in jobs:
        for target in job.targets:
            resolved = target.output.resolve()
            if resolved in inputs:
                raise UsageError(
                    f"The prediction of {target.image} would be written over an input: give another --out."
                )
            if resolved in outputs:
                raise UsageError(f"Two images would be written to {target.output}: predict them one after the other.")
            outputs.add(resolved)


def _record_of(head: Path, info: HeadInfo, settings: PredictionSettings) -> dict[str, Any]:
    from dsu.images import file_sha256

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
