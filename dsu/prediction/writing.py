"""From masks to files: one file per mask, with a record and a table next to them."""

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
from dsu.export.runner import stretch
from dsu.files import atomic_write, make_folder
from dsu.heads.head_file import HeadInfo
from dsu.pictures import cutout, overlay
from dsu.prediction.record import LOCK_FILE, Seen, file_in, note_job, open_record, trained_on_marker
from dsu.prediction.targets import Job, Target
from dsu.prediction.verdicts import VerdictRow, find_verdict, read_table, write_table
from dsu.settings import PredictionSettings
from dsu.thresholds import DEFAULT_THRESHOLD, level_of
from dsu_cache import locked

__all__ = ["Look", "Outcome", "row_of", "verdict_of", "write_jobs", "write_mask"]

_KEEP_EVERY: Final = 10.0
"""Seconds between writes of the table."""


@dataclass
class Outcome:
    """The result of a prediction.

    Attributes:
        folder: where the masks are; or the single output file.
        has_truth: whether ground truth of any set is known.
    """

    folder: Path
    has_truth: bool = False
    written: int = 0
    kept: int = 0
    """Existing predictions of the same head and settings."""
    broken: list[str] = field(default_factory=list)
    """One sentence for each unreadable image or image without a mask."""
    rows: dict[str, VerdictRow] = field(default_factory=dict)
    """The verdict of each image, by output file."""
    before: dict[str, VerdictRow] = field(default_factory=dict, repr=False)
    """The folder's earlier table."""
    keeps: bool = True
    """Whether this process writes the folder's table."""
    _kept_at: float = field(default_factory=time.monotonic, repr=False)
    _fresh: list[VerdictRow] = field(default_factory=list, repr=False)

    def count(self, rows: Iterable[VerdictRow]) -> None:
        """Count what was written, or note what is wrong with it. Raises as `atomic_write`."""
        for row in rows:
            self._fresh.append(row)
            self.rows[row.file] = row
            self.written += not row.problem
            self.broken += [row.problem] if row.problem else []
        if time.monotonic() - self._kept_at > _KEEP_EVERY:  # a command that is killed loses no more
            self.keep_table()

    def gather(self, world: World) -> None:
        """Count what the other processes have written since they were last asked."""
        own, self._fresh = self._fresh, []
        for rank, rows in enumerate(world.gathered(own)):
            if rank != world.rank:
                self.count(rows)
        self._fresh = []

    def keep_table(self) -> None:
        """Write the folder's table, with what has been found so far."""
        if self.keeps:
            write_table(self.folder, self.before | self.rows)
        self._kept_at = time.monotonic()


def write_jobs(
    jobs: Sequence[Job],
    head: Path,
    info: HeadInfo,
    out: Path,
    settings: PredictionSettings,
    run: Callable[[Job, Sequence[Target], Outcome, Seen | None], None],
    world: World = ALONE,
) -> Outcome:
    """Let `run` predict the missing targets of all jobs; keep the record and the table of verdicts.

    Files appear whole or not at all. The folder is held meanwhile: two commands at once would write over each other's
    record. Raises `DsuError` if `out` holds predictions made otherwise, and `BusyError` if another command
    predicts into it.

    Args:
        jobs, head, info, out, settings: what is predicted, by which head, and where to.
        run: predicts targets of a job and counts them in the outcome; where it decodes images, it tells the last
            argument what their pixels hash to before a mask of theirs is written.
        world: the processes that divide each job's targets; `run` has all of them, and the first keeps the folder.
    """
    outcome = Outcome(out, settings.kind == "mask" and any(job.source is not None for job in jobs), keeps=world.leads)
    record: dict[str, Any] = {}

    def begin(job: Job) -> list[Target]:
        first = not record
        if first or world.together:  # then the others mark images there, too
            record.update(open_record(out, head, info, settings))
        if first and record["sets"]:
            outcome.before = read_table(out)
        todo, rows = note_job(job, record, info, out, settings, outcome.before)
        outcome.broken += job.unread
        outcome.kept += len(rows)
        outcome.rows |= rows
        return todo

    with ExitStack() as held:
        if world.leads:
            make_folder(out)
            held.enter_context(locked(out / LOCK_FILE, f"{out} is being predicted into"))
        try:
            for job in jobs:
                todo = world.told(partial(begin, job))
                if todo:
                    run(job, todo, outcome, trained_on_marker(out, record, job.name, info, world))
                outcome.gather(world)
        except BaseException:  # of what a stopped command has written, too
            with suppress(DsuError):  # the disk is full, the folder is gone: what went wrong first is told
                outcome.keep_table()
            raise
        outcome.keep_table()
    return outcome


def row_of(job: Job, target: Target, outcome: Outcome) -> VerdictRow:
    """A target's row before it has a mask."""
    return VerdictRow(job.name, target.name, "no mask", file=file_in(outcome.folder, target))


def write_mask(
    row: VerdictRow, target: Target, mask: NDArray[np.float32], job: Job, settings: PredictionSettings
) -> VerdictRow:
    """Write what is wanted of a mask (H, W), not stretched yet; its row, with a sentence where nothing is written."""
    row = verdict_of(row, target.image, mask, job.threshold)
    if row.problem:
        return row
    look = Look(settings.kind, settings.threshold, job.threshold, job.normalization, job.depth)
    try:
        content = look.png(target.image, mask)
    except UnreadableImage as error:
        return replace(row, verdict="no mask", problem=str(error))
    atomic_write(target.output, content)
    return row


def verdict_of(row: VerdictRow, image: Path, mask: NDArray[np.float32], threshold: float) -> VerdictRow:
    """An image's row by its mask (H, W), not stretched; with a sentence where that is no mask."""
    if np.isfinite(mask).all():
        return find_verdict(row, _grey(mask), threshold)
    problem = (
        f"{image} has no mask, since the network's output is not finite: try --precision fp32, or train the head again."
    )
    return replace(row, problem=problem)


@dataclass(frozen=True)
class Look:
    """What masks become.

    Attributes:
        kind: of picture.
        cut: where masks are cut to black and white; None leaves them soft.
        threshold: from which on soft masks show in overlays and cutouts.
        normalization: see `Normalization`.
        depth: what is black and white in images of more than 8 bits.
    """

    kind: PredictionKind
    cut: float | None
    threshold: float
    normalization: Normalization = "none"
    depth: Depth | None = None

    def png(self, image: Path, mask: NDArray[np.float32], data: bytes | None = None) -> bytes:
        """The picture of an image (its file, or the file's bytes) and its mask (H, W), which is written over.

        Raises `UnreadableImage` if the image is wanted and can't be read.
        """
        grey = _grey(stretch(mask) if self.normalization == "minmax" else mask)
        if self.cut is not None:
            grey = np.where(grey >= level_of(self.cut), np.uint8(255), np.uint8(0))
        threshold = self.threshold if self.cut is None else DEFAULT_THRESHOLD  # what is cut is black or white
        if self.kind == "overlay":
            picture = overlay(read_image(image, data, self.depth), grey, threshold)
        elif self.kind == "cutout":
            picture = cutout(read_rgba(image, data, self.depth), grey, threshold)
        else:
            picture = Image.fromarray(grey)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=3)
        return buffer.getvalue()


def _grey(mask: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (mask * 255).astype(np.uint8)
