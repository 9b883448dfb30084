"""Tables that compare runs with each other and the paper: Markdown and LaTeX for papers, CSV and JSON for programs.

Markdown and LaTeX print three decimals, as the paper does, and mark the best of the printed numbers: equal ones share
the mark. CSV and JSON have all digits. Each takes `metrics`, names of `FIGURES` in the order to print; by default all
metrics and, if there are images without an object, the metrics for those.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, TypeVar

from dsu.evaluation.evaluate import Evaluation
from dsu.metrics.figures import (
    FIGURES,
    IMAGE_LEVEL,
    LOWER_IS_BETTER,
    METRICS,
    OBJECT,
    PER_IMAGE,
    RANDOM,
    SPOILT,
    arrow,
    figure_name,
    metric_of,
    over_objects,
)
from dsu.metrics.paper import PublishedRow, evaluated_in_part, incomparable, published

Results = Mapping[str, Mapping[str, Evaluation]]
"""Evaluations by run and set."""

T = TypeVar("T", bound=Hashable)

PLACES: Final = 3
"""Decimals in tables with the paper's scores, which have as many."""

_UNCERTAIN: Final = "last digits hard to read in the paper's scan"
_MIXED: Final = (
    "The runs were evaluated on different images, so no score is marked as the best: dsu eval --common evaluates those "
    "that they share."
)
_NOISE: Final = (
    "min-max normalisation amplifies faint noise on images without an object to the full range, which spoils S, E and "
    "MAE over all images: --normalize none evaluates the maps as they are"
)
_STRETCHED: Final = (
    "every map reaches the full range, as after min-max normalisation at prediction, so false alarms, misses and AUROC "
    "say nothing: predict with --normalize none"
)


@dataclass(frozen=True)
class Line:
    """The scores of one run or published method on one set.

    Attributes:
        label: The run's or the method's name.
        figures: Known scores by their names in `FIGURES`.
        evaluation: Of a run; None for published scores.
        approximate: Whether the last digits of published scores are hard to read.
        remark: Why a run's scores are not comparable with published ones; empty if they are.
    """

    label: str
    figures: Mapping[str, float]
    evaluation: Evaluation | None = None
    approximate: bool = False
    remark: str = ""

    @property
    def published(self) -> bool:
        """Whether these scores are the paper's."""
        return self.evaluation is None

    @property
    def images(self) -> int | None:
        """Number of images that a run was evaluated on; None for published scores."""
        return None if self.evaluation is None else self.evaluation.images

    @property
    def title(self) -> str:
        """The label, marked if the scores are the paper's."""
        return f"{self.label} (paper{', approximate' if self.approximate else ''})" if self.published else self.label

    @property
    def without_object(self) -> int:
        """Number of images without an object."""
        return 0 if self.evaluation is None else self.evaluation.image_level.without_object

    @property
    def too_good(self) -> str:
        """Why the scores are too good, as a clause; empty if they are not."""
        of = self.evaluation
        if of is None or not of.trained_on:
            return ""
        return f"trained on {of.trained_on:,} of the {of.images:,} images, so the scores are too good"

    def notes(self, shown: Sequence[str]) -> list[str]:
        """What readers of the scores named `shown` should know about this line, in sentences."""
        of = self.evaluation
        if of is None:
            return []
        found = [f"not comparable with the paper, {self.remark}"] if self.remark else []
        if of.missing and not self.remark:
            found.append(evaluated_in_part(of.images, of.images + of.missing))
        if self.too_good:
            found.append(self.too_good)
        if of.faint and {"IoU", "Dice"} & {*shown}:
            found.append(of.faint)
        undefined = [figure_name(name) for name in shown if name in FIGURES and name not in self.figures]
        if undefined:
            found.append(f"{', '.join(undefined)} undefined, because {of.image_level.lacking}")
        if self.without_object and of.normalize and {*shown} & {*METRICS}:
            found.append(_NOISE)
        if self.without_object and of.image_level.stretched and {*shown} & {*IMAGE_LEVEL}:
            found.append(_STRETCHED)
        return [f"{self.label}: {note}." for note in found]


@dataclass(frozen=True)
class Comparison:
    """All lines of one set, the paper's first.

    `mixed` says whether the runs were evaluated on different images; then no score is the best.
    """

    name: str
    lines: tuple[Line, ...]
    mixed: bool = False

    def is_best(self, line: Line, metric: str) -> bool:
        """Whether no other line prints a better score; False if there is nothing to compare with.

        Next to published scores, runs that are not comparable with them never count.
        """
        if self.mixed:
            return False
        beside_paper = any(other.published for other in self.lines)
        rivals = [other for other in self.lines if metric in other.figures and not (beside_paper and other.remark)]
        choose = min if metric in LOWER_IS_BETTER else max
        figures = [round(other.figures[metric], PLACES) for other in rivals]
        return line in rivals and len(rivals) > 1 and round(line.figures[metric], PLACES) == choose(figures)

    @property
    def has_best(self) -> bool:
        """Whether any score is the best."""
        return any(self.is_best(line, metric) for line in self.lines for metric in line.figures)

    @property
    def printed(self) -> list[str]:
        """The metrics that the paper prints for the set, if any."""
        return [name for name in METRICS if any(line.published and name in line.figures for line in self.lines)]

    def shown(self, metrics: Sequence[str] | None = None) -> tuple[str, ...]:
        """Names of the scores to print: those asked for, else all metrics and, if useful, those for empty images."""
        if metrics is not None:
            return tuple(metrics)
        return (*METRICS, *((*IMAGE_LEVEL, *SPOILT) if self.with_empties else ()))

    def notes(self, metrics: Sequence[str] | None = None) -> list[str]:
        """What readers of the table should know about its lines, in sentences."""
        uncertain = [line.label for line in self.lines if line.approximate]
        found = [f"{' and '.join(uncertain)}: {_UNCERTAIN}."] if uncertain else []
        found += [_MIXED] if self.mixed else []
        return found + [note for line in self.lines for note in line.notes(self.shown(metrics))]

    @property
    def warnings(self) -> list[str]:
        """The gravest of the notes: scores that can't be compared or are too good."""
        return [_MIXED] * self.mixed + [f"{line.label}: {line.too_good}." for line in self.lines if line.too_good]

    @property
    def with_empties(self) -> bool:
        """Whether any run was evaluated on images without an object."""
        return any(line.without_object for line in self.lines)


def compare(results: Results, paper: Callable[[str], tuple[PublishedRow, ...]] | None = published) -> list[Comparison]:
    """Compare the scores of every set.

    Args:
        results: The evaluations.
        paper: Returns the published rows of a set: `published` or `ablations` of `dsu.metrics.paper`; None for none.

    Returns:
        One comparison per set, in the order of the runs' sets.
    """
    names = dict.fromkeys(chain.from_iterable(results.values()))
    return [
        Comparison(
            name,
            (
                *(Line(row.method, row.figures, approximate=row.approximate) for row in (paper(name) if paper else ())),
                *(_line(run, name, sets[name]) for run, sets in results.items() if name in sets),
            ),
            mixed=len({_images_of(sets[name]) for sets in results.values() if name in sets}) > 1,
        )
        for name in names
    ]


def by_kind(named: Iterable[tuple[str, T]]) -> dict[T, list[str]]:
    """Group names by their values."""
    kinds: dict[T, list[str]] = {}
    for name, kind in named:
        kinds.setdefault(kind, []).append(name)
    return kinds


def figures_of(found: Evaluation) -> dict[str, float]:
    """All defined scores of an evaluation by their names in `FIGURES`, unrounded."""
    restricted = {over_objects(metric): figure for metric, figure in found.object_metrics.items()}
    return found.metrics | restricted | found.image_level.figures()


def _images_of(found: Evaluation) -> frozenset[str]:
    """The images of an evaluation."""
    return frozenset(one.name for one in found.pairs)


def _line(run: str, name: str, found: Evaluation) -> Line:
    return Line(run, figures_of(found), found, remark=incomparable(name, found.images, minmax=found.normalize))


# ---- as text ----

_LATEX_FIGURES: Final = {
    "S": r"S_\alpha",
    "F_adaptive": r"F_\beta^{\mathrm{ad}}",
    "F_mean": r"F_\beta^{\mathrm{mean}}",
    "F_max": r"F_\beta^{\mathrm{max}}",
    "F_weighted": r"F_\beta^{w}",
    "E_adaptive": r"E_\phi^{\mathrm{ad}}",
    "E_mean": r"E_\phi^{\mathrm{mean}}",
    "E_max": r"E_\phi^{\mathrm{max}}",
    "false_alarms": r"\mathrm{false\ alarms}",
}
_LATEX_SPECIAL: Final = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}
_WITHOUT: Final = "images_without_object"


def as_markdown(
    results: Results, *, with_paper: bool, metrics: Sequence[str] | None = None, conventions: bool = False
) -> str:
    """One table per set, the best of each column bold; a second one if there are images without an object."""
    parts = []
    for comparison in compare(results, published if with_paper else None):
        shown = _known(comparison.lines, metrics or METRICS)
        table = _markdown_table(comparison, comparison.lines, shown, {"images": lambda line: line.images})
        parts += [f"### {_markdown(comparison.name)}\n", table]
        if comparison.with_empties and metrics is None:
            evaluated = [line for line in comparison.lines if not line.published]
            extra = _known(evaluated, [name for name in comparison.shown() if name not in METRICS])
            counts = {"without an object": lambda line: line.without_object}
            parts.append(_markdown_table(comparison, evaluated, extra, counts))
        parts += [f"{_markdown(note)}\n" for note in comparison.notes(metrics)]
    parts += [f"{_markdown(line)}\n" for line in _conventions(results, at_length=conventions)]
    return "\n".join(parts)


def as_latex(
    results: Results, *, with_paper: bool, metrics: Sequence[str] | None = None, conventions: bool = False
) -> str:
    """One `tabular` for the package booktabs: one block per set, the best of each column bold, no empty columns."""
    comparisons = compare(results, published if with_paper else None)
    shown = _known([line for comparison in comparisons for line in comparison.lines], metrics or METRICS)
    width = len(shown) + 1
    lines = [
        "% needs \\usepackage{booktabs}",
        *(f"% {_one_line(text)}" for text in _conventions(results, at_length=conventions)),
        f"\\begin{{tabular}}{{l*{{{width - 1}}}{{c}}}}",
        "\\toprule",
        f" & {' & '.join(map(_latex_head, shown))} \\\\",
    ]
    for comparison in comparisons:
        lines += [
            *(f"% {_one_line(note)}" for note in comparison.notes(metrics)),
            "\\midrule",
            f"\\multicolumn{{{width}}}{{c}}{{\\textit{{{latex_text(comparison.name)}}}}} \\\\",
            "\\midrule",
        ]
        for line in comparison.lines:
            cells = _cells(comparison, line, shown, "--", "\\textbf{{{}}}")
            lines.append(" & ".join((latex_text(line.title), *cells)) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def as_csv(
    results: Results, *, with_paper: bool = False, metrics: Sequence[str] | None = None, conventions: bool = False
) -> str:
    """One row per set: its name, number of images and scores with all digits; `conventions` has no effect.

    With several runs, or with the paper, the first column is the run's name. If any set has images without an object,
    further columns have their number and all of `FIGURES`.
    """
    several = len(results) > 1 or with_paper
    comparisons = compare(results, published if with_paper else None)
    with_empties = any(comparison.with_empties for comparison in comparisons) and metrics is None
    extra = (_WITHOUT, *IMAGE_LEVEL, *OBJECT) if with_empties else ()
    rows = [
        {
            "run": line.title,
            "set": comparison.name,
            "images": line.images,
            _WITHOUT: None if line.published else line.without_object,
            "trained_on": line.evaluation.trained_on if line.evaluation else 0,
            **line.figures,
        }
        for comparison in comparisons
        for line in comparison.lines
    ]
    known = ("trained_on",) if any(row["trained_on"] for row in rows) else ()
    return csv_text((*(("run",) if several else ()), "set", "images", *known, *(metrics or METRICS), *extra), rows)


def figures_as_csv(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """`as_csv` of the output of `as_json` for one run."""
    every = {name for found in figures.values() for name in found}
    known = ("trained_on",) if "trained_on" in every else ()
    extra = (_WITHOUT, *IMAGE_LEVEL, *OBJECT) if _WITHOUT in every else ()
    rows = [{_WITHOUT: 0, "trained_on": 0, **found, "set": name} for name, found in figures.items()]
    return csv_text(("set", "images", *known, *METRICS, *extra), rows)


def as_json(
    results: Results, *, with_paper: bool = False, metrics: Sequence[str] | None = None, conventions: bool = True
) -> str:
    """Map each set's name to its scores with all digits, "images" (their number) and "conventions" (in words).

    With several runs, or with the paper, each run's sets are below its name. Sets with images without an object have
    "images_without_object" and all of `FIGURES`; undefined ones are null. "missing" is the number of ground truths
    without a prediction, if there are any, "trained_on" the number of images that the head was trained on.
    `conventions` has no effect, as they are always included.
    """
    content: dict[str, dict[str, Any]] = {}
    for comparison in compare(results, published if with_paper else None):
        for line in comparison.lines:
            wanted = metrics or (*METRICS, *((*IMAGE_LEVEL, *OBJECT) if line.without_object else ()))
            entry: dict[str, Any] = {
                name: line.figures.get(name) for name in wanted if name in line.figures or not line.published
            }
            if line.evaluation is not None:
                of = line.evaluation
                counts = {_WITHOUT: line.without_object, "missing": of.missing, "trained_on": of.trained_on}
                entry |= {"images": of.images, **{what: count for what, count in counts.items() if count}}
                entry["conventions"] = of.conventions
            content.setdefault(line.title, {})[comparison.name] = entry
    several = len(results) > 1 or with_paper
    return json.dumps(content if several else next(iter(content.values())), indent=2) + "\n"


def as_per_image(results: Results) -> str:
    """CSV with one row per image: its set, name and scores; with several runs, its run.

    The scores are the metrics of single images, the response (the map's largest value, not normalised, in [0, 1]) and
    whether the ground truth is empty.
    """
    rows = (
        {"run": run, "set": name, **row}
        for run, sets in results.items()
        for name, found in sets.items()
        for row in found.per_image
    )
    return csv_text((*(("run",) if len(results) > 1 else ()), "set", "name", *PER_IMAGE, "response", "empty"), rows)


FORMATS: Final[Mapping[str, Callable[..., str]]] = {
    "markdown": as_markdown,
    "latex": as_latex,
    "csv": as_csv,
    "json": as_json,
}
"""Output formats; each takes `results`, `with_paper` (whether to add published rows), `metrics` and `conventions`
(whether to print them in full)."""


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV with these columns; missing values are empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def conventions_of(results: Results) -> dict[str, str]:
    """The conventions of all evaluations; if one differs between sets or runs, each value after their names."""
    several = len(results) > 1
    named = {
        f"{name} of {run}" if several else name: one.conventions
        for run, sets in results.items()
        for name, one in sets.items()
    }
    said: dict[str, str] = {}
    for what in dict.fromkeys(chain.from_iterable(named.values())):
        kinds = by_kind((whose, conventions[what]) for whose, conventions in named.items() if what in conventions)
        same = [*kinds.values()] == [[*named]]
        said[what] = "; ".join(how if same else f"{', '.join(whose)}: {how}" for how, whose in kinds.items())
    return said


def in_short(results: Results) -> str:
    """How maps were normalised, separately for sets and runs that differ, and where to read more."""
    found = {(run, name): one.conventions for run, sets in results.items() for name, one in sets.items()}
    kinds = by_kind(
        (
            name if len(results) == 1 else f"{name} of {run}",
            ", ".join(filter(None, (conventions["map"], conventions.get("predicted")))),
        )
        for (run, name), conventions in found.items()
    )
    told = [kind if len(kinds) == 1 else f"{', '.join(whose)} {kind}" for kind, whose in kinds.items()]
    told = [f"Maps: {'; '.join(told)}.", *caveats(results), "All conventions: dsu eval --conventions, docs/metrics.md."]
    return " ".join(told)


def caveats(results: Results) -> list[str]:
    """Which scores come from random encoders or from shares of the head's own training split, in sentences."""
    found = [(name, one.conventions) for sets in results.values() for name, one in sets.items()]
    random = [f"Encoders of {RANDOM}."] if any("encoders" in conventions for _, conventions in found) else []
    return random + sorted(
        {f"{name}: {conventions['share']}." for name, conventions in found if "share" in conventions}
    )


def _known(lines: Iterable[Line], names: Sequence[str]) -> list[str]:
    """The names of scores that any line has; all names if no line has any."""
    known = {name for line in lines for name in line.figures}
    return [name for name in names if name in known] or list(names)


def _cells(comparison: Comparison, line: Line, shown: Sequence[str], absent: str, best: str) -> list[str]:
    cells = []
    for name in shown:
        text = f"{line.figures[name]:.{PLACES}f}" if name in line.figures else absent
        cells.append(best.format(text) if comparison.is_best(line, name) else text)
    return cells


def _markdown_table(
    comparison: Comparison,
    lines: Sequence[Line],
    shown: Sequence[str],
    counts: Mapping[str, Callable[[Line], int | None]],
) -> str:
    head = ["", *(f"{_markdown(figure_name(name))} {arrow(name)}" for name in shown), *counts]
    rows = [
        [
            _markdown(line.title),
            *_cells(comparison, line, shown, "–", "**{}**"),
            *("" if (number := count(line)) is None else f"{number:,}" for count in counts.values()),
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] + ["--:"] * (len(head) - 1), *rows]) + "\n"


def _conventions(results: Results, *, at_length: bool) -> list[str]:
    """The conventions, one line each with `at_length`, else in one line."""
    if not at_length:
        return [in_short(results)]
    return [f"{what}: {how}" for what, how in conventions_of(results).items()]


def _latex_head(figure: str) -> str:
    metric, over_objects = metric_of(figure)
    symbol = _LATEX_FIGURES.get(metric, rf"\mathrm{{{metric}}}")
    # A bar, as for a function restricted to a part of its domain.
    restricted = r"|_{\mathrm{object}}" if over_objects else ""
    return rf"${symbol}{restricted}\{'downarrow' if arrow(figure) == '↓' else 'uparrow'}$"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", _one_line(text))


def latex_text(text: str) -> str:
    """Text escaped for LaTeX."""
    return "".join(_LATEX_SPECIAL.get(sign, sign) for sign in _one_line(text))
