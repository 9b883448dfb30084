"""Training steps: end to end, from the store at several depths, with and without what makes them fast."""

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.flop_counter import FlopCounterMode

from dsu.batches import feed
from dsu.bench.drawn import DrawnStore, images
from dsu.bench.timing import GpuWork, Timing, gpu_work, ratio, take_turns, wait_for
from dsu.config import DSUNetConfig
from dsu.features.feature_dataset import FeatureDataset
from dsu.graphs import EAGER_CALLS
from dsu.heads.head_file import HeadInfo
from dsu.network.network import DSUNet
from dsu.network.resume import ResumePoint, earliest, resume_point
from dsu.progress import SILENT, Progress
from dsu.runtime import PeakMemory, Runtime
from dsu.settings import TrainingSettings
from dsu.training.trainer import Trainer, TrainingPhase

if TYPE_CHECKING:
    from sam2.modeling.backbones.hieradet import Hiera
    from timm.models.vision_transformer import VisionTransformer

__all__ = ["BARE_DINO", "DINO_PART", "END_TO_END", "GROUPED", "PUBLISHED", "STORE", "StepRow", "measure_steps"]

BARE_DINO: Final = "DINOv2 alone"
BARE_HIERA: Final = "Hiera alone, sam2's forward"
FAST_HIERA: Final = "Hiera alone, without padding"
DINO_PART: Final = "DINOv2's part of end to end"
END_TO_END: Final = "end to end, N = all"
STORE: Final = "from the store, N = "
PUBLISHED: Final = f"{STORE}all, as published"
RECOMPUTED: Final = f"{STORE}all, recomputing"
COMPILED: Final = f"{STORE}all, compiled"


@dataclass(frozen=True)
class StepRow:
    """One case.

    Attributes:
        name: of the case.
        reads: what it resumes from; empty for an encoder alone.
        timing: of a step (or a forward pass) of one batch.
        speedup: against end to end with all blocks adapted.
        flop: operations of one image, forward and backward.
        images: a second.
        peak: bytes: the case's network, its optimiser and what a step adds.
        wait: share of the time that steps in a row waited for data; None where nothing is read.
        item_bytes: of one sample, by array that it reads.
        gpu: what a step makes the GPU do; None without one.
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
    name: str
    reads: tuple[str, ...]
    call: Callable[[], object]
    holds: tuple[torch.nn.Module, ...]
    trainer: Trainer | None = None
    eager: Callable[[], object] | None = None


def measure_steps(
    config: DSUNetConfig,
    hiera: "Hiera",
    dino: "VisionTransformer",
    drawn: DrawnStore,
    runtime: Runtime,
    *,
    batch_size: int,
    rounds: int,
    compiled: bool,
    progress: Progress = SILENT,
) -> list[StepRow]:
    """All cases in turn, on random weights or real ones: the time does not depend on them."""
    runtime.place(hiera)
    runtime.place(dino)
    cases = _bare(config, hiera, dino, runtime, batch_size)
    cases += _training(config, hiera, dino, drawn, runtime, batch_size, compiled=compiled)
    flop, peak = {}, {}
    with progress.task("warming up", len(cases), "cases") as task:
        for case in cases:
            task.note(case.name)
            flop[case.name], peak[case.name] = _warm_up(case, runtime, batch_size)
            task.advance()
    flop |= {case.name: flop[f"{STORE}all"] for case in cases if case.name == COMPILED}
    repeat = 10 if runtime.device.type == "cuda" else 1
    timings = take_turns({case.name: case.call for case in cases}, rounds, runtime, progress, repeat=repeat)
    rows = []
    for case in cases:
        timing = timings[case.name]
        rows.append(
            StepRow(
                case.name,
                case.reads,
                timing,
                ratio(timing, timings[END_TO_END]),
                flop[case.name],
                batch_size / timing.median,
                peak[case.name],
                _wait(case, drawn, timing, progress),
                {name: drawn.store.arrays[name].item_nbytes for name in (*case.reads, "mask")} if case.trainer else {},
                gpu_work(case.call, case.eager, runtime.device),
            )
        )
    return rows


def _bare(
    config: DSUNetConfig, hiera: "Hiera", dino: "VisionTransformer", runtime: Runtime, batch_size: int
) -> list[_Case]:
    """The frozen encoders by themselves, forward, on ready batches."""
    pixels = torch.randn(batch_size, 3, config.hiera_size, config.hiera_size, device=runtime.device)
    dino_pixels = torch.randn(batch_size, 3, config.dino_size, config.dino_size, device=runtime.device)
    batch = images(config, batch_size, dino=True)
    network = DSUNet(config, hiera, dino, feature_dtype=torch.float16)
    runtime.place(network.eval())

    def guide() -> object:
        inputs = batch.to(runtime.device).flipped().inputs
        return network.encode(None, inputs["guide_values"], ["V"])

    def bare(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad(), runtime.autocast():
                return call()

        return run

    return [
        _Case(BARE_DINO, (), bare(lambda: dino.forward_features(dino_pixels)), (dino,)),
        _Case(DINO_PART, (), bare(guide), (dino,)),
        _Case(BARE_HIERA, (), bare(lambda: hiera(pixels)), (hiera,)),
        _Case(FAST_HIERA, (), bare(lambda: network.encode(pixels, None, ["S1", "S2", "S3", "S4"])), (hiera,)),
    ]


def _training(
    config: DSUNetConfig,
    hiera: "Hiera",
    dino: "VisionTransformer",
    drawn: DrawnStore,
    runtime: Runtime,
    batch_size: int,
    *,
    compiled: bool,
) -> list[_Case]:
    """Steps of training, each on a batch that is there already."""
    live = images(config, batch_size, dino=True)
    store_names = set(drawn.store.arrays) - {"mask"}

    def case(name: str, depth: int, point: ResumePoint | None = None, **options: bool) -> _Case:
        adapted = config.model_copy(update={"adapt_last": depth})
        end_to_end = point is not None
        point = point or resume_point(adapted, {"pixels", "V"} if depth == config.hiera.depth else store_names)
        needed = hiera if end_to_end or point.block < config.hiera.depth else None
        network = DSUNet(
            adapted,
            needed,
            dino if end_to_end else None,
            feature_dtype=torch.float16,
            as_published=options.pop("as_published", False),
        ).train()
        settings = TrainingSettings(batch_size=batch_size, **options)  # type: ignore[arg-type]
        samples = FeatureDataset(drawn.store, point.features, names=drawn.names)
        info = HeadInfo(config=adapted)
        trainer = Trainer(
            network, TrainingPhase(point, samples, None), settings, info, runtime, Path(), keep_best=False
        )
        batch = live if end_to_end else samples.read(drawn.names[:batch_size], [0] * batch_size)
        held = tuple(module for module in (network.hiera, network.dino, network.head) if module is not None)
        ready = batch.to(runtime.device)
        eager = partial(trainer._eager_step, ready)
        return _Case(name, point.features, lambda: trainer.step(ready), held, None if end_to_end else trainer, eager)

    deepest, *shallower = config.usual_depths
    whole = config.model_copy(update={"adapt_last": deepest})
    return [
        case(END_TO_END, deepest, earliest(whole)),
        case(PUBLISHED, deepest, as_published=True),
        case(f"{STORE}all", deepest),
        case(RECOMPUTED, deepest, gradient_checkpointing=True),
        *([case(COMPILED, deepest, compile=True)] if compiled else []),
        *(case(f"{STORE}{depth}", depth) for depth in shallower),
    ]


def _warm_up(case: _Case, runtime: Runtime, batch_size: int) -> tuple[float, int]:
    """Operations of an image, and peak memory in bytes; what is compiled is not counted."""
    before = _held_now(runtime)
    if case.name == COMPILED:
        case.call()
        memory = PeakMemory(runtime.device)
        case.call()
        flop = 0.0
    else:
        memory = PeakMemory(runtime.device)
        with FlopCounterMode(display=False, custom_mapping=GROUPED) as counter:
            case.call()
        flop = counter.get_total_flops() / batch_size
    if runtime.device.type == "cuda":
        for _ in range(EAGER_CALLS + 1):  # up to the capture and one replay
            case.call()
    wait_for(runtime.device)
    parameters = {id(p): p for module in case.holds for p in (*module.parameters(), *module.buffers())}.values()
    trained = sum(p.nbytes for p in parameters if p.requires_grad) if case.trainer or case.name == END_TO_END else 0
    held = sum(p.nbytes for p in parameters) + 2 * trained  # AdamW keeps two numbers a parameter
    return flop, max(memory.bytes() - before, 0) + held


def _convolution_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *arguments: Any, **_: Any
) -> int:
    """Operations for both gradients, each as many as forward: torch's own formula takes groups for dense layers."""
    transposed, wanted = arguments[4], arguments[7]
    positions = math.prod((x if transposed else grad)[2:])
    return int(2 * x[0] * positions * math.prod(weight) * sum(wanted[:2]))


GROUPED: Final = {torch.ops.aten.convolution_backward: _convolution_backward}
"""For torch's counter of operations."""


def _held_now(runtime: Runtime) -> int:
    if runtime.device.type == "cuda":
        return torch.cuda.memory_allocated(runtime.device)
    # What earlier cases gave back would hide what this one takes: glibc keeps it in the process.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return PeakMemory(runtime.device).bytes()


def _wait(case: _Case, drawn: DrawnStore, timing: Timing, progress: Progress) -> float | None:
    """The share of their time that some steps in a row wait for their data; the first batch is not counted."""
    if case.trainer is None:
        return None
    trainer, device = case.trainer, case.trainer.runtime.device
    size = trainer.settings.batch_size
    steps = int(min(max(3 / timing.median, 2), 100)) + 1
    names = [drawn.names[index % len(drawn.names)] for index in range(steps * size)]
    fed = feed(trainer.main.train, [(names[i : i + size], [0] * size) for i in range(0, len(names), size)], device)
    waited = 0.0
    with progress.task(f"data wait, {case.name}", steps, "steps") as task:
        trainer.step(next(fed))
        wait_for(device)
        started = asked = time.perf_counter()
        for batch in fed:
            waited += time.perf_counter() - asked
            trainer.step(batch)
            task.advance()
            asked = time.perf_counter()
        wait_for(device)
    return waited / (time.perf_counter() - started)
