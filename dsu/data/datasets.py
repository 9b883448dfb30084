"""Find data sets: the nine benchmarks by name, or any folder; and record how to find them again.

Uses `benchmarks` (names and locations), `pairing` (files to pairs) and `inspection` (reads every file once).
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dsu.data.benchmarks import BENCHMARK_SPLITS, BenchmarkSplit, benchmark_splits, find_benchmark, sharing_masks
from dsu.data.images import IMAGE_SUFFIXES, Depth, printable
from dsu.data.masks import MaskFormat
from dsu.data.pairing import (
    IMAGE_FOLDERS,
    Kind,
    Pair,
    Split,
    find_images,
    find_subfolder,
    has_images,
    image_and_mask_folders,
    list_images,
    make_split,
    plain,
    subfolders,
    unwrapped,
)
from dsu.data.tiles import Tiling, tiled
from dsu.errors import DsuError, UsageError, did_you_mean


@dataclass(frozen=True)
class Paths:
    """Where to look for data sets and stores.

    Attributes:
        data_root: The benchmark folder.
        cache_root: The store folder.
        images: The image subfolder of a user's folder; "." is the folder itself; None finds it.
        masks: Likewise for the masks.
    """

    data_root: Path = Path("data")
    cache_root: Path = Path("features")
    images: str | None = None
    masks: str | None = None

    def folder(self, name: str) -> Path | None:
        """The folder at a path, here or below the data root; None if there is none."""
        return next((place for place in (Path(name), self.data_root / name) if os.path.isdir(place)), None)


def is_benchmark(name: str) -> bool:
    """Whether a name is a benchmark's or a benchmark split's, ignoring case and hyphens."""
    return bool(benchmark_splits(name))


def find_dataset(name_or_folder: str | Path, paths: Paths) -> tuple[Split, ...]:
    """Find a data set by a benchmark's name, a benchmark split's name, or its folder.

    Benchmarks are DUTS, DUT-OMRON, HKU-IS, PASCAL-S, ECSSD, CAMO, COD10K, CHAMELEON, NC4K, and COD, the camouflaged
    sets together: COD-TR for training, four test sets. Names ignore case and hyphens. Any other folder works without
    renaming: images and masks are found by the usual folder and file names.

    Args:
        name_or_folder: The name, or a folder (a path, or below the data root).
        paths: Where to look, and its layout.

    Returns:
        The splits found, training first.

    Raises:
        UsageError: There is no such data set, or images and masks can't be told apart.
    """
    data_root, images, masks = paths.data_root, paths.images, paths.masks
    if (images is None) != (masks is None):
        raise UsageError("--images and --masks belong together: name both subfolders.")
    text = str(name_or_folder)
    if not text:  # which Python treats as the working folder
        raise UsageError("The name of the data set is empty: give a benchmark's name or a folder.")
    wanted = benchmark_splits(text)
    found = find_benchmark(wanted, data_root) if images is None else ()
    if found:
        return found
    folder = paths.folder(text)
    if folder is None:
        raise _not_found(text, wanted, data_root)
    folder = Path(os.path.abspath(folder))
    if printable(folder) != str(folder):  # it could not be recorded
        raise UsageError(f"The folder name {printable(folder)} is not valid UTF-8: rename it.")
    if images is None or masks is None:
        return find_benchmark(benchmark_splits(folder.name), folder.parent) or _find_user_splits(folder)
    return _splits_from_folders(folder, _named_subfolder(folder, images), _named_subfolder(folder, masks))


def find_samples(source: str | Path, paths: Paths) -> tuple[Split, ...]:
    """The splits for an image file, a data set's name or a folder; for any other folder, all its images.

    If a data set has test splits, returns these. Raises `UsageError` if nothing is found.
    """
    path = Path(source)
    if path.is_file() or (path.suffix.lower() in IMAGE_SUFFIXES and not path.exists()):
        [file] = find_images(path)
        return (Split(path.stem, path.stem, "all", False, path.parent, None, (Pair(path.stem, file, None),)),)
    try:
        return test_splits(find_dataset(source, paths))
    except UsageError:
        if not path.is_dir():
            raise
    find_images(path)  # which raises if there are none
    return (make_split(path.name, path.name, "all", path, None),)


def test_splits(splits: Sequence[Split]) -> tuple[Split, ...]:
    """A data set's splits that are not for training; all of them if each is."""
    return tuple(split for split in splits if split.kind != "train") or tuple(splits)


def masks_below(folder: Path) -> set[str]:
    """Real paths of the masks below a folder with images and masks, or with such folders."""
    home = Path(os.path.realpath(folder))
    images = list_images(home)
    places = {place for image in images for place in image.parents if place.is_relative_to(home)}
    # PASCAL VOC's second masks, of the same images.
    masks = {os.path.realpath(one) for one in images if "segmentationobject" in map(plain, one.relative_to(home).parts)}
    for place in sorted(places):
        try:
            splits = find_dataset(place, Paths(home))
        except UsageError:
            continue
        pairs = [(pair.image, pair.mask) for split in splits for pair in split.pairs if pair.mask is not None]
        # Next to its image, a file of the same name may be a photograph in another format.
        masks |= {os.path.realpath(mask) for image, mask in pairs if mask.with_suffix("") != image.with_suffix("")}
        masks |= {os.path.realpath(mask) for split in splits for mask in split.masks_without_image}
    return masks


def check_places(sources: Sequence[str], out: Path | None, *, overwrite: bool) -> bool:
    """Check sources and output of a prediction before any work; returns whether `out` is a single file.

    Raises `UsageError` for the home folder or a parent of it, since nobody means all of a person's images, and if a
    single prediction can't be written to `out`.
    """
    home = Path(os.path.realpath(Path.home()))
    for source in filter(None, sources):
        folder = Path(os.path.realpath(source))
        if folder.is_dir() and home.is_relative_to(folder):
            raise UsageError(
                f"{source} is {'your home folder' if folder == home else 'a parent of your home folder'}: name a "
                f"folder of images in it, or image files."
            )
    if out is None or out.suffix.lower() not in IMAGE_SUFFIXES or out.is_dir():
        return False
    if len(sources) != 1 or Path(sources[0]).is_dir() or is_benchmark(sources[0]):
        raise UsageError(f"--out {out} must be a folder: only a single image file can be predicted into one file.")
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out} can't be a {out.suffix}, which is lossy or not supported: give a .png.")
    if os.path.realpath(out) == os.path.realpath(sources[0]):
        raise UsageError(f"The prediction {out} would overwrite an input: give another --out.")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} already exists: give another --out, or --overwrite.")
    return True


def _not_found(name: str, wanted: Sequence[BenchmarkSplit], data_root: Path) -> UsageError:
    give = "give its parent folder with --data-root FOLDER or DSU_DATA, or name its own folder"
    if wanted:
        places = ", ".join(dict.fromkeys(str(place) for split in wanted for place in split.places))
        return UsageError(f"{name} was not found below {data_root} (looked for {places}): {give}.")
    if os.path.isfile(name):
        return UsageError(f"{name} is a file: give a folder (unpack archives first).")
    known = list(dict.fromkeys(split.dataset for split in BENCHMARK_SPLITS))
    near = did_you_mean(name, [*known, *(split.name for split in BENCHMARK_SPLITS)])
    return UsageError(
        f"{name!r} is neither a folder (here or below {data_root}) nor a known benchmark ({', '.join(known)}): "
        f"{give}{near or '.'}"
    )


# ---- user folders ----

_PART_FOLDERS: Final[dict[str, tuple[str, Kind]]] = {
    **dict.fromkeys(("train", "training", "tr", "trainset"), ("TR", "train")),
    **dict.fromkeys(("test", "testing", "te", "testset"), ("TE", "test")),
    **dict.fromkeys(("val", "valid", "validation", "valset"), ("VAL", "test")),
}


def _find_user_splits(folder: Path) -> tuple[Split, ...]:
    inner = _part_folders(folder)
    if inner and not any(plain(entry.name) in IMAGE_FOLDERS for entry in subfolders(folder)):
        return tuple(
            make_split(f"{folder.name}-{ending}", folder.name, kind, *image_and_mask_folders(unwrapped(part)))
            for ending, kind, part in inner
        )
    return _splits_from_folders(folder, *image_and_mask_folders(unwrapped(folder)))


def _splits_from_folders(folder: Path, images: Path, masks: Path | None) -> tuple[Split, ...]:
    """One split, or one for each of the folders train, test and val that contain the images."""
    inner = _part_folders(images)
    if not inner or masks == images:
        return (make_split(folder.name, folder.name, "all", images, masks),)
    return sharing_masks(
        [
            make_split(
                f"{folder.name}-{ending}",
                folder.name,
                kind,
                part,
                masks and (find_subfolder(masks, part.name) or masks),
            )
            for ending, kind, part in inner
        ]
    )


def _part_folders(folder: Path) -> list[tuple[str, Kind, Path]]:
    """The folders train, test and val directly below a folder, with the suffix of each one's split."""
    found: dict[str, tuple[str, Kind, Path]] = {}
    for entry in subfolders(folder):
        name = plain(entry.name).removeprefix(plain(folder.name))
        if name in _PART_FOLDERS and has_images(entry):
            ending, kind = _PART_FOLDERS[name]
            found.setdefault(ending, (ending, kind, entry))
    if "TE" not in found and "VAL" in found:
        found["TE"] = ("TE", *found.pop("VAL")[1:])
    return [found[ending] for ending in ("TR", "TE", "VAL") if ending in found]


def _named_subfolder(folder: Path, name: str) -> Path:
    inner = folder / name
    if not os.path.isdir(inner):
        seen = ", ".join(entry.name for entry in subfolders(folder)) or "no folders"
        raise UsageError(
            f"{folder} has no subfolder {name}: it contains {seen}; name two of them with --images and --masks."
        )
    return Path(os.path.abspath(inner))


# ---- finding them again ----


@dataclass(frozen=True)
class SourceFolder:
    """How to find a split's images again: kept in its store and in heads trained on it.

    `tile` and `overlap` describe tiling; None: no tiles. `mask_format` is how the masks of the whole split were read
    (`MaskFormat.to_json`), since a part of it may not show this; None: unknown. `depth` is the black and white point of
    its images with more than 8 bits.
    """

    split: str
    dataset: str
    kind: str
    benchmark: bool
    reference: str
    data_root: str
    images: str | None = None
    masks: str | None = None
    tile: int | None = None
    overlap: int | None = None
    mask_format: Mapping[str, Any] | None = None
    depth: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not (
            all(isinstance(text, str) for text in (self.split, self.dataset, self.kind, self.reference, self.data_root))
            and isinstance(self.benchmark, bool)
            and all(isinstance(name, str | None) for name in (self.images, self.masks))
            and all(number is None or type(number) is int for number in (self.tile, self.overlap))
            and (self.depth is None or [type(value) for value in self.depth] == [float, float])
        ):
            raise TypeError("a source folder's fields are texts, numbers, and whether it is a benchmark")
        try:
            _ = self.parsed_mask_format
        except (KeyError, TypeError, AttributeError) as error:
            raise TypeError("a source folder's mask_format is one of masks") from error

    @classmethod
    def of(cls, split: Split, reference: str, paths: Paths, tiling: Tiling | None = None) -> "SourceFolder":
        """The record of a split found by `reference`, a benchmark's name or a folder (here or below the data root)."""
        return cls(
            split=split.name,
            dataset=split.dataset,
            kind=split.kind,
            benchmark=split.benchmark,
            # realpath, since Path.resolve fails on circular links.
            reference=reference
            if split.benchmark and is_benchmark(reference)
            else os.path.realpath(paths.folder(reference) or reference),
            data_root=os.path.realpath(paths.data_root.expanduser()),
            images=paths.images,
            masks=paths.masks,
            tile=tiling.size if tiling else None,
            overlap=tiling.overlap if tiling else None,
        )

    @property
    def tiling(self) -> Tiling | None:
        """The tiling of its images."""
        return Tiling.of(self.tile, self.overlap)

    @property
    def untiled(self) -> "SourceFolder":
        """The same images without tiling."""
        return replace(self, tile=None, overlap=None)

    @property
    def parsed_mask_format(self) -> MaskFormat | None:
        """How the masks of the split were read, if known."""
        return None if self.mask_format is None else MaskFormat.from_json(self.mask_format)

    @property
    def parsed_depth(self) -> Depth | None:
        """`depth` as the image readers take it."""
        return None if self.depth is None else (self.depth[0], self.depth[1])

    @property
    def foreground(self) -> tuple[int, ...] | None:
        """Raw mask values that the user declared foreground."""
        known = self.parsed_mask_format
        return None if known is None else known.foreground

    @property
    def arguments(self) -> str:
        """The arguments of `dsu cache-features` for the same images, masks and tiles."""
        options = [("images", self.images), ("masks", self.masks), ("tile", self.tile), ("overlap", self.overlap)]
        options += [("foreground", value) for value in self.foreground or ()]
        words = [word for name, value in options if value is not None for word in (f"--{name}", str(value))]
        return shlex.join([self.reference, *words])

    @property
    def place(self) -> str:
        """Where its images were: the data root or the folder itself."""
        return self.reference if Path(self.reference).is_absolute() else self.data_root

    def splits(self) -> tuple[Split, ...]:
        """All splits of its data set as they are now, without tiling. Raises `UsageError` if they are gone."""
        return find_dataset(self.reference, Paths(Path(self.data_root), images=self.images, masks=self.masks))

    def find(self) -> Split | None:
        """The split as it is now, or None if its images are gone."""
        try:
            found = self.splits()
        except DsuError:
            return None
        return next((tiled(split, self.tiling) for split in found if split.name == self.split), None)
