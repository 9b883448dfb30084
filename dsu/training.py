"""Stage two: train the head, from the store or end to end, with the same data in the same order."""

import csv
import hashlib
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from dsu.batches import Batch, Samples, points_of, prefetch
from dsu.errors import DsuError
from dsu.heads import HEAD_FILE, HeadInfo, save_head, write_durably
from dsu.loss import side_losses, total_loss, weighted_sum
from dsu.network.network import DSUNet
from dsu.network.resume import ResumePoint
from dsu.progress import SILENT, Progress, Task
from dsu.runtime import Runtime
from dsu.settings import TrainingSettings
from dsu.views import draw_view, epoch_order

__all__ = ["BEST_FILE", "LAST_FILE", "METRICS_FILE", "STATE_FILE", "Drawn", "Trainer", "hold_out", "learning_rate"]

STATE_FILE: Final = "checkpoint.pt"
LAST_FILE: Final = "last.safetensors"
BEST_FILE: Final = "best.safetensors"
METRICS_FILE: Final = "metrics.csv"
COLUMNS: Final = (
    *("epoch", "lr", "loss", "loss_D1", "loss_D2", "loss_D3"),
    *("val_loss", "val_S", "val_MAE", "val_IoU"),
    *("seconds", "images_per_second", "data_wait"),
)
"""Of `metrics.csv`: D1..D3 are the side outputs, deepest first; data_wait is a share of the epoch's time."""


Drawn = tuple[Sequence[str], Sequence[int]]
"""A batch that is still to be fetched: names, and the number of the view drawn for each."""


def hold_out(contents: Mapping[str, str], fraction: float) -> tuple[list[str], list[str]]:
    """Names to train on and names to validate on, by the hash of each image's content.

    A sample stays on its side when others come or go, and copies of an image stay together. With a `fraction`
    above 0 at least one sample (the one of the smallest hash) is held out.
    """

    def share(name: str) -> float:
        return int.from_bytes(hashlib.blake2b(contents[name].encode(), digest_size=8).digest(), "big") / 2**64

    held = [name for name in sorted(contents) if share(name) < fraction]
    if fraction > 0 and not held and len(set(contents.values())) > 1:
        first = contents[min(contents, key=share)]
        held = [name for name in sorted(contents) if contents[name] == first]
    return sorted(set(contents) - set(held)), held


def learning_rate(settings: TrainingSettings, epoch: int) -> float:
    """Cosine from `lr` to `lr_min`, stepped once an epoch (counted from 0)."""
    return settings.lr_min + (settings.lr - settings.lr_min) * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2


@dataclass
class Trainer:
    """One run of stage two.

    Attributes:
        network: with those encoders that `point` needs.
        point: where every step resumes.
        train, validation: samples; validation may be None.
        settings, info: as resolved; `info` becomes the head's metadata.
        runtime: device and precision.
        out: the run's folder.
        keep_best: whether the best validated state is the result, or the last one.
    """

    network: DSUNet
    point: ResumePoint
    train: Samples
    validation: Samples | None
    settings: TrainingSettings
    info: HeadInfo
    runtime: Runtime
    out: Path
    keep_best: bool
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network.to(self.runtime.device)
        self.optimizer = torch.optim.AdamW(
            self.network.head.parameters(),
            lr=self.settings.lr,
            weight_decay=self.settings.weight_decay,
            fused=self.runtime.device.type == "cuda",
        )

    def run(
        self,
        progress: Progress = SILENT,
        after_epoch: Callable[[dict[str, float]], None] = lambda row: None,
    ) -> None:
        """Train up to `settings.epochs`, from wherever this trainer is.

        After every epoch the row of `metrics.csv` stands, after every `checkpoint_every` epochs the whole state.
        Raises `DsuError` naming the samples of the batch whose loss is not finite.
        """
        while self.epoch < self.settings.epochs:
            label = f"epoch {self.epoch + 1}/{self.settings.epochs}"
            with progress.task(label, len(self.train.names)) as task:
                row = self._train_epoch(task)
            due = (self.epoch + 1) % self.settings.val_every == 0 or self.epoch + 1 == self.settings.epochs
            if self.validation is not None and due:
                row |= self.validate(progress)
            self.epoch += 1
            self.history.append(row)
            self._save(row)
            after_epoch(row)
        self.finish()

    def resume(self) -> None:
        """Take up the state of a killed run. Raises `DsuError` where there is none or it does not fit."""
        path = self.out / STATE_FILE
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.network.head.load_state_dict(state["head"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch, self.history = int(state["epoch"]), list(state["history"])
        except FileNotFoundError as error:
            raise DsuError(f"There is no checkpoint in {self.out}: start the run without --resume.") from error
        except Exception as error:  # whatever a damaged or foreign file makes torch raise
            raise DsuError(
                f"The checkpoint {path} is damaged or of another network: start the run anew with --overwrite."
            ) from error

    def validate(self, progress: Progress = SILENT) -> dict[str, float]:
        """Loss, S-measure, MAE and IoU (threshold 0.5) of the finest output at network size, on unflipped images."""
        from py_sod_metrics import MAE, FmeasureV2, IOUHandler

        from dsu.meters import StructureMeasure

        assert self.validation is not None
        structure, error = StructureMeasure(), MAE()
        overlap = FmeasureV2(
            metric_handlers={"iou": IOUHandler(with_dynamic=False, with_adaptive=False, with_binary=True)}
        )
        losses = []
        self.network.eval()
        with torch.no_grad(), progress.task("validating", len(self.validation.names)) as task:
            unflipped = [(names, [0] * len(names)) for names in self._cut(self.validation.names)]
            for batch in prefetch(_fetches(self.validation, unflipped)):
                outputs, mask = self.forward(batch)
                losses.append(float(total_loss(outputs, mask, self.settings.bce)) * len(batch.names))
                probability = outputs[-1].float().sigmoid().cpu().double().numpy()
                for predicted, truth in zip(probability[:, 0], mask.cpu().numpy()[:, 0] > 128 / 255, strict=True):
                    for meter in (structure, error, overlap):
                        meter.step(pred=predicted, gt=truth, normalize=False)
                task.advance(len(batch.names))
        return {
            "val_loss": sum(losses) / len(self.validation.names),
            "val_S": float(structure.get_results()["sm"]),
            "val_MAE": float(error.get_results()["mae"]),
            "val_IoU": float(np.mean(overlap.get_results()["iou"]["binary"])),
        }

    def finish(self) -> None:
        """Put the result under the head's own name."""
        chosen = self.out / (BEST_FILE if self.keep_best and (self.out / BEST_FILE).exists() else LAST_FILE)
        write_durably(self.out / HEAD_FILE, chosen.read_bytes())

    @property
    def best_epoch(self) -> int | None:
        """The epoch (from 1) with the highest validated S-measure."""
        validated = [row for row in self.history if "val_S" in row]
        return int(max(validated, key=lambda row: row["val_S"])["epoch"]) if validated else None

    def _train_epoch(self, task: Task) -> dict[str, float]:
        rate = learning_rate(self.settings, self.epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        log = _LossLog(every=20 if self.runtime.device.type == "cuda" else 1)
        started, waited = time.perf_counter(), 0.0
        batches = prefetch(_fetches(self.train, self.epoch_batches(self.epoch)))
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - asked
            if batch is None:
                break
            log.add(batch.names, self.step(batch))
            task.advance(len(batch.names))
            task.note(f"loss {log.recent:.3f} · data wait {waited / (time.perf_counter() - started):.0%}")
        seconds = time.perf_counter() - started
        total, *sides = log.mean()
        task.note(f"loss {total:.4f} · data wait {waited / seconds:.0%}")
        return {
            "epoch": self.epoch + 1,
            "lr": rate,
            "loss": total,
            "loss_D1": sides[0],
            "loss_D2": sides[1],
            "loss_D3": sides[2],
            "seconds": seconds,
            "images_per_second": len(self.train.names) / seconds,
            "data_wait": waited / seconds,
        }

    def step(self, batch: Batch) -> Tensor:
        """One optimiser step; the batch's total loss and the three side outputs', still on the device."""
        outputs, mask = self.forward(batch)
        losses = side_losses(outputs, mask, self.settings.bce)
        total = weighted_sum(losses)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        self.optimizer.step()
        return torch.stack([total, *losses]).detach()

    def forward(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Logits in float32 and the soft mask of a batch as it was fetched."""
        ready = batch.to(self.runtime.device).flipped()
        with self.runtime.autocast():
            outputs = self.network.suffix(points_of(self.network, ready, self.point), self.point)
        return [output.float() for output in outputs], ready.soft_mask

    def epoch_batches(self, epoch: int) -> list[Drawn]:
        """The batches of an epoch (from 0): a pure function of the settings and the samples' names."""
        seed, views = self.settings.seed, self.settings.views
        order = epoch_order(seed, epoch, self.train.names)
        return [(names, [draw_view(seed, epoch, name, views) for name in names]) for names in self._cut(order)]

    def _cut(self, names: Sequence[str]) -> list[Sequence[str]]:
        """Batches in order; the short last one is kept."""
        size = self.settings.batch_size
        return [names[start : start + size] for start in range(0, len(names), size)]

    def _save(self, row: Mapping[str, float]) -> None:
        """Write metrics, heads and the whole state, each so that no half of it can be met."""
        write_durably(self.out / METRICS_FILE, _as_csv(self.history))
        metrics = {key: value for key, value in row.items() if key.startswith("val_")}
        info = self.info.model_copy(update={"epoch": self.epoch, "metrics": metrics})
        state = self.network.head.state_dict()
        if self.best_epoch == self.epoch:
            save_head(self.out / BEST_FILE, state, info)
        if self.epoch % self.settings.checkpoint_every == 0 or self.epoch == self.settings.epochs:
            save_head(self.out / LAST_FILE, state, info)
            buffer = io.BytesIO()
            torch.save(
                {
                    "head": {name: tensor.cpu() for name, tensor in state.items()},
                    "optimizer": self.optimizer.state_dict(),
                    "epoch": self.epoch,
                    "history": self.history,
                },
                buffer,
            )
            write_durably(self.out / STATE_FILE, buffer.getvalue())


@dataclass
class _LossLog:
    """Losses of an epoch, fetched from the device only every so often: a fetch waits for the device."""

    every: int
    recent: float = math.nan
    _pending: list[tuple[tuple[str, ...], Tensor]] = field(default_factory=list)
    _sum: np.ndarray = field(default_factory=lambda: np.zeros(4))
    _count: int = 0

    def add(self, names: tuple[str, ...], losses: Tensor) -> None:
        self._pending.append((names, losses))
        if len(self._pending) >= self.every:
            self._flush()

    def mean(self) -> list[float]:
        """The total and the three side losses, means over samples."""
        self._flush()
        return [float(value) for value in self._sum / self._count]

    def _flush(self) -> None:
        if not self._pending:
            return
        values = torch.stack([losses for _, losses in self._pending]).double().cpu().numpy()
        for (names, _), row in zip(self._pending, values, strict=True):
            if not np.isfinite(row).all():
                raise DsuError(
                    f"The loss is not finite ({row[0]}) in the batch of {', '.join(names)}: look at these images and "
                    f"masks, lower --lr, or try --precision fp32; the last checkpoint is from before."
                )
            self._sum += row * len(names)
            self._count += len(names)
        self.recent = float(values[-1, 0])
        self._pending = []


def _fetches(samples: Samples, batches: Sequence[Drawn]) -> Iterator[Callable[[], Batch]]:
    """One call a batch."""
    for names, views in batches:
        yield partial(samples.fetch, names, views)


def _as_csv(history: Sequence[Mapping[str, float]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()
