"""Resolve the user's sources into sets of images, with the features that they start from and their output files.

No output file is an input, another prediction, or outside the output folder.
"""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dsu.choices import Normalization
from dsu.data.datasets import Paths, SourceFolder, find_dataset, is_benchmark, masks_below, test_splits
from dsu.data.images import IMAGE_SUFFIXES, OTHER_PHOTOGRAPHS, UnreadableImage
from dsu.data.pairing import Split, find_images, list_files, output_files, written_below
from dsu.data.tiles import Tiling, image_name
from dsu.data.views import UNFLIPPED
from dsu.errors import DsuError, UsageError
from dsu.heads.head_file import HeadInfo
from dsu.network.resume import ResumePoint, earliest, resume_point
from dsu.progress import SILENT, Progress, counted
from dsu.settings import PredictionSettings
from dsu.thresholds import DEFAULT_THRESHOLD

if TYPE_CHECKING:
    from dsu.features.stores import FeatureStore
    from dsu.runtime import Runtime

VALIDATION: Final = "validation share"
"""Value of a job's `share` for the validation images."""

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
        name: of the set, and of the folder of its predictions; empty for single files.
        targets: its images.
        normalization: resolved.
        source: where to find the ground truth, for a data set.
        store: its stored features; None predicts from the images.
        point: where the network resumes.
        tiling: how images are cut into tiles; then the store's samples are tiles.
        share: which part of the head's own training split it is, in words; empty for other sets.
        threshold: for its verdicts.
        places: folders of images outside data sets: by image name for single files and mirrored folders; otherwise
            the whole folder's path by "".
        unread: one sentence for each image of a type that can't be read.
        depth: black and white point of images with more than 8 bits, as in training.
    """

    name: str
    targets: tuple[Target, ...]
    normalization: Normalization
    source: SourceFolder | None
    store: "FeatureStore | None"
    point: ResumePoint
    tiling: Tiling | None = None
    share: str = ""
    threshold: float = DEFAULT_THRESHOLD
    places: Mapping[str, str] = field(default_factory=dict)
    unread: Sequence[str] = ()
    depth: tuple[float, float] | None = None

    @property
    def label(self) -> str:
        """The job's name in messages; without a name, that of the images' only folder."""
        folders = set(self.places.values())
        return self.name or (os.path.basename(folders.pop()) if len(folders) == 1 else "") or "files"

    def describe(self) -> str:
        """The number of images and their origin, in one line."""
        origin = f"features ({' + '.join(self.point.features)})" if self.store is not None else "images"
        cut = f" in tiles of {self.tiling.size} px with overlap {self.tiling.overlap}" if self.tiling else ""
        return f"{self.label}: {len(self.targets):,} from {origin}{cut}, normalisation {self.normalization}"


def decided_by(settings: PredictionSettings, info: HeadInfo) -> float:
    """The threshold of verdicts, overlays and cutouts: as asked for, else the head's own, else 0.5."""
    chosen = [settings.threshold, info.threshold, DEFAULT_THRESHOLD]
    return next(threshold for threshold in chosen if threshold is not None)


def prepare_jobs(
    sources: Sequence[str],
    head: Path,
    info: HeadInfo,
    out: Path,
    settings: PredictionSettings,
    runtime: "Callable[[], Runtime] | None",
    *,
    paths: Paths,
    end_to_end: bool,
    held_out: bool = False,
    validation: bool = False,
    mirror: bool = False,
    progress: Progress = SILENT,
) -> list[Job]:
    """Find the images of `sources`; without any, the test images (or the held-out ones) of the head's data set.

    Args:
        sources: a benchmark's name means its test splits, from their stores unless `end_to_end`; folders and files are
            always predicted from their pixels.
        head, info: the head's file, and its metadata.
        out: the output folder.
        settings: as asked for.
        runtime: returns the device and precision that stored features must agree with; only called for stores.
        paths: where data sets and stores are.
        end_to_end: ignore stores.
        held_out: without sources, predict the held-out share even if there is a test split.
        validation: add the validation share, which thresholds are chosen on.
        mirror: write a folder's predictions directly into `out`, not into a subfolder named after it.
        progress: receives messages.

    Raises `UsageError` if a source is unknown or an output would overwrite an input.
    """
    if not sources and "reference" not in info.dataset:
        raise UsageError(f"{head} does not record its training data: give a benchmark, a folder or image files.")
    finder = _Finder(info, out, settings, runtime, paths, end_to_end, mirror, progress)
    files = [Path(source) for source in sources if Path(source).is_file()]
    jobs = [job for source in sources if Path(source) not in files for job in finder.find(source)]
    if files:
        places = {path.name: os.path.realpath(path.parent) for path in files}
        jobs.append(replace(finder.images("", [(path.name, path) for path in files]), places=places))
    if not sources:
        jobs = [finder.held_out_share()] if held_out else finder.of_the_head()
        jobs += finder.for_thresholds(jobs) if validation else []
    _check_outputs(jobs)
    folders = {Path(place) for job in jobs for place in job.places.values()}
    if finder.mirror and not files and any(folder.is_relative_to(os.path.realpath(out)) for folder in folders):
        raise UsageError(f"Predictions in {out} would be among the images: give a separate folder with --out.")
    return jobs


@dataclass(frozen=True)
class _Finder:
    """Turns sources into jobs."""

    info: HeadInfo
    out: Path
    settings: PredictionSettings
    runtime: "Callable[[], Runtime] | None"
    paths: Paths
    end_to_end: bool
    mirror: bool
    progress: Progress

    @property
    def tiling(self) -> Tiling | None:
        """How images are cut into tiles: as asked for, else as in training."""
        trained, size, overlap = self.info.tiling, self.settings.tile, self.settings.overlap
        if size is None and trained is not None:
            return Tiling(trained.size, trained.overlap if overlap is None else overlap)
        return Tiling.of(size or None, overlap)

    def find(self, source: str) -> list[Job]:
        """The jobs of a benchmark, a folder, or a data set below the data root."""
        path = Path(source)
        if not source:  # Path("") is the working folder
            raise UsageError("A source name is empty: give a benchmark, a folder or image files.")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.exists():
            raise UsageError(f"There is no image at {source}: check the path.")
        return [self._folder(path)] if path.is_dir() and not is_benchmark(source) else self._named(source)

    def _named(self, name: str) -> list[Job]:
        """The test splits of a data set, or the split of that name."""
        if stored := self._from_stores(name):
            return stored
        paths = self.paths
        try:
            splits = find_dataset(name, paths)
        except UsageError:
            # The benchmark may be next to the head's own data set.
            if "data_root" not in self.info.dataset:
                raise
            paths = replace(paths, data_root=Path(self._trained_on().data_root))
            splits = find_dataset(name, paths)
        jobs = []
        for split in test_splits(splits):
            source = SourceFolder.of(split, name, paths)
            if self.info.dataset.get("reference") == source.reference:  # masks are read as in training
                source = replace(source, mask_format=self._trained_on().mask_format)
            jobs.append(self.images(split.name, _images_of(split), source))
        return jobs

    def _folder(self, folder: Path) -> Job:
        """All images below a folder, by their paths within it."""
        name = folder.resolve().name
        masks = masks_below(folder)
        if masks:
            shown = ", ".join(sorted(map(os.path.basename, masks))[:_SHOWN]) + ", ..." * (len(masks) > _SHOWN)
            self.progress.say(
                f"{name}: {len(masks):,} masks among the images are left out ({shown}): name them one by one to "
                "predict them too."
            )
        written = written_below(list_files(folder))
        if written:
            self.progress.say(f"{name}: {counted(len(written), 'predictions')} of dsu among the images are left out")
        images = [path for path in find_images(folder) if os.path.realpath(path) not in masks | written]
        if not images:
            raise UsageError(f"There is no image below {folder}: give a folder of images.")
        named = [(path.relative_to(folder).as_posix(), path) for path in images]
        place, unread = os.path.realpath(folder), _unread(folder, images)
        if self.mirror:
            places = dict.fromkeys((item for item, _ in named), place)
            return replace(self.images("", named), places=places, unread=unread)
        return replace(self.images(name, named), places={"": place}, unread=unread)

    def of_the_head(self) -> list[Job]:
        """The test splits of the head's data set and its test share; without either, its validation share."""
        like, jobs = self._trained_on(), list[Job]()
        try:
            splits = like.splits()
        except DsuError:  # the images have moved, but their features may be stored
            tests = [store for store in self._stores(like.dataset) if store.source.kind == "test"]
            jobs, splits = [self._stored_job(store.source.split, store) for store in tests], ()
        for split in splits:
            if split.kind == "test":
                source = replace(like, split=split.name, dataset=split.dataset, kind=split.kind)
                jobs += self._from_stores(split.name) or [self.images(split.name, _images_of(split), source)]
        return jobs + ([self.held_out_share()] if self.info.test or not jobs else [])

    def held_out_share(self) -> Job:
        """Samples of the head's training split set apart to test it, else those its weights were chosen on."""
        if self.info.test:
            return self._share("TEST", "test share, never seen in training", self.info.test)
        return self._validation_share()

    def for_thresholds(self, jobs: Sequence[Job]) -> list[Job]:
        """The validation share, if there is one and it is not among the jobs."""
        if not self.info.dataset.get("held_out") or any(job.share.startswith(VALIDATION) for job in jobs):
            return []
        try:
            return [self._validation_share()]
        except DsuError as error:
            self.progress.say(f"The validation images, needed to choose a threshold, are left out: {error}")
            return []

    def _validation_share(self) -> Job:
        names = self.info.dataset.get("held_out", ())
        if not names:
            raise UsageError(
                f"{self._trained_on().dataset} has neither a test split nor held-out images: give a benchmark, a "
                "folder or image files."
            )
        chose = ", which chose the weights" if self.info.training.get("keep") == "best" else ""
        return self._share("VAL", f"{VALIDATION}{chose}", names)

    def _share(self, ending: str, share: str, names: Iterable[str]) -> Job:
        """The named samples of the training split, from its store or its images."""
        source, wanted = self._trained_on(), set(names)
        name = f"{source.split}-{ending}"
        for store in self._stores(source.split):
            if store.source.reference == source.reference and store.source.tiling == source.tiling:
                return self._stored_job(name, store, wanted, share)
        if source.tiling is not None:
            wanted = {image_name(tile) for tile in wanted}
        own = [image for split in source.splits() if split.name == source.split for image in _images_of(split)]
        return self.images(name, [(image, path) for image, path in own if image in wanted], source, share=share)

    def _trained_on(self) -> SourceFolder:
        """Where the head's own data set is. Raises `DsuError` if its record in the head is invalid."""
        noted = {name: value for name, value in self.info.dataset.items() if name != "held_out"}
        held_out = self.info.dataset.get("held_out", [])
        try:
            if isinstance(held_out, list) and all(isinstance(name, str) for name in held_out):
                return SourceFolder(**noted)
        except TypeError:  # other fields
            pass
        raise DsuError(
            "The head's record of its training data is invalid: give the images to predict, or train it again."
        )

    def _from_stores(self, name: str) -> list[Job]:
        """Jobs from the stores of a data set's test splits, or of one split; empty if any is missing or incomplete."""
        stores = self._stores(name)
        tests = [store for store in stores if store.source.kind == "test"] or stores
        try:
            return [self._stored_job(store.source.split, store) for store in tests]
        except UsageError:  # incomplete
            return []

    def _stores(self, name: str) -> "list[FeatureStore]":
        """Stores of a data set or a split with the right tiling; empty with `end_to_end`."""
        if self.end_to_end:
            return []
        from dsu.features.stores import find_stores

        stores = find_stores(self.paths.cache_root, name, self.info.config.encoders_name)
        return [store for store in stores if store.source.tiling == self.tiling]

    def _stored_job(
        self, name: str, store: "FeatureStore", only: Collection[str] | None = None, share: str = ""
    ) -> Job:
        """The samples of a store, or some of them, after checking that the stored features are valid."""
        source, available = store.source, store.available(UNFLIPPED)
        if "pixels" not in available:
            raise UsageError(f"{store.path} is incomplete: run {store.command()} again.")
        assert self.runtime is not None
        point = resume_point(self.info.config, available)
        _, drift = store.check_arrays(point, self.info.encoders, self.runtime(), self.info.feature_dtype or "float16")
        for item in drift:
            self.progress.say(f"other version: {item}")
        store.check_samples(self.progress)
        split = source.untiled.find()
        chosen = [sample for sample in store.manifest.names if only is None or sample in only]
        paths = {} if split is None else dict(_images_of(split))
        images = dict.fromkeys(image_name(sample) if source.tiling else sample for sample in chosen)
        return self.images(
            name, [(image, paths.get(image, Path(image))) for image in images], source, store, point, share
        )

    def images(
        self,
        name: str,
        images: Sequence[tuple[str, Path]],
        source: SourceFolder | None = None,
        store: "FeatureStore | None" = None,
        point: ResumePoint | None = None,
        share: str = "",
    ) -> Job:
        """A set of images, by name and file, predicted from the files, or from a store from its `point` on.

        Without a name, masks are written into OUT itself.
        """
        benchmark = source is not None and source.benchmark
        minmax = benchmark and self.settings.kind == "mask" and not share.startswith(VALIDATION)
        normalization = self.settings.normalize or ("minmax" if minmax else "none")
        # Names of a data set's samples have no endings, unless they would be ambiguous.
        outputs = output_files(self.out, name, [item for item, _ in images], stems=source is None)
        targets = [Target(item, path, output) for (item, path), output in zip(images, outputs, strict=True)]
        point = point or earliest(self.info.config)
        return Job(
            name,
            tuple(targets),
            normalization,
            source and source.untiled,
            store,
            point,
            self.tiling,
            share,
            threshold=decided_by(self.settings, self.info),
            depth=self.info.depth,
        )


def _images_of(split: Split) -> list[tuple[str, Path]]:
    return [(pair.name, pair.image) for pair in split.pairs]


def _unread(folder: Path, images: Sequence[Path]) -> list[str]:
    """List photographs below a folder in unsupported formats, except those that also exist as an image."""
    stems = {image.with_suffix("") for image in images}
    others = (file for file in sorted(list_files(folder)) if file.suffix.lower() in OTHER_PHOTOGRAPHS)
    return [
        str(UnreadableImage(file, "its format is not supported"))
        for file in others
        if file.with_suffix("") not in stems
    ]


def _check_outputs(jobs: Sequence[Job]) -> None:
    """Raise `UsageError` if a prediction would overwrite an input or another one, or if two sets share a name."""
    for name, count in Counter(job.name for job in jobs).items():
        if count > 1:
            raise UsageError(f"{count} sources are called {name}: predict them separately, each with its own --out.")
    targets = [target for job in jobs for target in job.targets]
    # realpath, since Path.resolve fails on circular links.
    inputs = {os.path.realpath(target.image) for target in targets}
    folders = {os.path.dirname(image) for image in inputs}
    outputs: set[str] = set()
    for target in targets:
        place = os.path.realpath(target.output)
        if place in inputs:
            raise UsageError(f"The prediction of {target.image} would overwrite an input: give another --out.")
        if os.path.dirname(place) in folders:  # later they would be taken for images or ground truth
            raise UsageError(
                f"Predictions in {target.output.parent} would be among the images: give a separate folder with --out."
            )
        if place in outputs:
            raise UsageError(f"Two images would be written to {target.output}: predict them one after the other.")
        outputs.add(place)
