"""Evaluations told to people: tables side by side, and one page to look at."""

from dsu.report.comparison import Comparison, Line, Results, compare
from dsu.report.page import write_report
from dsu.report.tables import (
    FORMATS,
    as_csv,
    as_json,
    as_latex,
    as_markdown,
    as_per_image,
    conventions_of,
    figures_as_csv,
    in_short,
)

__all__ = [
    "FORMATS",
    "Comparison",
    "Line",
    "Results",
    "as_csv",
    "as_json",
    "as_latex",
    "as_markdown",
    "as_per_image",
    "compare",
    "conventions_of",
    "figures_as_csv",
    "in_short",
    "write_report",
]
