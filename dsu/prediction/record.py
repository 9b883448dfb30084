"""The record of a prediction folder: which head, which settings, and which images in which state."""

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from dsu.data.images import UnreadableImage, file_bytes_and_time, file_sha256, or_unreadable
from dsu.data.pairing import PREDICTIONS_FILE
from dsu.data.tiles import image_name
from dsu.distributed import ALONE, World
from dsu.errors import DsuError
from dsu.files import make_folder, sweep, write_json
from dsu.heads.head_file import IMAGE_DIGITS, HeadInfo, head_sha256
from dsu.prediction.targets import Job, Target, decided_by
from dsu.prediction.verdicts import VerdictRow, find_verdict
from dsu.progress import SILENT, Progress, in_threads
from dsu.settings import PredictionSettings
from dsu_cache import locked

PREDICTIONS_LOCK: Final = ".predictions.lock"
_RECORD_LOCK: Final = ".predictions.record.lock"

_SHOWN_FROM: Final = 5000
"""Number of files from which hashing shows progress: that many take seconds on a slow disk."""

FIGURE_FILES: Final = ("metrics.json", "metrics.csv")
"""What `dsu eval` writes next to a record: the scores of its sets."""

Seen = Callable[[Mapping[str, str]], None]
"""Receives the pixel hashes of images by name."""

THRESHOLDS_FILE: Final = "thresholds.json"
"""What `dsu eval` writes next to a record: proposed thresholds and their effect."""


def open_record(out: Path, head: Path, info: HeadInfo, settings: PredictionSettings) -> dict[str, Any]:
    """The record of `out`, continued if head and settings are the same."""
    record = {
        "head": str(head),
        "head_sha256": head_sha256(head),
        "version": info.version,
        "kind": settings.kind,
        # Overlays and cutouts depend on a threshold even if none was given.
        "threshold": settings.threshold if settings.kind == "mask" else decided_by(settings, info),
    }
    path, damaged = out / PREDICTIONS_FILE, False
    if not path.exists():
        return {**record, "sets": {}}
    try:
        before = json.loads(path.read_text())
        same, sets = all(before[key] == record[key] for key in ("head_sha256", "kind", "threshold")), before["sets"]
        for how in sets.values():
            check_noted(how)
    except OSError as error:
        raise DsuError(unreadable_record(path, error)) from error
    except (ValueError, KeyError, TypeError, AttributeError):
        same, damaged, sets = False, True, {}
    if not same and not settings.overwrite:
        why = f"{path} is damaged" if damaged else f"{out} contains predictions of another head or with other settings"
        raise DsuError(f"{why}: give --overwrite or another --out.")
    if not same:
        for file in (*FIGURE_FILES, THRESHOLDS_FILE):
            (out / file).unlink(missing_ok=True)
    return {**record, "sets": sets if same else {}}


def unreadable_record(path: Path, error: OSError) -> str:
    """The error for a record without read permission, which is not damaged."""
    return f"{path} can't be read ({error.strerror}): make it readable, and run again."


def check_noted(how: Mapping[str, Any]) -> None:
    """Raise `KeyError`, `TypeError` or `AttributeError` for a set record that `dsu predict` never writes."""
    stamps, trained_on = how.get("stamps", {}), how.get("trained_on", [])
    places, names, contents = how.get("places", {}), how["names"], how.get("contents", {})
    texts = [*names, *trained_on, *places, *places.values(), *contents.values()]
    numbers = [number for stamp in stamps.values() if stamp is not None for number in stamp]
    if not (
        isinstance(names, list)
        and isinstance(trained_on, list)
        and all(isinstance(text, str) for text in texts)
        and all(type(number) is int for number in numbers)
    ):
        raise TypeError("the names of a record are texts, and its stamps numbers")


@dataclass(frozen=True)
class Remaining:
    """What remains of a job.

    Attributes:
        targets: those without a current mask.
        rows: the table rows of the others, by file.
        how: how the masks are predicted, as in the set's record.
        before: the set's record if its masks were predicted in the same way, else empty.
        stamps: of the images of all current and future masks, by name.
    """

    targets: Sequence[Target]
    rows: Mapping[str, VerdictRow]
    how: Mapping[str, Any]
    before: Mapping[str, Any]
    stamps: Mapping[str, list[int] | None]


def find_remaining(
    job: Job,
    record: Mapping[str, Any],
    info: HeadInfo,
    out: Path,
    settings: PredictionSettings,
    table: Mapping[str, VerdictRow],
) -> Remaining:
    """What remains of a job, given the record and the table of `out`; changes nothing.

    Raises `DsuError` if existing predictions were made differently.
    """
    how = {
        "normalization": job.normalization,
        "from": "images" if job.store is None else "store",
        "tiling": job.tiling and str(job.tiling),
        "random": info.random,
        "share": job.share,
        "source": None if job.source is None else vars(job.source),
    }
    before = record["sets"].get(job.name, {})
    if not settings.overwrite:
        _check_places(job, before, out)
    if settings.overwrite or any(before.get(key) != how[key] for key in ("normalization", "from", "tiling")):
        before = {}
    stamps = {target.name: _stamp(target.image) for target in job.targets}
    noted = before.get("stamps", {})
    there = [t for t in job.targets if t.name in noted and noted[t.name] == stamps[t.name] and t.output.exists()]
    rows = {t: _existing_row(job, t, table.get(file_in(out, t)), out, settings) for t in there}
    todo = [t for t in job.targets if rows.get(t) is None]
    unknown = [] if before or settings.overwrite else [t.output for t in todo if t.output.exists()]
    if unknown:
        raise DsuError(f"{unknown[0]} already exists: give --overwrite or another --out.")
    found = {row.file: row for row in rows.values() if row is not None}
    return Remaining(todo, found, how, before, {**noted, **stamps})


def note_job(
    job: Job,
    remaining: Remaining,
    record: dict[str, Any],
    info: HeadInfo,
    out: Path,
    progress: Progress = SILENT,
) -> None:
    """Record what a job is about to predict, and remove outdated masks and scores."""
    todo, before = remaining.targets, remaining.before
    for folder in {target.output.parent for target in todo}:
        make_folder(folder)
        sweep(folder)
    if todo:
        _forget_figures(out, job.name)
    for target in todo:  # remove outdated masks before the record says that they are current
        target.output.unlink(missing_ok=True)
    contents = _contents(job, todo, progress)
    noted = before.get("stamps", {})
    trained_on = {name for name in before.get("trained_on", ()) if name in noted and name not in contents}
    digits = {name: file[:IMAGE_DIGITS] for name, (file, *_) in contents.items()}
    record["sets"][job.name] = {
        **remaining.how,
        "names": list(remaining.stamps),
        "stamps": remaining.stamps,
        "contents": {**before.get("contents", {}), **digits},
        "places": {**before.get("places", {}), **job.places},
        "trained_on": sorted(trained_on | {name for name, hashes in contents.items() if info.was_trained_on(*hashes)}),
    }
    _write_record(out, record)


def _write_record(out: Path, record: Mapping[str, Any]) -> None:
    write_json(out / PREDICTIONS_FILE, record)


def trained_on_marker(
    out: Path, record: dict[str, Any], name: str, info: HeadInfo, world: World = ALONE
) -> Seen | None:
    """A function that records which images of a set the head was trained on, even from other files, by pixel hashes.

    None for a head without pixel hashes. The processes of a `world` take turns to change the record on the disk.
    """
    if not info.trained_on_pixels:
        return None
    lock = threading.Lock()

    def mark(pixels: Mapping[str, str]) -> None:
        known = {image for image, content in pixels.items() if info.was_trained_on(content)}
        if not known:
            return
        with ExitStack() as held:
            held.enter_context(lock)  # two threads decode batches
            if world.connected:
                held.enter_context(
                    locked(out / _RECORD_LOCK, f"{out / PREDICTIONS_FILE} is being written", patience=60)
                )
                record.update(json.loads((out / PREDICTIONS_FILE).read_text()))
            how = record["sets"][name]
            if known.difference(how["trained_on"]):
                how["trained_on"] = sorted(known.union(how["trained_on"]))
                _write_record(out, record)

    return mark


def file_in(out: Path, target: Target) -> str:
    """A target's file name in a table: its path below the output folder."""
    return Path(os.path.relpath(target.output, out)).as_posix()


def _existing_row(
    job: Job, target: Target, before: VerdictRow | None, out: Path, settings: PredictionSettings
) -> VerdictRow | None:
    """The row of an existing prediction; None if it can't be recovered, so the image is predicted again."""
    if before is not None and before.threshold == job.threshold:
        return before
    if settings.kind == "mask" and settings.threshold is None and job.normalization == "none":
        try:
            with Image.open(target.output) as mask:
                grey = np.asarray(mask)
        except (OSError, ValueError):  # damaged
            return None
        row = before or VerdictRow(job.name, target.name, "clear", file=file_in(out, target))
        return find_verdict(row, grey, job.threshold)
    return None if before is None or before.response is None else before.at(job.threshold)


def _forget_figures(out: Path, name: str) -> None:
    """Remove what `dsu eval` wrote about a set whose maps are about to change."""
    figures, table = (out / file for file in FIGURE_FILES)
    (out / THRESHOLDS_FILE).unlink(missing_ok=True)
    try:
        kept = {known: found for known, found in json.loads(figures.read_text()).items() if known != name}
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError):  # damaged
        kept = {}
    table.unlink(missing_ok=True)  # the next `dsu eval` rewrites it for all sets
    if kept:
        write_json(figures, kept, indent=2)
    else:
        figures.unlink()


def _check_places(job: Job, before: Mapping[str, Any], out: Path) -> None:
    """Raise `DsuError` if a folder's predictions belong to images of the same name in another place.

    Moved images are accepted: then their old place no longer exists.
    """
    for name, place in before.get("places", {}).items():
        if job.places.get(name, place) != place and Path(place, name).exists():
            raise DsuError(
                f"{out / job.name} contains predictions of {Path(place, name)}, not of {Path(job.places[name], name)}: "
                f"give --overwrite or another --out."
            )


def _contents(job: Job, todo: Sequence[Target], progress: Progress) -> dict[str, tuple[str, ...]]:
    """SHA-256 of each image to predict ("" if unreadable), and of its pixels if a store has it."""
    if job.store is not None:
        facts = job.store.metadata.items()
        stored = {image_name(n) if job.tiling else n: (fact.image_sha256, fact.pixels_sha256) for n, fact in facts}
        return {target.name: stored[target.name] for target in todo}
    digest = or_unreadable(file_sha256)
    shown = progress if len(todo) > _SHOWN_FROM else SILENT
    found = in_threads(lambda target: digest(target.image), todo, f"hashing {job.label}", shown)
    return {
        target.name: (content if isinstance(content, str) else "",) for target, content in zip(todo, found, strict=True)
    }


def _stamp(image: Path) -> list[int] | None:
    """Size in bytes and modification time, to recognise the image that was predicted."""
    found = or_unreadable(file_bytes_and_time)(image)
    return None if isinstance(found, UnreadableImage) else list(found)
