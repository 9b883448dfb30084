"""The training split as a run sees it: from its store, or end to end from its images."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsu.config import DSUNetConfig
from dsu.data.datasets import (
    Paths,
    SampleMetadata,
    SourceFolder,
    Split,
    describe,
    find_dataset,
    inspect,
    unpaired,
    unreadable,
)
from dsu.data.masks import MaskFormat
from dsu.data.splitting import fold_weights, recorded_deal, share_weights
from dsu.data.tiles import Tiling
from dsu.datasets import ImageDataset, SampleDataset
from dsu.errors import DsuError, UsageError
from dsu.features.feature_dataset import FeatureDataset
from dsu.features.stores import FeatureStore, find_store
from dsu.network.resume import ResumePoint
from dsu.progress import Progress
from dsu.settings import NetworkSettings, TrainingSettings

__all__ = ["TrainingData", "config_asked", "encoders_asked", "find_training_data"]


@dataclass(frozen=True)
class TrainingData:
    """A training split as a run sees it, whether it comes from a store or from images."""

    source: SourceFolder
    facts: Mapping[str, SampleMetadata]
    config: DSUNetConfig
    store: FeatureStore | None
    split: Split | None
    mask_format: MaskFormat

    @property
    def empty(self) -> frozenset[str]:
        """Samples without an object."""
        return frozenset(n for n, fact in self.facts.items() if fact.mask and fact.mask.is_empty(self.mask_format))

    def shares(
        self, settings: TrainingSettings, cache_root: Path, progress: Progress, asked: Collection[str] = ()
    ) -> dict[str, str]:
        """Each sample's share: `train`, `val` or `test`.

        Raises `DsuError` where nothing is left to train on, or nothing to hold out for a fraction that was `asked` for.
        """
        images = {name: fact.image_sha256 for name, fact in self.facts.items()}
        with_object = {images[name] for name in images.keys() - self.empty}
        strata = [with_object, set(images.values()) - with_object]
        if settings.fold is None:
            weights = share_weights(settings.val_fraction or 0.0, settings.test_fraction)
        else:
            part, parts = settings.fold.split("/")
            weights = fold_weights(int(parts))
        dealt = dict.fromkeys(images.values(), "train")
        if len(weights) > 1:
            # Beside the stores: a split's name comes out of a store's file, and may lead anywhere.
            beside = self.store.path.parent if self.store else cache_root / self.source.split
            dealt = recorded_deal(beside, strata, weights, progress)
        if settings.fold is not None:
            dealt = {content: "val" if share == part else "train" for content, share in dealt.items()}
        found = {name: dealt[images[name]] for name in sorted(images)}
        if "train" not in found.values():
            raise DsuError(f"{self.source.split} leaves nothing to train on: hold out less, or add images.")
        if settings.fold is not None and "val" not in found.values():
            raise DsuError(f"{self.source.split} has too few images for --fold {settings.fold}: take fewer parts.")
        lacking = [share for share in weights if share in ("val", "test") and share not in found.values()]
        wanted = [share for share in lacking if f"{share}_fraction" in asked]
        if wanted:
            raise UsageError(
                f"{self.source.split} has too few images to hold any out by --{wanted[0]}-fraction: add images, or "
                f"give --{wanted[0]}-fraction 0."
            )
        if lacking:
            progress.say(f"{self.source.split} has too few images to hold any out: nothing will judge this run.")
        return found

    def samples(self, names: Sequence[str], point: ResumePoint, *, live: bool) -> SampleDataset:
        """The named samples, as a run that resumes from `point` reads them: from the store, or `live` images."""
        if live:
            assert self.split is not None
            return ImageDataset(
                self.split,
                self.config,
                metadata=self.facts,
                mask_format=self.mask_format,
                depth=self.source.parsed_depth,
                names=names,
                guide=bool(point.guides),
            )
        assert self.store is not None
        return FeatureDataset(self.store, point.features, names=names)


def find_training_data(settings: TrainingSettings, paths: Paths, progress: Progress) -> TrainingData:
    """The training split: from its store, or end to end from its images (with its store's settings, if any)."""
    encoders = encoders_asked(settings)
    try:
        store = find_store(paths.cache_root, settings.dataset, ("train", "all"), encoders, settings.tiling)
    except UsageError:
        if not settings.end_to_end or settings.dataset is None:
            raise
        source = _source_from_images(settings.dataset, paths, settings.tiling)
        return _from_images(source, config_asked(settings, None), None, progress)
    store.check_views(settings.views)
    config = config_asked(settings, store)
    if settings.end_to_end:
        return _from_images(store.source, config, store, progress)
    mask_format = store.mask_format
    return TrainingData(store.source, store.check_samples(progress), config, store, None, mask_format)


def encoders_asked(settings: TrainingSettings) -> str | None:
    """The name of the encoders that settings ask for; None where they leave that to the store."""
    given = [getattr(settings, name) for name in NetworkSettings.model_fields]
    return None if all(value is None for value in given) else config_asked(settings, None).encoders_name


def config_asked(settings: TrainingSettings, store: FeatureStore | None) -> DSUNetConfig:
    """As asked for; the store's encoders where a store decides."""
    if store is not None:
        like = store.config
        adapt_last = like.hiera.depth if settings.adapt_last is None else settings.adapt_last
        if adapt_last > like.hiera.depth:
            raise UsageError(f"This Hiera has {like.hiera.depth} blocks: --adapt-last {adapt_last} is too many.")
        return like.model_copy(update={"adapt_last": adapt_last, "ablation": settings.ablation})
    return settings.config(adapt_last=settings.adapt_last, ablation=settings.ablation)


def _source_from_images(reference: str, paths: Paths, tiling: Tiling | None) -> SourceFolder:
    split = next((split for split in find_dataset(reference, paths) if split.kind in ("train", "all")), None)
    if split is None:
        raise UsageError(f"{reference} has no training split: its benchmark is for testing only.")
    return SourceFolder.of(split, reference, paths, tiling)


def _from_images(
    source: SourceFolder, config: DSUNetConfig, store: FeatureStore | None, progress: Progress
) -> TrainingData:
    split = source.find()
    if split is None:
        raise DsuError(
            f"The images of {source.split} are not at {source.place}: bring them back, or name where they are now."
        )
    if split.masks is None:
        raise DsuError(f"{split.name} has no masks in {split.images}: they are needed to train.")
    found = inspect(
        split,
        store.metadata if store else None,
        progress,
        foreground=source.foreground,
        depth=source.parsed_depth,
    )
    for line in (*unpaired(split), *describe(split, found), *unreadable(found)):
        progress.say(line)
    mask_format = store.mask_format if store else found.mask_format
    return TrainingData(
        replace(source, mask_format=mask_format.to_json(), depth=found.depth and list(found.depth)),
        found.facts,
        config,
        store,
        split,
        mask_format,
    )
