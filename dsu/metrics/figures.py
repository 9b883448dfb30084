"""Names of an evaluation's scores, in output order."""

from typing import Final

METRICS: Final = (
    "S",
    "F_adaptive",
    "F_mean",
    "F_max",
    "F_weighted",
    "E_adaptive",
    "E_mean",
    "E_max",
    "MAE",
    "IoU",
    "Dice",
)

# Metrics with a value for each image; the mean and max of F and E exist only for a set's averaged curve.
PER_IMAGE: Final = ("S", "F_adaptive", "F_weighted", "E_adaptive", "MAE", "IoU", "Dice")

IMAGE_LEVEL: Final = ("false_alarms", "misses", "AUROC")
"""Metrics of whole images: see `dsu.metrics.image_level`."""

_OVER_OBJECTS: Final = "_object"


def over_objects(metric: str) -> str:
    """The name of a metric over the images with an object only."""
    return f"{metric}{_OVER_OBJECTS}"


OBJECT: Final = tuple(map(over_objects, METRICS))
"""The metrics over the images with an object only."""

SPOILT: Final = tuple(name for name in OBJECT if name.startswith(("F_", "E_adaptive", "IoU", "Dice")))
"""Those of `OBJECT` whose counterparts over all images mean little with empty ground truths."""

FIGURES: Final = (*METRICS, *OBJECT, *IMAGE_LEVEL)
"""All metrics."""

LOWER_IS_BETTER: Final = ("MAE", over_objects("MAE"), "false_alarms", "misses")

RANDOM: Final = "random weights: these scores only show that the pipeline works"
"""The convention "encoders" of predictions by random encoders."""

MINMAX: Final = "min-max normalised, image by image"
"""The convention "map" of an evaluation that min-max normalised each map first."""


def metric_of(figure: str) -> tuple[str, bool]:
    """A figure's metric, and whether it is over the images with an object only."""
    return figure.removesuffix(_OVER_OBJECTS), figure.endswith(_OVER_OBJECTS)


def figure_name(figure: str) -> str:
    """A figure's name for people, such as `IoU`, `IoU with an object` or `false alarms`."""
    metric, restricted = metric_of(figure)
    name = metric if metric in METRICS else metric.replace("_", " ")
    return f"{name} with an object" if restricted else name


def arrow(figure: str) -> str:
    """An arrow towards better values."""
    return "↓" if figure in LOWER_IS_BETTER else "↑"
