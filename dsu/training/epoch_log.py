"""Counters of the current epoch, and the table of epochs."""

import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from dsu.errors import DsuError

COLUMNS: Final = (
    *("epoch", "lr", "loss", "loss_D1", "loss_D2", "loss_D3"),
    *("val_loss", "val_S", "val_MAE", "val_IoU"),
    *("seconds", "images_per_second", "data_wait", "peak_memory_gb"),
)
"""Columns of `metrics.csv`: D1..D3 are the side outputs, deepest first; data_wait is a fraction of the epoch's time."""


def as_csv(history: Sequence[Mapping[str, float]]) -> bytes:
    """A CSV table with one row per epoch and `COLUMNS`; missing values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


@dataclass
class EpochLog:
    """Losses, time and data wait of the current epoch, including the part before an interruption.

    Losses are fetched from the device only occasionally, because a fetch waits for the device.

    Attributes:
        every: steps between two fetches.
        steps, samples: number of finished steps and of their samples.
        seconds, waited: training time, and the part of it that steps waited for data.
        recent: the last total loss fetched.
        fetched: number of samples with known losses.
    """

    every: int
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    recent: float = math.nan
    fetched: int = 0
    _sum: np.ndarray = field(default_factory=lambda: np.zeros(4))
    _pending: list[tuple[tuple[str, ...], Tensor]] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)

    def add(self, names: tuple[str, ...], losses: Tensor, waited: float) -> None:
        """Add a step: its samples' names, (4,) losses (total, D1..D3) and seconds of data wait."""
        self._pending.append((names, losses))
        self.steps += 1
        self.samples += len(names)
        self.waited += waited
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        if len(self._pending) >= self.every:
            self.fetch()

    def fetch(self) -> None:
        """Fetch pending losses. Raises `DsuError` naming a batch's samples if its loss is not finite."""
        if not self._pending:
            return
        values = torch.stack([losses for _, losses in self._pending]).double().cpu().numpy()
        for (names, _), row in zip(self._pending, values, strict=True):
            if not np.isfinite(row).all():
                raise DsuError(
                    f"The loss is not finite ({row[0]}) in the batch of {', '.join(names)}: check these images and "
                    "masks, lower --lr, or try --precision fp32; the last checkpoint is from before."
                )
            self._sum = self._sum + row * len(names)  # not in place: another thread may be reading the old array
            self.fetched += len(names)
        self.recent = float(values[-1, 0])
        self._pending = []

    @property
    def losses(self) -> tuple[float, float, float, float]:
        """Mean losses over the samples fetched so far: total, D1, D2 and D3."""
        total, deepest, middle, finest = (float(value) for value in self._sum / max(self.fetched, 1))
        return total, deepest, middle, finest

    def remark(self) -> str:
        """A remark for the progress line."""
        return f"loss {self.recent:.3f} · data wait {self.waited / max(self.seconds, 1e-9):.0%}"

    def row(self) -> dict[str, float]:
        """A finished epoch's row of the table: mean losses, time, rate and data wait."""
        self.fetch()
        return {
            **dict(zip(("loss", "loss_D1", "loss_D2", "loss_D3"), self.losses, strict=True)),
            "seconds": self.seconds,
            "images_per_second": self.samples / self.seconds,
            "data_wait": self.waited / self.seconds,
        }

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        self.fetch()
        kept = {name: getattr(self, name) for name in ("steps", "samples", "seconds", "waited", "recent")}
        return kept | {"sum": self._sum.tolist()}

    @classmethod
    def of(cls, state: Mapping[str, Any], every: int) -> "EpochLog":
        """The log of an interrupted epoch, from its `state`."""
        kept = {name: value for name, value in state.items() if name != "sum"}
        return cls(every, **kept, fetched=kept["samples"], _sum=np.array(state["sum"]))
