"""Facts about heads without loading their encoders: for people (`dsu head`) and for model cards."""

import json
import math
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open

from dsu.encoders.sources import Source, published_source
from dsu.errors import DsuError, UsageError
from dsu.heads.head_file import HEAD_FILE, HeadInfo, head_sha256, read_head_info
from dsu.metrics.figures import MINMAX
from dsu.metrics.paper import incomparable
from dsu.prediction.record import THRESHOLDS_FILE
from dsu.prediction.targets import RECORD_FILE
from dsu.progress import counted
from dsu.settings import TrainingSettings
from dsu.thresholds import level_of

__all__ = ["EncoderFacts", "HeadFacts", "ListedHead", "find_heads", "head_facts"]

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
        sha256: digest of the weights that the head was trained on; None if it was not noted.
        random: whether these weights are random ones, which every dsu draws alike.
        source: where its weights are published; None for random ones, sizes that nobody published, and weights out of
            a file that are not known to be the published ones.
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
        path: of the file.
        info: its metadata.
    """

    path: Path
    info: HeadInfo

    @cached_property
    def parameters(self) -> int:
        """Numbers that train, the batch norms' statistics not among them."""
        with safe_open(self.path, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
        return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(_STATISTICS))

    @cached_property
    def evaluated(self) -> dict[str, dict[str, Any]]:
        """What `dsu eval` wrote of the predictions in its run folder, by set.

        Of each set its figures, `images`, `conventions`, where there are any `images_without_object` and `missing`
        ones (without a prediction), and where it is not to be held against the published figures `not_comparable`:
        why.

        Empty if there are none, or if the predictions are not masks, are binarised, or come from another head.
        """
        folder = self.path.parent / "predictions"
        try:
            made = json.loads((folder / RECORD_FILE).read_text())
            evaluated = json.loads((folder / "metrics.json").read_text())
            mine = (
                made["head_sha256"] == head_sha256(self.path) and made["kind"] == "mask" and made["threshold"] is None
            )
            return {
                name: _comparable(name, found) for name, found in evaluated.items() if mine and name in made["sets"]
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or not as dsu writes them
            return {}

    @property
    def at_threshold(self) -> list[str]:
        """What the head's threshold does, by what `dsu eval` kept beside its predictions: a phrase a set.

        Nothing where none is stored, or nothing was evaluated at it.
        """
        folder = self.path.parent / "predictions"
        try:
            made = json.loads((folder / RECORD_FILE).read_text())
            found = json.loads((folder / THRESHOLDS_FILE).read_text())
            if self.info.threshold is None or made["head_sha256"] != head_sha256(self.path):
                return []
            chosen = level_of(self.info.threshold)
            sets = next(one["sets"] for one in found["proposals"] if level_of(one["threshold"]) == chosen)
            return [
                f"{name}: {at['found']:,} of {found['images'][name]['with_object']:,} images with an object found, "
                f"{at['false_alarms']:,} false alarms on {found['images'][name]['without_object']:,} without, "
                f"Dice {at['dice']:.3f}"
                for name, at in sets.items()
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):  # not as dsu writes them
            return []

    @property
    def encoders(self) -> list[EncoderFacts]:
        """The frozen encoders that it needs."""
        config, drawn, known = self.info.config, self.info.random_weights, self.info.known_encoders
        hiera, dino = config.hiera.name, config.dino.name
        found = [
            EncoderFacts(
                name=f"Hiera {hiera}",
                size=config.hiera_size,
                sha256=self.info.encoders.get("hiera"),
                random=drawn or hiera == "toy",
                source=published_source("hiera", hiera) if "hiera" in known else None,
            ),
            EncoderFacts(
                name=f"DINOv2 {dino}",
                size=config.dino_size,
                sha256=self.info.encoders.get("dino"),
                random=drawn or dino == "toy",
                source=published_source("dino", dino) if "dino" in known else None,
            ),
        ]
        return found if config.injections else found[:1]

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


@dataclass(frozen=True)
class ListedHead:
    """A trained head in one line. Of one that can't be read only path, time and damage are known.

    Attributes:
        path: of its run folder.
        written: when it was.
        damage: why it can't be read, a sentence.
        data: the training split; None for a head of a published checkpoint.
        preset: of its network.
        adapt_last, depth: how many of Hiera's blocks have adapters, and how many there are.
        epoch, epochs: after which epoch of how many it was taken; of a published checkpoint the latter is None.
        tiled: whether it was trained, and so validated, on tiles of images.
        held_out: its metrics on the images (or tiles) held out; nothing where none were.
    """

    path: Path
    written: datetime
    damage: str | None = None
    data: str | None = None
    preset: str | None = None
    adapt_last: int = 0
    depth: int = 0
    epoch: int = 0
    epochs: int | None = None
    tiled: bool = False
    held_out: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"path": str(self.path), "written": self.written.isoformat(timespec="seconds")}


def head_facts(path: Path) -> HeadFacts:
    """The facts of a head's file. Raises `DsuError` as `read_head_info`."""
    return HeadFacts(path, read_head_info(path))


def find_heads(folder: Path) -> list[ListedHead]:
    """All heads below a folder, the newest first; damaged ones are among them.

    Raises `UsageError` if there is no such folder; a `runs` that no run has made yet is merely empty.
    """
    if not folder.is_dir() and folder != Path("runs"):
        raise UsageError(f"There is no folder {folder}: give one that contains run folders.")
    return sorted((_listed(file) for file in folder.rglob(HEAD_FILE)), key=lambda head: head.written, reverse=True)


def _listed(file: Path) -> ListedHead:
    written = datetime.fromtimestamp(file.stat().st_mtime).astimezone()
    try:
        facts = head_facts(file)
    except DsuError as error:
        return ListedHead(file.parent, written, str(error))
    config, epochs = facts.info.config, facts.info.training.get("epochs")
    return ListedHead(
        path=file.parent,
        written=written,
        data=facts.data_name,
        preset=config.preset,
        adapt_last=config.adapt_last,
        depth=config.hiera.depth,
        epoch=facts.info.epoch,
        epochs=epochs if isinstance(epochs, int) else None,
        tiled=facts.info.tiling is not None,
        held_out=facts.held_out_metrics,
    )


def _comparable(name: str, found: dict[str, Any]) -> dict[str, Any]:
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
