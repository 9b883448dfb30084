"""Stage one: run what is frozen, once, and store it."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsu.architecture import Architecture
from dsu.batches import Batch, ImageSamples, prefetch
from dsu.datasets import Inspection, SampleFacts, Split, describe, find_dataset, inspect
from dsu.encoders.weights import EncoderWeights
from dsu.errors import DsuError, UsageError
from dsu.network.network import DSUNet, normalize_pixels
from dsu.network.resume import check_points, map_names, point_shape
from dsu.progress import SILENT, Progress
from dsu.runtime import Precision, Runtime, choose_runtime
from dsu.stores import (
    SourceFolder,
    encoders_of,
    fingerprint,
    load_encoders,
    sample_key,
    source_of,
    store_path,
    torch_type,
)
from dsu.views import VIEWS
from dsu_cache import Changes, Entry, Fingerprint, Store

__all__ = ["DEFAULT_LEVELS", "CachePlan", "Extraction", "ExtractionSettings", "cache_features"]

DEFAULT_LEVELS = ("V", "S1", "S2", "S3", "S4")


@dataclass(frozen=True)
class ExtractionSettings:
    """What stage one stores, and how.

    Attributes:
        levels: points and maps beside pixels and mask, which are always stored.
        views: how many views of DINOv2's maps a training split keeps (test splits keep one).
        level_views: how many views of Hiera's levels and tokens.
        stored: float16 or float32.
        batch_size: samples the encoders see at once; a batch never crosses a shard.
        compressor: None, zstd or blosc.
        foreground: mask values that count as foreground, None to recognise them.
        rebuild: drop arrays whose fingerprint differs instead of refusing.
    """

    levels: tuple[str, ...] = DEFAULT_LEVELS
    views: int = 4
    level_views: int = 1
    stored: str = "float16"
    batch_size: int = 8
    compressor: Any = None
    foreground: tuple[int, ...] | None = None
    rebuild: bool = False

    def views_of(self, name: str, kind: str, architecture: Architecture) -> tuple[int, ...]:
        """The views in which array `name` is kept; pixels and masks are flipped when they are read."""
        if name in ("pixels", "mask") or kind == "test":
            return (0,)
        return tuple(range(self.views if name in map_names(architecture) else self.level_views))


@dataclass
class Extraction:
    """One split's work, known before it starts: what is new, and the bytes that will be written by array."""

    split: Split
    inspection: Inspection
    store: Store
    changes: Changes
    drift: tuple[str, ...]
    settings: ExtractionSettings
    architecture: Architecture
    todo: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    """Shard to the (array, view) that it lacks."""

    @property
    def bytes_by_array(self) -> dict[str, int]:
        """Bytes still to be written, before any compression."""
        found: dict[str, int] = {}
        for shard, lacking in self.todo.items():
            rows = len(self.store.rows_in_shard(shard))
            for name, _ in lacking:
                found[name] = found.get(name, 0) + rows * self.store.item_nbytes(name)
        return found

    @property
    def images(self) -> int:
        """Images that have to be decoded."""
        return sum(len(self.store.rows_in_shard(shard)) for shard in self.todo)

    @property
    def encodings(self) -> int:
        """Views of images that have to be encoded or written: the unit of progress."""
        return sum(len(self.store.rows_in_shard(s)) * len({view for _, view in todo}) for s, todo in self.todo.items())

    def needs(self, architecture: Architecture) -> tuple[bool, bool]:
        """Whether Hiera and DINOv2 have to run."""
        arrays = {name for lacking in self.todo.values() for name, _ in lacking} - {"pixels", "mask"}
        maps = arrays & set(map_names(architecture))
        return bool(arrays - maps), bool(maps)

    def run(self, network: DSUNet, runtime: Runtime, progress: Progress = SILENT) -> None:
        """Decode, encode and write what is missing, the three overlapping, a shard at a time.

        A shard that is finished stays finished, whatever happens to the next one. Raises `DsuError` naming the
        sample when a value is not finite or does not fit the stored type, or when the disk is full.
        """
        if not self.todo:
            return
        with (
            self.store.lock(),
            progress.task(f"encoding {self.split.name}", self.encodings, "views") as task,
            ThreadPoolExecutor(1, thread_name_prefix="write") as writer,
        ):
            pending: list[Future[None]] = []
            for shard, names, batch in self._decoded(network):
                for view in sorted({view for _, view in self.todo[shard]}):
                    arrays = [name for name, wanted in self.todo[shard] if wanted == view]
                    values = self._encode(network, runtime, batch, names, arrays, view, task.advance)
                    rows = self.store.rows_in_shard(shard)
                    for future in pending:
                        future.result()
                    pending = [
                        writer.submit(self._write, name, view, shard, rows, value) for name, value in values.items()
                    ]
            for future in pending:
                future.result()

    def _decoded(self, network: DSUNet) -> Iterator[tuple[int, list[str], Batch]]:
        """Each shard with the names of its rows and their decoded images, one shard ahead."""
        files = {pair.name: (pair.image, pair.mask) for pair in self.split.pairs}
        _, dino = self.needs(network.architecture)
        samples = ImageSamples(files, network.architecture, self.inspection.mask_reading, dino=dino)
        shards = sorted(self.todo)
        names = [
            [self.store.manifest.names_at(int(row))[0] for row in self.store.rows_in_shard(shard)] for shard in shards
        ]

        def decode(chosen: list[str]) -> Callable[[], Batch]:
            return lambda: samples.fetch(chosen, [0] * len(chosen))

        yield from zip(shards, names, prefetch(map(decode, names), ahead=1), strict=True)

    def _encode(
        self,
        network: DSUNet,
        runtime: Runtime,
        batch: Batch,
        names: list[str],
        arrays: list[str],
        view: int,
        advance: Callable[[int], None],
    ) -> dict[str, np.ndarray]:
        """The named arrays of one shard in one view, (rows, *item) each."""
        found: dict[str, np.ndarray] = {
            name: getattr(batch, name).numpy() for name in ("pixels", "mask") if name in arrays
        }
        encoded = [name for name in arrays if name not in found]
        if not encoded:
            advance(len(names))
            return found
        parts: dict[str, list[Tensor]] = {name: [] for name in encoded}
        for start in range(0, len(names), self.settings.batch_size):
            part = slice(start, start + self.settings.batch_size)
            turned = Batch(
                tuple(names[part]),
                (view,) * len(names[part]),
                None if batch.pixels is None else batch.pixels[part],
                None,
                None if batch.dino_pixels is None else batch.dino_pixels[part],
                {},
            )
            for name, tensor in _frozen_features(network, runtime, turned, encoded).items():
                _check_finite(name, tensor, turned.names)
                parts[name].append(tensor.cpu())
            advance(len(turned.names))
        return found | {name: torch.cat(tensors).numpy() for name, tensors in parts.items()}

    def _write(self, name: str, view: int, shard: int, rows: np.ndarray, values: np.ndarray) -> None:
        try:
            self.store.write_shard(name, view, shard, rows, values)
        except OSError as error:
            raise DsuError(
                f"The features can't be written to {self.store.path} ({error.strerror or error}): free some space or "
                f"mend the folder and run the same command again; what is finished stays finished."
            ) from error


def _frozen_features(network: DSUNet, runtime: Runtime, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """The prefix's tensors of a batch that was read as identity, in its views."""
    ready = batch.to(runtime.device).flipped()
    assert ready.pixels is not None
    dino_pixels = None if ready.dino_pixels is None else normalize_pixels(ready.dino_pixels)
    with runtime.autocast():
        return network.prefix(normalize_pixels(ready.pixels), dino_pixels, names)


def _check_finite(name: str, tensor: Tensor, samples: Sequence[str]) -> None:
    finite = tensor.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        sample = samples[int((~finite).nonzero()[0])]
        raise DsuError(
            f"{name} of {sample} has values that are not finite as {str(tensor.dtype).removeprefix('torch.')}: store "
            f"float32 (--stored float32), or check the image and the encoder's weights."
        )


def prepare_extraction(
    split: Split,
    source: SourceFolder,
    architecture: Architecture,
    settings: ExtractionSettings,
    runtime: Runtime,
    digests: Mapping[str, str],
    cache_root: Path,
    progress: Progress = SILENT,
) -> Extraction:
    """Look at the images, open or make the split's store, and find out what it lacks.

    Nothing but the store's metadata is written. Raises `StaleError` where a stored array was made of something
    else, unless `settings.rebuild`.
    """
    check_points(architecture, settings.levels)
    path = store_path(cache_root, split.name, architecture)
    store = Store.open(path) if (path / "zarr.json").exists() else None
    if store is not None:
        _check_owner(store, source)
    previous = {} if store is None else {n: SampleFacts.from_json(e.info) for n, e in store.manifest.entries.items()}
    inspection = inspect(split, previous, progress, foreground=settings.foreground)
    if not inspection.facts:
        raise DsuError(f"{split.name} has no image that can be read: nothing to store.")
    entries = {name: Entry(sample_key(facts), facts.to_json()) for name, facts in inspection.facts.items()}
    attributes = {
        "source": vars(source),
        "architecture": architecture.model_dump(mode="json"),
        "encoders": {**(encoders_of(store) if store else {}), **digests},
    }
    if store is None:
        store = Store.create(path, attributes, compressor=settings.compressor)
    wanted = {
        name: fingerprint(
            name,
            architecture,
            reading=inspection.mask_reading,
            stored=settings.stored,
            runtime=runtime,
            digests=digests,
            batch_size=settings.batch_size,
        )
        for name in ("pixels", *(["mask"] if split.masks else []), *dict.fromkeys(settings.levels))
    }
    with store.lock():
        drift = _reconcile(store, wanted, settings)
        store.set_attributes(attributes)
        manifest, changes = store.manifest.assign(entries, store.rows_per_shard)
        if manifest != store.manifest:
            store.set_manifest(manifest)
        _add_arrays(store, wanted, settings, architecture)
    extraction = Extraction(split, inspection, store, changes, drift, settings, architecture)
    for name in wanted:
        for shard in store.missing(name, settings.views_of(name, split.kind, architecture)):
            extraction.todo.setdefault(shard.shard, []).append((name, shard.view))
    return extraction


def _check_owner(store: Store, source: SourceFolder) -> None:
    """Two folders of one name must not take turns in one store."""
    owner = source_of(store)
    if not source.benchmark and owner.reference != source.reference and Path(owner.reference).exists():
        raise UsageError(
            f"{store.path} holds the features of {owner.reference}: give another --cache-root for {source.reference}, "
            f"or rename the folder."
        )


def _reconcile(store: Store, wanted: Mapping[str, Fingerprint], settings: ExtractionSettings) -> tuple[str, ...]:
    """Refuse or drop arrays that were made of something else; return what differs only in versions."""
    present = {name: print_ for name, print_ in wanted.items() if name in store.arrays}
    if settings.rebuild:
        for name, print_ in present.items():
            if store.arrays[name].fingerprint.differences(print_, name):
                store.remove_array(name)
        present = {name: print_ for name, print_ in present.items() if name in store.arrays}
    drift = store.check(
        present, "Run again with --rebuild to compute these arrays anew, or give another --cache-root to keep both."
    )
    return tuple(str(item) for item in drift)


def _add_arrays(
    store: Store, wanted: Mapping[str, Fingerprint], settings: ExtractionSettings, architecture: Architecture
) -> None:
    side = architecture.hiera_size
    for name, print_ in wanted.items():
        if name in store.arrays:
            continue
        flipped_on_read = name in ("pixels", "mask")
        shape: tuple[int, ...] = (side, side) if name == "mask" else point_shape(architecture, name)
        kind_of = np.dtype(np.uint8 if flipped_on_read else settings.stored)
        # All views have their place from the start: an array of one view would serve it for every other.
        store.add_array(name, shape, kind_of, 1 if flipped_on_read else len(VIEWS), print_)


@dataclass(frozen=True)
class CachePlan:
    """All splits' work, shown before it starts."""

    extractions: tuple[Extraction, ...]
    runtime: Runtime
    free_bytes: int

    @property
    def skipped(self) -> int:
        """Images that pair but can't be decoded."""
        return sum(len(extraction.inspection.undecodable) for extraction in self.extractions)


def cache_features(
    dataset: str,
    architecture: Architecture,
    settings: ExtractionSettings,
    weights: EncoderWeights,
    *,
    data_root: Path,
    cache_root: Path,
    images: str | None = None,
    masks: str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    before: Callable[[CachePlan], None] = lambda plan: None,
    progress: Progress = SILENT,
) -> CachePlan:
    """Stage one for all splits that a data set has, from its images to its stores.

    Args:
        dataset: a benchmark's name or a folder.
        architecture: encoders and input sizes (its depth of adaptation does not matter).
        settings: what is stored.
        weights: where the encoders' weights come from.
        data_root, cache_root, images, masks: where images lie and stores go.
        device, precision: see `choose_runtime`.
        before: called with the plan once everything is known and nothing has been computed.
        progress: who is told.

    Raises `DsuError` or `CacheError` before any work where something does not fit.
    """
    check_points(architecture, settings.levels)
    splits = find_dataset(dataset, data_root, images, masks)
    runtime = choose_runtime(device, precision)
    maps = set(settings.levels) & set(map_names(architecture))
    hiera, dino, digests = load_encoders(
        architecture, weights, hiera=bool(set(settings.levels) - maps), dino=bool(maps)
    )
    extractions = []
    for split in splits:
        source = SourceFolder.of(split, dataset, data_root, images, masks)
        extractions.append(
            prepare_extraction(split, source, architecture, settings, runtime, digests, cache_root, progress)
        )
        for line in describe(split, extractions[-1].inspection):
            progress.say(line)
    plan = CachePlan(tuple(extractions), runtime, _free_bytes(extractions, cache_root))
    before(plan)
    network = DSUNet(architecture, hiera, dino, torch_type(settings.stored)).eval().to(runtime.device)
    for extraction in extractions:
        extraction.run(network, runtime, progress)
    return plan


def _free_bytes(extractions: Sequence[Extraction], cache_root: Path) -> int:
    """Free bytes under the cache root. Raises `DsuError` with the leaner options when they do not suffice."""
    needed = sum(sum(extraction.bytes_by_array.values()) for extraction in extractions)
    existing = next(folder for folder in (cache_root, *cache_root.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DsuError(
            f"The features need {needed / 1e9:.1f} GB, but {existing} has {free / 1e9:.1f} GB free: leave Hiera's "
            f"levels out (--levels V), keep fewer views (--views 1, --level-views 1), compress (--compressor zstd) or "
            f"give another --cache-root."
        )
    return free
