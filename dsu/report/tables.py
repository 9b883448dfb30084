"""Figures side by side, runs and the paper's rows, as text to paste into a paper or to read with a program.

Markdown and LaTeX print three places, as the paper does, and what is best is judged by what is printed: figures that
read the same share the mark. CSV and JSON have all digits.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from dsu.evaluation import METRICS, Evaluation
from dsu.meters import PER_IMAGE
from dsu.paper import IMAGES, Row, published

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
]

Results = Mapping[str, Mapping[str, Evaluation]]
"""Of every run, by its name, what each set scored, by the set's name."""

LOWER_IS_BETTER: Final = ("MAE",)

_PLACES: Final = 3
_UNCERTAIN: Final = "last digits hard to read in the paper's scan"
_LATEX_METRICS: Final = {
    "S": r"S_\alpha",
    "F_adaptive": r"F_\beta^{\mathrm{ad}}",
    "F_mean": r"F_\beta^{\mathrm{mean}}",
    "F_max": r"F_\beta^{\mathrm{max}}",
    "F_weighted": r"F_\beta^{w}",
    "E_adaptive": r"E_\phi^{\mathrm{ad}}",
    "E_mean": r"E_\phi^{\mathrm{mean}}",
    "E_max": r"E_\phi^{\mathrm{max}}",
}
_LATEX_SPECIAL: Final = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


@dataclass(frozen=True)
class Line:
    """One run's or published method's figures on one set.

    Attributes:
        label: The run's or the method's name.
        figures: What is known of it, by metric.
        images: How many images a run was judged on; None for published figures.
        approximate: Whether a published last digit is hard to read.
        remark: Why a run's figures are not to be compared with published ones; empty where they are.
    """

    label: str
    figures: Mapping[str, float]
    images: int | None = None
    approximate: bool = False
    remark: str = ""

    @property
    def published(self) -> bool:
        """Whether these are the paper's figures."""
        return self.images is None

    @property
    def title(self) -> str:
        """The label, saying of published figures that they are the paper's."""
        return f"{self.label} (paper{', approximate' if self.approximate else ''})" if self.published else self.label


@dataclass(frozen=True)
class Comparison:
    """All lines of one set, the paper's first."""

    name: str
    lines: tuple[Line, ...]

    def is_best(self, line: Line, metric: str) -> bool:
        """Whether no other line prints a better figure; of nothing to compare with, nothing is best.

        Beside published figures, runs that are not comparable with them are out of the contest.
        """
        out = self.incomparable
        rivals = [other for other in self.lines if metric in other.figures and other not in out]
        if line not in rivals or len(rivals) < 2:
            return False
        choose = min if metric in LOWER_IS_BETTER else max
        figures = [round(other.figures[metric], _PLACES) for other in rivals]
        return round(line.figures[metric], _PLACES) == choose(figures)

    def notes(self) -> list[str]:
        """What a reader of the table should know of single lines, in sentences."""
        uncertain = [line.label for line in self.lines if line.approximate]
        found = [f"{' and '.join(uncertain)}: {_UNCERTAIN}."] if uncertain else []
        return found + [f"{line.label}: not comparable with the paper, {line.remark}." for line in self.incomparable]

    @property
    def incomparable(self) -> list[Line]:
        """The runs that must not be held against the published figures beside them."""
        beside_paper = any(line.published for line in self.lines)
        return [line for line in self.lines if beside_paper and line.remark]


def compare(results: Results, paper: Callable[[str], tuple[Row, ...]] | None = published) -> list[Comparison]:
    """Put every set's figures side by side.

    Args:
        results: What was judged.
        paper: Gives the published rows of a set (`dsu.paper.published`, `dsu.paper.ablations`); None: without them.

    Returns:
        A comparison a set, in the order in which the runs first name them.
    """
    names = dict.fromkeys(chain.from_iterable(results.values()))
    return [
        Comparison(
            name,
            (
                *(Line(row.method, row.figures, approximate=row.approximate) for row in (paper(name) if paper else ())),
                *(
                    Line(run, sets[name].metrics, sets[name].images, remark=_remark(name, sets[name]))
                    for run, sets in results.items()
                    if name in sets
                ),
            ),
        )
        for name in names
    ]


def as_markdown(results: Results, *, with_paper: bool) -> str:
    """A table a set, the best of each column bold."""
    parts = []
    for comparison in compare(results, published if with_paper else None):
        head = ["", *(f"{_markdown(metric)} {_arrow(metric)}" for metric in METRICS), "images"]
        rows = [
            [
                _markdown(line.title),
                *_cells(comparison, line, "–", "**{}**"),
                "" if line.images is None else f"{line.images:,}",
            ]
            for line in comparison.lines
        ]
        table = [head, ["---"] + ["--:"] * (len(METRICS) + 1), *rows]
        parts.append(f"### {_markdown(comparison.name)}\n")
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in table) + "\n")
        parts += [f"{_markdown(note)}\n" for note in comparison.notes()]
    parts += [f"{_markdown(line)}\n" for line in _conventions(results)]
    return "\n".join(parts)


def as_latex(results: Results, *, with_paper: bool) -> str:
    """One `tabular` for the package booktabs, a block a set, the best of each column bold."""
    width = len(METRICS) + 1
    heads = [_latex_head(name) for name in METRICS]
    lines = ["% needs \\usepackage{booktabs}", *(f"% {_one_line(text)}" for text in _conventions(results))]
    lines += [f"\\begin{{tabular}}{{l*{{{width - 1}}}{{c}}}}", "\\toprule", f" & {' & '.join(heads)} \\\\"]
    for comparison in compare(results, published if with_paper else None):
        lines += [f"% {_one_line(note)}" for note in comparison.notes()]
        lines += [
            "\\midrule",
            f"\\multicolumn{{{width}}}{{c}}{{\\textit{{{_latex(comparison.name)}}}}} \\\\",
            "\\midrule",
        ]
        for line in comparison.lines:
            lines.append(" & ".join((_latex(line.title), *_cells(comparison, line, "--", "\\textbf{{{}}}"))) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def as_csv(results: Results, *, with_paper: bool = False) -> str:
    """A row a set: its name, its number of images and `METRICS`, to all digits.

    Where there is more than one run, or the paper beside it, a first column says whose figures they are.
    """
    several = len(results) > 1 or with_paper
    rows = [
        {"run": line.title, "set": comparison.name, "images": line.images, **line.figures}
        for comparison in compare(results, published if with_paper else None)
        for line in comparison.lines
    ]
    return _csv((*(("run",) if several else ()), "set", "images", *METRICS), rows)


def as_json(results: Results, *, with_paper: bool = False) -> str:
    """Map each set's name to `METRICS`, "images" (how many) and "conventions" (in words), to all digits.

    Where there is more than one run, or the paper beside it, that is below the name of whose figures they are.
    """
    content: dict[str, dict[str, Any]] = {}
    for comparison in compare(results, published if with_paper else None):
        for line in comparison.lines:
            entry: dict[str, Any] = dict(line.figures)
            if line.images is not None:
                entry |= {"images": line.images, "conventions": results[line.label][comparison.name].conventions}
            content.setdefault(line.title, {})[comparison.name] = entry
    several = len(results) > 1 or with_paper
    return json.dumps(content if several else next(iter(content.values())), indent=2) + "\n"


def as_per_image(results: Results) -> str:
    """CSV with a row an image: its set, its name and what can be said of one image; with several runs, its run."""
    rows = (
        {"run": run, "set": name, **row}
        for run, sets in results.items()
        for name, found in sets.items()
        for row in found.per_image
    )
    return _csv((*(("run",) if len(results) > 1 else ()), "set", "name", *PER_IMAGE), rows)


FORMATS: Final[Mapping[str, Callable[..., str]]] = {
    "markdown": as_markdown,
    "latex": as_latex,
    "csv": as_csv,
    "json": as_json,
}
"""How results become text; each takes `results` and `with_paper`, whether the published rows stand beside them."""


def _remark(name: str, found: Evaluation) -> str:
    official = IMAGES.get(name) or IMAGES.get(f"{name}-TE")
    if official is None:
        return ""
    if found.images != official:
        return f"judged on {found.images:,} of the set's {official:,} images"
    return "" if found.normalize else "whose maps were min-max normalised"


def _cells(comparison: Comparison, line: Line, absent: str, best: str) -> list[str]:
    cells = []
    for metric in METRICS:
        text = f"{line.figures[metric]:.{_PLACES}f}" if metric in line.figures else absent
        cells.append(best.format(text) if comparison.is_best(line, metric) else text)
    return cells


def _conventions(results: Results) -> list[str]:
    """The conventions in one line, and where sets or runs differ in them, one for each kind."""
    kinds: dict[str, list[str]] = {}
    for run, sets in results.items():
        for name, found in sets.items():
            text = "; ".join(f"{what}: {how}" for what, how in found.conventions.items())
            kinds.setdefault(text, []).append(f"{name} of {run}")
    if len(kinds) == 1:
        return list(kinds)
    return [f"{', '.join(whose)}: {text}" for text, whose in kinds.items()]


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _arrow(metric: str) -> str:
    return "↓" if metric in LOWER_IS_BETTER else "↑"


def _latex_head(metric: str) -> str:
    symbol = _LATEX_METRICS.get(metric, rf"\mathrm{{{metric}}}")
    return rf"${symbol}\{'downarrow' if metric in LOWER_IS_BETTER else 'uparrow'}$"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", _one_line(text))


def _latex(text: str) -> str:
    return "".join(_LATEX_SPECIAL.get(sign, sign) for sign in _one_line(text))
