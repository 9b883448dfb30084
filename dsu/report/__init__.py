"""Evaluations told to people: tables side by side, and one page to look at."""

from dsu.report.page import write_report
from dsu.report.tables import (
    FORMATS,
    LOWER_IS_BETTER,
    Comparison,
    Line,
    Results,
    as_csv,
    as_json,
    as_latex,
    as_markdown,
    as_per_image,
    compare,
)

__all__ = [
    "FORMATS",
    "LOWER_IS_BETTER",
    "Comparison",
    "Line",
    "Results",
    "as_csv",
    "as_json",
    "as_latex",
    "as_markdown",
    "as_per_image",
    "compare",
    "write_report",
]
