"""Write masks to files, with a record and a table next to them."""

import io
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.choices import Normalization, PredictionKind
from dsu.data.images import Depth, UnreadableImage, read_image, read_rgba
from dsu.distributed import ALONE, World
from dsu.errors import DsuError
from dsu.files import atomic_write, make_folder
from dsu.heads.head_file import HeadInfo
from dsu.pictures import cutout, overlay
from dsu.prediction.record import (
    PREDICTIONS_LOCK,
    Remaining,
    Seen,
    file_in,
    find_remaining,
    note_job,
    open_record,
    trained_on_marker,
)
from dsu.prediction.targets import Job, Target
from dsu.prediction.verdicts import VerdictRow, find_verdict, read_table, write_table
from dsu.progress import SILENT, Progress
from dsu.runner import stretch
from dsu.settings import PredictionSettings
from dsu.thresholds import DEFAULT_THRESHOLD, level_of
from dsu_cache import locked

_SECONDS_BETWEEN_TABLES: Final = 10.0
_TABLE_SHARE: Final = 0.02
"""Highest share of the time spent on writing tables: each contains all rows so far."""


@dataclass
class Outcome:
    """The result of a prediction.

    Attributes:
        folder: where the masks are; or the single output file.
        has_truth: whether ground truth of any set is known.
        written: number of new masks.
        kept: number of existing predictions of the same head and settings.
        broken: one sentence for each unreadable image or image without a mask.
        rows: the verdict of each image, by output file.
        before: the folder's earlier table.
        writes_table: whether this process writes the folder's table.
    """

    folder: Path
    has_truth: bool = False
    written: int = 0
    kept: int = 0
    broken: list[str] = field(default_factory=list)
    rows: dict[str, VerdictRow] = field(default_factory=dict)
    before: dict[str, VerdictRow] = field(default_factory=dict, repr=False)
    writes_table: bool = True
    _next_table_at: float = field(default_factory=lambda: time.monotonic() + _SECONDS_BETWEEN_TABLES, repr=False)
    _not_gathered: list[VerdictRow] = field(default_factory=list, repr=False)

    def add(self, rows: Iterable[VerdictRow]) -> None:
        """Add rows of finished images; write the table now and then. Raises as `atomic_write`."""
        for row in rows:
            self._not_gathered.append(row)
            self.rows[row.file] = row
            self.written += not row.problem
            self.broken += [row.problem] if row.problem else []
        if time.monotonic() > self._next_table_at:  # for the case of a kill
            self.write_table()

    def gather(self, world: World) -> None:
        """Add the rows of the other processes since the last call."""
        own, self._not_gathered = self._not_gathered, []
        for rank, rows in enumerate(world.all_gather(own)):
            if rank != world.rank:
                self.add(rows)
        self._not_gathered = []

    def write_table(self) -> None:
        """Write the folder's table with all rows so far."""
        started = time.monotonic()
        if self.writes_table:
            write_table(self.folder, self.before | self.rows)
        now = time.monotonic()
        self._next_table_at = now + max(_SECONDS_BETWEEN_TABLES, (now - started) / _TABLE_SHARE)


RunJob = Callable[[Job, Sequence[Target], Outcome, Seen | None], None]
"""Predicts targets of a job and adds their rows to the outcome; if it decodes images, it passes their pixel hashes to
its last argument before it writes their masks."""


def write_jobs(
    jobs: Sequence[Job],
    head: Path,
    info: HeadInfo,
    out: Path,
    settings: PredictionSettings,
    prepare: Callable[[Sequence[Job]], RunJob],
    world: World = ALONE,
    progress: Progress = SILENT,
) -> Outcome:
    """Predict the missing targets of all jobs; write the record and the table of verdicts.

    Files are written atomically. The folder is locked meanwhile: two commands would overwrite each other's record.

    Args:
        jobs, head, info, out, settings: what to predict, with which head, and where to.
        prepare: returns the function that predicts, given the jobs with missing targets, if there are any.
        world: the processes that divide each job's targets. Each predicts from all targets; rank 0 writes the record.
        progress: receives progress.

    Raises `DsuError` if `out` contains predictions made differently, and `BusyError` if another command predicts into
    it.
    """
    outcome = Outcome(out, settings.kind == "mask" and any(job.source is not None for job in jobs))
    outcome.writes_table = world.is_main
    record: dict[str, Any] = {}
    run: RunJob | None = None

    def look() -> list[Remaining]:
        record.update(open_record(out, head, info, settings))
        if record["sets"]:
            outcome.before = read_table(out)
        return [find_remaining(job, record, info, out, settings, outcome.before) for job in jobs]

    def begin(job: Job, remaining: Remaining) -> None:
        if world.connected:  # other processes change the record on the disk
            record.update(open_record(out, head, info, settings))
        note_job(job, remaining, record, info, out, progress)
        outcome.broken += job.unread
        outcome.kept += len(remaining.rows)
        outcome.rows |= remaining.rows

    with ExitStack() as held:
        if world.is_main:
            make_folder(out)
            held.enter_context(locked(out / PREDICTIONS_LOCK, f"{out} is being predicted into"))
        work = list(zip(jobs, world.broadcast_object(look), strict=True))
        try:
            for job, remaining in work:
                world.broadcast_object(partial(begin, job, remaining))
                if remaining.targets:
                    run = run or prepare([job for job, remaining in work if remaining.targets])
                    run(job, remaining.targets, outcome, trained_on_marker(out, record, job.name, info, world))
                outcome.gather(world)
        except BaseException:  # also when stopped by Ctrl-C
            with suppress(DsuError):  # report the first error, not that the disk is still full
                outcome.write_table()
            raise
        outcome.write_table()
    return outcome


def row_of(job: Job, target: Target, outcome: Outcome) -> VerdictRow:
    """The row of a target without a mask."""
    return VerdictRow(job.name, target.name, "no mask", file=file_in(outcome.folder, target))


def write_mask(
    row: VerdictRow, target: Target, mask: NDArray[np.float32], job: Job, settings: PredictionSettings
) -> VerdictRow:
    """Write the output for a mask (H, W), not normalised yet; returns its row, with the problem if there is one."""
    row = verdict_of(row, target.image, mask, job.threshold)
    if row.problem:
        return row
    try:
        content = png_of(
            target.image, mask, settings.kind, settings.threshold, job.threshold, job.normalization, job.depth
        )
    except UnreadableImage as error:
        return replace(row, verdict="no mask", problem=str(error))
    atomic_write(target.output, content)
    return row


def verdict_of(row: VerdictRow, image: Path, mask: NDArray[np.float32], threshold: float) -> VerdictRow:
    """An image's row from its mask (H, W), not normalised; with the problem if the mask is not finite."""
    if np.isfinite(mask).all():
        return find_verdict(row, _grey(mask), threshold)
    problem = (
        f"{image} has no mask, since the network's output is not finite: try --precision fp32, or train the head again."
    )
    return replace(row, problem=problem)


def png_of(
    image: Path,
    mask: NDArray[np.float32],
    kind: PredictionKind,
    binarize_at: float | None,
    threshold: float,
    normalization: Normalization = "none",
    depth: Depth | None = None,
    data: bytes | None = None,
) -> bytes:
    """The PNG for an image and its mask.

    Args:
        image, data: the image's file, and its bytes if they were read.
        mask: (H, W), which is overwritten.
        kind: mask, overlay or cutout.
        binarize_at: threshold for black and white masks; None keeps them soft.
        threshold: above which overlays and cutouts show soft masks.
        normalization: see `Normalization`.
        depth: black and white point of images with more than 8 bits.

    Raises `UnreadableImage` if the image is needed and can't be read.
    """
    grey = _grey(stretch(mask) if normalization == "minmax" else mask)
    if binarize_at is not None:
        grey = np.where(grey >= level_of(binarize_at), np.uint8(255), np.uint8(0))
        threshold = DEFAULT_THRESHOLD  # between black and white
    if kind == "overlay":
        picture = overlay(read_image(image, data, depth), grey, threshold)
    elif kind == "cutout":
        picture = cutout(read_rgba(image, data, depth), grey, threshold)
    else:
        picture = Image.fromarray(grey)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _grey(mask: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (mask * 255).astype(np.uint8)
