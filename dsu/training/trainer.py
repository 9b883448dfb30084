"""The training loop of stage two: from the store or end to end, with the same data in the same order."""

import io
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from dsu.batches import Batch, BatchIndices, feed
from dsu.data.views import draw_samples, draw_view
from dsu.datasets import SampleDataset
from dsu.distributed import ALONE, World
from dsu.errors import DsuError
from dsu.files import atomic_write
from dsu.graphs import GraphRunner, Outputs
from dsu.heads.head_file import HEAD_FILE, RUN_LOCK, STATE_FILE, HeadInfo, read_head_info, save_head
from dsu.loss import SegmentationLoss, precise
from dsu.network.network import DSUNet
from dsu.network.norms import shared_batch
from dsu.network.resume import ResumePoint
from dsu.network.rounding import rounded_weights
from dsu.progress import SILENT, Progress, Task, clock, counted
from dsu.runtime import PeakMemory, Runtime
from dsu.settings import TrainingSettings
from dsu.training.callbacks import Callback, probability_of
from dsu.training.epoch_log import EpochLog, as_csv
from dsu.training.optimizer import load_optimizer, make_optimizer, optimizer_state, set_learning_rate
from dsu.training.run_folders import BEST_FILE, LAST_FILE, METRICS_FILE, remove_previous

T = TypeVar("T")

SIDES: Final = ("D1", "D2", "D3")
"""The side outputs, deepest first."""

_IDENTIFYING: Final = ("epoch", "metrics", "trained_on", "encoders")
"""Fields of a head's info that differ between runs or epochs."""


def learning_rate(settings: TrainingSettings, epoch: int) -> float:
    """The learning rate of an epoch (from 0): a cosine from `lr` to `lr_min`, constant within an epoch."""
    return settings.lr_min + (settings.lr - settings.lr_min) * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2


@dataclass(frozen=True)
class TrainingPhase:
    """The data of a range of epochs.

    Attributes:
        point: the resume point of every step.
        train, validation: samples; validation may be None.
    """

    point: ResumePoint
    train: SampleDataset
    validation: SampleDataset | None


@dataclass
class Trainer:
    """A stage-two run.

    Attributes:
        network: the network, with the encoders that its phases need.
        main: the run's data.
        frozen_adapters: the data of the first `settings.freeze_adapter_epochs` epochs. Their steps resume after all
            adapters: these have no gradient, and the optimiser skips them.
        empty: samples without an object, if both kinds are drawn equally often; otherwise None.
        settings, info: the resolved settings; the head's metadata.
        runtime: device and precision.
        keep_best: whether the result is the best weights on validation instead of the last ones.
        out: the run's folder.
        mark: the run's identity (`run_mark`); checkpoints of other runs are refused.
        holds: returns whether this process still has the lock of the run's folder.
        world: the processes that train together. Each draws the same batches and takes its part; norms, gradients and
            losses are those of whole batches, and all have the same weights. Only the first process writes.
        callbacks: observers of the run.
        memory: peak memory of this epoch.
    """

    network: DSUNet
    main: TrainingPhase
    settings: TrainingSettings
    info: HeadInfo
    runtime: Runtime
    keep_best: bool
    out: Path = Path()
    mark: str = ""
    holds: Callable[[], bool] = lambda: True
    frozen_adapters: TrainingPhase | None = None
    empty: Collection[str] | None = None
    world: World = ALONE
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    callbacks: list[Callback] = field(default_factory=list)
    _log: EpochLog | None = None
    """State of an unfinished epoch."""

    def __post_init__(self) -> None:
        self.runtime.place(self.network)
        self.memory = PeakMemory(self.runtime.device)
        parts = self.settings
        self.loss = SegmentationLoss(parts.region, parts.bce, parts.tversky_beta, parts.focal_gamma)
        self.network.gradient_checkpointing = self.settings.gradient_checkpointing
        if self.settings.compile:
            self.network.compile_adapted_blocks()
        self.optimizer = make_optimizer(self.network.head.parameters(), self.settings, self.runtime.device)
        self._steps = GraphRunner.on(self.runtime.device, self.world)
        self._evaluations = GraphRunner.on(self.runtime.device)
        self._captured_phase: TrainingPhase | None = None

    @property
    def phase(self) -> TrainingPhase:
        """The data of the next or unfinished epoch."""
        return (
            self.frozen_adapters
            if self.frozen_adapters is not None and self.epoch < self.settings.freeze_adapter_epochs
            else self.main
        )

    def run(self, progress: Progress = SILENT) -> None:
        """Train from the current epoch up to `settings.epochs`.

        Writes a row of `metrics.csv` and a checkpoint after every epoch, and a checkpoint also after every
        `checkpoint_steps` steps. Raises `DsuError` naming the batch's samples if its loss is not finite; checkpoints
        never contain a state that is not finite.
        """
        progress = progress if self.world.is_main else SILENT
        try:
            for tensor in self.network.head.state_dict().values():
                self.world.broadcast(tensor)
            for callback in self.callbacks:
                callback.on_train_start(self)
            while self.epoch < self.settings.epochs:
                self._run_epoch(progress)
            self.finish()
        finally:
            self._forget_graphs()  # while all processes are still connected: freeing graphs needs this
            for callback in self.callbacks:
                callback.on_train_end(self)

    def _run_epoch(self, progress: Progress) -> None:
        label = f"epoch {self.epoch + 1}/{self.settings.epochs}"
        with progress.task(label, len(self.phase.train.names)) as task:
            row = self._train_epoch(task)
        self._check_finite()
        due = (self.epoch + 1) % self.settings.val_every == 0 or self.epoch + 1 == self.settings.epochs
        if self.phase.validation is not None and due:
            row |= self.validate(self.phase.validation, progress)
        self.epoch += 1
        self.history.append(row)
        self._log = None
        self._save_state()
        self._save_results()
        for callback in self.callbacks:
            callback.on_epoch_end(self, row)

    def resume(self) -> None:
        """Load the checkpoint of an interrupted run. Raises `DsuError` if it is missing, damaged or of another run."""
        path = self.out / STATE_FILE
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            mark = state["run"]
            self.network.head.load_state_dict(state["head"])
            load_optimizer(self.optimizer, state["optimizer"])
            self.epoch, self.history = int(state["epoch"]), list(state["history"])
            self._log = None if state["log"] is None else EpochLog.of(state["log"], self._fetch_every)
        except FileNotFoundError as error:
            raise DsuError(
                f"There is no {STATE_FILE} in {self.out} to resume from: restore it, or start the run again with "
                "--overwrite."
            ) from error
        except Exception as error:  # torch may raise anything on a damaged or foreign file
            raise DsuError(
                f"The checkpoint {path} is damaged or belongs to another network: start the run again with --overwrite."
            ) from error
        if mark != self.mark:
            raise DsuError(
                f"The checkpoint {path} belongs to another run than settings.yaml and run.json next to it: restore "
                "the matching files, or start the run again with --overwrite."
            )
        self._check_best()
        if self._log is None and self.history:  # the checkpoint is written first: a kill may have prevented the rest
            self._save_results()

    def _check_best(self) -> None:
        """Raise `DsuError` if the best weights so far, from an earlier epoch, are missing."""
        epoch, path = self.best_epoch, self.out / BEST_FILE
        if not self.keep_best or epoch is None or epoch == self.epoch or not self.world.is_main:
            return
        expected = self._info_at(self.history[epoch - 1])
        found = read_head_info(path) if path.exists() else None
        if found is None or any(getattr(found, name) != getattr(expected, name) for name in _IDENTIFYING):
            raise DsuError(
                f"{path} does not contain this run's best weights so far, of epoch {epoch}: restore it, or start the "
                "run again with --overwrite."
            )

    def validate(self, samples: SampleDataset, progress: Progress = SILENT) -> dict[str, float]:
        """Compute loss, S-measure, MAE and IoU of the finest output at network size, on unflipped images.

        IoU uses threshold 0.5, and is averaged over samples with an object (0 if there are none), since it is
        meaningless for others.
        """
        from py_sod_metrics import MAE, FmeasureV2, IOUHandler

        from dsu.metrics.meters import StructureMeasure

        structure, error = StructureMeasure(), MAE()
        iou = IOUHandler(with_dynamic=False, with_adaptive=False, with_binary=True)
        overlap = FmeasureV2(metric_handlers={"iou": iou})
        losses: list[float] = []
        # Processes divide whole batches, since the last bits of a loss depend on its batch.
        batches = self._split(samples.names)
        own = [name for part in batches[self.world.part(len(batches))] for name in part]
        with progress.task("validating", len(samples.names)) as task:
            for names, outputs, mask in self.evaluated(samples, own):
                losses.append(float(self.loss.total(self.loss.side_losses(outputs, mask))) * len(names))
                if not math.isfinite(losses[-1]):
                    raise self._not_finite(f"outputs for {', '.join(names)}")
                probability = probability_of(outputs)
                for predicted, truth in zip(probability, mask.cpu().numpy()[:, 0] > 128 / 255, strict=True):
                    for meter in (structure, error, *([overlap] if truth.any() else [])):
                        meter.step(pred=predicted, gt=truth, normalize=False)
                for callback in self.callbacks:
                    callback.on_validation_batch(names, probability)
                task.advance(len(names))
            scores = self.world.all_gather((losses, structure.sms, error.maes, iou.binary_results))
            losses, structure.sms, error.maes, overlaps = (list(chain(*parts)) for parts in zip(*scores, strict=True))
            task.advance(len(samples.names) - len(own))
        return {
            "val_loss": sum(losses) / len(samples.names),
            "val_S": float(structure.get_results()["sm"]),
            "val_MAE": float(error.get_results()["mae"]),
            "val_IoU": float(np.mean(overlaps)) if overlaps else 0.0,
        }

    @torch.no_grad()
    def evaluated(
        self, samples: SampleDataset, names: Sequence[str]
    ) -> Iterator[tuple[tuple[str, ...], list[Tensor], Tensor]]:
        """Evaluate named samples, unflipped; yields each batch's names, logits (as `forward`) and soft masks."""
        self.network.eval()
        unflipped = [(part, [0] * len(part)) for part in self._split(names)]
        for batch in feed(samples, unflipped, self.runtime.device):
            found = self._evaluations.run(self._eager_evaluation, self._ready(batch))
            yield batch.names, [found[name] for name in SIDES], found["mask"]

    def finish(self) -> None:
        """Write the result as the head's file, and remove the previous run."""
        if not self.world.is_main:
            return
        self._check_lock()
        chosen = self.out / (BEST_FILE if self.keep_best and self.best_epoch is not None else LAST_FILE)
        atomic_write(self.out / HEAD_FILE, chosen.read_bytes())
        remove_previous(self.out)

    @property
    def best_epoch(self) -> int | None:
        """The epoch (from 1) with the highest S-measure on validation; None without validation."""
        validated = [row for row in self.history if "val_S" in row]
        return int(max(validated, key=lambda row: row["val_S"])["epoch"]) if validated else None

    @property
    def step_in_epoch(self) -> int:
        """Optimiser steps done in the unfinished epoch."""
        return 0 if self._log is None else self._log.steps

    def _train_epoch(self, task: Task) -> dict[str, float]:
        """Train the rest of the epoch; returns its row for `metrics.csv`."""
        rate = learning_rate(self.settings, self.epoch)
        set_learning_rate(self.optimizer, rate)
        self.network.train()
        self.memory = PeakMemory(self.runtime.device)
        self._log = log = self._log or EpochLog(self._fetch_every)
        task.advance(log.samples)
        drawn = self.epoch_batches(self.epoch)[log.steps :]
        batches = feed(self.phase.train, drawn, self.runtime.device, self.world)
        for names, _ in drawn:
            started = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - started
            log.add(tuple(names), self.step(batch), waited)
            task.advance(len(names))
            task.note(log.remark())
            for callback in self.callbacks:
                callback.on_step_end(self, log)
            if self.settings.checkpoint_steps and log.steps % self.settings.checkpoint_steps == 0:
                self._check_finite()
                self._save_state()
                self.network.train()
        row = {"epoch": self.epoch + 1, "lr": rate, **log.row(), "peak_memory_gb": self.memory.bytes() / 1e9}
        to_go = self.settings.epochs - self.epoch - 1
        left = f" · {counted(to_go, 'epochs')} to go, {clock(to_go * log.seconds)}" if to_go else ""
        task.note(
            f"loss {row['loss']:.4f} · data wait {row['data_wait']:.0%} · peak {row['peak_memory_gb']:.1f} GB"
            f"{self._steps.remark}{left}"
        )
        return row

    @property
    def _fetch_every(self) -> int:
        return 20 if self.runtime.device.type == "cuda" else 1

    def step(self, batch: Batch) -> Tensor:
        """Run an optimiser step; returns (4,) losses of the whole batch on the device: total, D1, D2 and D3."""
        return self._steps.run(self._eager_step, self._ready(batch))["losses"]

    def forward(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Logits of the side outputs (at least float32), and the soft mask, both for the flipped batch."""
        flipped = batch.to(self.runtime.device).flipped()
        rounded = rounded_weights(self.network, torch.bfloat16) if self.runtime.precision == "bf16" else {}
        inputs = {**flipped.inputs, "start_feature": self.phase.point.start}
        with self.runtime.autocast():
            output = functional_call(self.network, rounded, kwargs=inputs)
        side_logits = [precise(logits) for logits in output.side_logits]
        return side_logits, flipped.soft_mask.to(side_logits[0].dtype)

    def _ready(self, batch: Batch) -> Batch:
        """Move a batch to the device; drops graphs that were captured in another phase."""
        if self._captured_phase is not self.phase:
            self._forget_graphs()
            self._captured_phase = self.phase
        return batch.to(self.runtime.device)

    def _forget_graphs(self) -> None:
        self._steps.forget()
        self._evaluations.forget()

    def _eager_step(self, batch: Batch) -> Outputs:
        # Compiling all blocks again for a shorter last batch would take longer than it saves.
        short = self.settings.compile and (batch.whole or len(batch.names)) < self.settings.batch_size
        with (
            self.runtime.training(),
            shared_batch(self.world, batch.share),
            torch.compiler.set_stance("force_eager") if short else nullcontext(),  # takes effect when it is created
        ):
            outputs, mask = self.forward(batch)
            losses = self.loss.side_losses(outputs, mask)
            if batch.share is not None:
                part = (batch.share[0] / batch.share[1]).to(losses[0].dtype)
                losses = [loss * part for loss in losses]
            total = self.loss.total(losses)
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(total)
            found = torch.stack([total, *losses]).detach()
            if batch.share is not None:
                found = self._sum_over_processes(found)
            self.optimizer.step()
            return {"losses": found}

    def _sum_over_processes(self, losses: Tensor) -> Tensor:
        """Sum gradients (in place) and losses over all processes, with a single exchange."""
        gradients = [p.grad for p in self.network.head.parameters() if p.grad is not None]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), losses])
        self.world.all_reduce(flat)
        *sums, losses = torch.split(flat, [*(gradient.numel() for gradient in gradients), len(losses)])
        summed = [one.view(gradient.shape) for one, gradient in zip(sums, gradients, strict=True)]
        torch._foreach_copy_(gradients, summed)
        return losses.clone()  # a view would keep the whole buffer in memory

    @torch.no_grad()
    def _eager_evaluation(self, batch: Batch) -> Outputs:
        outputs, mask = self.forward(batch)
        return {**dict(zip(SIDES, outputs, strict=True)), "mask": mask}

    def epoch_batches(self, epoch: int) -> list[BatchIndices]:
        """The batches of an epoch (from 0), a pure function of the settings and the samples' names."""
        seed, views = self.settings.seed, self.settings.views
        drawn = draw_samples(seed, epoch, self.main.train.names, self.empty)
        return [
            ([name for name, _ in part], [draw_view(seed, epoch, name, views, turn) for name, turn in part])
            for part in self._split(drawn)
        ]

    def _split(self, samples: Sequence[T]) -> list[Sequence[T]]:
        """Split samples into batches, in order; the last one may be shorter."""
        size = self.settings.batch_size
        return [samples[start : start + size] for start in range(0, len(samples), size)]

    def _check_finite(self) -> None:
        """Raise `DsuError` if the weights, or the outputs for the first samples, are no longer finite."""
        floats = [tensor for tensor in self.network.head.state_dict().values() if tensor.is_floating_point()]
        if not torch.stack([tensor.isfinite().all() for tensor in floats]).all():
            raise self._not_finite("weights")
        samples = self.phase.train
        for names, outputs, _ in self.evaluated(samples, samples.names[: self.settings.batch_size]):
            if not torch.stack([logits.isfinite().all() for logits in outputs]).all():
                raise self._not_finite(f"outputs for {', '.join(names)}")

    def _not_finite(self, what: str) -> DsuError:
        return DsuError(
            f"After step {self.step_in_epoch} of epoch {self.epoch + 1} the network's {what} are not finite: start "
            "again with a lower --lr, or try --precision fp32; this state was not saved."
        )

    def _save_results(self) -> None:
        """Write the table of epochs and the heads.

        Must run after the checkpoint is saved: these files must never be newer than the state of a resumed run.
        """
        if not self.world.is_main:
            return
        atomic_write(self.out / METRICS_FILE, as_csv(self.history))
        info = self._info_at(self.history[-1])
        state = self.network.head.state_dict()
        if self.best_epoch == self.epoch:
            save_head(self.out / BEST_FILE, state, info)
        save_head(self.out / LAST_FILE, state, info)

    def _info_at(self, row: Mapping[str, float]) -> HeadInfo:
        """The head's info at the end of the epoch with this row."""
        metrics = {key: value for key, value in row.items() if key.startswith("val_")}
        return self.info.model_copy(update={"epoch": int(row["epoch"]), "metrics": metrics})

    def _check_lock(self) -> None:
        """Raise `DsuError` if the folder was renamed or its lock removed, since another run may be using it now."""
        if not self.holds():
            raise DsuError(
                f"{self.out} no longer belongs to this run: the folder, or {RUN_LOCK} in it, was renamed or "
                "removed, so nothing more is written there; resume from the last checkpoint with `dsu train-head "
                f"--resume --out FOLDER`, once no other command trains in it."
            )

    def _save_state(self) -> None:
        """Write a checkpoint, from which a run can resume even in the middle of an epoch."""
        if not self.world.is_main:
            return
        self._check_lock()
        buffer = io.BytesIO()
        torch.save(
            {
                "run": self.mark,
                "head": {name: tensor.cpu() for name, tensor in self.network.head.state_dict().items()},
                "optimizer": optimizer_state(self.optimizer),
                "epoch": self.epoch,
                "log": None if self._log is None else self._log.state(),
                "history": self.history,
            },
            buffer,
        )
        atomic_write(self.out / STATE_FILE, buffer.getvalue())
