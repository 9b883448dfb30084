"""Allowed values of settings. Nothing here imports torch: the command line's help reads them."""

from typing import Literal

__all__ = [
    "BceKind",
    "ExportPrecision",
    "FeatureDtype",
    "Normalization",
    "Precision",
    "PredictionKind",
    "RegionKind",
    "ReportFormat",
    "ServedKind",
]

FeatureDtype = Literal["float16", "float32"]
"""Data type of stored features."""

Precision = Literal["auto", "fp32", "bf16"]

ExportPrecision = Literal["fp32", "int8", "fp16"]
"""`int8` is for processors, `fp16` for GPUs."""

RegionKind = Literal["iou", "tversky"]
"""The paper's IoU, or the Tversky index, in which misses and false alarms have weights of their own
(arXiv 1706.05721)."""

BceKind = Literal["plain", "weighted", "focal"]
"""In the authors' program the boundary weight of the BCE cancels out: their results used `plain`. `focal` weighs each
pixel by a power of its error, |m - p|, so that the many easy ones count little (1708.02002)."""

PredictionKind = Literal["mask", "overlay", "cutout"]
"""An 8-bit mask, the image under a coloured mask, or the object with alpha."""

ServedKind = Literal["mask", "map", "overlay", "cutout", "table"]
"""What a server is asked for: a `PredictionKind`, the soft map even where masks are cut, or the table of verdicts."""

Normalization = Literal["minmax", "none"]
"""`minmax` stretches each map to its full range: the benchmarks' convention, which turns the noise of an image
without any object into a full-range mask."""

ReportFormat = Literal["markdown", "latex", "csv", "json"]
"""Output formats of scores, besides the table for people."""
