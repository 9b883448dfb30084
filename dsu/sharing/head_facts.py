"""What can be said of a head without loading its encoders: for people (`dsu head info`) and for its model card."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open

from dsu.data.images import file_sha256
from dsu.encoders.weights import Source, published_source
from dsu.heads.head_file import HeadInfo, read_head_info
from dsu.metrics.figures import MINMAX
from dsu.metrics.paper import incomparable
from dsu.prediction.predict import RECORD_FILE
from dsu.settings import TrainingSettings

__all__ = ["EncoderFacts", "HeadFacts", "evaluated_metrics", "head_facts"]

_STATISTICS: Final = ("running_mean", "running_var", "num_batches_tracked")
"""Endings of what batch norms keep beside what trains."""

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
"""What of a run's settings people ask for first."""

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
"""What they want to know where it is not the default."""


@dataclass(frozen=True)
class EncoderFacts:
    """One frozen encoder of a head.

    Attributes:
        name: such as "Hiera large".
        size: of its input, in pixels.
        sha256: digest of the weights that the head was trained on; None where it was not noted.
        random: whether these weights are random ones, which every dsu draws alike.
        source: where weights of this size are published; None for random ones and sizes that nobody published.
    """

    name: str
    size: int
    sha256: str | None
    random: bool
    source: Source | None


@dataclass(frozen=True)
class HeadFacts:
    """A head's file: what stands in it, how large it is, and what it was judged at.

    Attributes:
        path, nbytes: of the file.
        info: its metadata.
        parameters: numbers that train, the batch norms' statistics not among them.
        encoders: those that it needs.
        evaluated: what `dsu eval` found of its predictions, a mapping of metrics by set; see `evaluated_metrics`.
    """

    path: Path
    nbytes: int
    info: HeadInfo
    parameters: int
    encoders: tuple[EncoderFacts, ...]
    evaluated: dict[str, dict[str, Any]]

    @property
    def data_name(self) -> str | None:
        """The training split; None for a head of a published checkpoint."""
        name = self.info.dataset.get("split")
        return name if isinstance(name, str) else None

    @property
    def benchmark(self) -> bool:
        """Whether it was trained on one of the literature's data sets."""
        return self.info.dataset.get("benchmark") is True

    @property
    def held_out(self) -> int:
        """How many images, or tiles, were held out to validate on."""
        names = self.info.dataset.get("held_out")
        return len(names) if isinstance(names, list) else 0

    @property
    def unit(self) -> str:
        """What it was trained on: images, or their tiles."""
        return "images" if self.info.tiling is None else "tiles"

    @property
    def random(self) -> bool:
        """Whether its encoders are random ones: good for trying things out, for nothing else."""
        return self.info.random

    @property
    def adapters(self) -> str:
        """Which of Hiera's blocks have adapters, in words."""
        depth, adapted = self.info.config.hiera.depth, self.info.config.adapt_last
        if adapted in (0, depth):
            return f"in front of all {depth} Hiera blocks" if adapted else "none"
        return f"in front of the last {adapted} of {depth} Hiera blocks"

    @property
    def recipe(self) -> dict[str, str]:
        """The settings that people ask for first, in words."""
        training, fields = self.info.training, TrainingSettings.model_fields
        unusual = [key for key in _UNUSUAL if key in training and training[key] != fields[key].default]
        return {key.replace("_", " "): str(training[key]) for key in (*_RECIPE, *unusual) if key in training}

    @property
    def held_out_metrics(self) -> dict[str, float]:
        """What training found on the images held out; nothing where none were."""
        return {key.removeprefix("val_"): figure for key, figure in self.info.metrics.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": str(self.path),
            "bytes": self.nbytes,
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
    """The facts of a head's file. Raises `DsuError` as `read_head_info`."""
    info = read_head_info(path)
    with safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(_STATISTICS))
    return HeadFacts(path, path.stat().st_size, info, parameters, _encoders(info), evaluated_metrics(path))


def evaluated_metrics(head: Path) -> dict[str, dict[str, Any]]:
    """What `dsu eval` wrote of the predictions in a head's run folder, by set.

    Of each set its figures, `images`, `conventions`, where there are any `images_without_object` and `missing` ones
    (without a prediction), and where it is not to be held against the published figures `not_comparable`: why.

    Nothing where nothing was judged, or where the predictions are pictures, cut at a threshold or of another head.
    """
    folder = head.parent / "predictions"
    try:
        record = json.loads((folder / RECORD_FILE).read_text())
        judged = json.loads((folder / "metrics.json").read_text())
        mine = record["head_sha256"] == file_sha256(head) and record["kind"] == "mask" and record["threshold"] is None
        return {name: _judged(name, found) for name, found in judged.items() if mine and name in record["sets"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or not as dsu writes them
        return {}


def _judged(name: str, found: dict[str, Any]) -> dict[str, Any]:
    conventions = dict(found["conventions"])
    remark = incomparable(name, int(found["images"]), minmax=conventions.get("map") == MINMAX)
    return {
        **{figure: float(value) for figure, value in found.items() if isinstance(value, int | float)},
        **{count: int(found[count]) for count in ("images", "images_without_object", "missing") if count in found},
        "conventions": conventions,
        **({"not_comparable": remark} if remark else {}),
    }


def _encoders(info: HeadInfo) -> tuple[EncoderFacts, ...]:
    config = info.config
    drawn = info.random_weights
    hiera, dino = config.hiera.name, config.dino.name
    named = [("hiera", f"Hiera {hiera}", hiera, config.hiera_size)]
    if config.injections:
        named.append(("dino", f"DINOv2 {dino}", dino, config.dino_size))
    return tuple(
        EncoderFacts(
            name=shown,
            size=size,
            sha256=info.encoders.get(encoder),
            random=drawn or name == "toy",
            source=None if drawn else published_source("hiera" if encoder == "hiera" else "dino", name),
        )
        for encoder, shown, name, size in named
    )
