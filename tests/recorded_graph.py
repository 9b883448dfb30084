"""A substitute for a CUDA graph on a CPU: it repeats operators on fixed tensors, but no Python code."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["RecordedGraph", "RefusingGraph"]


class RecordedGraph:
    """Records every operator with its input and output tensors, in the forward pass, backward pass and optimiser.

    As on a GPU, a replay reads and writes the same memory again. Branches, numbers and tensors that the host created
    during recording are frozen. Unlike on a GPU, recording runs the operators; `capture` restores the tensors that
    existed before, so that only replays have an effect.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._alive: list[Any] = []
        self.replays = 0

    def capture(self, function: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        recorder = _Recorder(self._calls)
        with recorder:
            outputs = function()
        for storage, before in recorder.originals.values():
            storage.copy_(before)
        return outputs

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for operator, arguments, options, result in self._calls:
            again = operator(*arguments, **options)
            for fixed, new in zip(_tensors(result), _tensors(again), strict=True):
                if fixed.data_ptr() != new.data_ptr() or fixed.shape != new.shape:
                    fixed.copy_(new)


class RefusingGraph(RecordedGraph):
    """A graph that can't be captured."""

    def capture(self, function: object) -> dict[str, Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


class _Recorder(TorchDispatchMode):
    """Records operators, and copies existing memory at its first use, since any operator may overwrite it."""

    def __init__(self, calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> None:
        super().__init__()
        self._calls = calls
        self._made: set[int] = set()
        self.originals: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        inputs = {one.data_ptr(): one for one in _storages((args, options))}
        for address, storage in inputs.items():
            if address not in self._made and address not in self.originals:
                self.originals[address] = (storage, storage.clone())
        result = operator(*args, **options)
        self._made |= {one.data_ptr() for one in _storages(result)} - inputs.keys()
        self._calls.append((operator, args, options, result))
        return result


def _storages(value: Any) -> list[torch.UntypedStorage]:
    return [tensor.untyped_storage() for tensor in _tensors(value)]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
