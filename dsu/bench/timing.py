"""Taking turns, medians and spread, and what the machine can do at best."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dsu.progress import SILENT, Progress
from dsu.runtime import Runtime

__all__ = ["Timing", "matrix_rate", "ratio", "take_turns", "wait_for"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing, a value a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The fastest and the slowest round."""
        return min(self.seconds), max(self.seconds)


def ratio(of: Timing, to: Timing) -> float:
    """How many times longer `to` takes than `of`: the median of the rounds' own ratios."""
    return statistics.median(b / a for a, b in zip(of.seconds, to.seconds, strict=True))


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that was asked of it."""
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
    """Time every case once a round; `repeat` calls make one value, and a GPU is waited for only after them."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    with progress.task("timing", rounds * len(cases), "measurements") as task:
        for _ in range(rounds):
            for name, call in cases.items():
                task.note(name)
                wait_for(runtime.device)
                started = time.perf_counter()
                for _ in range(repeat):
                    call()
                wait_for(runtime.device)
                found[name].append((time.perf_counter() - started) / repeat)
                task.advance()
    return {name: Timing(tuple(values)) for name, values in found.items()}


def matrix_rate(runtime: Runtime, sides: Sequence[int] = ()) -> float:
    """FLOP/s of the largest square matrix products at the precision, the best of several: the machine's ceiling."""
    card = runtime.device.type == "cuda"
    dtype = torch.bfloat16 if runtime.precision == "bf16" else torch.float32
    best = 0.0
    for side in sides or ((4096, 8192) if card else (1024, 2048)):
        a, b = (torch.randn(side, side, device=runtime.device).to(dtype) for _ in range(2))
        repeat = 20 if card else 1
        taken = take_turns({"": lambda a=a, b=b: a @ b}, 7, runtime, repeat=repeat)[""]  # type: ignore[misc]
        best = max(best, 2 * side**3 / taken.spread[0])
    return best
