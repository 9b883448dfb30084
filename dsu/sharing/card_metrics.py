"""What a model card says of a head's figures."""

from typing import TYPE_CHECKING, Any, Final

from dsu.metrics.figures import FIGURES, LOWER_IS_BETTER, METRICS, figure_name, metric_of
from dsu.metrics.paper import judged_in_part
from dsu.sharing.head_facts import HeadFacts

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["eval_results", "metrics_section"]

_METRIC_NAMES: Final = {
    "S": "S-measure",
    "F_adaptive": "F-measure, adaptive",
    "F_mean": "F-measure, mean",
    "F_max": "F-measure, maximum",
    "F_weighted": "F-measure, weighted",
    "E_adaptive": "E-measure, adaptive",
    "E_mean": "E-measure, mean",
    "E_max": "E-measure, maximum",
    "MAE": "mean absolute error",
    "IoU": "intersection over union",
    "Dice": "Dice",
}


def metrics_section(facts: HeadFacts) -> str:
    """What was found of a head, as Markdown: figures, what they rest on, and which are not over a whole set."""
    parts = []
    if facts.evaluated:
        parts.append(_figures(facts.evaluated))
        for name, found in facts.evaluated.items():
            if "not_comparable" in found:
                parts.append(f"**{name} is not comparable with published figures: {found['not_comparable']}.**")
            elif "missing" in found:
                whole = found["images"] + found["missing"]
                parts.append(f"**{name} was {judged_in_part(found['images'], whole)}.**")
        parts += _conventions(facts.evaluated)
    if facts.held_out_metrics:
        figures = ", ".join(f"{key} {value:.4f}" for key, value in facts.held_out_metrics.items())
        parts.append(
            f"On the held-out share, at the network's own size, after epoch {facts.info.epoch}: {figures}. These "
            f"images took part in choosing the state if the best one was kept, so they flatter it."
        )
    return "\n\n".join(parts) or "None were measured before it was exported."


def _figures(evaluated: dict[str, dict[str, Any]]) -> str:
    """The figures of all sets as one table; those for images without an object where there are any."""
    sets = evaluated.values()
    lines = [f"| | {' | '.join(evaluated)} |", f"|---|{'---:|' * len(sets)}"]
    told = [figure for figure in FIGURES if any(figure in found for found in sets)]
    for figure in told:
        better = "lower" if figure in LOWER_IS_BETTER else "higher"
        cells = " | ".join(f"{found[figure]:.4f}" if figure in found else "–" for found in sets)
        lines.append(f"| {_spelled(figure)} ({better} is better) | {cells} |")
    counts = {"images": "images", "images_without_object": "images without an object"}
    for count, words in counts.items():
        if any(count in found for found in sets):
            lines.append(f"| {words} | {' | '.join(format(found.get(count, 0), ',') for found in sets)} |")
    return "\n".join(lines)


def _conventions(evaluated: dict[str, dict[str, Any]]) -> list[str]:
    """What the figures rest on, and where sets differ in that, a sentence for each kind."""
    kinds: dict[str, list[str]] = {}
    for name, found in evaluated.items():
        kinds.setdefault("; ".join(f"{what}: {how}" for what, how in found["conventions"].items()), []).append(name)
    whose = {said: f", {', '.join(names)}" if len(kinds) > 1 else "" for said, names in kinds.items()}
    return [f"By `dsu eval`{of}, so: {said}." for said, of in whose.items()]


def _spelled(figure: str) -> str:
    metric, over_objects = metric_of(figure)
    name = _METRIC_NAMES.get(metric, figure_name(metric))
    return f"{name}, with an object" if over_objects else name


def eval_results(facts: HeadFacts) -> list["EvalResult"]:
    """The figures as the hub takes them; of a part of a set, the data set's name says so."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            "image-segmentation",
            dataset.lower(),
            f"{dataset} ({found['not_comparable']})" if "not_comparable" in found else dataset,
            metric,
            figure,
            metric_name=_METRIC_NAMES[metric],
        )
        for dataset, found in _judged(facts).items()
        for metric, figure in found.items()
        if metric in METRICS
    ]


def _judged(facts: HeadFacts) -> dict[str, dict[str, Any]]:
    """By set, what `dsu eval` found; else what training found on the held-out share."""
    if facts.evaluated:
        return facts.evaluated
    found = facts.held_out_metrics
    return {f"{facts.data_name}, held-out share": found} if found and facts.data_name else {}
