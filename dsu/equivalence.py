"""Verify step by step that training from the store equals training end to end.

The same head trains on the same batches in two ways: from the store, and live (end to end). On any device, stored
features, the first logits, the first masks and the first loss must be bit-identical. On a CPU, and on a GPU with
`deterministic`, all later losses, gradients and weights must be, too. Without `deterministic`, a GPU sums in another
order at every call: then a second live run measures how much training differs from itself, and these rows may differ by
as much.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsu.batches import BatchIndices
from dsu.data.datasets import Paths
from dsu.data.views import view_name
from dsu.datasets import ImageDataset
from dsu.errors import DsuError
from dsu.features.samples import FeatureDataset
from dsu.network.network import DSUNet
from dsu.prediction.inference import finish_mask
from dsu.progress import SILENT, Progress
from dsu.settings import EncoderWeights, TrainingSettings
from dsu.training.runs import prepare_run
from dsu.training.trainer import Trainer


@dataclass(frozen=True)
class Difference:
    """One row: the difference between store and live.

    Attributes:
        what: a stored feature's name, `logits`, `masks`, `loss`, a parameter's name.
        stage: `stored`, `logits`, `masks`, `loss`, `gradient` or `weight`.
        absolute: the largest absolute difference.
        relative: `absolute` divided by the largest absolute value.
        allowance: the largest absolute difference between two live runs; 0 if equality is required.
        where: the sample and view (or step) of the largest difference.
    """

    what: str
    stage: str
    absolute: float
    relative: float
    allowance: float = 0.0
    where: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is at most the allowance (NaN fails)."""
        return self.absolute <= self.allowance


@dataclass(frozen=True)
class Rounding:
    """The effect of storing float16 instead of float32, for the first batch and the initial head.

    Attributes:
        logits: largest absolute difference of the finest logits.
        grey_levels: largest difference of the 8-bit masks.
        mae: difference of the mean absolute errors with respect to the ground truth.
    """

    logits: float
    grey_levels: int
    mae: float


@dataclass(frozen=True)
class Report:
    """All rows, and the effect of rounding."""

    rows: tuple[Difference, ...]
    rounding: Rounding
    steps: int
    batch_size: int
    features: tuple[str, ...]
    runtime: str
    again: str
    """The command that stores the features again."""

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.passed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [{**asdict(row), "passed": row.passed} for row in self.rows]
        return {**asdict(self), "passed": self.passed, "rows": rows}


def check_equivalence(
    settings: TrainingSettings,
    *,
    paths: Paths,
    weights: EncoderWeights,
    steps: int = 20,
    progress: Progress = SILENT,
) -> Report:
    """Train `steps` steps from the store and live, and compare all intermediate results.

    Raises `DsuError` if there is no store, or if its images are missing.
    """

    def trainer(*, end_to_end: bool) -> Trainer:
        fixed = {"val_fraction": 0.0, "test_fraction": 0.0, "fold": None, "keep": "last", "freeze_adapter_epochs": 0}
        fixed["compile"] = False
        way = settings.model_copy(update={**fixed, "end_to_end": end_to_end})
        return prepare_run(way, paths=paths, weights=weights, progress=progress).trainer

    stored, live = trainer(end_to_end=False), trainer(end_to_end=True)
    if not isinstance(live.main.train, ImageDataset):
        raise DsuError("The images are gone, so there is nothing to compare the store with: restore them.")
    assert isinstance(stored.main.train, FeatureDataset)
    if stored.network.hiera is not None:
        stored.network.hiera = live.network.hiera  # only one copy of the frozen weights in memory
    exact = live.runtime.device.type == "cpu" or live.runtime.deterministic
    ways = (stored, live) if exact else (stored, live, replace(live, network=_twin(live.network)))
    batches = list(islice(chain.from_iterable(map(live.epoch_batches, count())), steps))
    rounding = _rounding(live, batches[0])
    rows = _compare_features(stored, live, batches, progress)
    rows += _compare_outputs(stored, live, batches[0])
    rows += _compare_training(ways, batches, progress)
    return Report(
        tuple(rows),
        rounding,
        len(batches),
        settings.batch_size,
        live.main.point.features,
        live.runtime.describe(),
        stored.main.train.store.command("--rebuild"),
    )


def _twin(network: DSUNet) -> DSUNet:
    """A second network with a copy of the head and the same encoders."""
    twin = DSUNet(
        network.config,
        network.hiera,
        network.dino,
        feature_dtype=network.feature_dtype,
        encoder_batch_size=network.encoder_batch_size,
    )
    twin.head.load_state_dict(network.head.state_dict())
    return twin


def _compare_features(
    stored: Trainer, live: Trainer, batches: Sequence[BatchIndices], progress: Progress
) -> list[Difference]:
    """Compare all features that are read, for every sample and view in the batches."""
    rows = []
    with progress.task("comparing stored features", sum(len(names) for names, _ in batches)) as task:
        for names, views in batches:
            kept, computed = (_features(way, (names, views)) for way in (stored, live))
            for name in live.main.point.features:
                each = (kept[name].float() - computed[name].float()).abs().flatten(1).amax(1)
                worst = int(each.nan_to_num(nan=torch.inf).argmax())
                where = f"{names[worst]}, view {view_name(views[worst])}"
                rows.append(_row(name, "stored", (kept[name], computed[name]), where=where))
            task.advance(len(names))
    return _worst(rows)


def _features(trainer: Trainer, drawn: BatchIndices) -> dict[str, Tensor]:
    """The features that a step starts from, as stored or newly encoded."""
    batch = trainer.main.train.read(*drawn).to(trainer.runtime.device).flipped()
    inputs = batch.inputs
    missing = [name for name in trainer.main.point.features if name not in ("pixels", *batch.features)]
    with trainer.runtime.autocast():
        encoded = trainer.network.encode(inputs["pixel_values"], inputs["guide_values"], missing)
    return {"pixels": inputs["pixel_values"], **batch.features, **encoded}


def _compare_outputs(stored: Trainer, live: Trainer, batch: BatchIndices) -> list[Difference]:
    """Compare the initial head's three outputs and 8-bit masks in evaluation mode."""
    outputs = [_outputs(way, batch)[0] for way in (stored, live)]
    return [
        _row("logits", "logits", [torch.cat(each, dim=1) for each in outputs]),
        _row("masks", "masks", [_masks(each[-1]) for each in outputs]),
    ]


def _outputs(trainer: Trainer, batch: BatchIndices) -> tuple[list[Tensor], Tensor]:
    """The head's outputs in evaluation mode, and the ground truth."""
    trainer.network.eval()
    with torch.no_grad():
        return trainer.forward(trainer.main.train.read(*batch))


def _masks(logits: Tensor) -> Tensor:
    """(B, 1, S, S) logits to (B, S, S) grey levels, uint8, not normalised."""
    side = logits.shape[-1]
    maps = np.stack([finish_mask(one, (side, side), "none") for one in logits])
    return torch.from_numpy((maps * 255).astype(np.uint8))


def _compare_training(ways: Sequence[Trainer], batches: Sequence[BatchIndices], progress: Progress) -> list[Difference]:
    """Compare the losses of all steps, the gradients of the first, and weights and statistics after the last."""
    gradients: list[Difference] = []
    losses = []
    for way in ways:
        way.network.train()
    with progress.task(f"training {len(ways)} ways", len(batches), "steps") as task:
        for step, batch in enumerate(batches, start=1):
            found = [way.step(way.main.train.read(*batch)) for way in ways]
            what, compared = ("first loss", found[:2]) if step == 1 else ("later losses", found)
            losses.append(_row(what, "loss", compared, where=f"step {step}"))
            if not gradients:
                parameters = [way.network.head.named_parameters() for way in ways]
                first = [{n: p.grad.clone() for n, p in named if p.grad is not None} for named in parameters]
                gradients = _by_name("gradient", first)
            task.advance()
    weights = [{n: t for n, t in way.network.head.state_dict().items() if t.is_floating_point()} for way in ways]
    return [*_worst(losses), *gradients, *_by_name("weight", weights)]


def _by_name(stage: str, ways: Sequence[Mapping[str, Tensor]]) -> list[Difference]:
    differing = sorted({name for way in ways for name in way.keys() ^ ways[0].keys()})
    if differing:
        raise DsuError(
            f"Some parameters have a {stage} in one way of training but not in the other "
            f"({', '.join(differing[:3])}): a bug in dsu."
        )
    return [_row(name, stage, [way[name] for way in ways]) for name in ways[0]]


def _row(what: str, stage: str, ways: Sequence[Tensor], where: str = "") -> Difference:
    """The difference of stored and live; the allowance comes from a second live run, if there is one."""
    stored, live, *again = (way.double() for way in ways)
    absolute, scale = _largest(stored - live), _largest(live)
    allowance = _largest(again[0] - live) if again else 0.0
    return Difference(what, stage, absolute, absolute / scale if scale else absolute, allowance, where)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _worst(rows: Iterable[Difference]) -> list[Difference]:
    """Join rows that compare the same item: the largest difference, with the largest allowance."""
    found: dict[str, list[Difference]] = {}
    for row in rows:
        found.setdefault(row.what, []).append(row)
    return [
        replace(
            max(same, key=lambda row: math.inf if math.isnan(row.absolute) else row.absolute),
            allowance=max(row.allowance for row in same),
        )
        for same in found.values()
    ]


def _rounding(live: Trainer, batch: BatchIndices) -> Rounding:
    """Compare logits, masks and MAE of the initial head between features rounded to float16 and to float32."""
    kept = live.network.feature_dtype
    logits, masks, errors = [], [], []
    for kind in (torch.float16, torch.float32):
        live.network.feature_dtype = kind
        outputs, truth = _outputs(live, batch)
        logits.append(outputs[-1])
        masks.append(_masks(outputs[-1]).int())
        errors.append(float((outputs[-1].sigmoid() - truth).abs().mean()))
    live.network.feature_dtype = kept
    return Rounding(_largest(logits[0] - logits[1]), int(_largest(masks[0] - masks[1])), abs(errors[0] - errors[1]))
