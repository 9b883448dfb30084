"""Measure training steps, end to end and from the store at several depths."""

import ctypes
import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch.utils.flop_counter import FlopCounterMode

from dsu.batches import Batch, feed
from dsu.bench.machine import (
    GpuWork,
    RandomStore,
    Timing,
    gpu_work,
    images,
    ratio,
    seconds_of,
    take_turns,
)
from dsu.features.samples import FeatureDataset
from dsu.graphs import EAGER_CALLS, GraphRunner
from dsu.heads.head_file import HeadInfo
from dsu.network.network import DSUNet
from dsu.network.resume import earliest, resume_point
from dsu.progress import SILENT, Progress
from dsu.runtime import PeakMemory, Runtime
from dsu.settings import TrainingSettings
from dsu.training.trainer import Trainer, TrainingPhase

BARE_DINO: Final = "DINOv2 alone"
DINO_PART: Final = "DINOv2's part of end to end"
END_TO_END: Final = "end to end, N = all"
STORE: Final = "from the store, N = "
PUBLISHED: Final = f"{STORE}all, as published"
COMPILED: Final = f"{STORE}all, compiled"


@dataclass(frozen=True)
class StepRow:
    """The measurements of one case.

    Attributes:
        name: the case's name.
        reads: the features that a step resumes from; empty for an encoder alone.
        timing: seconds of a step (or a forward pass) with one batch.
        speedup: relative to end-to-end training with all blocks adapted.
        flop: floating-point operations per image, forward and backward.
        images: images per second.
        peak: bytes of the case's network and optimiser, plus the memory that a step adds.
        wait: fraction of time that consecutive steps waited for data; None if nothing is read.
        item_bytes: bytes of one sample, by array.
        gpu: the GPU's work in a step; None without a GPU.
    """

    name: str
    reads: tuple[str, ...]
    timing: Timing
    speedup: float
    flop: float
    images: float
    peak: int
    wait: float | None
    item_bytes: dict[str, int]
    gpu: GpuWork | None = None


@dataclass(frozen=True)
class _Case:
    """A case to measure.

    Attributes:
        name: the case's name.
        call: one step or forward pass, with a CUDA graph on a GPU.
        graphs: captures it.
        module: the network in memory.
        reads: the features that a training step resumes from.
        trainer: its trainer, if it trains from the store.
        eager: the same as `call`, without a graph.
    """

    name: str
    call: Callable[[], object]
    graphs: GraphRunner
    module: torch.nn.Module
    reads: tuple[str, ...] = ()
    trainer: Trainer | None = None
    eager: Callable[[], object] | None = None


def measure_steps(
    network: DSUNet,
    stored: RandomStore,
    runtime: Runtime,
    *,
    batch_size: int,
    rounds: int,
    compiled: bool,
    usual_only: bool = False,
    progress: Progress = SILENT,
) -> tuple[StepRow, ...]:
    """Measure all cases in turn; random weights take the same time as real ones.

    Args:
        network: the network on the device; all cases use its encoders.
        stored: the store that steps resume from.
        runtime: device and precision.
        batch_size: samples per step.
        rounds: rounds per case.
        compiled: add a case with torch.compile.
        usual_only: leave out the encoders alone, and variants of training that only serve as comparisons.
        progress: receives messages.
    """
    builders = [] if usual_only else _encoder_cases(network, runtime, batch_size)
    builders += _training_cases(network, stored, runtime, batch_size, compiled=compiled, usual_only=usual_only)
    # On a GPU, measure one case after the other: all together need several times the memory, and the clock rate is
    # steady. On a CPU it is not, so cases take turns.
    groups = [[builder] for builder in builders] if runtime.device.type == "cuda" else [builders]
    found: list[StepRow] = []
    for group in groups:
        found += _measure_group([build() for build in group], stored, runtime, batch_size, rounds, progress)
    whole = next(row for row in found if row.name == END_TO_END)
    return tuple(replace(row, speedup=ratio(row.timing, whole.timing)) for row in found)


def _measure_group(
    cases: Sequence[_Case], stored: RandomStore, runtime: Runtime, batch_size: int, rounds: int, progress: Progress
) -> list[StepRow]:
    """Measure cases in turn; their speedup stays NaN."""
    flop, peak = {}, {}
    with progress.task("warming up", len(cases), "cases") as task:
        for case in cases:
            task.note(case.name)
            flop[case.name], peak[case.name] = _warm_up(case, runtime, batch_size)
            task.advance()
    if COMPILED in flop:
        flop[COMPILED] = flop.get(f"{STORE}all", math.nan)
    repeat = 10 if runtime.device.type == "cuda" else 1
    timings = take_turns({case.name: case.call for case in cases}, rounds, runtime, progress, repeat=repeat)
    for case in cases:
        if case.graphs.refusal:
            progress.say(case.name + case.graphs.remark)
    return [
        StepRow(
            case.name,
            case.reads,
            timings[case.name],
            math.nan,
            flop[case.name],
            batch_size / timings[case.name].median,
            peak[case.name],
            _wait(case, stored, timings[case.name], progress),
            {name: stored.store.arrays[name].item_nbytes for name in (*case.reads, "mask")} if case.trainer else {},
            gpu_work(case.call, case.eager, runtime.device),
        )
        for case in cases
    ]


def _encoder_cases(network: DSUNet, runtime: Runtime, batch_size: int) -> list[Callable[[], _Case]]:
    """Forward passes of the frozen encoders alone, on batches that are ready on the device."""
    config, hiera, dino = network.config, network.hiera, network.dino
    assert hiera is not None
    assert dino is not None
    normalized = [
        torch.randn(batch_size, 3, side, side, device=runtime.device) for side in (config.hiera_size, config.dino_size)
    ]
    batch = images(config, batch_size, dino=True).to(runtime.device)

    def case(name: str, forward: Callable[[Batch], object], module: torch.nn.Module) -> _Case:
        graphs = GraphRunner.on(runtime.device)

        def run(batch: Batch) -> dict[str, torch.Tensor]:
            with torch.no_grad(), runtime.autocast():
                forward(batch)
            return {}

        return _Case(name, partial(graphs.run, run, batch), graphs, module, eager=partial(run, batch))

    def encode(batch: Batch, names: Sequence[str]) -> object:
        inputs = batch.flipped().inputs
        return network.encode(inputs["pixel_values"], inputs["guide_values"], names)

    def alone(encoder: Callable[[torch.Tensor], object], pixels: torch.Tensor) -> Callable[[Batch], object]:
        return lambda _: encoder(pixels)

    return [
        partial(case, BARE_DINO, alone(dino.forward_features, normalized[1]), dino),
        partial(case, DINO_PART, partial(encode, names=["V"]), dino),
        partial(case, "Hiera alone, sam2's forward", alone(hiera, normalized[0]), hiera),
        partial(case, "Hiera alone, ours", partial(encode, names=["S1", "S2", "S3", "S4"]), hiera),
    ]


def _training_cases(
    network: DSUNet, stored: RandomStore, runtime: Runtime, batch_size: int, *, compiled: bool, usual_only: bool
) -> list[Callable[[], _Case]]:
    """Training steps, each with its own head, on a batch that is ready on the device."""
    config = network.config
    live = images(config, batch_size, dino=True)
    arrays = set(stored.store.arrays) - {"mask"}

    def case(name: str, depth: int, *, as_published: bool = False, **options: bool) -> _Case:
        adapted = config.model_copy(update={"adapt_last": depth})
        end_to_end = name == END_TO_END
        available = {"pixels", "V"} if depth == config.hiera.depth else arrays
        point = earliest(adapted) if end_to_end else resume_point(adapted, available)
        trained = DSUNet(
            adapted,
            network.hiera if end_to_end or point.block < config.hiera.depth else None,
            network.dino if end_to_end else None,
            feature_dtype=torch.float16,
            as_published=as_published,
        ).train()
        settings = TrainingSettings(batch_size=batch_size, **options)  # type: ignore[arg-type]
        samples = FeatureDataset(stored.store, point.features, names=stored.names)
        phase, info = TrainingPhase(point, samples, None), HeadInfo(config=adapted)
        trainer = Trainer(trained, phase, settings, info, runtime, keep_best=False)
        ready = (live if end_to_end else samples.read(stored.names[:batch_size], [0] * batch_size)).to(runtime.device)
        return _Case(
            name,
            partial(trainer.step, ready),
            trainer._steps,
            trained,
            point.features,
            None if end_to_end else trainer,
            partial(trainer._eager_step, ready),
        )

    deepest, *shallower = config.usual_depths
    compared = [
        partial(case, PUBLISHED, deepest, as_published=True),
        partial(case, f"{STORE}all, gradient checkpointing", deepest, gradient_checkpointing=True),
    ]
    return [
        partial(case, END_TO_END, deepest),
        partial(case, f"{STORE}all", deepest),
        *([] if usual_only else compared),
        *([partial(case, COMPILED, deepest, compile=True)] if compiled else []),
        *(partial(case, f"{STORE}{depth}", depth) for depth in shallower),
    ]


def _warm_up(case: _Case, runtime: Runtime, batch_size: int) -> tuple[float, int]:
    """Run a case until its graph is captured; returns operations per image and peak memory in bytes.

    Operations of compiled code are not counted.
    """
    before, counter = _memory_in_use(runtime), FlopCounterMode(display=False, custom_mapping=GROUPED)
    if case.name == COMPILED:
        case.call()
    memory = PeakMemory(runtime.device)
    with nullcontext() if case.name == COMPILED else counter:
        case.call()
    if runtime.device.type == "cuda":
        for _ in range(EAGER_CALLS + 1):  # up to the capture and one replay
            case.call()
    tensors = [*case.module.parameters(), *case.module.buffers()]
    trained = sum(tensor.nbytes for tensor in tensors if tensor.requires_grad)
    held = sum(tensor.nbytes for tensor in tensors) + 2 * trained  # AdamW keeps two values per parameter
    return counter.get_total_flops() / batch_size, max(memory.bytes() - before, 0) + held


def _convolution_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *arguments: Any, **_: Any
) -> int:
    """Operations for both gradients, each as many as forward. Torch counts grouped layers as dense ones."""
    transposed, wanted = arguments[4], arguments[7]
    return int(2 * x[0] * math.prod((x if transposed else grad)[2:]) * math.prod(weight) * sum(wanted[:2]))


GROUPED: Final = {torch.ops.aten.convolution_backward: _convolution_backward}
"""A corrected formula for torch's `FlopCounterMode`."""


def _memory_in_use(runtime: Runtime) -> int:
    if runtime.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(runtime.device)
    # glibc keeps freed memory in the process, which would hide what this case allocates: release it.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return PeakMemory(runtime.device).bytes()


def _wait(case: _Case, stored: RandomStore, timing: Timing, progress: Progress) -> float | None:
    """The fraction of time that consecutive steps wait for data, without the first batch."""
    if case.trainer is None:
        return None
    trainer, device, size = case.trainer, case.trainer.runtime.device, case.trainer.settings.batch_size
    steps = int(min(max(1.5 / timing.median, 2), 100)) + 1
    names = [stored.names[index % len(stored.names)] for index in range(steps * size)]
    fed = feed(trainer.main.train, [(names[i : i + size], [0] * size) for i in range(0, len(names), size)], device)
    waited = 0.0

    def steps_in_a_row() -> None:
        nonlocal waited
        started = time.perf_counter()
        for batch in fed:
            waited += time.perf_counter() - started
            trainer.step(batch)
            task.advance()
            started = time.perf_counter()

    with progress.task(f"data wait, {case.name}", steps, "steps") as task:
        trainer.step(next(fed))
        task.advance()
        return waited / seconds_of(steps_in_a_row, device)
