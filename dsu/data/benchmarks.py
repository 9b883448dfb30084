"""The nine benchmarks as data: their splits, official sizes, and where they lie once unpacked.

Places are as published by the data sets' authors and as commonly repacked, below one data root. Neither case nor
hyphens nor underscores matter in any of these names.
"""

from dataclasses import dataclass
from typing import Final

from dsu.data.pairing import Kind

__all__ = ["BENCHMARK_SPLITS", "COD_TEST", "COD_TRAIN", "PAGES", "BenchmarkSplit", "Place"]


@dataclass(frozen=True)
class Place:
    """Where a split may lie: a folder below the data root, and in it the images and the masks.

    Without `images` and `masks` those are found by the usual names (dsu.data.pairing). `only` is what the names of the
    split's files begin with, where several splits share one folder.
    """

    home: str
    images: str | None = None
    masks: str | None = None
    only: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.home, self.images) if part)


@dataclass(frozen=True)
class BenchmarkSplit:
    """One split of a data set of the literature: its official number of pairs, and its places by rank.

    `without` marks the names of images that are shipped with it but by convention belong to neither training nor
    test.
    """

    dataset: str
    name: str
    kind: Kind
    official_count: int
    places: tuple[Place, ...]
    without: str = ""


def _homes(*homes: str, only: str = "") -> tuple[Place, ...]:
    return tuple(Place(home, only=only) for home in homes)


# The camouflaged sets are often repacked together: TrainDataset/Imgs, TestDataset/CAMO/Imgs.
_COD_TRAIN_HOMES: Final = ("TrainDataset", "COD/TrainDataset")


def _test_homes(name: str) -> tuple[Place, ...]:
    return _homes(f"TestDataset/{name}", f"COD/TestDataset/{name}")


def _test_alone(name: str) -> tuple[Place, ...]:
    """A data set of two splits of which a folder holds the test images only, as in TestDataset itself."""
    return tuple(Place(name, images, "GT") for images in ("Imgs", "Image"))


def _test_only(name: str, official_count: int, *places: Place) -> BenchmarkSplit:
    return BenchmarkSplit(name, name, "test", official_count, (*places, Place(name), *_test_homes(name)))


def _camo(part: str) -> tuple[Place, ...]:
    """CAMO as published: two folders of images, one of masks for both."""
    return tuple(Place(home, f"Images/{part}", "GT") for home in ("CAMO", "CAMO-V.1.0-CVIU2019"))


def _cod10k(part: str) -> tuple[Place, ...]:
    """COD10K as published."""
    return _homes(f"COD10K-v3/{part}", f"COD10K/{part}", f"COD10K/COD10K-v3/{part}")


BENCHMARK_SPLITS: Final = (
    BenchmarkSplit("DUTS", "DUTS-TR", "train", 10_553, _homes("DUTS/DUTS-TR", "DUTS-TR", "DUTS/train")),
    BenchmarkSplit("DUTS", "DUTS-TE", "test", 5_019, _homes("DUTS/DUTS-TE", "DUTS-TE", "DUTS/test")),
    _test_only("DUT-OMRON", 5_168, Place("", "DUT-OMRON-image", "pixelwiseGT-new-PNG")),
    _test_only("HKU-IS", 4_447),
    # The original archive holds other data sets beside PASCAL's.
    _test_only(
        "PASCAL-S",
        850,
        Place("PASCAL-S", "datasets/imgs/pascal", "datasets/masks/pascal"),
        Place("PASCAL-S", "imgs/pascal", "masks/pascal"),
        Place("", "datasets/imgs/pascal", "datasets/masks/pascal"),
    ),
    _test_only("ECSSD", 1_000),
    BenchmarkSplit(
        "CAMO",
        "CAMO-TR",
        "train",
        1_000,
        (
            *_camo("Train"),
            *_homes("CAMO/CAMO-TR", "CAMO-TR", "CAMO/train"),
            # Sic: so the files are spelt.
            *_homes(*_COD_TRAIN_HOMES, only="camourflage"),
        ),
    ),
    BenchmarkSplit(
        "CAMO",
        "CAMO-TE",
        "test",
        250,
        (*_camo("Test"), *_homes("CAMO/CAMO-TE", "CAMO-TE", "CAMO/test"), *_test_homes("CAMO"), *_test_alone("CAMO")),
    ),
    BenchmarkSplit(
        "COD10K",
        "COD10K-TR",
        "train",
        3_040,
        (*_cod10k("Train"), *_homes("COD10K/COD10K-TR", "COD10K-TR"), *_homes(*_COD_TRAIN_HOMES, only="COD10K")),
        without="NonCAM",
    ),
    BenchmarkSplit(
        "COD10K",
        "COD10K-TE",
        "test",
        2_026,
        (*_cod10k("Test"), *_homes("COD10K/COD10K-TE", "COD10K-TE"), *_test_homes("COD10K"), *_test_alone("COD10K")),
        without="NonCAM",
    ),
    _test_only("CHAMELEON", 76),
    _test_only("NC4K", 4_121),
)

COD_TRAIN: Final = BenchmarkSplit("COD", "COD-TR", "train", 4_040, _homes(*_COD_TRAIN_HOMES), without="NonCAM")
"""The camouflaged sets' common training split: CAMO-TR and COD10K-TR together."""

COD_TEST: Final = ("CAMO-TE", "COD10K-TE", "CHAMELEON", "NC4K")
"""The splits that a network trained on COD-TR is tested on."""

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
