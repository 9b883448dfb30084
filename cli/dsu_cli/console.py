"""Output: progress bars, tables, errors. Results go to standard output, all else to standard error."""

import codecs
import io
import json
import logging
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Column, Table

from dsu.progress import Task, clock, counted

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars

# File and folder names are text, not markup: "a[/b]" would be an error, ":car:" a picture.
out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
for _console in (out, err):
    if _console.width < 40:  # narrower, and no table would have room for a word
        _console.width = 40


_PLAIN = str.maketrans("↑↓→≈–—…·²’‘“”×│─", "^v>~--..2''\"\"x|-")


def prepare_streams() -> None:
    """Prepare the standard streams for all commands.

    A closed stream becomes empty: otherwise the next file that is opened would take its place and be written into. If a
    stream can't encode a character, as on a latin-1 terminal, the nearest plain one is printed.
    """
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - as long as the process
    codecs.register_error("plain", _nearest)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def _nearest(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return lost.translate(_PLAIN).encode("ascii", "replace").decode(), error.end


class Stopped(Exception):
    """Ctrl-C in a command that knows how to continue: one sentence for the user."""


def say(text: str) -> None:
    """Print one permanent line on standard error."""
    err.print(with_urls(text), markup=False)


def fail(message: str) -> None:
    """An error, in one sentence."""
    err.print("error:", style="bold red", end=" ")
    err.print(with_urls(message), markup=False)


def with_urls(text: str) -> str:
    """The text with local mirrors of S3 replaced by the URL that the user gave."""
    if "/s3:/" not in text:
        return text
    from dsu_cache.remote import with_urls as shown

    return shown(text)


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


_SAID = _Said()


def listen(*, quiet: bool = False) -> None:
    """Print what the library logs without a `Progress`, such as network requests."""
    logger = logging.getLogger("dsu")
    logger.addHandler(_SAID)  # only once
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


def bytes_text(count: float) -> str:
    """`3.2 GB`: decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def age_text(seconds: float) -> str:
    """`3 min`, `5 h`, `12 d`: how long ago something happened."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds // length:,.0f} {unit}"
    return "now"


def key_table(
    rows: Iterable[tuple[RenderableType, RenderableType]], *, style: str = "bold", whole: bool = False
) -> Table:
    """Styled names and their values, aligned, without a frame; `whole` names are never wrapped."""
    made = Table.grid(Column(style=style, no_wrap=whole), Column(overflow="fold"), padding=(0, 2))
    for row in rows:
        made.add_row(*row)
    return made


def table(headings: Sequence[str], right: Collection[str] = (), rows: Iterable[Iterable[RenderableType]] = ()) -> Table:
    """A table without a frame; columns named in `right` are right-aligned."""
    columns = [Column(one, justify="right" if one in right else "left", overflow="fold") for one in headings]
    made = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        made.add_row(*row)
    return made


def print_json(value: Any) -> None:
    """Print one JSON document, and nothing else, on standard output."""
    print(json.dumps(value, indent=1))


def as_text(shown: RenderableType) -> str:
    """Printed output as plain text for a file."""
    # Wide enough for a table of several runs.
    console = Console(file=io.StringIO(), width=160, highlight=False, soft_wrap=True, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(shown)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


class ConsoleProgress:
    """Bars with rate and ETA on a terminal; elsewhere one plain line per phase."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    def say(self, text: str) -> None:
        """Print one permanent line."""
        if not self._quiet:
            say(text)

    @contextmanager
    def task(self, label: str, total: int, unit: str = "images") -> Iterator[Task]:
        """See `dsu.progress.Progress.task`."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress as RichBars,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        live = err.is_terminal and not self._quiet
        bars = RichBars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}", markup=False),
            console=err,
            disable=not live,
            transient=True,
        )
        bar = _RatedBar(bars, label, total, unit)
        with bars:
            yield bar
        if not self._quiet:
            say(bar.summary())


class _RatedBar:
    """A bar with its rate; prints one summary line when it is done."""

    def __init__(self, bars: "RichBars", label: str, total: int, unit: str) -> None:
        self._started = time.perf_counter()
        self._bars, self._label, self._unit = bars, label, unit
        self._done, self._remark = 0, ""
        self._task = bars.add_task(label, total=total, rate="", remark="")

    def advance(self, units: int = 1) -> None:
        self._done += units
        self._bars.update(self._task, advance=units, rate=self._rate())

    def note(self, text: str) -> None:
        self._remark = text
        self._bars.update(self._task, remark=text)

    def summary(self) -> str:
        """`encoding DUTS-TR: 4,800 views in 5:12, 15.4 views/s`."""
        taken = clock(time.perf_counter() - self._started)
        text = f"{self._label}: {counted(self._done, self._unit)} in {taken}, {self._rate()}"
        return f"{text} · {self._remark}" if self._remark else text

    def _rate(self) -> str:
        rate = self._done / max(time.perf_counter() - self._started, 1e-9)
        digits = f"{rate:.2g}" if rate < 1 else f"{rate:.1f}" if rate < 100 else f"{rate:,.0f}"
        return f"{digits} {self._unit}/s"
