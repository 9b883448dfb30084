"""`dsu bench`: measure all parts in one run, and report them as JSON and Markdown."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from dsu.bench import PARTS
from dsu.bench.commands import CommandRow, EvalRow, StageRow, measure_eval, measure_stages
from dsu.bench.machine import ReadRow, matrix_rate, measure_reading, random_store, ratio
from dsu.bench.scale import ScaleRow, measure_scale
from dsu.bench.steps import (
    BARE_DINO,
    DINO_PART,
    END_TO_END,
    PUBLISHED,
    STORE,
    StepRow,
    measure_steps,
)
from dsu.choices import Precision
from dsu.config import DSUNetConfig
from dsu.encoders.weights import load_encoders
from dsu.features.samples import WRITERS
from dsu.features.stores import library_versions
from dsu.network.network import DSUNet
from dsu.progress import SILENT, Progress, counted
from dsu.runtime import choose_runtime, machine_name
from dsu.settings import EncoderWeights

T = TypeVar("T")

WIDE: Final = 32
"""A second batch size on a GPU, at which kernel launches matter less."""
DUTS_TR: Final = 10_553
"""Images in DUTS-TR; stage one encodes each in four views."""
EPOCHS: Final = 50
_PLAIN: Final = f"plain files of the same sizes, {WRITERS} threads, each file flushed once"


@dataclass
class Report:
    """All measurements of a run of `dsu bench`; parts that were left out are None or empty.

    Attributes:
        device, libraries, date: machine, versions and date of the run.
        preset, precision, batch_size, rounds: settings of the run.
        matrix_rate: FLOP/s of large matrix products, the machine's peak at this precision.
        steps, reading, stages, evaluation, scale: see their classes.
        wide: steps at a larger batch size, on a GPU.
        written: bytes per second written to the store, including flushing.
        disk: bytes per second written to plain files of the same sizes.
    """

    device: str
    libraries: str
    date: str
    preset: str
    precision: str
    batch_size: int
    rounds: int
    matrix_rate: float
    steps: tuple[StepRow, ...] = ()
    wide: tuple[StepRow, ...] = ()
    reading: tuple[ReadRow, ...] = ()
    stages: StageRow | None = None
    evaluation: EvalRow | None = None
    scale: tuple[ScaleRow, ...] = ()
    written: float | None = None
    disk: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with every round's seconds."""
        return asdict(self)

    def to_markdown(self) -> str:
        """All tables, with padded columns, and their explanations."""
        return "\n\n".join(self._paragraphs())

    def _paragraphs(self) -> Iterator[str]:
        yield (
            f"`dsu bench`, {self.date}: {self.device}, {self.precision}, preset {self.preset}, batch "
            f"{self.batch_size}, {self.rounds} rounds ({self.libraries}). Matrix products reach "
            f"{self.matrix_rate / 1e12:.3g} TFLOP/s."
        )
        if self.steps:
            yield self._step_table(self.steps)
            by_name = {row.name: row.timing for row in self.steps}
            yield (
                f"The step with all blocks adapted takes {ratio(by_name[PUBLISHED], by_name[f'{STORE}all']):.2f} "
                "times as long as the same step with padded windows and explicit attention. DINOv2's part of an "
                f"end-to-end step takes {ratio(by_name[BARE_DINO], by_name[DINO_PART]):.2f} times as long as DINOv2 "
                "alone."
            )
        if self.wide:
            yield f"The same at batch {WIDE}:"
            yield self._step_table(self.wide)
        if self.steps:
            yield self._projection()
        if self.reading:
            yield self._reading_table()
            yield " ".join(self._disk())
        if self.stages:
            yield _stage_table(self.stages)
            yield (
                f"Over {self.stages.images:,} images, in brackets: the command's share. Network alone: on batches that "
                f"are ready. Host alone: the command with a network that takes no time. Disk alone: {_PLAIN}."
            )
        if found := self.evaluation:
            same = "identical in every digit" if found.same else "NOT THE SAME FIGURES"
            yield (
                f"`eval` evaluates {found.ours:.3g} images/s with {found.workers} processes, pysodmetrics in a loop "
                f"{found.library:.3g}: {found.speedup:.2f}x, {same} ({found.images} images)."
            )

        if self.scale:
            yield _scale_table(self.scale)
            yield (
                "Begin: start of stage one, from a finished file scan to the first image. Memory: in addition to a "
                "process that opens an empty store. In brackets: ratio to the line above."
            )

    def _step_table(self, steps: Sequence[StepRow]) -> str:
        columns: dict[str, Callable[[StepRow], str]] = {
            "": lambda row: row.name,
            "reads": lambda row: " ".join(row.reads),
            "ms": lambda row: _ms(row.timing.median),
            "range": lambda row: f"{_ms(min(row.timing.seconds))} to {_ms(max(row.timing.seconds))}",
            "images/s": lambda row: f"{row.images:.3g}",
            "speedup": lambda row: f"{row.speedup:.2f}x" if row.reads else "",
            "TFLOP/image": lambda row: f"{row.flop / 1e12:.3f}",
            "TFLOP/s": lambda row: f"{row.flop * row.images / 1e12:.3g}",
            "of peak": lambda row: f"{row.flop * row.images / self.matrix_rate:.0%}",
            "GB": lambda row: f"{row.peak / 1e9:.1f}",
            "wait": lambda row: "" if row.wait is None else f"{row.wait:.1%}",
        }
        if any(row.gpu for row in steps):
            columns |= {
                "kernels": lambda row: f"{row.gpu.kernels:,}" if row.gpu else "",
                "busy": lambda row: f"{row.gpu.busy / row.timing.median:.0%}" if row.gpu else "",
                "eager ms": lambda row: _ms(row.gpu.eager) if row.gpu and row.gpu.eager is not None else "",
            }
        return _table(steps, columns, left=2)

    def _projection(self) -> str:
        stage_one = 4 * DUTS_TR / self.stages.mixes[0].rate / 3600 if self.stages else 0.0
        hours = {row.name: EPOCHS * DUTS_TR / row.images / 3600 for row in self.steps if row.reads}
        both = {name: alone if name == END_TO_END else alone + stage_one for name, alone in hours.items()}
        body = [[name, f"{hours[name]:,.1f}", f"{both[name]:,.1f}" if self.stages else ""] for name in hours]
        return markdown_table([f"{EPOCHS} epochs of DUTS-TR", "hours", "with stage one"], body, left=1)

    def _reading_table(self) -> str:
        columns: dict[str, Callable[[ReadRow], str]] = {
            "reading": lambda row: " ".join(row.what),
            "MB/sample": lambda row: f"{row.bytes_per_sample / 1e6:.2f}",
            "samples/s": lambda row: f"{row.samples:,.0f}",
            "GB/s": lambda row: f"{row.samples * row.bytes_per_sample / 1e9:.2f}",
            "of memory maps": lambda row: f"{row.against_plain:.0%}",
            "cold samples/s": lambda row: f"{row.cold:,.0f}",
            "cold MB/s": lambda row: f"{row.cold * row.bytes_per_sample / 1e6:,.0f}",
        }
        return _table(self.reading, columns, left=1)

    def _disk(self) -> Iterator[str]:
        """Sentences on the store's writing rate, and on the depths for which the disk is fast enough."""
        if self.written and self.disk:
            yield (
                f"The store was written at {self.written / 1e6:,.0f} MB/s, {self.written / self.disk:.0%} of the "
                f"disk's own {self.disk / 1e6:,.0f} MB/s ({_PLAIN})."
            )
        if not self.steps:
            return
        cold = max(row.cold * row.bytes_per_sample for row in self.reading)
        size = {name: count for row in self.steps for name, count in row.item_bytes.items()}
        needs = {
            row.name.removeprefix(STORE): row.images * sum(size[name] for name in {*row.reads, "mask"})
            for row in self.steps
            if row.wait is not None and row.name.removeprefix(STORE).isalnum()
        }
        fed = ", ".join(name for name, need in needs.items() if need <= cold) or "none"
        starved = ", ".join(f"{name} ({need / 1e6:,.0f} MB/s)" for name, need in needs.items() if need > cold)
        slow = f"; too slow for N = {starved}" if starved else ""
        yield f"With an empty page cache it is fast enough for N = {fed}{slow}."


def _ms(seconds: float) -> str:
    """Milliseconds with three digits."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def _stage_table(stages: StageRow) -> str:
    def name(row: CommandRow) -> str:
        if not row.features:
            return "`predict --end-to-end`, images/s"
        views = counted(row.count // stages.images, "views")
        return f"`cache-features`, V in {views}{', S1 to S4 in one' * ('S1' in row.features)}, views/s"

    def bound(rate: float, limit: float) -> str:
        return f"{digits(limit)} ({rate / limit:.0%})"

    def digits(rate: float) -> str:
        return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"

    columns: dict[str, Callable[[CommandRow], str]] = {
        "command": name,
        "rate": lambda row: digits(row.rate),
        "network alone": lambda row: bound(row.rate, row.network),
        "host alone": lambda row: bound(row.rate, row.host),
        "MB/s": lambda row: digits(row.written / 1e6) if row.disk else "",
        "disk alone": lambda row: bound(row.written / 1e6, row.disk / 1e6) if row.disk else "",
    }
    return _table((*stages.mixes, stages.prediction), columns, left=1)


def _scale_table(rows: Sequence[ScaleRow]) -> str:
    columns: dict[str, Callable[[ScaleRow], float]] = {
        "manifest MB": lambda row: row.manifest / 1e6,
        "begin s": lambda row: row.begin,
        "open s": lambda row: row.open,
        "MB": lambda row: row.open_memory / 1e6,
        "add 1,000 s": lambda row: row.add,
        "MB written": lambda row: row.added / 1e6,
        "draw an epoch s": lambda row: row.epoch,
        "cache info s": lambda row: row.info,
    }
    body = []
    for before, row in zip((None, *rows), rows, strict=False):
        cells = []
        for figure in columns.values():
            growth = f" ({figure(row) / figure(before):.1f}x)" if before and figure(before) > 0 else ""
            cells.append(f"{figure(row):.3g}{growth}")
        body.append([f"{row.samples:,}", *cells])
    return markdown_table(["samples", *columns], body, left=0)


def _table(rows: Sequence[T], columns: Mapping[str, Callable[[T], str]], *, left: int) -> str:
    """One line per row, with each column's cell; see `markdown_table`."""
    return markdown_table([*columns], [[cell(row) for cell in columns.values()] for row in rows], left=left)


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]], *, left: int) -> str:
    """A table with padded columns: the first `left` are left-aligned, the others right-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *body, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    padded = [
        [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in (head, rule, *body)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


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
        config: preset and sizes; all of its usual depths are measured.
        weights: where the encoders' weights come from; random ones take the same time.
        cache_root: the folder of stores; its disk is measured.
        device, precision: see `choose_runtime`.
        parts: the parts to measure, from `PARTS`.
        batch_size: samples per step; None: 8 on a GPU, and 32 in a second table; 2 on a CPU.
        rounds: rounds per case; None: 5 on a GPU, 3 on a CPU.
        images: number of images for stage one and prediction; None: 512 on a GPU, 8 on a CPU.
        compiled: add a case with torch.compile, which needs minutes for its compilation.
        memory_limit: GB of GPU memory that may be used; None: all.
        progress: receives messages.
    """
    runtime = choose_runtime(device, precision)
    on_gpu = runtime.device.type == "cuda"
    if on_gpu and memory_limit is not None:
        total = torch.cuda.get_device_properties(runtime.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_limit * 1e9 / total), runtime.device)
    report = Report(
        device=machine_name(runtime),
        libraries=", ".join(f"{name} {number}" for name, number in library_versions().items()),
        date=date.today().isoformat(),
        preset=config.encoders_name,
        precision=runtime.precision,
        batch_size=batch_size or (8 if on_gpu else 2),
        rounds=rounds or (5 if on_gpu else 3),
        matrix_rate=matrix_rate(runtime),
    )
    if {"steps", "stages"} & set(parts):
        with runtime.device:  # draw random weights on the device: on a GPU this takes a second
            hiera, dino, _ = load_encoders(config, weights, hiera=True, dino=True)
        network = runtime.place(DSUNet(config, hiera, dino, feature_dtype=torch.float16).eval())
    if {"steps", "reading"} & set(parts):
        with random_store(config, cache_root, 256, progress) as stored:
            report.written, report.disk = stored.written, stored.disk
            if "reading" in parts:
                report.reading = measure_reading(stored, runtime, max(report.rounds, 5), progress)
            if "steps" in parts:
                steps = partial(measure_steps, network, stored, runtime, compiled=compiled, progress=progress)
                report.steps = steps(batch_size=report.batch_size, rounds=report.rounds)
                if on_gpu and batch_size is None:
                    report.wide = steps(batch_size=WIDE, rounds=max(report.rounds // 2, 1), usual_only=True)
                report.matrix_rate = max(report.matrix_rate, matrix_rate(runtime))
    if "stages" in parts:
        report.stages = measure_stages(network, runtime, images or (512 if on_gpu else 8), cache_root, progress)
    if "eval" in parts:
        report.evaluation = measure_eval(runtime, 100, 6, 2, progress)
    if "scale" in parts:
        report.scale = measure_scale(cache_root, progress=progress)
    return report
