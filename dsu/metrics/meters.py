"""The accumulators of pysodmetrics, updated together.

See `dsu.evaluation.evaluate` for the metrics, and `dsu.metrics.image_level` for those of whole images.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import py_sod_metrics as sod
from numpy.typing import NDArray

from dsu.metrics.figures import METRICS, PER_IMAGE
from dsu.metrics.image_level import ImageLevel


class StructureMeasure(sod.Smeasure):  # type: ignore[misc]  # the library has no types
    """S without the library's NaN for a foreground within the last row or column, which leaves quadrants empty.

    Such a quadrant has weight 0, but its score in the library, a mean over no pixels, is NaN.
    """

    def ssim(self, pred: NDArray[np.float64], gt: NDArray[np.bool_]) -> float:
        """The library's score if the quadrant has any pixel, else 0."""
        return float(super().ssim(pred, gt)) if pred.size else 0.0


class AlignmentMeasure(sod.Emeasure):  # type: ignore[misc]  # the library has no types
    """E, at most 1: the library divides by the number of pixels minus one, and for one pixel by almost nothing."""

    def step(self, *pair: NDArray[Any], normalize: bool = True) -> None:
        """Measure one pair, map and ground truth, both (H, W)."""
        super().step(*pair, normalize=normalize)
        self.adaptive_ems[-1] = min(self.adaptive_ems[-1], 1.0)
        self.changeable_ems[-1] = np.minimum(self.changeable_ems[-1], 1.0)


_CURVES: Final = ("F", "precision", "recall", "E")


class Meters:
    """The library's accumulators, updated together; can be pickled."""

    def __init__(self) -> None:
        self.s = StructureMeasure(alpha=0.5)
        self.weighted = sod.WeightedFmeasure(beta=1)
        self.e = AlignmentMeasure()
        self.mae = sod.MAE()
        self.handlers = {
            "F": sod.FmeasureHandler(with_dynamic=True, with_adaptive=True, beta=0.3),
            "precision": sod.PrecisionHandler(with_dynamic=True, with_adaptive=False),
            "recall": sod.RecallHandler(with_dynamic=True, with_adaptive=False),
            "IoU": sod.IOUHandler(with_dynamic=False, with_adaptive=False, with_binary=True),
            "Dice": sod.DICEHandler(with_dynamic=False, with_adaptive=False, with_binary=True),
        }
        self.f = sod.FmeasureV2(self.handlers)
        self.responses: list[float] = []
        self.empty: list[bool] = []
        self.levels = np.zeros((2, 256), np.int64)

    def step(self, prediction: NDArray[np.uint8], truth: NDArray[np.uint8], *, normalize: bool) -> None:
        """Measure one pair, both (H, W)."""
        pair = (prediction, truth) if normalize else (prediction / 255, truth > 128)
        for meter in (self.s, self.weighted, self.e, self.mae, self.f):
            meter.step(*pair, normalize=normalize)
        # Responses are never normalised: see `ImageLevel`.
        self.responses.append(float(prediction.max()) / 255)
        on_object = truth > 128
        self.empty.append(not on_object.any())
        counts = np.bincount((prediction + 256 * on_object.astype(np.intp)).ravel(), minlength=512)
        self.levels += counts.reshape(2, 256)

    def averages(self) -> dict[str, float]:
        """The metrics as the library itself averages them."""
        f, e = self.f.get_results(), self.e.get_results()["em"]
        scalars = {
            "S": self.s.get_results()["sm"],
            "F_adaptive": f["F"]["adaptive"],
            "F_weighted": self.weighted.get_results()["wfm"],
            "E_adaptive": e["adp"],
            "MAE": self.mae.get_results()["mae"],
            "IoU": f["IoU"]["binary"],
            "Dice": f["Dice"]["binary"],
        }
        return _metrics(scalars, f["F"]["dynamic"], e["curve"])

    def lists(self) -> dict[str, list[Any]]:
        """The library's lists, one entry per image: numbers, and curves (256,)."""
        return {
            "S": self.s.sms,
            "F_adaptive": self.handlers["F"].adaptive_results,
            "F_weighted": self.weighted.weighted_fms,
            "E_adaptive": self.e.adaptive_ems,
            "MAE": self.mae.maes,
            "IoU": self.handlers["IoU"].binary_results,
            "Dice": self.handlers["Dice"].binary_results,
            "F": self.handlers["F"].dynamic_results,
            "precision": self.handlers["precision"].dynamic_results,
            "recall": self.handlers["recall"].dynamic_results,
            "E": self.e.changeable_ems,
        }


class Totals:
    """Sums over meters in the order of the images: keeps each image's numbers, but not its curves (12 KB).

    Curves are added one by one, as in the library's average of all of them: the results have the same digits.

    Attributes:
        levels: Number of pixels outside and inside objects by 8-bit value, int64 (2, 256).
    """

    def __init__(self) -> None:
        self._scalars: dict[str, list[float]] = {}
        self._responses: list[float] = []
        self._empty: list[bool] = []
        self._sums = {kind: {name: np.zeros(256) for name in _CURVES} for kind in ("all", "with object")}
        self.levels = np.zeros((2, 256), np.int64)

    def add(self, meters: Meters) -> None:
        """Add the meters of the next images."""
        for name, some in meters.lists().items():
            if name not in _CURVES:
                self._scalars.setdefault(name, []).extend(map(float, some))
                continue
            for curve, empty in zip(some, meters.empty, strict=True):
                self._sums["all"][name] += curve
                if not empty:
                    self._sums["with object"][name] += curve
        self._responses += meters.responses
        self._empty += meters.empty
        self.levels += meters.levels

    @property
    def image_level(self) -> ImageLevel:
        """Every image's response, and whether its ground truth is empty."""
        return ImageLevel(tuple(self._responses), tuple(self._empty))

    def per_image(self, names: Sequence[str]) -> list[dict[str, str | float]]:
        """One row per image: its name, `PER_IMAGE`, its response and whether its ground truth is empty."""
        return [
            {
                "name": name,
                **{metric: float(self._scalars[metric][row]) for metric in PER_IMAGE},
                "response": self._responses[row],
                "empty": self._empty[row],
            }
            for row, name in enumerate(names)
        ]

    def curves(self, *, with_object: bool = False) -> dict[str, NDArray[np.float64]]:
        """The averaged curves (256,), over all images or over those with an object only."""
        count = len(self._empty) - with_object * sum(self._empty)
        return {name: total / count for name, total in self._sums["with object" if with_object else "all"].items()}

    def averages(self, *, with_object: bool = False) -> dict[str, float]:
        """The metrics, in order, over all images or over those with an object only."""
        kept = ~(np.array(self._empty) & with_object)
        curves = self.curves(with_object=with_object)
        scalars = {name: np.mean(np.array(some)[kept]) for name, some in self._scalars.items()}
        return _metrics(scalars, curves["F"], curves["E"])


def _metrics(scalars: Mapping[str, Any], f: NDArray[np.float64], e: NDArray[np.float64]) -> dict[str, float]:
    """All metrics, in order: averages over images, and means and maxima of the averaged curves of F and E."""
    figures = {**scalars, "F_mean": f.mean(), "F_max": f.max(), "E_mean": e.mean(), "E_max": e.max()}
    return {metric: float(figures[metric]) for metric in METRICS}
