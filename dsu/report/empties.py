"""The part of a report on images without an object; sets without any have none."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Final

import numpy as np

from dsu.metrics.figures import IMAGE_LEVEL, METRICS
from dsu.report.comparison import Comparison, Line
from dsu.report.markup import cells, figure, head, table
from dsu.report.plots import histogram, style_class

__all__ = ["empties"]

_WITH, _WITHOUT = 0, 1
"""The line styles of images with and without an object."""

_EXPLAINED: Final = (
    "An image’s response is the largest value of its map, never normalised; from 0.5 on (128 of 255) it is an alarm. "
    "False alarms are a share of the images without an object, misses (no alarm anywhere) of those with one; AUROC "
    "is how often an image with an object has the greater response, ties counting half. In the tables above, F, IoU "
    "and Dice of every image without an object are 0 whatever was predicted, and adaptive E of an all-black map is "
    "too: beside them stand the figures over the images with an object alone. S, mean E and MAE hold for both kinds, "
    "of maps that were not normalised."
)


def empties(comparison: Comparison) -> str:
    """False alarms, misses, AUROC, and what the spoilt metrics are over the images with an object alone."""
    lines = [line for line in comparison.lines if line.without_object]
    if not lines:
        return ""
    over_objects = [name for name in comparison.shown() if name not in (*METRICS, *IMAGE_LEVEL)]
    tables = [
        _table(comparison, lines, "Alarms", IMAGE_LEVEL, lambda line: line.without_object),
        _table(
            comparison,
            lines,
            "Over the images with an object",
            over_objects,
            lambda line: (line.images or 0) - line.without_object,
        ),
    ]
    return (
        f"<h3>Images without an object</h3><div class=tables>{''.join(tables)}</div><p class=note>{_EXPLAINED}</p>"
        f"{_LEGEND}<div class=charts>{''.join(_responses(line, several=len(lines) > 1) for line in lines)}</div>"
    )


def _table(
    comparison: Comparison,
    lines: Sequence[Line],
    title: str,
    figures: Sequence[str],
    count: Callable[[Line], int],
) -> str:
    heads = ["<th scope=col><span class=unseen>run</span>", *map(head, figures), "<th scope=col>images"]
    rows = [
        f"<tr><th scope=row>{escape(line.label)}{cells(comparison, line, figures)}<td>{count(line):,}" for line in lines
    ]
    return table(title, heads, [f"<tbody>{''.join(rows)}"])


def _responses(line: Line, *, several: bool) -> str:
    found = line.image_level
    assert found is not None  # a run's
    responses, empty = np.array(found.responses), np.array(found.empty)
    kinds = {_WITH: responses[~empty], _WITHOUT: responses[empty]}
    drawing = histogram(
        {kind: values for kind, values in kinds.items() if values.size},
        "response",
        1.0,
        "How many images with and without an object respond how strongly",
    )
    return figure(escape(f"Responses of {line.label}" if several else "Responses"), {}, drawing)


def _entry(kind: int, name: str) -> str:
    return (
        f'<li><svg class=key viewBox="0 0 28 10" aria-hidden=true><line class="line {style_class(kind)}" '
        f'x1="0" x2="28" y1="5" y2="5"/></svg>{name}'
    )


_LEGEND: Final = f"<ul class=legend>{_entry(_WITH, 'with an object')}{_entry(_WITHOUT, 'without an object')}</ul>"
