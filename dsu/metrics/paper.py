"""The paper's published scores as data: Tables I to VIII, rounded to three decimals as printed.

Salient sets print S, mean E and MAE; camouflaged sets print S, adaptive F, mean E and MAE. Metrics are named as in
`dsu.evaluation.evaluate`. In two rows of Table III the last digits were blurred in the scan; they are marked here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dsu.data.benchmarks import BENCHMARK_SPLITS, COD_TRAIN
from dsu.progress import counted


@dataclass(frozen=True)
class PublishedRow:
    """One method's printed scores on one set; `approximate` if a last digit is hard to read."""

    method: str
    figures: Mapping[str, float]
    approximate: bool = False


@dataclass(frozen=True)
class Table:
    """One printed table: for every method and set, one score per metric."""

    number: str
    metrics: tuple[str, ...]
    sets: tuple[str, ...]
    rows: Mapping[str, tuple[tuple[float, ...], ...]]
    approximate: frozenset[str] = frozenset()
    ablation: bool = False


_SALIENT: Final = ("S", "E_mean", "MAE")
_CAMOUFLAGED: Final = ("S", "F_adaptive", "E_mean", "MAE")

TABLES: Final[tuple[Table, ...]] = (
    Table(
        "III",
        _SALIENT,
        ("DUTS-TE", "DUT-OMRON", "HKU-IS"),
        {
            "U2Net": ((0.874, 0.884, 0.044), (0.847, 0.872, 0.054), (0.916, 0.948, 0.031)),
            "ICON": ((0.889, 0.914, 0.037), (0.845, 0.879, 0.057), (0.920, 0.959, 0.029)),
            "EDN": ((0.892, 0.925, 0.035), (0.850, 0.877, 0.049), (0.924, 0.955, 0.026)),
            "MENet": ((0.905, 0.937, 0.028), (0.850, 0.891, 0.045), (0.927, 0.966, 0.023)),
            "SAM2-UNet": ((0.934, 0.959, 0.020), (0.884, 0.912, 0.039), (0.941, 0.971, 0.019)),
            "DSU-Net": ((0.934, 0.959, 0.020), (0.893, 0.919, 0.034), (0.945, 0.969, 0.019)),
        },
        approximate=frozenset({"ICON", "EDN"}),
    ),
    Table(
        "IV",
        _SALIENT,
        ("PASCAL-S", "ECSSD"),
        {
            "U2Net": ((0.844, 0.850, 0.074), (0.928, 0.925, 0.033)),
            "ICON": ((0.861, 0.893, 0.064), (0.929, 0.954, 0.032)),
            "EDN": ((0.865, 0.902, 0.062), (0.927, 0.951, 0.032)),
            "MENet": ((0.872, 0.913, 0.054), (0.928, 0.954, 0.031)),
            "SAM2-UNet": ((0.894, 0.931, 0.043), (0.950, 0.970, 0.020)),
            "DSU-Net": ((0.898, 0.935, 0.042), (0.953, 0.972, 0.018)),
        },
    ),
    Table(
        "V",
        _CAMOUFLAGED,
        ("CHAMELEON", "CAMO-TE"),
        {
            "SINet": ((0.872, 0.832, 0.936, 0.034), (0.745, 0.712, 0.804, 0.092)),
            "PFNet": ((0.882, 0.820, 0.931, 0.033), (0.782, 0.751, 0.841, 0.085)),
            "ZoomNet": ((0.902, 0.858, 0.943, 0.024), (0.820, 0.792, 0.877, 0.066)),
            "FEDER": ((0.903, 0.856, 0.947, 0.026), (0.836, 0.807, 0.897, 0.066)),
            "SAM2-UNet": ((0.914, 0.863, 0.961, 0.022), (0.884, 0.861, 0.932, 0.042)),
            "DSU-Net": ((0.923, 0.869, 0.963, 0.020), (0.889, 0.859, 0.931, 0.041)),
        },
    ),
    Table(
        "VI",
        _CAMOUFLAGED,
        ("COD10K-TE", "NC4K"),
        {
            "SINet": ((0.776, 0.667, 0.864, 0.043), (0.808, 0.768, 0.871, 0.058)),
            "PFNet": ((0.800, 0.676, 0.877, 0.040), (0.829, 0.779, 0.887, 0.053)),
            "ZoomNet": ((0.838, 0.740, 0.888, 0.029), (0.853, 0.814, 0.896, 0.043)),
            "FEDER": ((0.844, 0.784, 0.911, 0.029), (0.862, 0.824, 0.913, 0.042)),
            "SAM2-UNet": ((0.880, 0.789, 0.936, 0.021), (0.901, 0.863, 0.941, 0.029)),
            "DSU-Net": ((0.891, 0.819, 0.947, 0.019), (0.909, 0.868, 0.948, 0.026)),
        },
    ),
    Table(
        "VII",
        _SALIENT,
        ("DUTS-TE", "DUT-OMRON"),
        {
            "A: without DINOv2": ((0.931, 0.955, 0.023), (0.880, 0.909, 0.041)),
            "B: four DINOv2 blocks into four levels": ((0.926, 0.950, 0.025), (0.879, 0.907, 0.044)),
            "C: last DINOv2 block into four levels": ((0.928, 0.952, 0.024), (0.880, 0.907, 0.042)),
            "DSU-Net": ((0.934, 0.959, 0.020), (0.893, 0.919, 0.034)),
        },
        ablation=True,
    ),
    Table(
        "VIII",
        _CAMOUFLAGED,
        ("CAMO-TE", "COD10K-TE"),
        {
            "A: without DINOv2": ((0.881, 0.852, 0.924, 0.045), (0.879, 0.800, 0.938, 0.020)),
            "B: four DINOv2 blocks into four levels": (
                (0.875, 0.848, 0.919, 0.048),
                (0.868, 0.792, 0.933, 0.022),
            ),
            "C: last DINOv2 block into four levels": (
                (0.880, 0.851, 0.922, 0.043),
                (0.881, 0.801, 0.939, 0.020),
            ),
            "DSU-Net": ((0.889, 0.859, 0.931, 0.041), (0.891, 0.819, 0.947, 0.019)),
        },
        ablation=True,
    ),
)
"""Tables III to VIII, in the paper's order."""

IMAGES: Final[Mapping[str, int]] = {
    split.name: split.official_count for split in BENCHMARK_SPLITS if split is not COD_TRAIN
}
"""Number of images of each official set (Tables I and II): comparable scores use all of them."""

# The paper prints these two without saying "test".
_AS_PRINTED: Final = {"CAMO": "CAMO-TE", "COD10K": "COD10K-TE"}


def published(set_name: str) -> tuple[PublishedRow, ...]:
    """Return the paper's scores for a test set (Tables III to VI), DSU-Net last.

    `set_name` is one of `IMAGES`, or CAMO or COD10K as the paper prints them; any other name, such as your own data,
    has no rows.
    """
    return _rows(set_name, ablation=False)


def ablations(set_name: str) -> tuple[PublishedRow, ...]:
    """Return ablations A, B, C and the whole network on a set (Tables VII and VIII); others have no rows."""
    return _rows(set_name, ablation=True)


def incomparable(set_name: str, images: int, *, minmax: bool) -> str:
    """Why a set's scores are not comparable with published ones, in a few words; empty if they are.

    Args:
        set_name: As for `published`; for your own data the result is empty.
        images: Number of images that the scores are over.
        minmax: Whether each map was min-max normalised.
    """
    official = IMAGES.get(set_name) or IMAGES.get(f"{set_name}-TE")
    if official is None:
        return ""
    if images != official:
        return evaluated_in_part(images, official)
    return "" if minmax else "whose maps were min-max normalised"


def evaluated_in_part(images: int, whole: int) -> str:
    """On how many images of a set the scores are based, in a few words."""
    return f"evaluated on {images:,} of the set's {counted(whole, 'images')}"


def _rows(set_name: str, *, ablation: bool) -> tuple[PublishedRow, ...]:
    name = _AS_PRINTED.get(set_name, set_name)
    return tuple(
        PublishedRow(
            method,
            dict(zip(table.metrics, by_set[table.sets.index(name)], strict=True)),
            approximate=method in table.approximate,
        )
        for table in TABLES
        if table.ablation is ablation and name in table.sets
        for method, by_set in table.rows.items()
    )
