"""The nine benchmarks: splits, official sizes, folder layouts, and finding them.

Layouts are as published by the data sets' authors and as commonly repacked, below one data root. Names ignore case,
hyphens and underscores.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dsu.data.pairing import (
    Kind,
    Split,
    find_subfolder,
    has_images,
    image_and_mask_folders,
    list_images,
    make_split,
    plain,
    unwrapped,
)
from dsu.errors import UsageError


@dataclass(frozen=True)
class Place:
    """A possible location of a split: a folder below the data root, with images and masks.

    Without `images` and `masks`, they are found by the usual names (dsu.data.pairing). `only` is the prefix of the
    split's file names if several splits share one folder.
    """

    home: str
    images: str | None = None
    masks: str | None = None
    only: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.home, self.images) if part)


@dataclass(frozen=True)
class BenchmarkSplit:
    """One split of a benchmark: its official number of pairs, and its possible locations by rank.

    `without` marks file names that ship with it but by convention belong to neither training nor test.
    """

    dataset: str
    name: str
    kind: Kind
    official_count: int
    places: tuple[Place, ...]
    without: str = ""


def _split(
    dataset: str, name: str, kind: Kind, official_count: int, *places: str, without: str = "", only: str = ""
) -> BenchmarkSplit:
    """A split from locations written `home` or `home:images:masks`.

    `only` is for folders that contain the camouflaged sets' training splits together.
    """
    found = (replace(Place(*place.split(":")), only=only if place in _COD_TRAIN_HOMES else "") for place in places)
    return BenchmarkSplit(dataset, name, kind, official_count, tuple(found), without)


# The camouflaged sets are often repacked together: TrainDataset/Imgs, TestDataset/CAMO/Imgs.
_COD_TRAIN_HOMES: Final = ("TrainDataset", "COD/TrainDataset")

COD_TRAIN: Final = _split("COD", "COD-TR", "train", 4_040, *_COD_TRAIN_HOMES, without="NonCAM")
"""The camouflaged sets' common training split: CAMO-TR and COD10K-TR together."""

BENCHMARK_SPLITS: Final = (
    _split("DUTS", "DUTS-TR", "train", 10_553, "DUTS/DUTS-TR", "DUTS-TR", "DUTS/train"),
    _split("DUTS", "DUTS-TE", "test", 5_019, "DUTS/DUTS-TE", "DUTS-TE", "DUTS/test"),
    _split(
        "DUT-OMRON",
        "DUT-OMRON",
        "test",
        5_168,
        ":DUT-OMRON-image:pixelwiseGT-new-PNG",
        "DUT-OMRON",
        "TestDataset/DUT-OMRON",
        "COD/TestDataset/DUT-OMRON",
    ),
    _split("HKU-IS", "HKU-IS", "test", 4_447, "HKU-IS", "TestDataset/HKU-IS", "COD/TestDataset/HKU-IS"),
    # The original archive also contains other data sets.
    _split(
        "PASCAL-S",
        "PASCAL-S",
        "test",
        850,
        "PASCAL-S:datasets/imgs/pascal:datasets/masks/pascal",
        "PASCAL-S:imgs/pascal:masks/pascal",
        ":datasets/imgs/pascal:datasets/masks/pascal",
        "PASCAL-S",
        "TestDataset/PASCAL-S",
        "COD/TestDataset/PASCAL-S",
    ),
    _split("ECSSD", "ECSSD", "test", 1_000, "ECSSD", "TestDataset/ECSSD", "COD/TestDataset/ECSSD"),
    # As published, CAMO has two image folders and one mask folder for both.
    _split(
        "CAMO",
        "CAMO-TR",
        "train",
        1_000,
        "CAMO:Images/Train:GT",
        "CAMO-V.1.0-CVIU2019:Images/Train:GT",
        "CAMO/CAMO-TR",
        "CAMO-TR",
        "CAMO/train",
        *_COD_TRAIN_HOMES,
        only="camourflage",  # sic: the files' spelling
    ),
    _split(
        "CAMO",
        "CAMO-TE",
        "test",
        250,
        "CAMO:Images/Test:GT",
        "CAMO-V.1.0-CVIU2019:Images/Test:GT",
        "CAMO/CAMO-TE",
        "CAMO-TE",
        "CAMO/test",
        "TestDataset/CAMO",
        "COD/TestDataset/CAMO",
        # A folder with the test images only, as in TestDataset itself.
        "CAMO:Imgs:GT",
        "CAMO:Image:GT",
    ),
    _split(
        "COD10K",
        "COD10K-TR",
        "train",
        3_040,
        "COD10K-v3/Train",
        "COD10K/Train",
        "COD10K/COD10K-v3/Train",
        "COD10K/COD10K-TR",
        "COD10K-TR",
        *_COD_TRAIN_HOMES,
        only="COD10K",
        without="NonCAM",
    ),
    _split(
        "COD10K",
        "COD10K-TE",
        "test",
        2_026,
        "COD10K-v3/Test",
        "COD10K/Test",
        "COD10K/COD10K-v3/Test",
        "COD10K/COD10K-TE",
        "COD10K-TE",
        "TestDataset/COD10K",
        "COD/TestDataset/COD10K",
        "COD10K:Imgs:GT",
        "COD10K:Image:GT",
        without="NonCAM",
    ),
    _split("CHAMELEON", "CHAMELEON", "test", 76, "CHAMELEON", "TestDataset/CHAMELEON", "COD/TestDataset/CHAMELEON"),
    _split("NC4K", "NC4K", "test", 4_121, "NC4K", "TestDataset/NC4K", "COD/TestDataset/NC4K"),
    COD_TRAIN,
)

COD_TEST: Final = ("CAMO-TE", "COD10K-TE", "CHAMELEON", "NC4K")
"""The test splits for a network trained on COD-TR."""

PAGES: Final = {
    "DUTS": "http://saliencydetection.net/duts/",
    "DUT-OMRON": "http://saliencydetection.net/dut-omron/",
    "HKU-IS": "https://i.cs.hku.hk/~gbli/deep_saliency.html",
    "PASCAL-S": "http://cbs.ic.gatech.edu/salobj/",
    "ECSSD": "https://www.cse.cuhk.edu.hk/leojia/projects/hsaliency/dataset.html",
    "CAMO": "https://sites.google.com/view/ltnghia/research/camo",
    "COD10K": "https://dengpingfan.github.io/pages/COD.html",
    "CHAMELEON": "https://www.polsl.pl/rau6/chameleon-database-animal-camouflage-analysis/",
    "NC4K": "https://github.com/JingZhang617/COD-Rank-Localize-and-Segment",
    "COD": "https://github.com/DengPingFan/SINet",
}
"""Where each data set's authors publish it; COD's page is that of the repacked TrainDataset and TestDataset."""


# ---- finding them ----


def benchmark_splits(name: str) -> list[BenchmarkSplit]:
    """The splits that a benchmark's or split's name denotes, training first; none for other names.

    Names ignore case and hyphens.
    """
    if plain(name) == "cod":
        return [COD_TRAIN, *(split for split in BENCHMARK_SPLITS if split.name in COD_TEST)]
    return [split for split in BENCHMARK_SPLITS if plain(name) in (plain(split.dataset), plain(split.name))]


def find_benchmark(wanted: Sequence[BenchmarkSplit], root: Path) -> tuple[Split, ...]:
    """The given splits that exist below a data root.

    Raises `UsageError` if a folder of that name exists but images and masks can't be told apart.
    """
    if not os.path.isdir(root):
        return ()
    datasets = {split.dataset for split in wanted}
    related = [_find_split(split, root) for split in BENCHMARK_SPLITS if split.dataset in datasets]
    by_name = {split.name: split for split in sharing_masks([split for split in related if split])}
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
    return _combined_cod_train(root) if sought is COD_TRAIN else None


def _folders_at(place: Place, root: Path) -> tuple[Path, Path | None] | None:
    """The image and mask folders at a location, if it contains images of the split."""
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


def _combined_cod_train(root: Path) -> Split | None:
    """COD-TR from CAMO's and COD10K's own folders."""
    parts = {split.name: split for name in ("CAMO", "COD10K") for split in find_benchmark(benchmark_splits(name), root)}
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


def sharing_masks(splits: Sequence[Split]) -> tuple[Split, ...]:
    """Remove masks that another split uses from the lists of masks without an image."""
    used = {pair.mask for split in splits for pair in split.pairs}
    return tuple(
        replace(split, masks_without_image=tuple(mask for mask in split.masks_without_image if mask not in used))
        for split in splits
    )


# ---- which of them exist ----


@dataclass(frozen=True)
class SplitState:
    """A benchmark's split as found below a data root.

    Attributes:
        sought: the split, with its official number of pairs.
        found: the split; None if it does not exist.
        problem: why a folder of that name can't be read as the split.
    """

    sought: BenchmarkSplit
    found: Split | None = None
    problem: str | None = None

    @property
    def pairs(self) -> int:
        """Number of image-mask pairs found."""
        return len(self.found.pairs) if self.found else 0

    @property
    def complete(self) -> bool:
        """Whether the number of pairs is the official one."""
        return self.pairs == self.sought.official_count

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = self.found
        return {
            "split": self.sought.name,
            "dataset": self.sought.dataset,
            "kind": self.sought.kind,
            "pairs": self.pairs,
            "official": self.sought.official_count,
            "complete": self.complete,
            "images": str(found.images) if found else None,
            "masks": str(found.masks) if found and found.masks else None,
            "images_without_mask": len(found.images_without_mask) if found else 0,
            "masks_without_image": len(found.masks_without_image) if found else 0,
            "problem": self.problem,
            "page": PAGES[self.sought.dataset],
        }


def survey(data_root: Path) -> list[SplitState]:
    """The state of all benchmark splits below `data_root`, including missing ones; opens no image."""
    states = []
    for dataset in PAGES:
        wanted = [split for split in BENCHMARK_SPLITS if split.dataset == dataset]
        problem, found = None, {}
        try:
            found = {split.name: split for split in find_benchmark(benchmark_splits(dataset), data_root)}
        except UsageError as error:
            problem = str(error)
        states += [SplitState(split, found.get(split.name), problem) for split in wanted]
    return states
