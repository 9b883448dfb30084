"""Taking turns, medians and spread, and what the machine can do at best."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch

from dsu.progress import SILENT, Progress
from dsu.runtime import Runtime

__all__ = ["CPU", "GpuWork", "Timing", "gpu_work", "matrix_rate", "ratio", "seconds_of", "summed", "take_turns"]

CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing, a value a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.seconds)


def ratio(of: Timing, to: Timing) -> float:
    """How many times longer `to` takes than `of`: the median of the rounds' own ratios."""
    return statistics.median(b / a for a, b in zip(of.seconds, to.seconds, strict=True))


def seconds_of(call: Callable[[], object], device: torch.device = CPU, repeat: int = 1) -> float:
    """Seconds of a call, on average over `repeat` in a row; a GPU is waited for before the first and after the last."""
    _wait_for(device)
    started = time.perf_counter()
    for _ in range(repeat):
        call()
    _wait_for(device)
    return (time.perf_counter() - started) / repeat


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    runtime: Runtime,
    progress: Progress = SILENT,
    *,
    repeat: int = 1,
) -> dict[str, Timing]:
    """Time every case once a round; `repeat` calls make one value."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    with progress.task("timing", rounds * len(cases), "measurements") as task:
        for _ in range(rounds):
            for name, call in cases.items():
                task.note(name)
                found[name].append(seconds_of(call, runtime.device, repeat))
                task.advance()
    return {name: Timing(tuple(values)) for name, values in found.items()}


@dataclass(frozen=True)
class GpuWork:
    """What one call makes a GPU do.

    Attributes:
        kernels: launched, or replayed by a graph.
        busy: seconds in which any of them ran.
        eager: seconds of the same call kernel by kernel; None where it is not captured at all.
    """

    kernels: int
    busy: float
    eager: float | None


def gpu_work(call: Callable[[], object], eager: Callable[[], object] | None, device: torch.device) -> GpuWork | None:
    """Profile one call, which has warmed up; None without a GPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        seconds_of(call, device)
    work = summed(profiled.key_averages())
    if eager is None:
        return work
    eager()
    return replace(work, eager=seconds_of(eager, device, repeat=5))


def summed(events: Iterable[Any]) -> GpuWork:
    """The device's share of a profile: its own times are in microseconds."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]

    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in on_device) / 1e6
    return GpuWork(sum(event.count for event in on_device), busy, None)


def matrix_rate(runtime: Runtime, sides: Sequence[int] = ()) -> float:
    """FLOP/s of the largest square matrix products at the precision, the best of several: the machine's ceiling."""
    on_gpu = runtime.device.type == "cuda"
    dtype = torch.bfloat16 if runtime.precision == "bf16" else torch.float32
    best = 0.0
    for side in sides or ((4096, 8192) if on_gpu else (1024, 2048)):
        a, b = (torch.randn(side, side, device=runtime.device).to(dtype) for _ in range(2))
        product = partial(torch.matmul, a, b)
        fastest = min(seconds_of(product, runtime.device, 20 if on_gpu else 1) for _ in range(7))
        best = max(best, 2 * side**3 / fastest)
    return best
