"""The training panel on a terminal: progress, scores, speed and memory."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from dsu.progress import Task, clock
from dsu.training.callbacks import Callback
from dsu_cli.console import key_table

if TYPE_CHECKING:
    from dsu.training.epoch_log import EpochLog
    from dsu.training.trainer import Trainer

WIDEST: Final = 88
CAPTION: Final = " data wait: time spent waiting for data · peak: peak memory "


class TrainingPanel(Callback):
    """The run's progress (`dsu.progress.Progress`) and its callback (`dsu.training.callbacks.Callback`) in one.

    A step only updates counters; a separate thread draws the panel from them a few times per second. One line per epoch
    remains above it.

    Args:
        console: a terminal, on standard error.
        trainer: the trainer of the run.
    """

    def __init__(self, console: Console, trainer: "Trainer") -> None:
        self._console, self._trainer = console, trainer
        self._log: EpochLog | None = None
        self._epochs_before = trainer.epoch
        self._phase, self._done, self._total = "starting", 0, 1
        self._validating_took = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draw the panel while the context is open, then erase it."""
        with Live(
            get_renderable=self.render,
            console=self._console,
            refresh_per_second=4,
            transient=True,
        ):
            yield

    # ---- Progress ----

    def say(self, text: str) -> None:
        """Print a permanent line above the panel."""
        self._console.print(text, markup=False)

    @contextmanager
    def task(self, label: str, total: int, unit: str = "images") -> Iterator[Task]:
        """See `dsu.progress.Progress.task`."""
        self._phase, self._done, self._total = label, 0, max(total, 1)
        began = time.perf_counter()
        yield self
        if not label.startswith("epoch"):
            self._validating_took = time.perf_counter() - began

    def advance(self, units: int = 1) -> None:
        """See `dsu.progress.Task.advance`."""
        self._done += units

    def note(self, text: str) -> None:
        """Ignored: the panel shows the facts themselves."""

    # ---- Callback ----

    def on_step_end(self, trainer: "Trainer", log: "EpochLog") -> None:
        """Read the current epoch's counters."""
        # The trainer counts the epoch as done shortly before `on_epoch_end`, which releases its log.
        self._log, self._epochs_before = log, trainer.epoch

    def on_epoch_end(self, trainer: "Trainer", row: Mapping[str, float]) -> None:
        """Print the epoch's line."""
        self._log = None
        text = f"epoch {trainer.epoch}/{trainer.settings.epochs} in {clock(row['seconds'])}: loss {row['loss']:.4f}"
        if "val_S" in row:
            best = " (best)" if trainer.best_epoch == trainer.epoch else ""
            text += f" · held out S {row['val_S']:.4f}  MAE {row['val_MAE']:.4f}  IoU {row['val_IoU']:.4f}{best}"
        self.say(text)

    # ---- drawing ----

    def render(self) -> RenderableType:
        """The current panel."""
        trainer = self._trainer
        epochs = trainer.settings.epochs
        now, whole = self._left()
        facts = [(name, Text(value, no_wrap=True, overflow="ellipsis")) for name, value in self._facts()]
        lines = [
            self._bar(self._phase, self._done, self._total, now if self._phase.startswith("epoch") else None),
            self._bar("run", self._epochs_done(), float(epochs), whole),
            key_table(facts, style="dim"),
        ]
        title = Text(f" epoch {min(trainer.epoch + 1, epochs)}/{epochs} · {trainer.out} ", style="bold")
        title.truncate(WIDEST - 8, overflow="ellipsis")
        return Panel(
            Group(*lines),
            title=title,
            title_align="left",
            subtitle=Text(CAPTION, style="dim"),
            subtitle_align="left",
            width=min(WIDEST, self._console.width),
        )

    def _bar(self, label: str, done: float, total: float, left: float | None) -> Table:
        row = Table.grid(
            Column(width=14, no_wrap=True, overflow="ellipsis"),
            Column(ratio=1),
            Column(width=18, justify="right", no_wrap=True),
            Column(width=14, justify="right", no_wrap=True),
            padding=(0, 2),
            expand=True,
        )
        count = f"{done:,.0f}/{total:,.0f}" if label != "run" else f"{done / total:.0%}"
        row.add_row(
            Text(label),
            ProgressBar(total=total, completed=min(done, total)),
            count,
            "" if left is None else f"{clock(left)} left",
        )
        return row

    def _facts(self) -> Iterator[tuple[str, str]]:
        trainer, log = self._trainer, self._log
        last = trainer.history[-1] if trainer.history else None
        losses = [] if last is None else [last[name] for name in ("loss", "loss_D1", "loss_D2", "loss_D3")]
        if log is not None and log.fetched:
            losses = [*log.losses]
        sides = ("", "D1 ", "D2 ", "D3 ")
        yield "loss", "   ".join(f"{side}{value:.4f}" for side, value in zip(sides, losses, strict=False)) or "–"
        memory = f"peak {trainer.memory.bytes() / 1e9:.1f} GB"
        if log is not None and log.seconds > 0:
            wait = log.waited / log.seconds
            yield "speed", f"{log.samples / log.seconds:,.1f} images/s   data wait {wait:.0%}   {memory}"
        elif last is not None:
            yield "speed", f"{last['images_per_second']:,.1f} images/s   data wait {last['data_wait']:.0%}   {memory}"
        else:
            yield "speed", memory
        yield "held out", self._validated()

    def _validated(self) -> str:
        trainer = self._trainer
        if trainer.main.validation is None:
            return "nothing"
        rows = [row for row in trainer.history if "val_S" in row]
        if not rows:
            return "not validated yet"
        last = rows[-1]
        text = f"S {last['val_S']:.4f}  MAE {last['val_MAE']:.4f}  IoU {last['val_IoU']:.4f}"
        best = max(rows, key=lambda row: row["val_S"])
        return f"{text}   best S {best['val_S']:.4f} (epoch {int(best['epoch'])})"

    def _epochs_done(self) -> float:
        log = self._log
        if log is None:
            return self._trainer.epoch
        return self._epochs_before + log.samples / len(self._trainer.main.train.names)

    def _left(self) -> tuple[float | None, float | None]:
        """Seconds left in this epoch and in the whole run; None before the first measurement."""
        trainer, log = self._trainer, self._log
        images = len(trainer.main.train.names)
        if log is not None and log.samples and log.seconds:
            pace = log.seconds / log.samples
        elif trainer.history:
            pace = 1 / trainer.history[-1]["images_per_second"]
        else:
            return None, None
        validations = (trainer.settings.epochs - trainer.epoch) / trainer.settings.val_every
        steps = pace * images * (trainer.settings.epochs - self._epochs_done())
        of_epoch = pace * (images - log.samples) if log is not None else None
        return of_epoch, steps + validations * self._validating_took
