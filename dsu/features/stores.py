"""The stored features of data sets: find a split's store, what it was made from, and whether it is still valid."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypeVar

from dsu.choices import FeatureDtype, Precision
from dsu.config import DSUNetConfig
from dsu.data.datasets import SourceFolder
from dsu.data.images import Depth
from dsu.data.inspection import SampleMetadata, inspect
from dsu.data.masks import MaskFormat
from dsu.data.tiles import Tiling
from dsu.data.views import FLIPPED_WHEN_READ, RECIPE, Views, view_index
from dsu.errors import DsuError, UsageError
from dsu.network.resume import ResumePoint, guide_names
from dsu.progress import SILENT, Progress, few
from dsu.runtime import Runtime, processor_name
from dsu_cache import CacheError, CorruptError, Fingerprint, RemoteError, Store, folder_of, is_store

_T = TypeVar("_T")


def _checked_property(read: "Callable[[FeatureStore], _T]") -> "Callable[[FeatureStore], _T]":
    """A property of a store's own record. Raises `DsuError` if this dsu would not have written the record."""

    def reading(store: "FeatureStore") -> _T:
        try:
            return read(store)
        except (KeyError, TypeError, ValueError) as error:
            raise DsuError(
                f"The store {store.path} was not written by this dsu: remove it, or give another --cache-root."
            ) from error

    reading.__doc__ = read.__doc__
    return reading


class FeatureStore(Store):
    """The features of one split, with a record of the images and encoders that they were made from.

    Example:
        >>> store = FeatureStore.open("features/DUTS-TR/large")
        >>> store.available(ALL_FLIPS)
        {'pixels', 'V'}
    """

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """The store in a folder. Raises `DsuError` or `CacheError` naming the folder if it can't be opened.

        Arrays with damaged metadata count as missing: call `ensure_readable` before reading.
        """
        try:
            return super().open(path)
        except CorruptError as error:
            raise DsuError(
                f"The store {path} is damaged beyond repair ({_relative(Path(path), error)}): remove it (`dsu cache "
                f"remove {path}`) and run `dsu cache-features` again."
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """After unpickling, another process opens the store again."""
        return type(self).open, (self.path,)

    def ensure_readable(self) -> None:
        """Check the metadata, and that nobody is writing, before anything is read.

        Raises `DsuError` naming the damaged file, and `BusyError` naming the process.
        """
        try:
            self.check_readable()
        except CorruptError as error:
            raise DsuError(
                f"The store {self.path} is damaged ({_relative(self.path, error)}): run {self.command()} again, which "
                "recomputes only what is damaged."
            ) from error

    # -- what it was made from -------------------------------------------------------------------------------------

    @property
    @_checked_property
    def source(self) -> SourceFolder:
        """How its images were found."""
        return SourceFolder(**self.attributes["source"])

    @property
    @_checked_property
    def config(self) -> DSUNetConfig:
        """The encoders and sizes that it was made with (its depth of adaptation has no meaning)."""
        return DSUNetConfig.model_validate(self.attributes["config"])

    @property
    @_checked_property
    def encoders(self) -> dict[str, str]:
        """Digests of the encoder weights of its features."""
        return dict(self.attributes["encoders"])

    @property
    def from_files(self) -> set[str]:
        """Encoders whose weights were given as files, so they may not be the published ones."""
        return set(self.attributes.get("from_files", ()))

    @property
    def mask_format(self) -> MaskFormat:
        """How its masks were read. Raises `DsuError` for a store without masks."""
        if "mask" not in self.arrays:
            raise DsuError(
                f"The store {self.path} has no masks, which training and comparisons need: add masks and run `dsu "
                "cache-features` again."
            )
        return MaskFormat.from_json(self._fingerprint_field("mask_format"))

    @property
    def precision(self) -> Precision:
        """The precision at which its features were computed; auto if there are none."""
        return self._fingerprint_field("precision", "auto")  # type: ignore[no-any-return]

    @property
    def feature_dtype(self) -> FeatureDtype:
        """The data type of its features."""
        return self._fingerprint_field("type", "float16")  # type: ignore[no-any-return]

    @property
    def encoder_batch_size(self) -> int | None:
        """The encoders' batch size; None if no feature is stored."""
        return self._fingerprint_field("encoder batch size")  # type: ignore[no-any-return]

    @property
    def threads(self) -> int | None:
        """The number of CPU threads that computed its features; None for a GPU, or if there are none."""
        prints = [info.fingerprint.recorded for info in self.arrays.values()]
        return next((int(one["threads"]) for one in prints if "threads" in one), None)  # type: ignore[arg-type]

    @property
    @_checked_property
    def metadata(self) -> dict[str, SampleMetadata]:
        """The metadata of each sample when it was stored."""
        return {name: SampleMetadata.from_json(entry.info) for name, entry in self.manifest.samples()}

    def matches(self, name: str) -> bool:
        """Whether `name` is its data set, its split or its folder; an existing folder always means that folder."""
        source, folder = self.source, Path(name).expanduser()
        if folder.resolve() == Path(source.reference):
            return True
        named = _normalise_name(name) in (_normalise_name(source.split), _normalise_name(source.dataset))
        return named and (source.benchmark or not folder.is_dir())

    @property
    def described(self) -> str:
        """A short description: the split, its encoders, tiling and whether it has masks."""
        cut = f", in tiles {self.source.tiling}" if self.source.tiling else ""
        return f"{self.source.split} ({self.path.name}{cut}{'' if 'mask' in self.arrays else ', without masks'})"

    def command(self, *options: object) -> str:
        """The command that created it, with other `options`, to compute what is missing."""
        encoders = [
            word
            for name, value in self.config.encoder_settings.items()
            if value not in (None, "large")
            for word in (f"--{name.replace('_', '-')}", value)
        ]
        return f"`{' '.join(['dsu cache-features', self.source.arguments, *map(str, [*encoders, *options])])}`"

    def _fingerprint_field(self, field: str, default: Any = None) -> Any:
        """A field of the fingerprints; it is equal in all arrays that have it."""
        prints = [info.fingerprint.fields for info in self.arrays.values()]
        return next((fields[field] for fields in prints if field in fields), default)

    # -- whether it is still valid ----------------------------------------------------------------------------------

    def available(self, views: Views) -> set[str]:
        """Features, including `pixels`, that have every sample in all of `views`. Raises as `ensure_readable`."""
        self.ensure_readable()
        return {name for name in self.arrays if name != "mask" and self.holds(name, views)}

    def holds(self, name: str, views: Views) -> bool:
        """Whether an array has every sample in all of `views`."""
        return not self.missing(name, [view_index(name, view) for view in views.numbers])

    def check_views(self, views: Views) -> None:
        """Raise `DsuError` if pixels or masks of any sample are missing in `views`."""
        lacking = [name for name in FLIPPED_WHEN_READ if name in self.arrays and not self.holds(name, views)]
        if lacking:
            raise DsuError(
                f"The store {self.path} lacks {' and '.join(lacking)} of some samples or views ({views}): run "
                f"{self.command()} with as many --views; it computes only what is missing."
            )

    def check_arrays(
        self, point: ResumePoint, digests: Mapping[str, str], runtime: Runtime, feature_dtype: str
    ) -> tuple[dict[str, str], tuple[str, ...]]:
        """Compare the features to read with what this run's encoders would compute.

        An encoder that the run does not load, because its features come from the store, is assumed to be the store's.
        Returns the digests of both encoders, and warnings about other library versions or devices. Raises `StaleError`
        listing the fields that differ.
        """
        config, known = self.config, {**self.encoders, **digests}
        mask_format = self.mask_format if "mask" in self.arrays else MaskFormat()
        wanted = fingerprints(
            [name for name in (*point.features, "mask") if name in self.arrays],
            config,
            mask_format=mask_format,
            depth=self.source.parsed_depth,
            feature_dtype=feature_dtype,
            runtime=runtime,
            digests=known,
            encoder_batch_size=self.encoder_batch_size or 0,
        )
        drift = self.check(wanted, f"Run {self.command('--rebuild')}, or run with the store's settings.")
        return known, tuple(map(str, drift))

    def check_samples(self, progress: Progress = SILENT) -> dict[str, SampleMetadata]:
        """The metadata of each sample, after comparing the data set with the manifest.

        Compares sizes and times; a file is hashed again only if they differ. Raises `DsuError` naming new, changed and
        missing or unreadable samples. If the data set no longer exists, prints that and uses the store as it is.
        """
        source, stored = self.source, self.metadata
        split = source.find()
        if split is None:
            progress.say(f"The images of {source.split} are no longer at {source.place}: using the store as it is.")
            return stored
        found = inspect(split, stored, progress, foreground=source.foreground, depth=source.parsed_depth).facts
        differing = {
            "new": sorted(found.keys() - stored.keys()),
            "changed": sorted(n for n in found.keys() & stored.keys() if sample_key(found[n]) != sample_key(stored[n])),
            "gone or unreadable": sorted(stored.keys() - found.keys()),
        }
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in differing.items()
            if names
        ]
        if parts:
            raise DsuError(
                f"{source.split} has changed since its features were made: {', '.join(parts)}. Run {self.command()} "
                "again: it computes only those."
            )
        return found


def sample_key(facts: SampleMetadata) -> str:
    """A row's key: the content of image and mask."""
    return hashlib.sha256(f"{facts.content}:{facts.mask_sha256}".encode()).hexdigest()


def _relative(folder: Path, error: CorruptError) -> str:
    """The error text, with paths relative to the store's folder, which the sentence already names."""
    return str(error).replace(f"{folder}/", "")


# -- validity of arrays -------------------------------------------------------------------


def fingerprints(
    names: Iterable[str],
    config: DSUNetConfig,
    *,
    mask_format: MaskFormat,
    depth: Depth | None,
    feature_dtype: str,
    runtime: Runtime,
    digests: Mapping[str, str],
    encoder_batch_size: int,
) -> dict[str, Fingerprint]:
    """What the named arrays are made from.

    `fields` decide whether an array may be used; `recorded` (library versions and the machine) only causes warnings.
    """
    extra: dict[str, Any] = {"cached augmentations": RECIPE}
    scaled = extra if depth is None else {**extra, "black and white": list(depth)}
    found = {}
    for name in names:
        if name == "pixels":
            fields = {"size": config.hiera_size, "resize": "PIL bilinear", "mode": "RGB", **scaled}
        elif name == "mask":
            fields = {
                "size": config.hiera_size,
                "resize": "PIL bicubic",
                "turned": "with its image",
                "alpha": "is the mask where it varies",
                "mask_format": mask_format.to_json(),
                **extra,
            }
        else:
            is_map = name in guide_names(config)
            fields = {
                "encoder": (config.dino if is_map else config.hiera).model_dump(mode="json", exclude={"name"}),
                "weights": digests["dino" if is_map else "hiera"],
                "input size": config.dino_size if is_map else config.hiera_size,
                "resize": "PIL bilinear",
                "normalisation": "ImageNet",
                "precision": runtime.precision,
                "type": feature_dtype,
                "feature": name,
                "encoder batch size": encoder_batch_size,
                **scaled,
            }
            if name == "V":
                fields |= {"grid": config.level_grid(4), "grid resize": "bilinear, two products"}
        machine = {} if name in FLIPPED_WHEN_READ else _machine_facts(runtime)
        found[name] = Fingerprint(fields, {**library_versions(), **machine})
    return found


def _machine_facts(runtime: Runtime) -> dict[str, str | int]:
    """What may affect a feature's last bits: the GPU, or the CPU and its threads."""
    import torch

    if runtime.device.type == "cuda":
        return {"device": torch.cuda.get_device_name(runtime.device)}
    return {"device": processor_name(), "threads": torch.get_num_threads()}


@cache
def library_versions() -> Mapping[str, str]:
    """Versions of libraries that may change numbers in their last digits."""
    return {library: version(library) for library in ("torch", "timm", "sam2", "pillow")}


# -- finding stores ----------------------------------------------------------------------------------------------


def store_path(cache_root: Path, split: str, config: DSUNetConfig) -> Path:
    """One store for each split, pair of encoders and input sizes; all depths and ablations share it."""
    return cache_root / split / config.encoders_name


def store_folders(cache_root: Path) -> list[Path]:
    """The folders of all stores below the cache root, including damaged ones, newest first."""
    folders = [folder for folder in cache_root.glob("*/*/") if is_store(folder)]
    return sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)


def find_training_store(
    cache_root: Path,
    name: str | None,
    encoders: str | None = None,
    tiling: Tiling | None = None,
    progress: Progress = SILENT,
) -> FeatureStore:
    """The newest store of a data set's split that has images for training; with `name` None, of any data set, whose
    name is printed.

    `name` is a data set, a split or a folder; `encoders` selects a pair of encoders, `tiling` a tiling (None: whole
    images are preferred). Stores with masks are preferred. Raises `UsageError` with the command to run if there is
    none, and `DsuError` if there is a damaged one.
    """
    found = [store for store in find_stores(cache_root, name, encoders) if store.source.kind in ("train", "all")]
    fit = [store for store in found if tiling in (None, store.source.tiling)]
    for store in sorted(fit, key=lambda store: ("mask" not in store.arrays, store.source.tiling is not None)):
        store.ensure_readable()
        if name is None:
            progress.say(f"cached last: {store.described}")
            newer = found[: found.index(store)]
            if newer:
                names = few([one.described for one in newer])
                progress.say(f"skipped, although newer: {names}; give a data set and --tile to use another one")
        return store
    for folder in store_folders(cache_root) if name is None else ():
        if encoders in (None, folder.name):
            FeatureStore.open(folder)  # A damaged store is the likely reason, and opening it reports that.
    of = f" of {name}" if name else ""
    made_with = (f" made with {encoders}" if encoders else "") + (f" of tiles {tiling}" if tiling else "")
    likewise = " with the same options of network and tiles" if encoders or tiling else ""
    raise UsageError(
        f"There are no training features{of}{made_with} below {cache_root}: run `dsu cache-features "
        f"{name or 'NAME|FOLDER'}` first{likewise}."
    )


def find_stores(cache_root: Path, name: str | None, encoders: str | None) -> list[FeatureStore]:
    """All stores of a data set, a split or a folder (None: any), newest first.

    Raises `DsuError` if a requested one is damaged; damaged others do not matter.
    """
    found = []
    for folder in store_folders(cache_root):
        if encoders not in (None, folder.name):
            continue
        try:
            store = FeatureStore.open(folder)
        except (CacheError, DsuError) as error:
            if isinstance(error, RemoteError) or (name is not None and _may_belong_to(Path(name).name, folder)):
                raise
            continue
        if name is None or store.matches(name):
            found.append(store)
    return found


def named_folders(cache_root: Path, name: str) -> list[Path]:
    """The folders of the stores that a user may mean, including damaged ones.

    As `find_stores` finds them, or by a store's folder or URL, its split's folder or `SPLIT/ENCODERS`.
    """
    given, word = os.path.abspath(folder_of(name).expanduser()), _normalise_name(name.rstrip("/"))

    def is_meant(folder: Path) -> bool:
        words = map(_normalise_name, (folder.parent.name, f"{folder.parent.name}/{folder.name}"))
        if given in map(os.path.abspath, (folder, folder.parent)) or word in words:
            return True
        try:
            return FeatureStore.open(folder).matches(name)
        except RemoteError:
            raise
        except (DsuError, CacheError):
            return _may_belong_to(word, folder)

    return [folder for folder in store_folders(cache_root) if is_meant(folder)]


def _may_belong_to(name: str, folder: Path) -> bool:
    """Whether a damaged store may belong to a data set or a split, judging by its folder's name only."""
    split = re.sub(r"-tiles-\d+-\d+$", "", folder.parent.name)  # then DATASET-TR or -TE
    return bool(name) and _normalise_name(name) in map(
        _normalise_name, (folder.parent.name, split, split.rpartition("-")[0])
    )


def _normalise_name(name: str) -> str:
    """A name without case, hyphens and the like, which don't matter in names of data sets and splits."""
    return name.casefold().replace("_", "-")
