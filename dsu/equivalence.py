"""Shows that training from the store is end-to-end training, step by step, with allowances that mean something.

Three ways train the same head on the same batches: from the store, live, and live with the frozen prefix run one
sample at a time. What the two live ways differ by is the machine's own doing (kernels that depend on the batch);
that is what the store may differ by, and no more. On a CPU in float32 it is zero.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsu.batches import Batch, Drawn, ImageSamples, points_of, prefix_of
from dsu.data.views import view_name
from dsu.encoders.weights import EncoderWeights
from dsu.errors import DsuError
from dsu.network.network import DSUNet
from dsu.prediction.inference import finish_mask
from dsu.progress import SILENT, Progress
from dsu.settings import TrainingSettings
from dsu.training.runs import open_run
from dsu.training.trainer import Trainer

__all__ = ["Comparison", "Report", "Rounding", "check_equivalence"]


@dataclass(frozen=True)
class Comparison:
    """One row: how far the store is from the live way.

    Attributes:
        what: a stored tensor's name, `logits`, `loss`, a parameter's name.
        stage: `stored`, `logits`, `loss`, `gradient` or `weight`.
        absolute: the largest absolute difference.
        relative: that over the largest absolute value.
        allowance: the largest absolute difference of the live way from itself at another batching.
        where: the sample and view (or step) of the largest difference.
    """

    what: str
    stage: str
    absolute: float
    relative: float
    allowance: float
    where: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is no larger than the allowance (a NaN is)."""
        return self.absolute <= self.allowance


@dataclass(frozen=True)
class Rounding:
    """What storing float16 instead of float32 changes, on the first batch and the initial head.

    Attributes:
        logits: largest absolute difference of the finest logits.
        grey_levels: largest difference of the 8-bit masks.
        mae: difference of the mean absolute errors against the truth.
    """

    logits: float
    grey_levels: int
    mae: float


@dataclass(frozen=True)
class Report:
    """All rows, and what the rounding changes."""

    rows: tuple[Comparison, ...]
    rounding: Rounding
    steps: int
    batch_size: int
    reads: tuple[str, ...]
    runtime: str

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.passed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        rows = [{**asdict(row), "passed": row.passed} for row in self.rows]
        return {**{k: v for k, v in asdict(self).items() if k != "rows"}, "passed": self.passed, "rows": rows}


def check_equivalence(
    settings: TrainingSettings,
    *,
    data_root: Path,
    cache_root: Path,
    weights: EncoderWeights,
    steps: int = 20,
    progress: Progress = SILENT,
) -> Report:
    """Train `steps` steps three ways and compare them at each step of the computation.

    Raises `DsuError` where there is no store to compare with, or its images are gone.
    """
    with tempfile.TemporaryDirectory() as folder:

        def trainer(name: str, *, end_to_end: bool) -> Trainer:
            return open_run(
                settings.model_copy(
                    update={"end_to_end": end_to_end, "val_fraction": 0.0, "fold": None, "keep": "last", "warm_up": 0}
                ),
                data_root=data_root,
                cache_root=cache_root,
                weights=weights,
                out=Path(folder) / name,
                progress=progress,
            ).trainer

        stored, live = trainer("stored", end_to_end=False), trainer("live", end_to_end=True)
        if not isinstance(live.main.train, ImageSamples):
            raise DsuError("The images are gone: there is nothing to compare the store with.")
        _share_encoders(stored, live)
        single = replace(
            live,
            network=_twin(live.network),
            main=replace(live.main, train=_OneByOne(live.main.train, live)),
        )
        batches = _batches(live, steps)
        rounding = _rounding(live, batches[0])
        rows = _compare_points(stored, live, single, batches, progress)
        rows += _compare_logits(stored, live, single, batches[0])
        rows += _compare_training(stored, live, single, batches, progress)
    return Report(
        tuple(rows), rounding, len(batches), settings.batch_size, live.main.point.reads, live.runtime.describe()
    )


@dataclass(frozen=True)
class _OneByOne:
    """Live samples whose prefix has run at batch size 1: the other batching."""

    images: ImageSamples
    live: Trainer

    @property
    def names(self) -> Sequence[str]:
        return self.images.names

    def fetch(self, names: Sequence[str], views: Sequence[int]) -> Batch:
        fetched = self.images.fetch(names, views)
        point, network, runtime = self.live.main.point, self.live.network, self.live.runtime
        points: dict[str, list[Tensor]] = {name: [] for name in point.reads if name != "pixels"}
        for index in range(len(names)):
            ready = fetched.part(index, index + 1).to(runtime.device).flipped()
            with runtime.autocast():
                computed = prefix_of(network, ready, list(points)) if points else {}
            for name, tensor in computed.items():
                points[name].append(tensor.cpu())
        return replace(fetched, dino_pixels=None, points={name: torch.cat(parts) for name, parts in points.items()})


def _share_encoders(stored: Trainer, live: Trainer) -> None:
    """One copy of the frozen weights in memory serves all ways."""
    if stored.network.hiera is not None:
        stored.network.hiera = live.network.hiera


def _twin(network: DSUNet) -> DSUNet:
    """Another head of the same weights around the same encoders."""
    twin = DSUNet(network.architecture, network.hiera, network.dino, network.stored)
    twin.head.load_state_dict(network.head.state_dict())
    return twin


def _batches(trainer: Trainer, steps: int) -> list[Drawn]:
    """The first `steps` batches of training, epoch after epoch."""
    drawn: list[Drawn] = []
    epoch = 0
    while len(drawn) < steps:
        drawn += trainer.epoch_batches(epoch)
        epoch += 1
    return drawn[:steps]


def _compare_points(
    stored: Trainer,
    live: Trainer,
    single: Trainer,
    batches: Sequence[Drawn],
    progress: Progress,
) -> list[Comparison]:
    """Every tensor that is read, for every sample and view that the steps draw."""
    found: dict[str, Comparison] = {}
    with progress.task("comparing stored tensors", sum(len(names) for names, _ in batches)) as task:
        for names, views in batches:
            by_way = [_points(way, way.main.train.fetch(names, views)) for way in (stored, live, single)]
            for name in live.main.point.reads:
                kept, computed, other = (points[name].float() for points in by_way)
                each = (kept - computed).abs().flatten(1).amax(1)
                worst = int(each.nan_to_num(nan=torch.inf).argmax())
                row = _row(name, "stored", kept, computed, other, f"{names[worst]}, view {view_name(views[worst])}")
                found[name] = _worse(found.get(name), row)
            task.advance(len(names))
    return list(found.values())


def _points(trainer: Trainer, batch: Batch) -> dict[str, Tensor]:
    ready = batch.to(trainer.runtime.device).flipped()
    with torch.no_grad(), trainer.runtime.autocast():
        return points_of(trainer.network, ready, trainer.main.point)


def _compare_logits(stored: Trainer, live: Trainer, single: Trainer, batch: Drawn) -> list[Comparison]:
    """The three outputs of the initial head in evaluation mode."""
    outputs = []
    for way in (stored, live, single):
        way.network.eval()
        with torch.no_grad():
            outputs.append(torch.cat(way.forward(way.main.train.fetch(*batch))[0], dim=1))
    return [_row("logits", "logits", outputs[0], outputs[1], outputs[2])]


def _compare_training(
    stored: Trainer,
    live: Trainer,
    single: Trainer,
    batches: Sequence[Drawn],
    progress: Progress,
) -> list[Comparison]:
    """Losses of all steps, gradients of the first, weights and statistics after the last."""
    ways = (stored, live, single)
    gradients: list[Comparison] = []
    loss: Comparison | None = None
    for way in ways:
        way.network.train()
    with progress.task("training three ways", len(batches), "steps") as task:
        for step, batch in enumerate(batches, start=1):
            losses = [way.step(way.main.train.fetch(*batch)) for way in ways]
            loss = _worse(loss, _row("loss", "loss", losses[0], losses[1], losses[2], f"step {step}"))
            gradients = gradients or _by_name("gradient", [_gradients(way.network) for way in ways])
            task.advance()
    assert loss is not None
    weights = [{n: t for n, t in way.network.head.state_dict().items() if t.is_floating_point()} for way in ways]
    return [loss, *gradients, *_by_name("weight", weights)]


def _gradients(network: DSUNet) -> dict[str, Tensor]:
    return {n: p.grad.detach().clone() for n, p in network.head.named_parameters() if p.grad is not None}


def _by_name(stage: str, ways: Sequence[Mapping[str, Tensor]]) -> list[Comparison]:
    stored, live, single = ways
    if not stored.keys() == live.keys() == single.keys():
        odd = sorted(set(stored) ^ set(live))[:3]
        raise DsuError(
            f"Some parameters have a {stage} one way and none the other ({', '.join(odd)}): a defect of dsu."
        )
    return [_row(name, stage, stored[name], live[name], single[name]) for name in live]


def _row(what: str, stage: str, stored: Tensor, live: Tensor, single: Tensor, where: str = "") -> Comparison:
    absolute = _largest(stored.double() - live.double())
    scale = _largest(live.double())
    return Comparison(
        what, stage, absolute, absolute / scale if scale else absolute, _largest(single.double() - live.double()), where
    )


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _worse(first: Comparison | None, second: Comparison) -> Comparison:
    """The row with the larger difference, and the larger allowance of both."""
    if first is None:
        return second
    worst = second if not second.absolute <= first.absolute else first
    return replace(worst, allowance=max(first.allowance, second.allowance))


def _rounding(live: Trainer, batch: Drawn) -> Rounding:
    """Logits, masks and MAE of the initial head with the split rounded to float16 and to float32."""
    fetched = live.main.train.fetch(*batch)
    stored = live.network.stored
    live.network.eval()
    logits, masks, errors = [], [], []
    for kind in (torch.float16, torch.float32):
        live.network.stored = kind
        with torch.no_grad():
            outputs, truth = live.forward(fetched)
        side = truth.shape[-1]
        maps = np.stack([finish_mask(one, (side, side), "none") for one in outputs[-1].cpu()])
        logits.append(outputs[-1])
        masks.append((maps * 255).astype(np.uint8).astype(int))
        errors.append(float(np.abs(maps - truth[:, 0].cpu().numpy()).mean()))
    live.network.stored = stored
    return Rounding(_largest(logits[0] - logits[1]), int(np.abs(masks[0] - masks[1]).max()), abs(errors[0] - errors[1]))
