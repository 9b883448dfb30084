"""Interrupt training at a given step."""

import pytest
import torch

from dsu.batches import Batch
from dsu.training.trainer import Trainer

__all__ = ["stop_at"]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Interrupt training before its `step`-th optimiser step (from 0)."""
    done = 0
    original = Trainer.step

    def counted(self: Trainer, batch: Batch) -> torch.Tensor:
        nonlocal done
        if done == step:
            raise KeyboardInterrupt
        done += 1
        return original(self, batch)

    monkeypatch.setattr(Trainer, "step", counted)
