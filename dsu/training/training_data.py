"""The training split of a run, from its store or from images, and its division into shares."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from dsu.config import DSUNetConfig
from dsu.data.datasets import Paths, SourceFolder, find_dataset
from dsu.data.groups import Thumbnail, empty_thumbnail, find_similar, max_group_size, named_groups, paste_thumbnail
from dsu.data.inspection import SampleMetadata, describe, inspect, unpaired, unreadable
from dsu.data.masks import MaskFormat
from dsu.data.pairing import Split
from dsu.data.splitting import SPLITS_FILE, assign_recorded_shares, fold_weights, share_weights
from dsu.data.tiles import Tiling, image_name
from dsu.errors import DsuError, UsageError
from dsu.features.stores import FeatureStore, find_training_store
from dsu.network.resume import ResumePoint
from dsu.progress import Progress, counted, few
from dsu.settings import NetworkSettings, TrainingSettings

if TYPE_CHECKING:
    from dsu.datasets import SampleDataset

_BLOCK_SIZE: Final = 64
"""Samples per read when comparing images."""


@dataclass(frozen=True)
class TrainingData:
    """The training split of a run, from a store or from images."""

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

    @property
    def strata(self) -> tuple[dict[str, float], dict[str, float]]:
        """Foreground fractions of images by their hash: those with an object, and those without."""
        pixels: dict[str, tuple[int, int]] = {}
        for fact in self.facts.values():
            marked, area = pixels.get(fact.image_sha256, (0, 0))
            marked += fact.mask.foreground(self.mask_format) if fact.mask else 0
            pixels[fact.image_sha256] = marked, area + prod(fact.mask_size or fact.size)
        foreground = {content: marked / area for content, (marked, area) in pixels.items()}
        with_object = {self.facts[name].image_sha256 for name in self.facts.keys() - self.empty}
        return (
            {content: part for content, part in foreground.items() if content in with_object},
            {content: part for content, part in foreground.items() if content not in with_object},
        )

    def groups(self, settings: TrainingSettings, weights: Mapping[str, float], progress: Progress) -> list[list[str]]:
        """Groups of image hashes that stay in one share: named groups, or similar images unless there are too many."""
        names = {fact.image_sha256: image_name(name) if fact.box else name for name, fact in self.facts.items()}
        if settings.group is not None:
            copies = {image_name(name) if fact.box else name: fact.image_sha256 for name, fact in self.facts.items()}
            named: dict[str, set[str]] = {}
            for name, group in named_groups(settings.group, copies.keys(), progress).items():
                named.setdefault(group, set()).add(copies[name])
            return [sorted(group) for group in named.values() if len(group) > 1]
        limit = max_group_size(len(names), max(weights.values()))
        groups, chains = find_similar(self._thumbnails(settings.end_to_end, progress), limit, progress)
        if groups:
            shown = few(min(sorted(names[one] for one in group) for group in groups))
            count = sum(map(len, groups))
            progress.say(
                f"{self.source.split}: {count:,} images look like others, in {counted(len(groups), 'groups')} (such "
                f"as {shown}); each group stays in one split (--group overrides this)."
            )
        for chain in chains:
            progress.say(
                f"{self.source.split}: {len(chain):,} of {len(names):,} images form one chain of similar images "
                f"({few(sorted(names[one] for one in chain))}): too many for one split, so only the closest stay "
                "together. Name the groups with --group REGEX|FILE.csv (--group .+ treats each image separately)."
            )
        return groups

    def _thumbnails(self, live: bool, progress: Progress) -> dict[str, Thumbnail]:
        """A small grey copy of each image, by its hash."""
        names = sorted(self.facts)
        samples = self.samples(names, ResumePoint("pixels", 0, (), ()), live=live)
        sizes: dict[str, tuple[int, int]] = {}
        for fact in self.facts.values():
            ends, least = fact.box[2:] if fact.box else fact.size, sizes.get(fact.image_sha256, (0, 0))
            sizes[fact.image_sha256] = max(ends[0], least[0]), max(ends[1], least[1])
        thumbnails = {content: empty_thumbnail() for content in sizes}
        with progress.task(f"comparing images of {self.source.split}", len(names)) as task:
            for start in range(0, len(names), _BLOCK_SIZE):
                block = names[start : start + _BLOCK_SIZE]
                for name, pixels in zip(block, samples.read(block, [0] * len(block)).images["pixels"], strict=True):
                    fact = self.facts[name]
                    box, size = fact.box or (0, 0, *fact.size), sizes[fact.image_sha256]
                    paste_thumbnail(thumbnails[fact.image_sha256], Image.fromarray(pixels.numpy()), box, size)
                task.advance(len(block))
        return {content: np.asarray(thumbnail) for content, thumbnail in thumbnails.items()}

    def shares(
        self, settings: TrainingSettings, cache_root: Path, progress: Progress, given: Collection[str] = ()
    ) -> tuple[dict[str, str], list[list[str]]]:
        """Each sample's share (`train`, `val` or `test`), and the groups of names that stay together.

        `given` are the names of the settings that the user gave. Raises `DsuError` if no sample remains for training,
        or if none can be held out for a given fraction.
        """
        images = {name: self.facts[name].image_sha256 for name in sorted(self.facts)}
        if settings.fold is None:
            weights = share_weights(settings.val_fraction or 0.0, settings.test_fraction)
        else:
            part, parts = settings.fold.split("/")
            weights = fold_weights(int(parts))
        assigned, groups = dict.fromkeys(images.values(), "train"), list[list[str]]()
        if len(weights) > 1:
            groups = self.groups(settings, weights, progress)
            # Next to the store, not in a folder named after the split: that name comes from a file, and may be a path.
            folder = self.store.path.parent if self.store else cache_root / self.source.split
            assigned = assign_recorded_shares(folder, self.strata, weights, groups, settings.group, progress)
            self._check_together(groups, assigned, folder, settings.group, progress)
        if settings.fold is not None:
            assigned = {content: "val" if share == part else "train" for content, share in assigned.items()}
        found = {name: assigned[content] for name, content in images.items()}
        if "train" not in found.values():
            raise DsuError(f"{self.source.split} has nothing left for training: hold out less, or add images.")
        if settings.fold is not None and "val" not in found.values():
            raise DsuError(f"{self.source.split} has too few images for --fold {settings.fold}: use fewer folds.")
        empty_shares = [share for share in weights if share in ("val", "test") and share not in found.values()]
        requested = [share for share in empty_shares if f"{share}_fraction" in given]
        if requested:
            raise UsageError(
                f"{self.source.split} has too few images to hold any out by --{requested[0]}-fraction: add images, or "
                f"give --{requested[0]}-fraction 0."
            )
        if empty_shares:
            progress.say(f"{self.source.split} has too few images to hold any out: this run has no validation.")
        members = [set(group) for group in groups]
        return found, sorted([name for name, content in images.items() if content in group] for group in members)

    def _check_together(
        self,
        groups: Sequence[Sequence[str]],
        assigned: Mapping[str, str],
        folder: Path,
        named: str | None,
        progress: Progress,
    ) -> None:
        """Warn about groups that an earlier run split. Raises `DsuError` if the user named these groups."""
        apart = [group for group in groups if len({assigned[content] for content in group}) > 1]
        if not apart:
            return
        names = [name for name, fact in sorted(self.facts.items()) if fact.image_sha256 in apart[0]]
        what = (
            f"{counted(len(apart), 'groups')} of {self.source.split} (such as {few(names)}) are in several splits from "
            f"an earlier run: remove {folder / SPLITS_FILE} to split all images again"
        )
        if named is not None:
            raise DsuError(f"{what}, or use the earlier --group.")
        progress.say(f"{what}; scores on held-out images may be too good.")

    def describe_shares(self, shares: Mapping[str, str], groups: Sequence[Sequence[str]]) -> list[str]:
        """Lines `share: content`, if there is more than one share."""
        thing_of = {name: index for index, group in enumerate(groups) for name in group}
        foreground = {content: part for stratum in self.strata for content, part in stratum.items()}
        lines, kind = [], "tiles" if self.source.tile else "images"
        for share in ("train", "val", "test", "left out"):
            names = [name for name in shares if shares[name] == share]
            if not names:
                continue
            marked = [name for name in names if name not in self.empty]
            things = len({thing_of.get(name, self.facts[name].image_sha256) for name in names})
            of_things = f" of {counted(things, 'things')}" if groups else ""
            middle = median(foreground[self.facts[name].image_sha256] for name in marked or names)
            lines.append(
                f"{share}: {counted(len(names), kind)}{of_things}, {len(marked):,} with an object, "
                f"{len(names) - len(marked):,} without; median foreground {100 * middle:.2g} %"
            )
        return lines if len(lines) > 1 else []

    def samples(self, names: Sequence[str], point: ResumePoint, *, live: bool) -> "SampleDataset":
        """A data set of named samples for steps from `point`, read from the store, or with `live` from images."""
        if live:
            from dsu.datasets import ImageDataset

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
        from dsu.features.samples import FeatureDataset

        assert self.store is not None
        return FeatureDataset(self.store, point.features, names=names)


def find_training_data(settings: TrainingSettings, paths: Paths, progress: Progress) -> TrainingData:
    """Find the training split: in its store, or end to end its images (with the store's settings, if there is one).

    Raises `UsageError` or `DsuError` if there is no such split, or if the store or the images can't be used.
    """
    encoders = requested_encoders(settings)
    try:
        store = find_training_store(paths.cache_root, settings.dataset, encoders, settings.tiling, progress)
    except UsageError:
        if not settings.end_to_end or settings.dataset is None:
            raise
        source = _source_from_images(settings.dataset, paths, settings.tiling)
        return _from_images(source, requested_config(settings, None), None, progress)
    store.check_views(settings.views)
    config = requested_config(settings, store)
    if settings.end_to_end:
        return _from_images(store.source, config, store, progress)
    mask_format = store.mask_format
    return TrainingData(store.source, store.check_samples(progress), config, store, None, mask_format)


def requested_encoders(settings: TrainingSettings) -> str | None:
    """The name of the requested encoders; None if settings name none: then the store decides."""
    given = [getattr(settings, name) for name in NetworkSettings.model_fields]
    return None if all(value is None for value in given) else requested_config(settings, None).encoders_name


def requested_config(settings: TrainingSettings, store: FeatureStore | None) -> DSUNetConfig:
    """The requested config; with a store, its encoders. Raises `UsageError` if `adapt_last` exceeds Hiera's depth."""
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
        raise UsageError(f"{reference} has no training split: this benchmark is for testing only.")
    return SourceFolder.of(split, reference, paths, tiling)


def _from_images(
    source: SourceFolder, config: DSUNetConfig, store: FeatureStore | None, progress: Progress
) -> TrainingData:
    split = source.find()
    if split is None:
        raise DsuError(
            f"The images of {source.split} are not at {source.place}: restore them, or give their new location."
        )
    if split.masks is None:
        raise DsuError(f"{split.name} has no masks in {split.images}: training needs them.")
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
