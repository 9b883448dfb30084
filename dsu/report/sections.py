"""The parts of a report that need no script: tables, curves, distributions and conventions, as HTML."""

from collections.abc import Mapping
from html import escape
from typing import Final

import numpy as np

from dsu.evaluation.evaluate import Evaluation
from dsu.metrics.figures import LOWER_IS_BETTER, METRICS, PER_IMAGE
from dsu.metrics.paper import TABLES, ablations
from dsu.progress import counted
from dsu.report.comparison import Comparison, Results, compare
from dsu.report.empties import empties
from dsu.report.markup import cells, figure, head, metric_html, table
from dsu.report.plots import Axis, histogram, line_chart, style_class

__all__ = ["overview", "set_navigation", "set_sections"]

_ERROR_RANGES: Final = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Where a histogram of a measure that is near 0 may end."""


def overview(results: Results) -> str:
    """All metrics of all sets and runs, in one table."""
    comparisons = compare(results, None)
    several = len(results) > 1
    heads = ["<th scope=col>set", *(["<th scope=col class=name>run"] if several else []), *map(head, METRICS)]
    bodies = []
    for comparison in comparisons:
        rows = []
        for index, line in enumerate(comparison.lines):
            first = f"<th scope=rowgroup rowspan={len(comparison.lines)}>{escape(comparison.name)}" if not index else ""
            run = f"<td class=name>{escape(line.label)}" if several else ""
            rows.append(f"<tr>{first}{run}{cells(comparison, line, METRICS)}<td>{line.images:,}")
        bodies.append(f"<tbody>{''.join(rows)}")
    return table("All sets", [*heads, "<th scope=col>images"], bodies)


def set_navigation(results: Results) -> str:
    """Links to the sections of all sets."""
    names = [comparison.name for comparison in compare(results, None)]
    return "".join(f'<a href="#set-{index}">{escape(name)}</a>' for index, name in enumerate(names))


def set_sections(results: Results) -> str:
    """A section a set: beside the paper's rows and ablations, curves, distributions, conventions."""
    numbers = {run: number for number, run in enumerate(results)}
    variants = compare(results, ablations)
    parts = []
    for index, (comparison, variant) in enumerate(zip(compare(results), variants, strict=True)):
        name = comparison.name
        judged = {run: sets[name] for run, sets in results.items() if name in sets}
        counts = {run: counted(found.images, "images") for run, found in judged.items()}
        if len({*counts.values()}) > 1:
            counts = {run: f"{count} ({run})" for run, count in counts.items()}
        facts = ", ".join(dict.fromkeys(counts.values()))
        notes = dict.fromkeys([*comparison.notes(), *variant.notes()])
        parts.append(
            f'<section id="set-{index}"><h2>{escape(name)}</h2><p class=facts>{escape(facts)}</p>'
            f"<div class=tables>{_beside_paper(comparison)}{_beside_paper(variant, ablation=True)}</div>"
            f"<p class=note>{escape(' '.join(notes))}</p>"
            f"{_legend(numbers, judged)}<div class='charts curves'>{_curves(numbers, judged)}</div>"
            f"{empties(comparison)}"
            f"<h3>Scores of single images</h3><div class=charts>{_distributions(numbers, judged)}</div>"
            f"{_conventions(judged)}</section>"
        )
    return "".join(parts)


def _beside_paper(comparison: Comparison, *, ablation: bool = False) -> str:
    """The metrics that the paper prints of the set; nothing for sets of which it prints none."""
    printed = [name for name in METRICS if any(line.published and name in line.figures for line in comparison.lines)]
    if not printed:
        return ""
    rows = [
        f'<tr class="{"paper" if line.published else "own"}"><th scope=row>{escape(line.label)}'
        f"{'<abbr title=approximate>≈</abbr>' if line.approximate else ''}{cells(comparison, line, printed)}"
        for line in comparison.lines
    ]
    heads = ["<th scope=col><span class=unseen>method</span>", *map(head, printed)]
    numbers = [table.number for table in TABLES if table.ablation is ablation and comparison.name in table.sets]
    title = " ".join(["Beside the paper’s", "ablations," if ablation else "", "Table", *numbers]).replace("  ", " ")
    return table(title, heads, [f"<tbody>{''.join(rows)}"])


def _legend(numbers: Mapping[str, int], judged: Mapping[str, Evaluation]) -> str:
    """Which run is drawn how; one alone needs no telling."""
    if len(judged) == 1:
        return ""
    entries = (
        f'<li><svg class=key viewBox="0 0 28 10" aria-hidden=true><line class="line {style_class(numbers[run])}" '
        f'x1="0" x2="28" y1="5" y2="5"/></svg>{escape(run)}'
        for run in judged
    )
    return f"<ul class=legend>{''.join(entries)}</ul>"


def _curves(numbers: Mapping[str, int], judged: Mapping[str, Evaluation]) -> str:
    thresholds = np.arange(255, -1, -1, dtype=np.float64)
    precision_recall = line_chart(
        {numbers[run]: (found.curves["recall"], found.curves["precision"]) for run, found in judged.items()},
        Axis("recall", 0, 1),
        Axis("precision", 0, 1),
        "Precision over recall, averaged over images",
    )
    greatest = {
        run: f"greatest {found.metrics['F_max']:.3f} at {255 - int(found.curves['F'].argmax())}"
        for run, found in judged.items()
    }
    f_measure = line_chart(
        {numbers[run]: (thresholds, found.curves["F"]) for run, found in judged.items()},
        Axis("threshold (grey level)", 0, 255, places=0),
        Axis("F (beta² 0.3)", 0, 1),
        "F over the threshold, averaged over images",
    )
    return figure("Precision over recall", dict.fromkeys(judged, "256 thresholds"), precision_recall) + figure(
        "F over the threshold", greatest, f_measure
    )


def _distributions(numbers: Mapping[str, int], judged: Mapping[str, Evaluation]) -> str:
    figures = []
    for metric in PER_IMAGE:
        scores = {run: np.array([row[metric] for row in found.per_image], float) for run, found in judged.items()}
        greatest = max(float(values.max()) for values in scores.values())
        high = next((end for end in _ERROR_RANGES if end >= greatest), 1.0) if metric in LOWER_IS_BETTER else 1.0
        plain = metric.replace("_", " ")
        drawing = histogram(
            {numbers[run]: values for run, values in scores.items()}, plain, high, f"How many images score what {plain}"
        )
        centres = {run: f"mean {v.mean():.3f}, median {np.median(v):.3f}" for run, v in scores.items()}
        figures.append(figure(metric_html(metric), centres, drawing))
    return "".join(figures)


def _conventions(judged: Mapping[str, Evaluation]) -> str:
    kinds: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run, found in judged.items():
        kinds.setdefault(tuple(found.conventions.items()), []).append(run)
    parts = []
    for convention, runs in kinds.items():
        whose = f" of {', '.join(runs)}" if len(kinds) > 1 else ""
        entries = "".join(f"<div><dt>{escape(what)}<dd>{escape(how)}</div>" for what, how in convention)
        parts.append(f"<h3>Conventions{escape(whose)}</h3><dl>{entries}</dl>")
    return "".join(parts)
