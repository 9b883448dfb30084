"""The folder of a training run: its lock, its identity, and replacing a previous run."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any, Final

from dsu.data.pairing import RUN_FILES
from dsu.errors import DsuError, UsageError
from dsu.files import make_folder, sweep, write_json
from dsu.heads.head_file import (
    HEAD_FILE,
    RUN_LOCK,
    RUNS,
    STATE_FILE,
    image_digits,
    is_finished,
    read_head_info,
    runs_with,
    stopped_runs,
)
from dsu.progress import few
from dsu.settings import TrainingSettings
from dsu.settings_file import read_settings
from dsu_cache import locked

SETTINGS_FILE, RUN_FILE = RUN_FILES
"""The run's settings, and its training data (see `RunRecord`)."""
LAST_FILE: Final = "last.safetensors"
BEST_FILE: Final = "best.safetensors"
METRICS_FILE: Final = "metrics.csv"
PREVIOUS: Final = "previous"
"""Subfolder for the old run while a new one trains in the same folder."""

_STATE_FILES: Final = (METRICS_FILE, BEST_FILE, LAST_FILE, HEAD_FILE, STATE_FILE)
"""Files of a run that has saved any training state."""
_TRAINING_FILES: Final = (RUN_FILE, SETTINGS_FILE, "curves.png", "sheets", *_STATE_FILES)
"""Files and folders that training writes."""
_ALL_FILES: Final = ("tracking", "predictions", *_TRAINING_FILES)
"""A run's own files and folders; all others are the user's. They are moved in this order: those that identify a run are
last."""

_CHANGEABLE: Final = frozenset(
    {
        "checkpoint_steps",
        "gradient_checkpointing",
        "compile",
        "val_every",
        "device",
        "end_to_end",
        "sheet_every",
        "track",
    }
)
"""Settings that may change on resume, since they don't affect the result."""


@dataclass(frozen=True)
class RunRecord:
    """A record of a run's training data, stored next to its settings.

    Attributes:
        encoders: digests of the frozen weights.
        masks: the mask format, as `MaskFormat.to_json`.
        start: SHA-256 of the initial head, if any.
        samples: for each name, its split (`train`, `val`, `test` or `left out`) and the SHA-256 of its image and mask.
        groups: names that stay together in one split.
    """

    encoders: Mapping[str, str]
    masks: Mapping[str, Any]
    start: str | None
    samples: Mapping[str, tuple[str, str, str | None]]
    groups: Sequence[Sequence[str]] = ()

    def write(self, folder: Path) -> None:
        """Write the record into a run's folder. Raises as `atomic_write`."""
        write_json(folder / RUN_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Read the record of a run. Raises `DsuError` if it can't be read."""
        try:
            content = json.loads((folder / RUN_FILE).read_text())
            samples = {name: tuple(one) for name, one in content["samples"].items()}
            return cls(
                dict(content["encoders"]), dict(content["masks"]), content["start"], samples, content.get("groups", ())
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DsuError(
                f"{folder} has no readable {RUN_FILE}, the record of its training data: start the run again."
            ) from error

    def differences(self, now: "RunRecord") -> list[str]:
        """How `now` differs from this record, as clauses."""
        found = [
            f"other weights of {name}" for name, digest in self.encoders.items() if now.encoders.get(name) != digest
        ]
        if self.masks != now.masks:
            found.append("other foreground in the masks")
        if self.start != now.start:
            found.append("another initial head")
        gone, new = self.samples.keys() - now.samples.keys(), now.samples.keys() - self.samples.keys()
        both = sorted(self.samples.keys() & now.samples.keys())
        changed = [name for name in both if self.samples[name][1:] != now.samples[name][1:]]
        moved = [name for name in both if self.samples[name][0] != now.samples[name][0]]
        kinds = (("gone", sorted(gone)), ("new", sorted(new)), ("changed", changed), ("in another split", moved))
        return found + [f"{kind}: {few(names)}" for kind, names in kinds if names]


def _decisive_settings(settings: TrainingSettings) -> dict[str, Any]:
    """The settings that affect the result, as JSON values."""
    return {name: value for name, value in settings.model_dump(mode="json").items() if name not in _CHANGEABLE}


def run_mark(settings: TrainingSettings, record: RunRecord) -> str:
    """A hash that identifies a run. Checkpoints contain it, to detect those of other runs."""
    # Groups affect the result only through the shares, which the record contains.
    data = {name: value for name, value in asdict(record).items() if name != "groups"}
    return hashlib.sha256(json.dumps([_decisive_settings(settings), data], sort_keys=True).encode()).hexdigest()


@contextmanager
def lock_new_run(out: Path | None, name: str, *, overwrite: bool) -> Iterator[tuple[Path, Callable[[], bool]]]:
    """Lock a folder for a new run inside a `with`; a run already in it is set aside first.

    Args:
        out: the requested folder; None creates a folder called `name` below `runs/`, with a number if it exists.
        name: the default name.
        overwrite: whether a run in `out` may be replaced.

    Yields the folder, and a function that returns whether it is still locked. Raises `UsageError` if the folder has a
    run or conflicting files, and `BusyError` if a run is training there.
    """
    numbered: Path | None = None
    if out is None:
        out = numbered = _make_numbered(name)
    make_folder(out)
    try:
        with locked(out / RUN_LOCK, f"{out} is being trained") as held:
            sweep(out)
            _check_foreign_files(out)
            if has_state(out):
                if not overwrite:
                    raise UsageError(
                        _finished_error(out)
                        if is_finished(out)
                        else f"{out} already contains a run: resume it (--resume), or start again (--overwrite)."
                    )
                _set_aside(out)
            yield out, held
    finally:
        if numbered is not None and {path.name for path in numbered.iterdir()} <= {RUN_LOCK}:
            rmtree(numbered)


@contextmanager
def lock_old_run(folder: Path) -> Iterator[Callable[[], bool]]:
    """Lock the folder of a run to resume inside a `with`.

    Yields a function that returns whether it is still locked. Raises `UsageError` if there is no run, and `BusyError`
    if it is training.
    """
    if not has_state(folder) and not (folder / SETTINGS_FILE).exists():
        raise UsageError(f"There is no run in {folder} to resume: omit --resume.")
    with locked(folder / RUN_LOCK, f"{folder} is being trained") as held:
        sweep(folder)
        yield held


def _make_numbered(name: str) -> Path:
    """Create a new folder; two runs that start at the same time never get the same one."""
    if Path(name).name != name:
        raise DsuError(f"The store's data set name {name!r} can't be a folder name: give the run's folder with --out.")
    make_folder(RUNS)
    for index in range(1, 10_000):
        folder = RUNS / (name if index == 1 else f"{name}-{index}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise DsuError(
                f"The folder {folder} can't be created ({error.strerror}): give another one with --out."
            ) from error
    raise DsuError(f"There are {index:,} runs called {name} below {RUNS}: remove some, or give a folder with --out.")


def _check_foreign_files(out: Path) -> None:
    """Raise `UsageError` if training would replace files that belong to no run: runs always have a record."""
    foreign = [name for name in _TRAINING_FILES if (out / name).exists()]
    if foreign and not (out / RUN_FILE).exists():
        raise UsageError(
            f"{out} contains {few(foreign)}, which training would replace, but no {RUN_FILE}, so they belong to "
            "no run: give the run its own folder with --out."
        )


def _set_aside(folder: Path) -> None:
    """Move a run's files to `FOLDER/previous` until the new run has finished.

    The subfolder is inside `FOLDER`, since the parent may be read-only or contain other files. If a run was already set
    aside, the run that replaced it never finished, and its files are removed instead.
    """
    previous = folder / PREVIOUS
    if is_finished(folder):
        remove_previous(folder)
    if has_state(previous):
        _remove_run(folder)
        return
    if previous.exists():
        raise UsageError(f"The old run would be moved to {previous}, but other files are there: move them away.")
    moving = folder / f"{PREVIOUS}.partial"
    make_folder(moving)
    for name in _ALL_FILES:
        if (folder / name).exists():
            os.replace(folder / name, moving / name)
    os.replace(moving, previous)


def remove_previous(folder: Path) -> None:
    """Remove the run that was set aside, once the run in `folder` has finished."""
    with suppress(OSError):
        _remove_run(folder / PREVIOUS)
        (folder / PREVIOUS).rmdir()


def _remove_run(folder: Path) -> None:
    """Remove a run's files, but no others."""
    for name in _ALL_FILES:
        part = folder / name
        rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink(missing_ok=True)


def has_state(folder: Path) -> bool:
    """Whether a run has saved any training state."""
    return any((folder / name).exists() for name in _STATE_FILES)


def unfinished_run() -> Path:
    """The run that was interrupted last. Raises `UsageError` if there is none."""
    found = stopped_runs()
    if not found:
        finished = any(runs_with(HEAD_FILE))
        why = " (all are finished, and their learning rate schedule is complete)" if finished else ""
        raise UsageError(
            f"There is no unfinished run below {RUNS}/ to resume{why}: start a new one, or name one with --out RUN."
        )
    return found[0]


def settings_of_run(folder: Path, given: TrainingSettings) -> TrainingSettings:
    """A run's original settings, overridden by the fields set in `given`."""
    return _read_run(folder).model_copy(update={name: getattr(given, name) for name in given.model_fields_set})


def check_same_run(folder: Path, resolved: TrainingSettings, record: RunRecord | None = None) -> None:
    """Raise `UsageError` naming the differences if settings or samples of a resumed run have changed."""
    before = _read_run(folder)
    if is_finished(folder):
        if before.epochs != resolved.epochs:
            raise UsageError(_finished_error(folder))
        _check_result(folder, before)
    other = RunRecord.read(folder).differences(record) if record is not None else []
    if other:
        raise UsageError(
            f"{folder} was trained on different data ({'; '.join(other)}): restore it, or start a new run, "
            f"optionally from its head (--init-from {folder})."
        )
    different = [
        f"{name} {getattr(before, name)} -> {getattr(resolved, name)}"
        for name in TrainingSettings.model_fields
        if name not in _CHANGEABLE and getattr(before, name) != getattr(resolved, name)
    ]
    if different:
        raise UsageError(
            f"{folder} was started with other settings ({'; '.join(different)}): omit these, or start again in "
            "another --out."
        )


def _check_result(folder: Path, settings: TrainingSettings) -> None:
    """Raise `UsageError` if the head of a finished run is not its own result."""
    info, samples = read_head_info(folder / HEAD_FILE), RunRecord.read(folder).samples
    own = _decisive_settings(settings)
    other = [
        f"{name} {info.training.get(name)}, not {own[name]}" for name in own if info.training.get(name) != own[name]
    ]
    if info.trained_on != image_digits(image for share, image, _ in samples.values() if share == "train"):
        other.append("other images")
    if other:
        raise UsageError(
            f"{folder / HEAD_FILE} belongs to another run than {SETTINGS_FILE} and {RUN_FILE} next to it "
            f"({'; '.join(other)}): remove it and restore the run's own head with `dsu train-head --resume --out "
            f"{folder}`."
        )


def _finished_error(folder: Path) -> str:
    return (
        f"{folder} contains a finished run, which --resume can't extend, since its cosine learning rate schedule is "
        f"complete: start from its head in another folder (--init-from {folder} --out FOLDER), or train again in this "
        f"one (--overwrite)."
    )


def _read_run(folder: Path) -> TrainingSettings:
    try:
        return read_settings(TrainingSettings, {}, folder / SETTINGS_FILE)
    except UsageError as error:
        raise DsuError(f"{folder} has no readable {SETTINGS_FILE} to resume from: start the run again.") from error
