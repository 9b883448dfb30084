"""Facts about heads, without loading their encoders, and heads as folders for the Hugging Face hub.

A folder has the head, its settings as JSON, and a model card, whose template is `card.md.jinja`, next to this module.
"""

import json
import math
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import StrictUndefined, Template
from safetensors import safe_open

from dsu.data.benchmarks import COD_TEST, PAGES
from dsu.encoders.sources import Source, published_source
from dsu.errors import DsuError, UsageError
from dsu.files import atomic_write, make_folder
from dsu.heads.head_file import CONFIG_FILE, HEAD_FILE, HeadInfo, head_bytes, head_sha256, load_head, read_head_info
from dsu.hub import is_repository
from dsu.metrics.figures import FIGURES, LOWER_IS_BETTER, METRICS, MINMAX, figure_name, metric_of
from dsu.metrics.paper import evaluated_in_part, incomparable
from dsu.prediction.record import THRESHOLDS_FILE
from dsu.prediction.targets import RECORD_FILE
from dsu.progress import counted
from dsu.settings import TrainingSettings
from dsu.thresholds import level_of

_STATISTICS: Final = ("running_mean", "running_var", "num_batches_tracked")
"""Suffixes of batch norms' tensors that are not trained."""

_RECIPE: Final = (
    "epochs",
    "batch_size",
    "lr",
    "lr_min",
    "weight_decay",
    "bce",
    "views",
    "seed",
    "keep",
    "start_feature",
    "precision",
)
"""A run's most important settings."""

_UNUSUAL: Final = (
    "tile",
    "overlap",
    "balance",
    "region",
    "tversky_beta",
    "focal_gamma",
    "freeze_adapter_epochs",
    "init_from",
    "fold",
)
"""Settings that are shown only if they differ from their defaults."""


@dataclass(frozen=True)
class EncoderFacts:
    """One frozen encoder of a head.

    Attributes:
        name: such as "Hiera large".
        size: side of its input, in pixels.
        sha256: hash of the weights that the head was trained on; None if it was not recorded.
        random: whether these are random weights, which dsu reproduces from a fixed seed.
        source: where its weights are published; None for random weights, for sizes without published weights, and for
            weights from a file that are not known to be the published ones.
    """

    name: str
    size: int
    sha256: str | None
    random: bool
    source: Source | None


@dataclass(frozen=True)
class HeadFacts:
    """A head's metadata, size and scores.

    Attributes:
        path: the head's file.
        info: its metadata.
    """

    path: Path
    info: HeadInfo

    @cached_property
    def parameters(self) -> int:
        """Number of trained parameters, without the batch norms' statistics."""
        with safe_open(self.path, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
        return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(_STATISTICS))

    @cached_property
    def evaluated(self) -> dict[str, dict[str, Any]]:
        """What `dsu eval` wrote about the predictions in the run's folder, by set.

        Each set has its figures, `images` and `conventions`, and if they apply: `images_without_object`, `missing` (the
        number of images without a prediction), `trained_on` (the number of training images in the set) and
        `not_comparable`, the reason why its figures can't be compared with published ones.

        Empty if nothing was evaluated, or if the predictions are not soft masks of this head.
        """
        folder = self.path.parent / "predictions"
        try:
            record = json.loads((folder / RECORD_FILE).read_text())
            metrics = json.loads((folder / "metrics.json").read_text())
            own = record["head_sha256"] == head_sha256(self.path)
            soft = record["kind"] == "mask" and record["threshold"] is None
            return {
                name: _with_remark(name, found)
                for name, found in metrics.items()
                if own and soft and name in record["sets"]
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing, or not in dsu's format
            return {}

    @property
    def at_threshold(self) -> list[str]:
        """The results at the head's threshold, from the file that `dsu eval` wrote: one phrase per set.

        Empty if the head has no threshold, or if it was not evaluated at this threshold.
        """
        folder = self.path.parent / "predictions"
        try:
            record = json.loads((folder / RECORD_FILE).read_text())
            found = json.loads((folder / THRESHOLDS_FILE).read_text())
            if self.info.threshold is None or record["head_sha256"] != head_sha256(self.path):
                return []
            chosen = level_of(self.info.threshold)
            sets = next(one["sets"] for one in found["proposals"] if level_of(one["threshold"]) == chosen)
            return [
                f"{name}: {at['found']:,} of {found['images'][name]['with_object']:,} images with an object found, "
                f"{at['false_alarms']:,} false alarms on {found['images'][name]['without_object']:,} without, "
                f"Dice {at['dice']:.3f}"
                for name, at in sets.items()
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):  # missing, or another format
            return []

    @property
    def encoders(self) -> list[EncoderFacts]:
        """The frozen encoders that the head needs."""
        config, known = self.info.config, self.info.known_encoders
        hiera = ("hiera", "Hiera", config.hiera.name, config.hiera_size)
        dino = ("dino", "DINOv2", config.dino.name, config.dino_size)
        return [
            EncoderFacts(
                name=f"{encoder} {name}",
                size=size,
                sha256=self.info.encoders.get(key),
                random=self.info.random_weights or name == "toy",
                source=published_source(key, name) if key in known else None,
            )
            for key, encoder, name, size in ((hiera, dino) if config.injections else (hiera,))
        ]

    @property
    def data_name(self) -> str | None:
        """The training split's name; None for a head from a published checkpoint."""
        name = self.info.dataset.get("split")
        return name if isinstance(name, str) else None

    @property
    def benchmark(self) -> bool:
        """Whether it was trained on a benchmark of the literature."""
        return self.info.dataset.get("benchmark") is True

    @property
    def held_out(self) -> int:
        """Number of images (or tiles) held out for validation."""
        names = self.info.dataset.get("held_out")
        return len(names) if isinstance(names, list) else 0

    @property
    def unit(self) -> str:
        """The unit of training: `images` or `tiles`."""
        return "images" if self.info.tiling is None else "tiles"

    @property
    def adapters(self) -> str:
        """The Hiera blocks with adapters, in words."""
        depth, adapted = self.info.config.hiera.depth, self.info.config.adapt_last
        if adapted in (0, depth):
            return f"in front of all {depth} Hiera blocks" if adapted else "none"
        return f"in front of the last {adapted} of {depth} Hiera blocks"

    @property
    def recipe(self) -> dict[str, str]:
        """The most important training settings, as text."""
        training, fields = self.info.training, TrainingSettings.model_fields
        unusual = [key for key in _UNUSUAL if key in training and training[key] != fields[key].default]
        return {key.replace("_", " "): str(training[key]) for key in (*_RECIPE, *unusual) if key in training}

    @property
    def held_out_metrics(self) -> dict[str, float]:
        """Validation metrics on the held-out images; empty if none were held out."""
        return {key.removeprefix("val_"): figure for key, figure in self.info.metrics.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": str(self.path),
            "bytes": self.path.stat().st_size,
            "parameters": self.parameters,
            **self.info.model_dump(mode="json"),
            "encoders": [
                {
                    "name": encoder.name,
                    "input_size": encoder.size,
                    "sha256": encoder.sha256,
                    "random": encoder.random,
                    "repository": encoder.source and encoder.source.repository,
                    "licence": encoder.source and encoder.source.licence,
                }
                for encoder in self.encoders
            ],
            "evaluated": self.evaluated,
        }


def head_facts(path: Path) -> HeadFacts:
    """Read the facts of a head's file. Raises `DsuError` as `read_head_info`."""
    return HeadFacts(path, read_head_info(path))


def find_heads(folder: Path) -> list[dict[str, Any]]:
    """All heads below a folder, newest first, as plain JSON values.

    `path` is the run folder, `written` the time of writing, `data` the training split (None for a head from a published
    checkpoint), `preset` the network's, `adapt_last` the number of Hiera blocks with adapters, of `depth`; `epoch` the
    epoch of the head, of `epochs` (None for a published checkpoint); `tiled` whether the head was trained and validated
    on tiles; `held_out` its metrics on held-out images or tiles, if any. `damage` is a sentence saying why the head
    can't be read, or None; then only path and time are known.

    Raises `UsageError` if there is no such folder, except for the default `runs`.
    """
    if not folder.is_dir() and folder != Path("runs"):
        raise UsageError(f"There is no folder {folder}: give one that contains run folders.")
    found = sorted(folder.rglob(HEAD_FILE), key=lambda file: file.stat().st_mtime, reverse=True)
    return [_listed(file) for file in found]


def _listed(file: Path) -> dict[str, Any]:
    written = datetime.fromtimestamp(file.stat().st_mtime).astimezone().isoformat(timespec="seconds")
    listed: dict[str, Any] = {"path": str(file.parent), "written": written, "damage": None, "data": None}
    listed |= {"preset": None, "adapt_last": 0, "depth": 0, "epoch": 0, "epochs": None, "tiled": False, "held_out": {}}
    try:
        facts = head_facts(file)
    except DsuError as error:
        return {**listed, "damage": str(error)}
    config, epochs = facts.info.config, facts.info.training.get("epochs")
    return {
        **listed,
        "data": facts.data_name,
        "preset": config.preset,
        "adapt_last": config.adapt_last,
        "depth": config.hiera.depth,
        "epoch": facts.info.epoch,
        "epochs": epochs if isinstance(epochs, int) else None,
        "tiled": facts.info.tiling is not None,
        "held_out": facts.held_out_metrics,
    }


def _with_remark(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """A set's entry in metrics.json, with the reason why its figures can't be compared with published ones, if any."""
    conventions = dict(found["conventions"])
    images, trained_on = int(found["images"]), int(found.get("trained_on", 0))
    remark = incomparable(name, images, minmax=conventions.get("map") == MINMAX)
    if trained_on:
        remark = f"trained on {trained_on:,} of {counted(images, 'images')}"
    return {
        **{figure: float(value) for figure, value in found.items() if isinstance(value, int | float)},
        **{
            count: int(found[count])
            for count in ("images", "images_without_object", "missing", "trained_on")
            if count in found
        },
        "conventions": conventions,
        **({"not_comparable": remark} if remark else {}),
    }


# ---- model cards ----

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
