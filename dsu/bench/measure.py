"""`dsu bench`: every part in one run."""

from collections.abc import Collection
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Final

import torch

from dsu.bench.drawn import draw_store
from dsu.bench.reading import measure_reading
from dsu.bench.report import Report
from dsu.bench.stages import measure_eval, measure_stages
from dsu.bench.steps import measure_steps
from dsu.bench.timing import matrix_rate
from dsu.choices import Precision
from dsu.config import DSUNetConfig
from dsu.encoders.weights import EncoderWeights, load_encoders
from dsu.features.stores import encoders_name, library_versions
from dsu.progress import SILENT, Progress
from dsu.runtime import choose_runtime, machine_name

__all__ = ["PARTS", "bench"]

PARTS: Final = ("steps", "reading", "stages", "eval")
STORED_SAMPLES: Final = 256
WIDE: Final = 32
"""Samples of a second batch size on a GPU, where launches weigh less."""


def bench(
    config: DSUNetConfig,
    weights: EncoderWeights,
    *,
    cache_root: Path,
    device: str = "auto",
    precision: Precision = "auto",
    parts: Collection[str] = PARTS,
    batch_size: int | None = None,
    rounds: int | None = None,
    images: int | None = None,
    compiled: bool = False,
    memory_limit: float | None = None,
    progress: Progress = SILENT,
) -> Report:
    """Measure this machine.

    Args:
        config: preset and sizes; all of its depths are measured.
        weights: of the encoders; random ones take the same time.
        cache_root: where stores lie; this disk is measured.
        device, precision: see `choose_runtime`.
        parts: some of `PARTS`.
        batch_size: of a step; None: 8 on a GPU, 2 on a CPU.
        rounds: turns that each case takes; None: 20 on a GPU, 3 on a CPU.
        images: that stage one and prediction run over; None: 256 on a GPU, 8 on a CPU.
        compiled: add a case with torch.compile, which takes minutes to get ready.
        memory_limit: GB of a GPU's memory that may be used; None: all.
        progress: who is told.
    """
    runtime = choose_runtime(device, precision)
    card = runtime.device.type == "cuda"
    if card and memory_limit is not None:
        total = torch.cuda.get_device_properties(runtime.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_limit * 1e9 / total), runtime.device)
    batch_size = batch_size or (8 if card else 2)
    rounds = rounds or (20 if card else 3)
    versions = ", ".join(f"{name} {number}" for name, number in library_versions().items())
    report = Report(
        device=machine_name(runtime),
        libraries=versions,
        date=date.today().isoformat(),
        preset=config.preset if config.preset != "custom" else encoders_name(config),
        precision=runtime.precision,
        batch_size=batch_size,
        rounds=rounds,
        matrix_rate=matrix_rate(runtime),
    )
    if {"steps", "stages"} & set(parts):
        hiera, dino, _ = load_encoders(config, weights, hiera=True, dino=True)
    if {"steps", "reading"} & set(parts):
        with draw_store(config, cache_root, STORED_SAMPLES, progress) as drawn:
            report = replace(report, written=drawn.written, disk=drawn.disk)
            if "reading" in parts:
                report = replace(
                    report, reading=tuple(measure_reading(config, drawn, runtime, max(rounds, 5), progress))
                )
            if "steps" in parts:
                steps = partial(
                    measure_steps, config, hiera, dino, drawn, runtime, compiled=compiled, progress=progress
                )
                report = replace(report, steps=tuple(steps(batch_size=batch_size, rounds=rounds)))
                if card and batch_size != WIDE:
                    report = replace(report, wide=tuple(steps(batch_size=WIDE, rounds=max(rounds // 4, 1))))
                report = replace(report, matrix_rate=max(report.matrix_rate, matrix_rate(runtime)))
    if "stages" in parts:
        count = images or (256 if card else 8)
        report = replace(report, stages=measure_stages(config, hiera, dino, runtime, count, cache_root, progress))
    if "eval" in parts:
        report = replace(report, evaluation=measure_eval(runtime, 100, 12, 2, progress))
    return report
