"""One run's figures, as JSON and as the Markdown that a README can take."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsu.bench.reading import ReadRow
from dsu.bench.stages import EvalRow, StageRow
from dsu.bench.steps import BARE_DINO, DINO_PART, END_TO_END, PUBLISHED, STORE, StepRow
from dsu.bench.timing import ratio
from dsu.features.writing import WRITERS
from dsu.progress import counted

__all__ = ["DUTS_TR", "Report"]

DUTS_TR = 10_553
"""Images of DUTS-TR, in four views each in stage one."""
EPOCHS = 50
_PLAIN = f"plain files of the same sizes, {WRITERS} threads, each file flushed once"


@dataclass(frozen=True)
class Report:
    """Everything that `dsu bench` measured; parts that were left out are None or empty.

    Attributes:
        device, libraries, date: of this run.
        preset, precision, batch_size, rounds: what was run.
        matrix_rate: FLOP/s of large matrix products, the machine's ceiling at this precision.
        steps, reading, stages, evaluation: see their modules.
        wide: steps at a larger batch size, on a GPU.
        written: bytes a second that the store took, flushed.
        disk: bytes a second that plain files of the same sizes took.
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
    written: float | None = None
    disk: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, with every round's seconds."""
        return asdict(self)

    def to_markdown(self) -> str:
        """All tables, aligned to be read as they are."""
        return "\n".join(
            [
                f"`dsu bench`, {self.date}: {self.device}, {self.precision}, preset {self.preset}, batch "
                f"{self.batch_size}, {self.rounds} rounds ({self.libraries}). Matrix products reach "
                f"{self.matrix_rate / 1e12:.3g} TFLOP/s.",
                *([*self._step_table(self.steps), "", *self._step_ratios()] if self.steps else []),
                *(["", "The same at batch 32:", *self._step_table(self.wide)] if self.wide else []),
                *(self._projection() if self.steps else []),
                *(self._reading_table() if self.reading else []),
                *(self._stage_lines() if self.stages else []),
                *(self._eval_line() if self.evaluation else []),
            ]
        )

    def _step_table(self, steps: Sequence[StepRow]) -> list[str]:
        head = ["", "reads", "ms", "range", "images/s", "speedup", "TFLOP/image", "TFLOP/s", "of peak", "GB", "wait"]
        on_gpu = any(row.gpu for row in steps)
        head += ["kernels", "busy", "eager ms"] if on_gpu else []
        body = []
        for row in steps:
            low, high = row.timing.spread
            rate = row.flop * row.images
            body.append(
                [
                    row.name,
                    " ".join(row.reads),
                    f"{row.timing.median * 1e3:,.0f}",
                    f"{low * 1e3:,.0f} to {high * 1e3:,.0f}",
                    f"{row.images:.3g}",
                    f"{row.speedup:.2f}x" if row.reads else "",
                    f"{row.flop / 1e12:.3f}",
                    f"{rate / 1e12:.3g}",
                    f"{rate / self.matrix_rate:.0%}",
                    f"{row.peak / 1e9:.1f}",
                    "" if row.wait is None else f"{row.wait:.1%}",
                    *(_gpu_cells(row) if on_gpu else []),
                ]
            )
        return ["", *markdown_table(head, body, left=2)]

    def _step_ratios(self) -> list[str]:
        by_name = {row.name: row.timing for row in self.steps}
        whole = by_name[f"{STORE}all"]
        return [
            f"The step with all blocks adapted takes {ratio(by_name[PUBLISHED], whole):.2f} of the same step with "
            f"padded windows and attention written out. DINOv2's part of an end-to-end step takes "
            f"{ratio(by_name[BARE_DINO], by_name[DINO_PART]):.2f} of DINOv2 alone.",
        ]

    def _projection(self) -> list[str]:
        head = [f"{EPOCHS} epochs of DUTS-TR", "hours", "with stage one"]
        stage_one = 0.0 if self.stages is None else 4 * DUTS_TR / self.stages.mixes[0].stage_one / 3600
        body = []
        for row in self.steps:
            if row.reads:
                hours = EPOCHS * DUTS_TR / row.images / 3600
                both = hours if row.name == END_TO_END else hours + stage_one
                body.append([row.name, f"{hours:,.1f}", f"{both:,.1f}" if self.stages else ""])
        return ["", *markdown_table(head, body, left=1)]

    def _reading_table(self) -> list[str]:
        head = ["reading", "MB/sample", "samples/s", "GB/s", "of memory maps", "cold samples/s", "cold MB/s"]
        body = [
            [
                " ".join(row.what),
                f"{row.bytes_per_sample / 1e6:.2f}",
                f"{row.samples:,.0f}",
                f"{row.samples * row.bytes_per_sample / 1e9:.2f}",
                f"{row.against_plain:.0%}",
                f"{row.cold:,.0f}",
                f"{row.cold * row.bytes_per_sample / 1e6:,.0f}",
            ]
            for row in self.reading
        ]
        return ["", *markdown_table(head, body, left=1), "", " ".join([*self._written(), *self._feeds()])]

    def _written(self) -> list[str]:
        if self.written is None or self.disk is None:
            return []
        return [
            f"The store was written at {self.written / 1e6:,.0f} MB/s, {self.written / self.disk:.0%} of the disk's "
            f"own {self.disk / 1e6:,.0f} MB/s ({_PLAIN})."
        ]

    def _feeds(self) -> list[str]:
        """Which depths the disk can feed, by what a sample of each reads."""
        if not self.steps:
            return []
        cold = max(row.cold * row.bytes_per_sample for row in self.reading)
        size = {name: count for row in self.steps for name, count in row.item_bytes.items()}
        needs = {
            row.name.removeprefix(STORE): row.images * sum(size[name] for name in {*row.reads, "mask"})
            for row in self.steps
            if row.wait is not None and row.name.removeprefix(STORE).isalnum()
        }
        fed = [name for name, need in needs.items() if need <= cold]
        starved = [f"{name} ({need / 1e6:,.0f} MB/s)" for name, need in needs.items() if need > cold]
        text = f"From a cold disk it feeds N = {', '.join(fed) or 'none'}"
        return [f"{text}; too slow for N = {', '.join(starved)}." if starved else f"{text}."]

    def _stage_lines(self) -> list[str]:
        stages = self.stages
        assert stages is not None
        head = ["`cache-features` of a training split", "views/s", "encoders alone", "of them"]
        head += ["MB/s", "disk alone", "of it"]
        body = [
            [
                f"V in {counted(row.views // stages.images, 'views')}{', S1 to S4 in one' * ('S1' in row.features)}",
                f"{row.stage_one:.3g}",
                f"{row.bare:.3g}",
                f"{row.stage_one / row.bare:.0%}",
                f"{row.written / 1e6:,.3g}",
                f"{row.disk / 1e6:,.0f}",
                f"{row.written / row.disk:.1%}",
            ]
            for row in stages.mixes
        ]
        return [
            "",
            *markdown_table(head, body, left=1),
            "",
            f"Over {stages.images} drawn images, decoding and writing included. The disk alone: {_PLAIN}. "
            f"`predict --end-to-end` runs {stages.prediction:.3g} images/s.",
        ]

    def _eval_line(self) -> list[str]:
        found = self.evaluation
        assert found is not None
        same = "the same to every digit" if found.same else "NOT THE SAME FIGURES"
        return [
            "",
            f"`eval` judges {found.ours:.3g} images/s with {found.workers} processes, pysodmetrics in a loop "
            f"{found.library:.3g}: {found.speedup:.2f}x, {same} ({found.images} images).",
        ]


def _gpu_cells(row: StepRow) -> list[str]:
    """Kernels, the share of the time in which the GPU is busy, and milliseconds kernel by kernel."""
    if row.gpu is None:
        return ["", "", ""]
    eager = "" if row.gpu.eager is None else f"{row.gpu.eager * 1e3:,.0f}"
    return [f"{row.gpu.kernels:,}", f"{row.gpu.busy / row.timing.median:.0%}", eager]


def markdown_table(head: list[str], body: list[list[str]], *, left: int) -> list[str]:
    """Lines of a table whose first `left` columns are flush left, the others flush right, all padded."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *body, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return [line(head), line(rule), *map(line, body)]
