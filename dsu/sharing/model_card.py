"""Write a head as a folder for the Hugging Face hub: the head, its settings as JSON, and a model card.

The card's template is `card.md.jinja`, next to this module.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import StrictUndefined, Template

from dsu.data.benchmarks import COD_TEST, PAGES
from dsu.errors import UsageError
from dsu.files import atomic_write, make_folder
from dsu.heads.head_file import CONFIG_FILE, HEAD_FILE, head_bytes, load_head
from dsu.hub import is_repository
from dsu.metrics.figures import FIGURES, LOWER_IS_BETTER, METRICS, figure_name, metric_of
from dsu.metrics.paper import evaluated_in_part
from dsu.progress import counted
from dsu.sharing.head_facts import HeadFacts, head_facts

CARD_FILE: Final = "README.md"

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


def export_folder(
    head: Path, out: Path, *, name: str | None = None, licence: str = "apache-2.0", overwrite: bool = False
) -> list[Path]:
    """Write a head with its model card and `config.json` into a folder; returns the files.

    The tensors stay bit-identical. Private details of the data set are removed: see `HeadInfo.public`.

    Args:
        head: the head's file.
        out: the folder to create.
        name: OWNER/NAME for the card; None: derived from the folder's name.
        licence: the head's licence, as an identifier of the hub.
        overwrite: replace the files of an earlier export; other files in the folder stay.

    Raises `UsageError` if `out` is a file, a run's folder or a folder with other files, and `DsuError` as `load_head`
    and `atomic_write`.
    """
    if name is not None and not is_repository(name):
        raise UsageError(f"--name {name} is not an OWNER/NAME for the hub: use letters, digits, '.', '_' and '-'.")
    _check_free(head, out, overwrite)
    facts = head_facts(head)
    state, info = load_head(head)
    public = info.public
    # For people and other tools; dsu itself only reads the head's file.
    values = {**facts.to_json(), **public.model_dump(mode="json", exclude={"encoders"})}
    config = {"library_name": "dsu-net", **{key: values[key] for key in values if key not in ("path", "bytes")}}
    contents = {
        HEAD_FILE: head_bytes(state, public),
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
        CARD_FILE: model_card(facts, name or f"OWNER/{out.resolve().name}", licence).encode(),
    }
    make_folder(out)
    for filename, content in contents.items():
        atomic_write(out / filename, content)
    return [out / filename for filename in contents]


def _check_free(head: Path, out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give another folder with --out.")
    # The head in a run's folder has the location of its images, which `predict` without SOURCE needs: keep it.
    if out.is_dir() and (out.resolve() == head.parent.resolve() or (out / "settings.yaml").exists()):
        raise UsageError(f"{out} is a run folder: give another folder with --out.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UsageError(f"{out} is not empty: give another --out, or --overwrite to replace an earlier export.")


def model_card(facts: HeadFacts, name: str, licence: str = "apache-2.0") -> str:
    """The model card of a head: YAML front matter for the hub, then Markdown.

    Args:
        facts: the head's facts.
        name: OWNER/NAME on the hub.
        licence: the head's licence, as an identifier of the hub.
    """
    text = (files("dsu.sharing") / "card.md.jinja").read_text("utf-8")
    conventions: dict[str, list[str]] = {}
    for name_of_set, found in facts.evaluated.items():
        text_of_set = "; ".join(f"{key}: {value}" for key, value in found["conventions"].items())
        conventions.setdefault(text_of_set, []).append(name_of_set)
    card = Template(text, trim_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    rendered: str = card.render(
        facts=facts,
        name=name,
        title=name.rpartition("/")[2],
        front_matter=_front_matter(facts, name, licence),
        page=PAGES.get(str(facts.info.dataset.get("dataset"))),
        figures=_figures(facts),
        conventions=conventions,
        counted=counted,
        evaluated_in_part=evaluated_in_part,
    )
    return rendered


def _figures(facts: HeadFacts) -> list[tuple[str, list[str]]]:
    """One row per figure that any set has, with its name and every set's value; then the numbers of images."""
    sets = facts.evaluated.values()
    rows = []
    for figure in FIGURES:
        metric, over_objects = metric_of(figure)
        label = _METRIC_NAMES.get(metric, figure_name(metric)) + (", with an object" if over_objects else "")
        better = "lower" if figure in LOWER_IS_BETTER else "higher"
        cells = [f"{found[figure]:.4f}" if figure in found else "–" for found in sets]
        rows.append((figure, f"{label} ({better} is better)", cells))
    for count in ("images", "images_without_object"):
        label = "images" if count == "images" else "images without an object"
        rows.append((count, label, [f"{found.get(count, 0):,}" for found in sets]))
    return [(label, cells) for key, label, cells in rows if any(key in found for found in sets)]


def _front_matter(facts: HeadFacts, name: str, licence: str) -> str:
    results = _eval_results(facts)
    repositories = [encoder.source.repository for encoder in facts.encoders if encoder.source]
    dataset = str(facts.info.dataset.get("dataset", facts.data_name))
    camouflaged = dataset in {"COD", *(test.removesuffix("-TE") for test in COD_TEST)}
    task = "camouflaged-object-detection" if camouflaged else "salient-object-detection"
    tags = ["dsu", "dsu-net", "image-segmentation", "sam2", "dinov2"]
    card = ModelCardData(
        license=licence,
        library_name="dsu-net",
        pipeline_tag="image-segmentation",
        tags=[*tags, task] if facts.benchmark else tags,
        base_model=repositories or None,
        datasets=[dataset] if facts.benchmark else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
        model_name=name.rpartition("/")[2] if results else None,
    )
    if repositories:
        card["base_model_relation"] = "adapter"
    return card.to_yaml().strip()


def _eval_results(facts: HeadFacts) -> list[EvalResult]:
    """The figures in the hub's format: those of `dsu eval`, or else those of the held-out share.

    If figures can't be compared with published ones, the data set's name includes the reason.
    """
    evaluated: dict[str, dict[str, Any]] = facts.evaluated
    if not evaluated and facts.data_name:
        evaluated = {f"{facts.data_name}, held-out images": facts.held_out_metrics}
    return [
        EvalResult(
            "image-segmentation",
            dataset.lower(),
            f"{dataset} ({found['not_comparable']})" if "not_comparable" in found else dataset,
            metric,
            found[metric],
            metric_name=_METRIC_NAMES[metric],
        )
        for dataset, found in evaluated.items()
        for metric in found
        if metric in METRICS
    ]
