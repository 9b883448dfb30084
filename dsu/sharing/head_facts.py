"""Facts about heads, without loading their encoders."""

import json
import math
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open

from dsu.data.pairing import PREDICTIONS_FILE
from dsu.encoders.sources import Source, published_source
from dsu.errors import DsuError, UsageError
from dsu.heads.head_file import HEAD_FILE, RUNS, HeadInfo, head_sha256, read_head_info
from dsu.metrics.figures import MINMAX
from dsu.metrics.paper import incomparable
from dsu.prediction.record import THRESHOLDS_FILE
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
            record = json.loads((folder / PREDICTIONS_FILE).read_text())
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
            record = json.loads((folder / PREDICTIONS_FILE).read_text())
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
    if not folder.is_dir() and folder != RUNS:
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
