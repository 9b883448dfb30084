"""Allowed values of settings. Nothing here imports torch, since the command line's help needs these values."""

from typing import Literal

FeatureDtype = Literal["float16", "float32"]
"""Data type of stored features."""

Precision = Literal["auto", "fp32", "bf16"]

ExportPrecision = Literal["fp32", "int8", "fp16"]
"""`int8` is for CPUs, `fp16` for GPUs."""

RegionKind = Literal["iou", "tversky"]
"""The paper's IoU, or the Tversky index, with separate weights for misses and false alarms (arXiv 1706.05721)."""

BceKind = Literal["plain", "weighted", "focal"]
"""In the authors' program the boundary weight of the BCE cancels out, so their results used `plain`. `focal` weights
each pixel by a power of its error, |m - p|, which reduces the influence of many easy pixels (arXiv 1708.02002)."""

PredictionKind = Literal["mask", "overlay", "cutout"]
"""An 8-bit mask, the image under a coloured mask, or the object with alpha."""

ServedKind = Literal["mask", "map", "overlay", "cutout", "table"]
"""Outputs of a server: a `PredictionKind`, the soft map even if masks are binarised, or the table of verdicts."""

Normalization = Literal["minmax", "none"]
"""`minmax` normalises each map to its full range: the benchmarks' convention, which turns the noise in an image without
an object into a full-range mask."""

ReportFormat = Literal["markdown", "latex", "csv", "json"]
"""Output formats of scores, in addition to the terminal table."""
