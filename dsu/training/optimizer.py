"""AdamW for CUDA graphs: on a GPU, the learning rate is a tensor that is filled in place."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dsu.settings import TrainingSettings

_MACHINE_ENTRIES = ("fused", "capturable", "foreach", "lr")
"""Entries of parameter groups that depend on the machine, or are set in every epoch."""


def make_optimizer(
    parameters: Iterable[nn.Parameter], settings: TrainingSettings, device: torch.device
) -> torch.optim.AdamW:
    """AdamW with one parameter group, norms and biases included (paper, Section IV.C)."""
    gpu = device.type == "cuda"
    rate = torch.tensor(settings.lr, device=device) if gpu else settings.lr
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=settings.weight_decay, fused=gpu or None, capturable=gpu)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state for a checkpoint, with the learning rate as a plain number."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state saved on any device; this run's machine-specific entries stay."""
    own = [{name: group.get(name) for name in _MACHINE_ENTRIES} for group in optimizer.param_groups]
    groups = [{**group, **kept} for group, kept in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    # The fused step needs averages in the parameter's memory layout, which differs between devices (see
    # `Runtime.place`).
    for parameter, averages in optimizer.state.items():
        for name, average in averages.items():
            if average.shape == parameter.shape:
                averages[name] = torch.empty_like(parameter, dtype=average.dtype).copy_(average)
    # Loading replaces the learning rate tensor: restore the old one, which a graph may use.
    for group, kept in zip(optimizer.param_groups, own, strict=True):
        group["lr"] = kept["lr"]
