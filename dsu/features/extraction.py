"""Stage one: find new and missing samples, run the frozen encoders on them once, and store the features."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from dsu.batches import Batch, prefetch
from dsu.choices import Precision
from dsu.config import PRESETS, DSUNetConfig
from dsu.data.datasets import Paths, SourceFolder, find_dataset
from dsu.data.inspection import Inspection, describe, inspect, unpaired
from dsu.data.pairing import Split
from dsu.data.tiles import Tiling, tiled
from dsu.data.views import FLIPPED_WHEN_READ, Views, augmentation_of, view_count, view_index
from dsu.datasets import ImageDataset
from dsu.distributed import ALONE, World
from dsu.encoders.sources import MissingWeightsError
from dsu.encoders.weights import load_encoders
from dsu.errors import DsuError, UsageError
from dsu.features.samples import writing
from dsu.features.stores import FeatureStore, find_stores, fingerprints, sample_key, store_path
from dsu.files import make_folder
from dsu.graphs import GraphRunner
from dsu.network.network import DSUNet, default_encoder_batch_size
from dsu.network.resume import check_features, feature_shape, guide_names
from dsu.progress import SILENT, Progress, clock, counted, few
from dsu.runtime import Runtime, choose_runtime, computing_threads, torch_type
from dsu.settings import EncoderWeights, ExtractionSettings
from dsu_cache import BusyError, Entry, Fingerprint, Store, locked, url_of

Part = tuple[int, int]
"""One of several independent jobs, counted from 1: `(3, 16)`."""

_MAX_WAIT_SECONDS: Final = 3600.0
"""Seconds that a part waits for another one that scans the images or changes the store."""
_REMINDER_SECONDS: Final = 300.0
"""Seconds between messages while waiting."""


@dataclass(frozen=True)
class ExtractionPlan:
    """The work for one split, known before it starts.

    Attributes:
        split, inspection, store: the split, the facts about its files, and the store for its features.
        drift: warnings about arrays made with other library versions or another device.
        guides: the names of all of DINOv2's features.
        encoder_batch_size: the encoders' batch size.
        kept: the views to store, by array.
        todo: the missing (array, view) pairs to compute, by shard.
    """

    split: Split
    inspection: Inspection
    store: FeatureStore
    drift: tuple[str, ...]
    guides: tuple[str, ...]
    encoder_batch_size: int
    kept: dict[str, tuple[int, ...]]
    todo: dict[int, list[tuple[str, int]]]

    def lacking(self) -> dict[int, list[tuple[str, int]]]:
        """The (array, view) pairs that the store lacks now, by shard."""
        found: dict[int, list[tuple[str, int]]] = {}
        for name, views in self.kept.items():
            for view in views:
                for missing in self.store.missing(name, [view_index(name, view)]):
                    found.setdefault(missing.shard, []).append((name, view))
        return found

    def part(self, part: Part) -> "ExtractionPlan":
        """The plan for one of several independent jobs, whatever the others have done: every n-th shard belongs to
        it."""
        number, parts = part
        return replace(self, todo={shard: todo for shard, todo in self.todo.items() if shard % parts == number - 1})

    def share(self, world: World) -> "ExtractionPlan":
        """The plan for one of several processes with the same plan."""
        return replace(self, todo=dict(sorted(self.todo.items())[world.rank :: world.size]))

    def left(self) -> "ExtractionPlan":
        """The plan without shards that another process has written meanwhile."""
        lacking = self.lacking()
        still = {shard: [one for one in todo if one in lacking.get(shard, ())] for shard, todo in self.todo.items()}
        return replace(self, todo={shard: todo for shard, todo in still.items() if todo})

    @property
    def bytes_by_array(self) -> dict[str, int]:
        """Bytes still to write, before compression."""
        found: dict[str, int] = {}
        for shard, lacking in self.todo.items():
            rows = len(self.store.rows_in_shard(shard))
            for name, _ in lacking:
                found[name] = found.get(name, 0) + rows * self.store.arrays[name].item_nbytes
        return found

    @property
    def images(self) -> int:
        """Number of images to decode; each cached augmentation counts as another one."""
        return self._count(augmentation_of)

    @property
    def encodings(self) -> int:
        """Number of views to encode or write: the unit of progress."""
        return self._count(int)

    def _count(self, what: Callable[[int], int]) -> int:
        """Sum over samples of the number of distinct values of `what` among their missing views."""
        return sum(
            len(self.store.rows_in_shard(shard)) * len({what(view) for _, view in lacking})
            for shard, lacking in self.todo.items()
        )


@dataclass(frozen=True)
class CachePlan:
    """The work for all splits, shown before it starts; at the end, `left` is the number of shards left to other
    parts."""

    splits: tuple[ExtractionPlan, ...]
    runtime: Runtime
    free_bytes: int | None
    left: int = 0

    @property
    def skipped(self) -> list[tuple[Path, str]]:
        """Files that are left out, with the reason: they can't be decoded, or have no counterpart."""
        found = [(path, why) for split in self.splits for path, why, _ in split.inspection.undecodable]
        for split in (plan.split for plan in self.splits):
            found += [(path, "it has no mask") for path in split.images_without_mask]
            found += [(path, "it has no image") for path in split.masks_without_image]
        return found


def cache_features(
    dataset: str,
    config: DSUNetConfig,
    settings: ExtractionSettings,
    weights: EncoderWeights,
    *,
    paths: Paths,
    tiling: Tiling | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    before: Callable[[CachePlan], None] = lambda plan: None,
    dry_run: bool = False,
    part: Part | None = None,
    world: World = ALONE,
    progress: Progress = SILENT,
) -> CachePlan:
    """Stage one for all splits of a data set, from images to stores.

    Args:
        dataset: a benchmark's name or a folder.
        config: encoders and input sizes (its depth of adaptation does not matter).
        settings: what to store.
        weights: where the encoders' weights come from.
        paths: where to find images, and the store folder.
        tiling: how to cut images into tiles; None for whole images.
        device, precision: see `choose_runtime`.
        before: called with the complete plan before anything is computed.
        dry_run: stop there.
        part: process only this part of the work; other jobs process the others, at any time.
        world: the processes that divide the work. The first one plans and prints; only it performs dry runs.
        progress: receives progress.

    Raises `DsuError` or `CacheError` before any work if something does not fit.
    """
    check_features(config, settings.features)
    progress = progress if world.is_main else SILENT
    splits = [
        (SourceFolder.of(split, dataset, paths, tiling), tiled(split, tiling)) for split in find_dataset(dataset, paths)
    ]
    for _, split in splits:
        for line in unpaired(split):
            progress.say(line)
    runtime = choose_runtime(world.device(device), precision)

    def plan_all(digests: Mapping[str, str], root: Path) -> CachePlan:
        plans, own = [], settings
        for source, split in splits:
            with _lock_planning(store_path(root, split.name, config), part, progress):
                plan = plan_extraction(
                    split, source, config, own, runtime, digests, root, progress, weights=weights, part=part
                )
            # One scale for the images of all splits with more than 8 bits: that of the first, the training split.
            own = own.model_copy(update={"range": own.range or plan.inspection.depth})
            for line in (*describe(split, plan.inspection), *_thread_notes(plan, runtime)):
                progress.say(line)
            plans.append(plan)
        planned = CachePlan(
            tuple(plan.part(part) if part else plan for plan in plans), runtime, _free_bytes(plans, paths.cache_root)
        )
        before(planned)
        return planned

    if dry_run and not any(Store.exists(store_path(paths.cache_root, split.name, config)) for _, split in splits):
        # Nothing is stored yet that could differ, so the plan does not need the weights.
        with TemporaryDirectory(prefix="dsu-dry-run-") as folder:
            return plan_all(dict.fromkeys(("hiera", "dino"), "not loaded"), Path(folder))
    maps = set(settings.features) & set(guide_names(config))
    try:
        hiera, dino, digests = load_encoders(
            config, weights, hiera=bool(set(settings.features) - maps), dino=bool(maps)
        )
    except MissingWeightsError as error:
        stored = {store.path.name for store in find_stores(paths.cache_root, dataset, None)} & set(PRESETS)
        options = " and ".join(f"--preset {preset}" for preset in sorted(stored))
        hint = f"; features of {dataset} are already stored with {options}" if stored else ""
        raise MissingWeightsError(f"{str(error).rstrip('.')}{hint}.") from error
    _check_same_computation(world, runtime, digests)
    planned = world.broadcast_object(lambda: plan_all(digests, paths.cache_root))
    if dry_run:
        return planned
    network = runtime.place(DSUNet(config, hiera, dino, feature_dtype=torch_type(settings.feature_dtype)).eval())
    for plan in planned.splits:
        extract(plan, network, runtime, progress, part=part, world=world)
        if part:
            plan.store.look()
    return replace(planned, left=sum(len(plan.lacking()) for plan in planned.splits) if part else 0)


def _thread_notes(plan: ExtractionPlan, runtime: Runtime) -> Iterator[str]:
    own, begun_with = torch.get_num_threads(), plan.store.threads
    if plan.todo and runtime.device.type == "cpu" and begun_with not in (None, own):
        began = counted(begun_with or 0, "threads")
        yield f"{plan.split.name}: encoded with {began}, like the rest of its store, not with {own}."


def _check_same_computation(world: World, runtime: Runtime, digests: Mapping[str, str]) -> None:
    """Raise `UsageError` if processes would compute different features from the same images."""
    found = world.all_gather((runtime.device.type, runtime.precision, dict(digests)))
    if any(one != found[0] for one in found):
        kinds = sorted({f"{device} at {precision}" for device, precision, _ in found})
        raise UsageError(
            f"The processes would compute different features ({', '.join(kinds)}, or other weights): give a --device "
            "and --precision that all of them support, and use the same weights on all machines."
        )


def _free_bytes(plans: Sequence[ExtractionPlan], cache_root: Path) -> int | None:
    """Free bytes at the cache root; None on S3. Raises `DsuError` with options that need less space if they are not
    enough."""
    if url_of(cache_root) is not None:
        return None
    needed = sum(sum(plan.bytes_by_array.values()) for plan in plans)
    existing = next(folder for folder in (cache_root, *cache_root.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DsuError(
            f"The features need {needed / 1e9:.1f} GB, but {existing} has {free / 1e9:.1f} GB free: omit Hiera's "
            "levels (--features V), store fewer views (--views none, --level-views none), compress (--compressor "
            "zstd) or give another --cache-root."
        )
    return free


# -- planning -----------------------------------------------------------------------------------------


def plan_extraction(
    split: Split,
    source: SourceFolder,
    config: DSUNetConfig,
    settings: ExtractionSettings,
    runtime: Runtime,
    digests: Mapping[str, str],
    cache_root: Path,
    progress: Progress = SILENT,
    *,
    weights: EncoderWeights,
    part: Part | None = None,
) -> ExtractionPlan:
    """Scan the images, open or create the split's store, and find out what it lacks.

    Writes only the store's metadata, including the source of the encoders' `weights`. While other parts write, a `part`
    must find the same metadata or is refused. Raises `StaleError` if a stored array was made from something else,
    unless `settings.rebuild`.
    """
    path = store_path(cache_root, split.name, config)
    store = FeatureStore.open(path) if Store.exists(path) else None
    if store is not None:
        _check_owner(store, source)
    inspection = _inspect(split, store, settings, progress)
    entries = {name: Entry(sample_key(facts), facts.to_json()) for name, facts in inspection.facts.items()}
    attributes: dict[str, Any] = {
        "source": vars(
            replace(
                source,
                mask_format=inspection.mask_format.to_json() if split.masks else None,
                depth=inspection.depth and list(inspection.depth),
            )
        ),
        "config": config.model_dump(mode="json"),
        "encoders": {**(store.encoders if store else {}), **digests},
        "random": weights.random,
        "from_files": sorted((weights.from_files & {*digests}) | (store.from_files - {*digests} if store else set())),
    }
    if store is None:
        store = FeatureStore.create(path, attributes, compressor=settings.compressor)
    # Features of one store must be consistent: its own settings take precedence over the device's defaults.
    begun_with = store.encoder_batch_size or default_encoder_batch_size(runtime.device)
    encoder_batch_size = settings.encoder_batch_size or begun_with
    # A launcher may give each process one thread, and the number of threads may affect the last bits of a feature.
    with computing_threads(store.threads if runtime.device.type == "cpu" else None):
        wanted = fingerprints(
            ("pixels", *(["mask"] if split.masks else []), *dict.fromkeys(settings.features)),
            config,
            mask_format=inspection.mask_format,
            depth=inspection.depth,
            feature_dtype=settings.feature_dtype,
            runtime=runtime,
            digests=digests,
            encoder_batch_size=encoder_batch_size,
        )
    try:
        with store.lock():
            drift = _reconcile(store, wanted, rebuild=settings.rebuild)
            store.set_attributes(attributes)
            _assign_rows(store, entries, split.name, progress)
            _add_arrays(store, wanted, settings, config)
    except BusyError:
        if part is None or not _is_up_to_date(store, wanted, attributes, entries):
            raise
        drift = _reconcile(store, wanted, rebuild=False)
    kept = {name: _stored_views(settings, name, split.kind, config) for name in wanted}
    plan = ExtractionPlan(split, inspection, store, drift, guide_names(config), encoder_batch_size, kept, {})
    return replace(plan, todo=plan.lacking())


def _inspect(split: Split, store: FeatureStore | None, settings: ExtractionSettings, progress: Progress) -> Inspection:
    """Scan the images, with the scale and foreground of the store unless others are given."""
    inspection = inspect(
        split,
        store.metadata if store else None,
        progress,
        foreground=settings.foreground or (store.source.foreground if store else None),
        depth=settings.range or (store.source.parsed_depth if store else None),
    )
    if not inspection.facts:
        broken = "".join(f" ({path}: {reason})" for path, reason, _ in inspection.undecodable[:1])
        raise DsuError(f"{split.name} has no readable image{broken}: nothing to store.")
    return inspection


@contextmanager
def _lock_planning(path: Path, part: Part | None, progress: Progress) -> Iterator[None]:
    """Let one part at a time scan a split's images inside a `with`: the first reads them, the others reuse its
    results."""
    if part is None:
        yield
        return
    root = path.parent.parent
    make_folder(root)
    lock = root / f".{path.parent.name}-{path.name}.lock"
    with _wait_for(lambda: locked(lock, f"the images of {path} are being scanned"), progress):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def _wait_for(lock: Callable[[], AbstractContextManager[object]], progress: Progress) -> Iterator[None]:
    """Hold a lock inside a `with`; wait for it as long as that is reasonable."""
    begun = time.monotonic()
    reminder = begun
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(lock())
                break
            except BusyError as error:
                now = time.monotonic()
                if now > begun + _MAX_WAIT_SECONDS:
                    raise
                if now >= reminder:
                    why = str(error).removesuffix(": wait until it ends, or stop it")
                    progress.say(f"waiting ({clock(now - begun)} of at most {clock(_MAX_WAIT_SECONDS)}): {why}")
                    reminder = now + _REMINDER_SECONDS
                time.sleep(0.5)
        yield


def _is_up_to_date(
    store: FeatureStore, wanted: Mapping[str, Fingerprint], attributes: Mapping[str, Any], entries: Mapping[str, Entry]
) -> bool:
    """Whether only shards would be written."""
    return (
        wanted.keys() <= store.arrays.keys()
        and store.attributes == json.loads(json.dumps(attributes))
        and store.manifest == store.manifest.assign(entries, store.rows_per_shard)
    )


def _check_owner(store: FeatureStore, source: SourceFolder) -> None:
    """Two folders of the same name must not share one store."""
    owner = store.source
    if not source.benchmark and owner.reference != source.reference and Path(owner.reference).exists():
        raise UsageError(
            f"{store.path} contains the features of {owner.reference}: give another --cache-root for "
            f"{source.reference}, or rename the folder."
        )


def _reconcile(store: FeatureStore, wanted: Mapping[str, Fingerprint], *, rebuild: bool) -> tuple[str, ...]:
    """Refuse or remove arrays that were made from something else; return differences in versions only."""
    for name, print_ in wanted.items():
        if rebuild and name in store.arrays and store.arrays[name].fingerprint.differences(print_, name):
            store.remove_array(name)
    drift = store.check(
        {name: print_ for name, print_ in wanted.items() if name in store.arrays},
        "Run again with --rebuild to recompute these arrays, or give another --cache-root to keep both.",
    )
    return tuple(map(str, drift))


def _assign_rows(store: FeatureStore, entries: Mapping[str, Entry], split: str, progress: Progress) -> None:
    """Give each new sample a row; the rows of samples that no longer exist are kept."""
    gone = sorted(store.manifest.entries.keys() - entries.keys())
    if gone:
        progress.say(
            f"{split}: {counted(len(gone), 'samples')} of the store no longer exist ({few(gone)}); "
            "their features are kept in case they return."
        )
    manifest = store.manifest.assign(entries, store.rows_per_shard)
    if manifest != store.manifest:
        store.set_manifest(manifest)


def _add_arrays(
    store: FeatureStore, wanted: Mapping[str, Fingerprint], settings: ExtractionSettings, config: DSUNetConfig
) -> None:
    for name, print_ in wanted.items():
        if name not in store.arrays:
            shape = (config.hiera_size,) * 2 if name == "mask" else feature_shape(config, name)
            kind = np.uint8 if name in FLIPPED_WHEN_READ else settings.feature_dtype
            store.add_array(name, shape, kind, view_count(name), print_)


def _stored_views(settings: ExtractionSettings, name: str, kind: str, config: DSUNetConfig) -> tuple[int, ...]:
    """The views in which array `name` is stored; pixels and masks without flips, but with every cached augmentation."""
    if kind == "test":
        return (0,)
    if name in FLIPPED_WHEN_READ:
        return Views(1, max(settings.views.extra, settings.level_views.extra)).numbers
    return (settings.views if name in guide_names(config) else settings.level_views).numbers


# -- doing it ----------------------------------------------------------------------------------------------------


def extract(
    plan: ExtractionPlan,
    network: DSUNet,
    runtime: Runtime,
    progress: Progress = SILENT,
    *,
    part: Part | None = None,
    world: World = ALONE,
) -> None:
    """Decode, encode and write what a split's store lacks, shard by shard; the three overlap.

    A finished shard is kept, whatever happens later. The processes of a `world` divide the shards of one plan, and none
    returns before all are written; a `part` writes only its own shards. Raises `DsuError` naming the sample if a value
    is not finite or does not fit the stored type, and if the disk is full.
    """
    if not plan.todo:
        return
    network.encoder_batch_size = plan.encoder_batch_size
    graphs: dict[tuple[str, ...], GraphRunner] = {}  # grouped by features that are encoded together
    label = f"encoding {plan.split.name}{f', part {part[0]}/{part[1]}' if part else ''}"
    with _lock_for_writing(plan, part, world, progress), progress.task(label, plan.encodings, "views") as task:
        network.encoder_threads = plan.store.threads if runtime.device.type == "cpu" else None
        advance = world.shared_progress(task, label)
        own = plan.share(world).left() if part or world.connected else plan
        with writing(plan.store) as writer:
            for shard, extra, batch in _decode_shards(own, network.config, runtime):
                for view in sorted({view for _, view in own.todo[shard] if augmentation_of(view) == extra}):
                    arrays = [name for name, wanted in own.todo[shard] if wanted == view]
                    for name, parts in _encode_view(network, runtime, graphs, batch, view, arrays, advance).items():
                        writer.put(name, view, shard, batch.names, parts)
        world.all_gather(None)  # wait until all processes have written
        advance(0)
    for remark in {graph.remark for graph in graphs.values() if graph.refusal}:
        progress.say(label + remark)


@contextmanager
def _lock_for_writing(plan: ExtractionPlan, part: Part | None, world: World, progress: Progress) -> Iterator[None]:
    """Hold the store's lock inside a `with`: exclusively, or together with other parts or processes.

    Raises `BusyError` if another process holds it, or if the samples have changed since the scan.
    """
    store, rows = plan.store, plan.store.manifest.rows_in_use
    with ExitStack() as held:
        if part is None and not world.connected:
            held.enter_context(store.lock())
        else:
            share = (part[0], f"{part[1]} parts") if part else (world.rank + 1, f"{world.size} processes")
            held.enter_context(_wait_for(lambda: store.lock(share), progress))
        if not np.array_equal(rows, store.manifest.rows_in_use):
            raise BusyError(
                f"the store {store.path} has just been changed by another process: run the same command again"
            )
        yield


def _decode_shards(plan: ExtractionPlan, config: DSUNetConfig, runtime: Runtime) -> Iterator[tuple[int, int, Batch]]:
    """Each shard in each augmentation (0: the original images); samples are decoded one shard ahead."""
    inspection, manifest = plan.inspection, plan.store.manifest
    guide = any(name in plan.guides for lacking in plan.todo.values() for name, _ in lacking)
    samples = ImageDataset(
        plan.split,
        config,
        metadata=inspection.facts,
        mask_format=inspection.mask_format,
        depth=inspection.depth,
        guide=guide,
    )
    wanted = [
        (shard, extra)
        for shard, todo in sorted(plan.todo.items())
        for extra in sorted({augmentation_of(view) for _, view in todo})
    ]

    def decode(shard: int, extra: int) -> tuple[int, int, Batch]:
        names = [manifest.names_at(row)[0] for row in plan.store.rows_in_shard(shard).tolist()]
        return shard, extra, samples.read(names, [4 * extra] * len(names)).pinned_for(runtime.device)

    return prefetch((partial(decode, *one) for one in wanted), ahead=1)


def _encode_view(
    network: DSUNet,
    runtime: Runtime,
    graphs: dict[tuple[str, ...], GraphRunner],
    batch: Batch,
    view: int,
    arrays: Sequence[str],
    advance: Callable[[int], None],
) -> dict[str, list[Tensor]]:
    """The named arrays in one view, (rows, *item) each, in parts that are still on the device.

    Does not wait for the GPU: the writing threads fetch the results.
    """
    found = {name: [batch.images[name]] for name in arrays if name in FLIPPED_WHEN_READ}
    wanted = tuple(name for name in arrays if name not in found)
    if not wanted:
        advance(len(batch.names))
        return found

    def encode(part: Batch) -> dict[str, Tensor]:
        inputs = part.flipped().inputs
        with runtime.autocast():
            return network.encode(inputs["pixel_values"], inputs["guide_values"], wanted)

    graph = graphs.setdefault(wanted, GraphRunner.on(runtime.device))
    size = network.encoder_batch_size or len(batch.names)
    for start in range(0, len(batch.names), size):
        part = batch.part(start, start + size, view).to(runtime.device)
        for name, tensor in graph.run(encode, part).items():
            found.setdefault(name, []).append(tensor)
        advance(len(part.names))
    return found
