"""What stage one has to do for a split: what is new, what is missing, how many bytes that makes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsu.config import DSUNetConfig
from dsu.data.datasets import Inspection, SourceFolder, Split, inspect
from dsu.data.views import FLIPPED_WHEN_READ, Views, augmentation_of, view_count, view_index
from dsu.errors import DsuError, UsageError
from dsu.features.fingerprints import fingerprint
from dsu.features.stores import FeatureStore, sample_key, store_path
from dsu.network.network import default_encoder_batch_size
from dsu.network.resume import feature_shape, guide_names
from dsu.progress import SILENT, Progress
from dsu.runtime import Runtime
from dsu.settings import ExtractionSettings
from dsu_cache import Entry, Fingerprint

__all__ = ["ExtractionPlan", "plan_extraction"]


@dataclass
class ExtractionPlan:
    """One split's work, known before it starts: what is new, and the bytes that will be written by array."""

    split: Split
    inspection: Inspection
    store: FeatureStore
    drift: tuple[str, ...]
    settings: ExtractionSettings
    config: DSUNetConfig
    encoder_batch_size: int
    todo: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    """Shard to the (array, view) that it lacks."""

    @property
    def bytes_by_array(self) -> dict[str, int]:
        """Bytes still to be written, before any compression."""
        found: dict[str, int] = {}
        for shard, lacking in self.todo.items():
            rows = len(self.store.rows_in_shard(shard))
            for name, _ in lacking:
                found[name] = found.get(name, 0) + rows * self.store.arrays[name].item_nbytes
        return found

    @property
    def images(self) -> int:
        """Images that have to be decoded, for cached augmentations once more each."""
        return sum(
            len(self.store.rows_in_shard(s)) * len({augmentation_of(view) for _, view in todo})
            for s, todo in self.todo.items()
        )

    @property
    def encodings(self) -> int:
        """Views of images that have to be encoded or written: the unit of progress."""
        return sum(len(self.store.rows_in_shard(s)) * len({view for _, view in todo}) for s, todo in self.todo.items())

    @property
    def needs(self) -> tuple[bool, bool]:
        """Whether Hiera and DINOv2 have to run."""
        arrays = {name for lacking in self.todo.values() for name, _ in lacking} - set(FLIPPED_WHEN_READ)
        maps = arrays & set(guide_names(self.config))
        return bool(arrays - maps), bool(maps)


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
    random: bool = False,
) -> ExtractionPlan:
    """Look at the images, open or make the split's store, and find out what it lacks.

    Nothing but the store's metadata is written; `random` notes there that the encoders' weights are random. Raises
    `StaleError` where a stored array was made of something else, unless `settings.rebuild`.
    """
    path = store_path(cache_root, split.name, config)
    store = FeatureStore.open(path) if (path / "zarr.json").exists() else None
    if store is not None:
        _check_owner(store, source)
    foreground = settings.foreground or (store.source.foreground if store else None)
    inspection = inspect(split, store.metadata if store else None, progress, foreground=foreground)
    if not inspection.facts:
        broken = "".join(f" ({path}: {reason})" for path, reason in inspection.undecodable[:1])
        raise DsuError(f"{split.name} has no image that can be read{broken}: nothing to store.")
    entries = {name: Entry(sample_key(facts), facts.to_json()) for name, facts in inspection.facts.items()}
    attributes: dict[str, Any] = {
        "source": vars(replace(source, mask_format=inspection.mask_format.to_json() if split.masks else None)),
        "config": config.model_dump(mode="json"),
        "encoders": {**(store.encoders if store else {}), **digests},
        "random": random,
    }
    if store is None:
        store = FeatureStore.create(path, attributes, compressor=settings.compressor)
    # Features of one store must go together: what it was begun with goes before what suits the device.
    begun_with = store.encoder_batch_size or default_encoder_batch_size(runtime.device)
    encoder_batch_size = settings.encoder_batch_size or begun_with
    wanted = {
        name: fingerprint(
            name,
            config,
            mask_format=inspection.mask_format,
            feature_dtype=settings.feature_dtype,
            runtime=runtime,
            digests=digests,
            encoder_batch_size=encoder_batch_size,
        )
        for name in ("pixels", *(["mask"] if split.masks else []), *dict.fromkeys(settings.features))
    }
    with store.lock():
        drift = _reconcile(store, wanted, settings)
        store.set_attributes(attributes)
        manifest = store.manifest.assign(entries, store.rows_per_shard)
        if manifest != store.manifest:
            store.set_manifest(manifest)
        _add_arrays(store, wanted, settings, config)
    plan = ExtractionPlan(split, inspection, store, drift, settings, config, encoder_batch_size)
    for name in wanted:
        for view in _kept_views(settings, name, split.kind, config):
            for missing in store.missing(name, [view_index(name, view)]):
                plan.todo.setdefault(missing.shard, []).append((name, view))
    return plan


def _kept_views(settings: ExtractionSettings, name: str, kind: str, config: DSUNetConfig) -> tuple[int, ...]:
    """The views in which array `name` is kept; of pixels and masks no flips, but every cached augmentation."""
    if kind == "test":
        return (0,)
    if name in FLIPPED_WHEN_READ:
        return Views(1, max(settings.views.extra, settings.level_views.extra)).numbers
    return (settings.views if name in guide_names(config) else settings.level_views).numbers


def _check_owner(store: FeatureStore, source: SourceFolder) -> None:
    """Two folders of one name must not take turns in one store."""
    owner = store.source
    if not source.benchmark and owner.reference != source.reference and Path(owner.reference).exists():
        raise UsageError(
            f"{store.path} holds the features of {owner.reference}: give another --cache-root for {source.reference}, "
            f"or rename the folder."
        )


def _reconcile(store: FeatureStore, wanted: Mapping[str, Fingerprint], settings: ExtractionSettings) -> tuple[str, ...]:
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
    store: FeatureStore, wanted: Mapping[str, Fingerprint], settings: ExtractionSettings, config: DSUNetConfig
) -> None:
    side = config.hiera_size
    for name, print_ in wanted.items():
        if name in store.arrays:
            continue
        raw = name in FLIPPED_WHEN_READ
        shape: tuple[int, ...] = (side, side) if name == "mask" else feature_shape(config, name)
        store.add_array(name, shape, np.dtype(np.uint8 if raw else settings.feature_dtype), view_count(name), print_)
