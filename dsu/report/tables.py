"""Figures side by side, runs and the paper's rows, as text to paste into a paper or to read with a program.

Markdown and LaTeX print three places, as the paper does, and what is best is judged by what is printed: figures that
read the same share the mark. CSV and JSON have all digits. Each takes `metrics`, the figures to tell and their order
(of `dsu.report.comparison.FIGURES`); without, it tells all metrics and, where there are images without an object, what
those call for.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Final

from dsu.metrics.figures import IMAGE_LEVEL, METRICS, OBJECT, PER_IMAGE, RANDOM, arrow, figure_name, metric_of
from dsu.metrics.paper import published
from dsu.report.comparison import PLACES, Comparison, Line, Results, by_kind, compare

__all__ = [
    "FORMATS",
    "as_csv",
    "as_json",
    "as_latex",
    "as_markdown",
    "as_per_image",
    "conventions_of",
    "csv_text",
    "figures_as_csv",
    "in_short",
    "latex_text",
]

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
    """A table a set, the best of each column bold; one more where there are images without an object."""
    parts = []
    for comparison in compare(results, published if with_paper else None):
        shown = _known(comparison.lines, metrics or METRICS)
        parts.append(f"### {_markdown(comparison.name)}\n")
        parts.append(_markdown_table(comparison, comparison.lines, shown, {"images": lambda line: line.images}))
        if comparison.with_empties and metrics is None:
            judged = [line for line in comparison.lines if not line.published]
            extra = _known(judged, [name for name in comparison.shown() if name not in METRICS])
            counts = {"without an object": lambda line: line.without_object}
            parts.append(_markdown_table(comparison, judged, extra, counts))
        parts += [f"{_markdown(note)}\n" for note in comparison.notes(metrics)]
    parts += [f"{_markdown(line)}\n" for line in _conventions(results, at_length=conventions)]
    return "\n".join(parts)


def as_latex(
    results: Results, *, with_paper: bool, metrics: Sequence[str] | None = None, conventions: bool = False
) -> str:
    """One `tabular` for the package booktabs, a block a set, the best of each column bold.

    It has the columns in which any line has a figure.
    """
    comparisons = compare(results, published if with_paper else None)
    shown = _known([line for comparison in comparisons for line in comparison.lines], metrics or METRICS)
    width = len(shown) + 1
    lines = ["% needs \\usepackage{booktabs}"]
    lines += [f"% {_one_line(text)}" for text in _conventions(results, at_length=conventions)]
    lines += [f"\\begin{{tabular}}{{l*{{{width - 1}}}{{c}}}}", "\\toprule"]
    lines.append(f" & {' & '.join(map(_latex_head, shown))} \\\\")
    for comparison in comparisons:
        lines += [f"% {_one_line(note)}" for note in comparison.notes(metrics)]
        lines += [
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
    """A row a set: its name, its number of images and the figures, to all digits; `conventions` adds nothing.

    Where there is more than one run, or the paper beside it, a first column says whose figures they are. Where any
    set has images without an object, further columns say how many and give all of `FIGURES`.
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
            "trained_on": line.trained_on,
            **line.figures,
        }
        for comparison in comparisons
        for line in comparison.lines
    ]
    known = ("trained_on",) if any(row["trained_on"] for row in rows) else ()
    return csv_text((*(("run",) if several else ()), "set", "images", *known, *(metrics or METRICS), *extra), rows)


def figures_as_csv(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """`as_csv` of what `as_json` gives for one run."""
    every = {name for found in figures.values() for name in found}
    known = ("trained_on",) if "trained_on" in every else ()
    extra = (_WITHOUT, *IMAGE_LEVEL, *OBJECT) if _WITHOUT in every else ()
    rows = [{_WITHOUT: 0, "trained_on": 0, **found, "set": name} for name, found in figures.items()]
    return csv_text(("set", "images", *known, *METRICS, *extra), rows)


def as_json(
    results: Results, *, with_paper: bool = False, metrics: Sequence[str] | None = None, conventions: bool = True
) -> str:
    """Map each set's name to its figures, "images" (how many) and "conventions" (in words, always), to all digits.

    Where there is more than one run, or the paper beside it, that is below the name of whose figures they are. Sets
    with images without an object have "images_without_object" and all of `FIGURES`; what is not defined is null. Where
    there are ground truths without a prediction, "missing" is their number; where images were judged that the head was
    trained on, "trained_on" is theirs.
    """
    content: dict[str, dict[str, Any]] = {}
    for comparison in compare(results, published if with_paper else None):
        for line in comparison.lines:
            extra = (*IMAGE_LEVEL, *OBJECT) if line.without_object else ()
            wanted = metrics or (*METRICS, *extra)
            entry: dict[str, Any] = {
                name: line.figures.get(name) for name in wanted if name in line.figures or not line.published
            }
            if line.images is not None:
                entry["images"] = line.images
                entry |= {_WITHOUT: line.without_object} if line.without_object else {}
                entry |= {"missing": line.missing} if line.missing else {}
                entry |= {"trained_on": line.trained_on} if line.trained_on else {}
                entry["conventions"] = results[line.label][comparison.name].conventions
            content.setdefault(line.title, {})[comparison.name] = entry
    several = len(results) > 1 or with_paper
    return json.dumps(content if several else next(iter(content.values())), indent=2) + "\n"


def as_per_image(results: Results) -> str:
    """CSV with a row an image: its set, its name and what can be said of one image; with several runs, its run.

    What can be said are the metrics that one image has, its response (the map's largest value, not normalised, in
    [0, 1]) and whether its ground truth is empty.
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
"""How results become text; each takes `results`, `with_paper` (whether the published rows stand beside them),
`metrics` and `conventions` (whether they are told at length)."""


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV: of each what stands under these columns, and nothing where it lacks one."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def conventions_of(results: Results) -> dict[str, str]:
    """What all figures rest on, said once; where sets or runs differ in a convention, each after those it is of."""
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
    """Whether maps were stretched, of sets and runs apart where they differ in it, and where to read the rest."""
    found = {(run, name): one.conventions for run, sets in results.items() for name, one in sets.items()}
    kinds = by_kind(
        (
            name if len(results) == 1 else f"{name} of {run}",
            ", ".join(filter(None, (conventions["map"], conventions.get("predicted")))),
        )
        for (run, name), conventions in found.items()
    )
    told = [kind if len(kinds) == 1 else f"{', '.join(whose)} {kind}" for kind, whose in kinds.items()]
    random = any("encoders" in conventions for conventions in found.values())
    remark = f" Encoders of {RANDOM}." if random else ""
    shares = {f"{name}: {conventions['share']}" for (_, name), conventions in found.items() if "share" in conventions}
    remark += "".join(f" {share}." for share in sorted(shares))
    return f"Maps: {'; '.join(told)}.{remark} All conventions: dsu eval --conventions, docs/metrics.md."


def _known(lines: Iterable[Line], names: Sequence[str]) -> list[str]:
    """Those of the figures that any line has; all, where none has any."""
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
    table = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n"


def _conventions(results: Results, *, at_length: bool) -> list[str]:
    """The conventions, a line each at length, else in one."""
    if not at_length:
        return [in_short(results)]
    return [f"{what}: {how}" for what, how in conventions_of(results).items()]


def _latex_head(figure: str) -> str:
    metric, over_objects = metric_of(figure)
    symbol = _LATEX_FIGURES.get(metric, rf"\mathrm{{{metric}}}")
    # A bar, as for a function that is restricted to a part of where it is defined.
    restricted = r"|_{\mathrm{object}}" if over_objects else ""
    return rf"${symbol}{restricted}\{'downarrow' if arrow(figure) == '↓' else 'uparrow'}$"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", _one_line(text))


def latex_text(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX_SPECIAL.get(sign, sign) for sign in _one_line(text))
