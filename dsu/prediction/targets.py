"""What to predict: from what a user names to sets of images, where each resumes and which files come of it."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dsu.choices import Normalization
from dsu.data.datasets import Paths, SourceFolder, find_dataset, find_images, is_benchmark, masks_below, test_splits
from dsu.data.images import IMAGE_SUFFIXES
from dsu.data.tiles import Tiling, image_name
from dsu.data.views import UNFLIPPED
from dsu.errors import DsuError, UsageError
from dsu.features.stores import FeatureStore, encoders_name, find_stores
from dsu.heads.head_file import HeadInfo, read_head_info
from dsu.network.resume import ResumePoint, earliest, resume_point
from dsu.prediction.outputs import check_outputs, output_files
from dsu.progress import SILENT, Progress
from dsu.runtime import Runtime
from dsu.settings import PredictionSettings

__all__ = ["Job", "Target", "prepare_jobs"]

_SHOWN: Final = 10


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
        tiling: how the images are cut; the samples of the store are the tiles then.
    """

    name: str
    targets: tuple[Target, ...]
    normalization: Normalization
    source: SourceFolder | None
    store: FeatureStore | None
    point: ResumePoint
    tiling: Tiling | None = None


def prepare_jobs(
    sources: Sequence[str],
    head: Path,
    out: Path,
    settings: PredictionSettings,
    runtime: Runtime,
    *,
    paths: Paths,
    end_to_end: bool,
    held_out: bool = False,
    progress: Progress = SILENT,
) -> list[Job]:
    """Find what is meant by `sources`; without any, the test splits (or held-out share) of the head's data set.

    A benchmark's name means its test splits, from their stores unless `end_to_end`; a folder or a file is always
    predicted from its pixels. With `held_out` and no sources it is the held-out share even where there is a test
    split. Raises `UsageError` where a source is unknown or an output would fall on an input.
    """
    info = read_head_info(head)
    if out.suffix.lower() in IMAGE_SUFFIXES and not out.is_dir():
        raise UsageError(f"--out {out} must be a folder: a mask keeps its image's name.")
    if not sources and "reference" not in info.dataset:
        raise UsageError(f"{head} does not say what it was trained on: name a benchmark, a folder or image files.")
    finder = _Finder(info, out, settings, runtime, paths, end_to_end, progress)
    jobs: list[Job] = []
    files = [Path(source) for source in sources if Path(source).is_file()]
    for source in sources:
        if not source:  # which Python would take for the working folder
            raise UsageError("A name of what to predict is empty: give a benchmark, a folder or image files.")
        if Path(source).is_file():
            continue
        if Path(source).suffix.lower() in IMAGE_SUFFIXES and not Path(source).exists():
            raise UsageError(f"There is no image at {source}: check the path.")
        if is_benchmark(source) or not Path(source).is_dir():
            jobs += finder.named(source)
        else:
            jobs.append(finder.folder(Path(source)))
    if files:
        jobs.append(finder.files(files))
    if not sources:
        jobs += [finder.held_out_share()] if held_out else finder.of_the_head()
    check_outputs([job.name for job in jobs], [(target.image, target.output) for job in jobs for target in job.targets])
    return jobs


@dataclass(frozen=True)
class _Finder:
    """From what a user names to jobs."""

    info: HeadInfo
    out: Path
    settings: PredictionSettings
    runtime: Runtime
    paths: Paths
    end_to_end: bool
    progress: Progress

    @property
    def tiling(self) -> Tiling | None:
        """How images are cut: as asked for, else as those that the head was trained on."""
        trained, size, overlap = self.info.tiling, self.settings.tile, self.settings.overlap
        if size is None and trained is not None:
            return trained if overlap is None else Tiling(trained.size, overlap)
        return Tiling.of(size or None, overlap)

    def named(self, name: str) -> list[Job]:
        """A data set's test splits (a split's own name: that split)."""
        if stored := self._from_stores(name):
            return stored
        paths = self.paths
        try:
            splits = find_dataset(name, paths)
        except UsageError:
            # A benchmark may still lie where the head's own data set lay.
            if "data_root" not in self.info.dataset:
                raise
            paths = replace(paths, data_root=Path(self._trained_on().data_root))
            splits = find_dataset(name, paths)
        jobs = []
        for split in test_splits(splits):
            source = SourceFolder.of(split, name, paths)
            if self.info.dataset.get("reference") == source.reference:  # its masks are read as they were in training
                source = replace(source, mask_format=self._trained_on().mask_format)
            jobs.append(self._job(split.name, [(pair.name, pair.image) for pair in split.pairs], source))
        return jobs

    def folder(self, folder: Path) -> Job:
        """All images below a folder, subfolders kept."""
        name = folder.resolve().name
        masks = masks_below(folder)
        if masks:
            shown = ", ".join(sorted(map(os.path.basename, masks))[:_SHOWN]) + ", ..." * (len(masks) > _SHOWN)
            self.progress.say(
                f"{name}: {len(masks):,} masks lie among the images and are left out ({shown}): name them one by "
                f"one to predict them too."
            )
        images = [path for path in find_images(folder) if os.path.realpath(path) not in masks]
        found = [(path.relative_to(folder).as_posix(), path) for path in images]
        if not found:
            raise UsageError(f"There is no image below {folder}: give a folder that holds some.")
        return self._job(name, found)

    def files(self, files: Sequence[Path]) -> Job:
        """Image files given one by one; their masks lie in OUT itself."""
        return self._job("", [(path.name, path) for path in files])

    def of_the_head(self) -> list[Job]:
        """What the head was not trained on: its data set's test splits, else the share held out."""
        like, jobs = self._trained_on(), []
        for split in like.splits():
            if split.kind == "test":
                source = replace(like, split=split.name, dataset=split.dataset, kind=split.kind)
                images = [(pair.name, pair.image) for pair in split.pairs]
                jobs += self._from_stores(split.name) or [self._job(split.name, images, source)]
        return jobs or [self.held_out_share()]

    def held_out_share(self) -> Job:
        """Those samples of the head's training split that it was not trained on."""
        source = self._trained_on()
        held_out = set(self.info.dataset.get("held_out", ()))
        if not held_out:
            raise UsageError(
                f"{source.dataset} has neither a test split nor a held-out share: name what to predict, a benchmark, "
                f"a folder or image files."
            )
        name = f"{source.split}-VAL"
        if not self.end_to_end:
            for store in find_stores(self.paths.cache_root, source.split, encoders_name(self.info.config)):
                origin = store.source
                if origin.reference == source.reference and origin.tiling == self.tiling == source.tiling:
                    return self._stored_job(name, store, held_out)
        if source.tiling is not None:
            held_out = {image_name(tile) for tile in held_out}
        own = [pair for split in source.splits() if split.name == source.split for pair in split.pairs]
        pairs = [(pair.name, pair.image) for pair in own if pair.name in held_out]
        return self._job(name, pairs, source)

    def _trained_on(self) -> SourceFolder:
        """Where the head's own data set is. Raises `DsuError` for a head that says it in a way dsu never does."""
        noted = {name: value for name, value in self.info.dataset.items() if name != "held_out"}
        held_out = self.info.dataset.get("held_out", [])
        try:
            if isinstance(held_out, list) and all(isinstance(name, str) for name in held_out):
                return SourceFolder(**noted)
        except TypeError:  # other fields
            pass
        raise DsuError("The head does not say rightly what it was trained on: name what to predict, or train it again.")

    def _from_stores(self, name: str) -> list[Job]:
        """Jobs from the stores of a data set's test splits, or of the one split that is named; none from images."""
        if self.end_to_end:
            return []
        stores = find_stores(self.paths.cache_root, name, encoders_name(self.info.config))
        found = [store for store in stores if store.source.tiling == self.tiling]
        tests = [store for store in found if store.source.kind == "test"] or found
        try:
            return [self._stored_job(store.source.split, store) for store in tests]
        except UsageError:  # not complete
            return []

    def _stored_job(self, name: str, store: FeatureStore, only: Collection[str] | None = None) -> Job:
        """The samples of a store, or some of them, after checking that their features still hold."""
        source, available = store.source, store.available(UNFLIPPED)
        if "pixels" not in available:
            raise UsageError(f"{store.path} is not complete: run {store.again()} again.")
        point = resume_point(self.info.config, available)
        _, drift = store.check_arrays(point, self.info.encoders, self.runtime, self.info.feature_dtype or "float16")
        for item in drift:
            self.progress.say(f"other version: {item}")
        store.check_samples(self.progress)
        split = source.uncut.find()
        chosen = [sample for sample in store.manifest.names if only is None or sample in only]
        paths = {} if split is None else {pair.name: pair.image for pair in split.pairs}
        images = dict.fromkeys(image_name(sample) if source.tiling else sample for sample in chosen)
        return self._job(name, [(image, paths.get(image, Path(image))) for image in images], source, store, point)

    def _job(
        self,
        name: str,
        images: Sequence[tuple[str, Path]],
        source: SourceFolder | None = None,
        store: FeatureStore | None = None,
        point: ResumePoint | None = None,
    ) -> Job:
        """A set that is predicted from its images, or where `point` is given from there on from a store."""
        benchmark = source is not None and source.benchmark
        normalization = self.settings.normalize or ("minmax" if benchmark else "none")
        # A data set's samples are called without ending already, but for those that differ in nothing else.
        outputs = output_files(self.out, name, [item for item, _ in images], stems=source is None)
        targets = [Target(item, path, output) for (item, path), output in zip(images, outputs, strict=True)]
        point = point or earliest(self.info.config)
        return Job(name, tuple(targets), normalization, source and source.uncut, store, point, self.tiling)
