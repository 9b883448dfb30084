"""Finding data sets: the nine benchmarks by name, any folder of one's own, and what a user sees of them first.

Behind it stand `benchmarks` (names and places), `pairing` (files to pairs) and `inspection` (every file read once).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dsu.data.benchmarks import BENCHMARK_SPLITS, COD_TEST, COD_TRAIN, BenchmarkSplit, Place
from dsu.data.folders import find_images, find_subfolder, has_images, list_images, plain, subfolders, unwrapped
from dsu.data.images import IMAGE_SUFFIXES, printable
from dsu.data.inspection import Inspection, SampleMetadata, describe, inspect, unreadable
from dsu.data.pairing import IMAGE_FOLDERS, Kind, Pair, Split, image_and_mask_folders, make_split
from dsu.errors import UsageError, did_you_mean

__all__ = [
    "Inspection",
    "Pair",
    "Paths",
    "SampleMetadata",
    "Split",
    "describe",
    "find_benchmark",
    "find_dataset",
    "find_images",
    "find_samples",
    "inspect",
    "is_benchmark",
    "masks_below",
    "test_splits",
    "unreadable",
]


@dataclass(frozen=True)
class Paths:
    """Where data sets are looked for and stores are kept.

    Attributes:
        data_root: The folder that the benchmarks lie in.
        cache_root: The folder of the stores.
        images: In a folder of one's own, the subfolder with the images; "." is the folder itself; None: to be found.
        masks: Likewise the masks.
    """

    data_root: Path = Path("data")
    cache_root: Path = Path("features")
    images: str | None = None
    masks: str | None = None

    def folder(self, name: str) -> Path | None:
        """The folder that is meant by a path, here or below the data root; None where there is none."""
        return next((place for place in (Path(name), self.data_root / name) if os.path.isdir(place)), None)


def is_benchmark(name: str) -> bool:
    """Whether a name is a benchmark's or a benchmark split's; neither case nor hyphens matter."""
    return bool(_benchmark_splits(name))


def find_dataset(name_or_folder: str | Path, paths: Paths) -> tuple[Split, ...]:
    """Find a data set by a benchmark's name, a benchmark split's name, or its folder.

    Benchmarks are DUTS, DUT-OMRON, HKU-IS, PASCAL-S, ECSSD, CAMO, COD10K, CHAMELEON, NC4K, and COD, which is the
    camouflaged ones as they are used together: COD-TR to train, four test sets. Neither case nor hyphens matter.
    Any other folder needs no renaming: images and masks are found by the usual names of folders or files.

    Args:
        name_or_folder: The name, or a folder (a path, or below the data root).
        paths: Where it may lie, and how it is laid out.

    Returns:
        The splits that are there, training first.

    Raises:
        UsageError: There is no such data set, or it cannot be told which files are images and which masks.
    """
    data_root, images, masks = paths.data_root, paths.images, paths.masks
    if (images is None) != (masks is None):
        raise UsageError("--images and --masks go together: name both subfolders.")
    text = str(name_or_folder)
    if not text:  # which Python would take for the working folder
        raise UsageError("The name of the data set is empty: give a benchmark's name or a folder.")
    wanted = _benchmark_splits(text)
    found = _find_benchmark(wanted, data_root) if images is None else ()
    if found:
        return found
    folder = paths.folder(text)
    if folder is None:
        raise _not_found(text, wanted, data_root)
    folder = Path(os.path.abspath(folder))
    if printable(folder) != str(folder):  # it could not be noted down
        raise UsageError(f"The name of the folder {printable(folder)} is no valid UTF-8: rename it.")
    if images is None or masks is None:
        as_benchmark = _find_benchmark(_benchmark_splits(folder.name), folder.parent)
        return as_benchmark or _find_own(folder)
    return _parts(folder, _named_subfolder(folder, images), _named_subfolder(folder, masks))


def find_benchmark(name: str, data_root: Path) -> tuple[Split, ...]:
    """The splits of a benchmark that lie below the data root, training first; none where there are none.

    Raises `UsageError` where a folder of its name is there and it cannot be told which files are images and which
    masks.
    """
    return _find_benchmark(_benchmark_splits(name), data_root)


def find_samples(source: str | Path, paths: Paths) -> tuple[Split, ...]:
    """What is meant by an image file, a data set's name or a folder; of a folder that is no data set, all its images.

    Where a data set has test splits, these are meant. Raises `UsageError` where there is no such thing.
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
    find_images(path)  # which says so where there are none
    return (make_split(path.name, path.name, "all", path, None),)


def test_splits(splits: Sequence[Split]) -> tuple[Split, ...]:
    """Those of a data set's splits that are not for training; all of them where each is."""
    return tuple(split for split in splits if split.kind != "train") or tuple(splits)


def masks_below(folder: Path) -> set[str]:
    """The masks below a folder that holds images and masks, or such folders: real paths, however it was named."""
    home = Path(os.path.realpath(folder))
    places = {place for image in list_images(home) for place in image.parents if place.is_relative_to(home)}
    masks: set[str] = set()
    for place in sorted(places):
        try:
            splits = find_dataset(place, Paths(home))
        except UsageError:
            continue
        paired = {(pair.image, pair.mask) for split in splits for pair in split.pairs if pair.mask is not None}
        alone = {mask for split in splits for mask in split.masks_without_image}
        # Beside its image, a file of the same name may be a photograph in another format.
        apart = {mask for image, mask in paired if mask.with_suffix("") != image.with_suffix("")}
        masks |= {os.path.realpath(mask) for mask in apart | alone}
    return masks


def _benchmark_splits(name: str) -> list[BenchmarkSplit]:
    """The splits that a name means; none if it is no benchmark's."""
    if plain(name) == "cod":
        return [COD_TRAIN, *(split for split in BENCHMARK_SPLITS if split.name in COD_TEST)]
    return [
        split for split in (*BENCHMARK_SPLITS, COD_TRAIN) if plain(name) in (plain(split.dataset), plain(split.name))
    ]


def _find_benchmark(wanted: Sequence[BenchmarkSplit], root: Path) -> tuple[Split, ...]:
    if not os.path.isdir(root):
        return ()
    datasets = {split.dataset for split in wanted}
    related = [split for split in (*BENCHMARK_SPLITS, COD_TRAIN) if split.dataset in datasets]
    found = _sharing_masks([split for sought in related if (split := _find_split(sought, root))])
    by_name = {split.name: split for split in found}
    return tuple(by_name[split.name] for split in wanted if split.name in by_name)


def _find_split(sought: BenchmarkSplit, root: Path) -> Split | None:
    for place in sought.places:
        folders = _folders_at(place, root)
        if folders:
            images, masks = unwrapped(folders[0]), folders[1] and unwrapped(folders[1])
            split = make_split(
                sought.name, sought.dataset, sought.kind, images, masks, only=place.only, without=sought.without
            )
            return replace(split, benchmark=True, official_count=sought.official_count)
    return _joined_cod_train(root) if sought is COD_TRAIN else None


def _folders_at(place: Place, root: Path) -> tuple[Path, Path | None] | None:
    """The folders of images and masks at a place, if it is there and holds images of the split."""
    home = find_subfolder(root, place.home)
    if home is None:
        return None
    home = unwrapped(home) if place.home else home
    if place.images is None or place.masks is None:
        if not any(image.name.startswith(place.only) for image in list_images(home)):
            return None
        return image_and_mask_folders(home)
    images, masks = find_subfolder(home, place.images), find_subfolder(home, place.masks)
    return (images, masks) if images and masks and has_images(images) else None


def _joined_cod_train(root: Path) -> Split | None:
    """COD-TR from CAMO's and COD10K's own folders."""
    parts = {
        split.name: split for name in ("CAMO", "COD10K") for split in _find_benchmark(_benchmark_splits(name), root)
    }
    if not {"CAMO-TR", "COD10K-TR"} <= parts.keys():
        return None
    camo, cod10k = parts["CAMO-TR"], parts["COD10K-TR"]
    return replace(
        cod10k,
        name=COD_TRAIN.name,
        dataset=COD_TRAIN.dataset,
        images=Path(os.path.commonpath([camo.images, cod10k.images])),
        masks=Path(os.path.commonpath([camo.masks or camo.images, cod10k.masks or cod10k.images])),
        pairs=tuple(sorted((*camo.pairs, *cod10k.pairs), key=lambda pair: pair.name)),
        images_without_mask=(*camo.images_without_mask, *cod10k.images_without_mask),
        masks_without_image=(*camo.masks_without_image, *cod10k.masks_without_image),
        official_count=COD_TRAIN.official_count,
    )


def _not_found(name: str, wanted: Sequence[BenchmarkSplit], data_root: Path) -> UsageError:
    give = "give the folder that it lies in with --data-root FOLDER or DSU_DATA, or name its own folder"
    if wanted:
        places = ", ".join(dict.fromkeys(str(place) for split in wanted for place in split.places))
        return UsageError(f"{name} was not found below {data_root} (looked for {places}): {give}.")
    known = list(dict.fromkeys(split.dataset for split in (*BENCHMARK_SPLITS, COD_TRAIN)))
    near = did_you_mean(name, [*known, *(split.name for split in BENCHMARK_SPLITS)])
    return UsageError(
        f"{name!r} is neither a folder (here or below {data_root}) nor a benchmark known here ({', '.join(known)}): "
        f"{give}{near or '.'}"
    )


# ---- folders of one's own ----

_PARTS: Final[dict[str, tuple[str, Kind]]] = {
    **dict.fromkeys(("train", "training", "tr", "trainset"), ("TR", "train")),
    **dict.fromkeys(("test", "testing", "te", "testset"), ("TE", "test")),
    **dict.fromkeys(("val", "valid", "validation", "valset"), ("VAL", "test")),
}


def _find_own(folder: Path) -> tuple[Split, ...]:
    inner = _part_folders(folder)
    if inner and not any(plain(entry.name) in IMAGE_FOLDERS for entry in subfolders(folder)):
        return tuple(
            make_split(f"{folder.name}-{ending}", folder.name, kind, *image_and_mask_folders(unwrapped(part)))
            for ending, kind, part in inner
        )
    return _parts(folder, *image_and_mask_folders(unwrapped(folder)))


def _parts(folder: Path, images: Path, masks: Path | None) -> tuple[Split, ...]:
    """One split, or one for each of the folders train, test and val that the images are in."""
    inner = _part_folders(images)
    if not inner or masks == images:
        return (make_split(folder.name, folder.name, "all", images, masks),)
    splits = [
        make_split(
            f"{folder.name}-{ending}", folder.name, kind, part, masks and (find_subfolder(masks, part.name) or masks)
        )
        for ending, kind, part in inner
    ]
    return _sharing_masks(splits)


def _part_folders(folder: Path) -> list[tuple[str, Kind, Path]]:
    """The folders train, test and val right below a folder, with the ending that each gives its split."""
    found: dict[str, tuple[str, Kind, Path]] = {}
    for entry in subfolders(folder):
        name = plain(entry.name).removeprefix(plain(folder.name))
        if name in _PARTS and has_images(entry):
            ending, kind = _PARTS[name]
            found.setdefault(ending, (ending, kind, entry))
    if "TE" not in found and "VAL" in found:
        found["TE"] = ("TE", *found.pop("VAL")[1:])
    return [found[ending] for ending in ("TR", "TE", "VAL") if ending in found]


def _named_subfolder(folder: Path, name: str) -> Path:
    inner = folder / name
    if not os.path.isdir(inner):
        seen = ", ".join(entry.name for entry in subfolders(folder)) or "no folders"
        raise UsageError(f"{folder} has no folder {name}: it holds {seen}; name two of them with --images and --masks.")
    return Path(os.path.abspath(inner))


def _sharing_masks(splits: Sequence[Split]) -> tuple[Split, ...]:
    """Take masks that another split uses off the lists of masks without an image."""
    used = {pair.mask for split in splits for pair in split.pairs}
    return tuple(
        replace(split, masks_without_image=tuple(mask for mask in split.masks_without_image if mask not in used))
        for split in splits
    )
