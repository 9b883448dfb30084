"""The small parts of which a report's page is made: names, cells, tables, figures."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from dsu.metrics.figures import LOWER_IS_BETTER, METRICS, arrow, figure_name, metric_of
from dsu.report.comparison import PLACES, Comparison, Line

__all__ = ["cells", "figure", "head", "metric_html", "table"]


def metric_html(figure: str) -> str:
    """A figure's name with its kind as index: F_max is F with a low "max", whatever images it is over."""
    metric, _ = metric_of(figure)
    if metric not in METRICS:
        return figure_name(figure)
    letter, _, kind = metric.partition("_")
    return f"{letter}<sub>{kind}</sub>" if kind else letter


def table(title: str, heads: Iterable[str], bodies: Iterable[str]) -> str:
    """A table below its title, in a box that scrolls."""
    # Focusable, so that a table wider than a phone can be scrolled with the keyboard.
    return (
        f"<div class=scrolls tabindex=0 role=region aria-label='{escape(title)}'><table><caption>{escape(title)}"
        f"</caption><thead><tr>{''.join(heads)}</thead>{''.join(bodies)}</table></div>"
    )


def head(metric: str) -> str:
    """A figure's column heading, saying which way is better."""
    hint = "less is better" if metric in LOWER_IS_BETTER else "more is better"
    sign = f"<span class=arrow aria-hidden=true>{arrow(metric)}</span>"
    return f'<th scope=col title="{hint}">{metric_html(metric)}{sign}<span class=unseen>, {hint}</span>'


def cells(comparison: Comparison, line: Line, metrics: Sequence[str]) -> str:
    """A row's cells: the printed figure's digits, those that a run has beyond a touch away, the best one strong."""
    parts = []
    for metric in metrics:
        if metric not in line.figures:
            parts.append("<td class=absent>–")
            continue
        text, exact = f"{line.figures[metric]:.{PLACES}f}", repr(line.figures[metric])
        mark = f"<strong>{text}</strong>" if comparison.is_best(line, metric) else text
        parts.append(f'<td title="{exact}">{mark}')
    return "".join(parts)


def figure(title: str, remarks: Mapping[str, str], drawing: str) -> str:
    """A drawing below its title and a line a run; what is the same for all runs is said once."""
    several = len({*remarks.values()}) > 1
    lines = dict.fromkeys(f"{run}: {remark}" if several else remark for run, remark in remarks.items())
    told = "".join(f"<small>{escape(line)}</small>" for line in lines)
    return f"<figure><figcaption>{title}{told}</figcaption>{drawing}</figure>"
