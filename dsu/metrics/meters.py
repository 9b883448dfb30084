"""pysodmetrics' accumulators, fed together; what they measure is described in `dsu.evaluation.evaluate`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import py_sod_metrics as sod
from numpy.typing import NDArray

from dsu.metrics.figures import METRICS, PER_IMAGE
from dsu.metrics.image_level import ImageLevel

__all__ = ["METRICS", "PER_IMAGE", "Meters", "StructureMeasure"]


class StructureMeasure(sod.Smeasure):  # type: ignore[misc]  # the library has no types
    """S, where the library gives NaN: a foreground within the last row or column leaves quadrants empty.

    Such a quadrant has weight 0, but its score in the library, a mean over no pixels, is not a number.
    """

    def ssim(self, pred: NDArray[np.float64], gt: NDArray[np.bool_]) -> float:
        """The library's, where the quadrant has any pixel."""
        return float(super().ssim(pred, gt)) if pred.size else 0.0


class Meters:
    """The library's accumulators, fed together. They travel between processes whole."""

    def __init__(self) -> None:
        self.s = StructureMeasure(alpha=0.5)
        self.weighted = sod.WeightedFmeasure(beta=1)
        self.e = sod.Emeasure()
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

    def step(self, prediction: NDArray[np.uint8], truth: NDArray[np.uint8], *, normalize: bool) -> None:
        """Measure one pair, both (H, W)."""
        pair = (prediction, truth) if normalize else (prediction / 255, truth > 128)
        for meter in (self.s, self.weighted, self.e, self.mae, self.f):
            meter.step(*pair, normalize=normalize)
        # Of the map as it is, whatever `normalize` says: see `dsu.metrics.image_level`.
        self.responses.append(float(prediction.max()) / 255)
        self.empty.append(not (truth > 128).any())

    @property
    def image_level(self) -> ImageLevel:
        """Every image's response, and whether its ground truth is empty."""
        return ImageLevel(tuple(self.responses), tuple(self.empty))

    def with_object(self) -> "Meters":
        """What was measured of the images with an object alone."""
        chosen = Meters()
        for some, every in zip(chosen._lists().values(), self._lists().values(), strict=True):
            some.extend(item for item, empty in zip(every, self.empty, strict=True) if not empty)
        return chosen

    def extend(self, later: "Meters") -> None:
        """Append what another process measured, as if it had been measured here."""
        for mine, others in zip(self._lists().values(), later._lists().values(), strict=True):
            mine.extend(others)

    def per_image(self, names: Sequence[str]) -> list[dict[str, str | float]]:
        """A row an image: its name, `PER_IMAGE`, its response and whether its ground truth is empty."""
        lists = self._lists()
        return [
            {
                "name": name,
                **{metric: float(lists[metric][row]) for metric in PER_IMAGE},
                "response": self.responses[row],
                "empty": self.empty[row],
            }
            for row, name in enumerate(names)
        ]

    def averages(self) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
        """Return the metrics, in order, and the averaged curves, all in the library's own arithmetic."""
        f = self.f.get_results()
        e = self.e.get_results()["em"]
        curves = {
            "precision": f["precision"]["dynamic"],
            "recall": f["recall"]["dynamic"],
            "F": f["F"]["dynamic"],
            "E": e["curve"],
        }
        figures = {
            "S": self.s.get_results()["sm"],
            "F_adaptive": f["F"]["adaptive"],
            "F_mean": curves["F"].mean(),
            "F_max": curves["F"].max(),
            "F_weighted": self.weighted.get_results()["wfm"],
            "E_adaptive": e["adp"],
            "E_mean": curves["E"].mean(),
            "E_max": curves["E"].max(),
            "MAE": self.mae.get_results()["mae"],
            "IoU": f["IoU"]["binary"],
            "Dice": f["Dice"]["binary"],
        }
        return {metric: float(figures[metric]) for metric in METRICS}, curves

    def _lists(self) -> dict[str, list[Any]]:
        """The library's own lists and ours, with an entry an image: numbers, truth values, and curves (256,)."""
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
            "response": self.responses,
            "empty": self.empty,
        }
