"""Capture a function of a batch as a CUDA graph, which launches many kernels at once.

A training step consists of thousands of small kernels. If the host launches them one by one, the GPU waits for it; a
graph needs one launch. A graph repeats kernels on fixed addresses, but no Python code. So everything that differs
between two calls must be in a tensor: the samples, their views, the learning rate.
"""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from dsu.batches import Batch
from dsu.distributed import ALONE, World

EAGER_CALLS: Final = 3
"""Eager calls before the capture: they allocate persistent tensors, and libraries choose or compile kernels."""

Outputs = dict[str, Tensor]


class Graph(Protocol):
    """Records the kernels of a function, and repeats them."""

    def capture(self, function: Callable[[], Outputs]) -> Outputs:
        """Record `function` without running it; its outputs are filled by every `replay`."""

    def replay(self) -> None:
        """Run the recorded kernels."""


class CudaGraph:
    """torch's CUDA graph, captured on the current stream, which must not be the default one."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], Outputs]) -> Outputs:
        """See `Graph.capture`; other threads may allocate meanwhile, such as pinned memory for the next batches."""
        with (
            _no_collection(),
            torch.cuda.graph(self._graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"),
        ):
            return function()

    def replay(self) -> None:
        """See `Graph.replay`."""
        self._graph.replay()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage now but not meanwhile: freeing a dead graph's memory would invalidate a capture."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def _turn(device: torch.device) -> threading.RLock:
    """Held by the thread that launches kernels on `compute_stream`, which its graphs' fixed tensors need too."""
    return threading.RLock()


@cache
def compute_stream(device: torch.device) -> "torch.cuda.Stream":
    """The stream for all functions that may be captured, one per device."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Captured(NamedTuple):
    """A graph, the shape of its batches, and its input and output tensors at fixed addresses."""

    graph: Graph
    shape: object
    inputs: Batch
    outputs: Outputs


@dataclass
class GraphRunner:
    """Calls a function; on a GPU, it captures the function after a few calls, and then replays the graph.

    The first shape of batch that has been seen `EAGER_CALLS` times is captured. Other shapes, such as a short last
    batch, run eagerly; so do all if the capture fails, and `refusal` has the reason. The eager calls before the capture
    are real steps, and the new graph is replayed for the batch of its capture: every call runs exactly once.

    Args:
        device: the device of all batches; on a CPU everything runs eagerly.
        make_graph: creates an empty graph; None never captures.
        world: the processes that call it together; if the capture fails in one of them, none uses its graph.
    """

    device: torch.device
    make_graph: Callable[[], Graph] | None = None
    world: World = ALONE
    refusal: str | None = None
    _seen: dict[object, int] = field(default_factory=dict)
    _captured: _Captured | None = None

    @classmethod
    def on(cls, device: torch.device, world: World = ALONE) -> "GraphRunner":
        """A runner that captures if `device` is a GPU."""
        return cls(device, CudaGraph if device.type == "cuda" else None, world)

    @property
    def captures(self) -> bool:
        """Whether it captures or has captured a graph."""
        return self.make_graph is not None and self.refusal is None

    @property
    def captured(self) -> bool:
        """Whether a graph was captured."""
        return self._captured is not None

    @property
    def remark(self) -> str:
        """How calls run, for a progress line; empty on a CPU."""
        if self.make_graph is None:
            return ""
        if self.refusal is not None:
            return f" · without a CUDA graph, which could not be captured ({self.refusal})"
        return " · one graph per step" if self.captured else " · no graph yet"

    def forget(self) -> None:
        """Drop the graph, for example because its function or tensors have been replaced."""
        self._captured = None
        self._seen.clear()

    def run(self, function: Callable[[Batch], Outputs], batch: Batch) -> Outputs:
        """The function's outputs for a batch; later calls do not overwrite them.

        Args:
            function: the same function in all calls. It must not synchronise, or read values on the host.
            batch: a batch on the device.
        """
        if self.make_graph is None:
            return function(batch)
        with _turn(self.device):
            if self.device.type != "cuda":
                return self._run(function, batch)
            stream, current = compute_stream(self.device), torch.cuda.current_stream(self.device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                outputs = self._run(function, batch)
            current.wait_stream(stream)
            return outputs

    def _run(self, function: Callable[[Batch], Outputs], batch: Batch) -> Outputs:
        # A graph can only be replayed for batches with the same names, shapes, types and strides. Processes that divide
        # batches must capture and replay their graphs together: they decide by the size of the whole batch.
        tensors = tuple((tensor.shape, tensor.dtype, tensor.stride()) for tensor in batch.tensors)
        shape = batch.whole, (*batch.images, *batch.features), tensors
        if self._captured is None and self._is_due(shape):
            self._capture(function, batch, shape)
        if self._captured is None or self._captured.shape != shape:
            return function(batch)
        for fixed, given in zip(self._captured.inputs.tensors, batch.tensors, strict=True):
            fixed.copy_(given, non_blocking=True)
        self._captured.graph.replay()
        return {name: output.clone() for name, output in self._captured.outputs.items()}

    def _is_due(self, shape: object) -> bool:
        if not self.captures:
            return False
        self._seen[shape] = self._seen.get(shape, 0) + 1
        return self._seen[shape] > EAGER_CALLS

    def _capture(self, function: Callable[[Batch], Outputs], batch: Batch, shape: object) -> None:
        assert self.make_graph is not None
        graph, inputs = self.make_graph(), batch.mapped(torch.clone)
        captured, refusal = None, None
        try:
            captured = _Captured(graph, shape, inputs, graph.capture(lambda: function(inputs)))
        except RuntimeError as error:
            # If `function` failed, ending the capture failed too, and says less.
            refusal = str(error.__context__ or error).strip().split("\n")[0][:200]
        self.refusal = next(filter(None, self.world.all_gather(refusal)), None)
        self._captured = captured if self.refusal is None else None
