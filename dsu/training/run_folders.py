"""The folder of a training run: who holds it, which run it is, what happens to the one before."""

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
from dsu.files import atomic_write, make_folder, sweep
from dsu.heads.head_file import (
    HEAD_FILE,
    LOCK_FILE,
    STATE_FILE,
    image_digits,
    is_finished,
    read_head_info,
    stopped_runs,
)
from dsu.progress import few
from dsu.settings import TrainingSettings
from dsu.settings_file import read_settings
from dsu_cache import locked

__all__ = [
    "BEST_FILE",
    "LAST_FILE",
    "METRICS_FILE",
    "PREVIOUS",
    "RECORD_FILE",
    "SETTINGS_FILE",
    "RunRecord",
    "check_same_run",
    "has_state",
    "hold_new_run",
    "hold_old_run",
    "remove_previous",
    "run_mark",
    "settings_of_run",
    "unfinished_run",
]

SETTINGS_FILE, RECORD_FILE = RUN_FILES
"""The run's settings, and what it is trained on (see `RunRecord`)."""
LAST_FILE: Final = "last.safetensors"
BEST_FILE: Final = "best.safetensors"
METRICS_FILE: Final = "metrics.csv"
PREVIOUS: Final = "previous"
"""The folder in a run's own in which the old run waits, while a new one is trained in its place."""

_KEPT: Final = (METRICS_FILE, BEST_FILE, LAST_FILE, HEAD_FILE, STATE_FILE)
"""What a run has of its training once it has any."""
_REPLACED: Final = (RECORD_FILE, SETTINGS_FILE, "curves.png", "sheets", *_KEPT)
"""What training writes."""
_OF_A_RUN: Final = ("tracking", "predictions", *_REPLACED)
"""What belongs to a run in its folder; whatever else lies there is its user's. What makes it a run is moved last."""

_FREE: Final = frozenset(
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
"""Settings with which a run may be resumed otherwise: they change nothing of what is trained."""


@dataclass(frozen=True)
class RunRecord:
    """What a run is trained on, kept beside its settings.

    Attributes:
        encoders: digests of the frozen weights.
        masks: how the masks are read, as `MaskFormat.to_json`.
        start: SHA-256 of the head that it starts from, if any.
        samples: of each name its share (`train`, `val`, `test` or `left out`) and the SHA-256 of its image and mask.
        groups: names that stay together in one share.
    """

    encoders: Mapping[str, str]
    masks: Mapping[str, Any]
    start: str | None
    samples: Mapping[str, tuple[str, str, str | None]]
    groups: Sequence[Sequence[str]] = ()

    def write(self, folder: Path) -> None:
        """Write it into a run's folder. Raises as `atomic_write`."""
        atomic_write(folder / RECORD_FILE, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """The record of a run. Raises `DsuError` where there is none that can be read."""
        try:
            content = json.loads((folder / RECORD_FILE).read_text())
            samples = {name: tuple(one) for name, one in content["samples"].items()}
            return cls(
                dict(content["encoders"]), dict(content["masks"]), content["start"], samples, content.get("groups", ())
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DsuError(
                f"{folder} has no readable {RECORD_FILE}, which says what it was trained on: start the run anew."
            ) from error

    def differences(self, now: "RunRecord") -> list[str]:
        """What `now` has otherwise, in clauses."""
        found = [
            f"other weights of {name}" for name, digest in self.encoders.items() if now.encoders.get(name) != digest
        ]
        if self.masks != now.masks:
            found.append("masks of which something else is foreground")
        if self.start != now.start:
            found.append("another head to start from")
        gone, new = self.samples.keys() - now.samples.keys(), now.samples.keys() - self.samples.keys()
        both = sorted(self.samples.keys() & now.samples.keys())
        changed = [name for name in both if self.samples[name][1:] != now.samples[name][1:]]
        moved = [name for name in both if self.samples[name][0] != now.samples[name][0]]
        kinds = (("gone", sorted(gone)), ("new", sorted(new)), ("changed", changed), ("in another share", moved))
        return found + [f"{kind}: {few(names)}" for kind, names in kinds if names]


def _decisive(settings: TrainingSettings) -> dict[str, Any]:
    """The settings that decide what is trained, as JSON has them."""
    return {name: value for name, value in settings.model_dump(mode="json").items() if name not in _FREE}


def run_mark(settings: TrainingSettings, record: RunRecord) -> str:
    """A digest of all that makes a run this one: its checkpoint carries it, so that no other's is taken for it."""
    decisive = {name: value for name, value in asdict(record).items() if name != "groups"}  # which shares follow from
    return hashlib.sha256(json.dumps([_decisive(settings), decisive], sort_keys=True).encode()).hexdigest()


@contextmanager
def hold_new_run(out: Path | None, name: str, *, overwrite: bool) -> Iterator[tuple[Path, Callable[[], bool]]]:
    """Take a folder for a new run, alone inside a `with`; the run that was in it is set aside first.

    Args:
        out: as given; None makes a folder called `name` below `runs/`, numbered where there is one.
        name: of data set and encoders.
        overwrite: whether a run that is in `out` may be replaced.

    Yields the folder, and a function that says whether it is still held. Raises `UsageError` for a folder that holds
    a run or what is no run's, and `BusyError` for one that is being trained.
    """
    taken: Path | None = None
    if out is None:
        out = taken = _make_numbered(Path("runs"), name)
    make_folder(out)
    try:
        with locked(out / LOCK_FILE, f"{out} is being trained") as held:
            sweep(out)
            _check_strangers(out)
            if has_state(out):
                if not overwrite:
                    raise UsageError(
                        _cannot_go_on(out)
                        if is_finished(out)
                        else f"{out} holds a run already: go on with it (--resume), or start anew (--overwrite)."
                    )
                _set_aside(out)
            yield out, held
    finally:
        if taken is not None and {path.name for path in taken.iterdir()} <= {LOCK_FILE}:
            rmtree(taken)


@contextmanager
def hold_old_run(folder: Path) -> Iterator[Callable[[], bool]]:
    """Hold the folder of a run that is to be resumed, alone inside a `with`.

    Yields a function that says whether it is still held. Raises `UsageError` where there is no run, and `BusyError`
    where it is being trained.
    """
    if not has_state(folder) and not (folder / SETTINGS_FILE).exists():
        raise UsageError(f"There is no run in {folder} to go on with: leave --resume away.")
    with locked(folder / LOCK_FILE, f"{folder} is being trained") as held:
        sweep(folder)
        yield held


def _make_numbered(runs: Path, name: str) -> Path:
    """A folder that was not there a moment before: two runs that start together never share one."""
    if Path(name).name != name:
        raise DsuError(f"The store's data set is called {name!r}, which names no folder: give the run's with --out.")
    make_folder(runs)
    for index in range(1, 10_000):
        folder = runs / (name if index == 1 else f"{name}-{index}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise DsuError(
                f"The folder {folder} can't be made ({error.strerror}): give another one with --out."
            ) from error
    raise DsuError(f"Below {runs} there are {index:,} runs called {name}: remove some, or give a folder with --out.")


def _check_strangers(out: Path) -> None:
    """Raise `UsageError` where training would replace files that no run has written: every run has its record."""
    strangers = [name for name in _REPLACED if (out / name).exists()]
    if strangers and not (out / RECORD_FILE).exists():
        raise UsageError(
            f"{out} holds {few(strangers)}, which training would replace, and no {RECORD_FILE}, so they are of no run: "
            f"give a folder of its own with --out."
        )


def _set_aside(folder: Path) -> None:
    """Move a run's files to `FOLDER/previous`, where they stay until the new run has finished.

    Inside, since beside it may be another disk, a folder that may not be written, or what someone else put there.
    Where a run waits already, the new one was begun and never finished: then it is its files that go.
    """
    previous = folder / PREVIOUS
    if is_finished(folder):
        remove_previous(folder)
    if has_state(previous):
        _remove_run(folder)
        return
    if previous.exists():
        raise UsageError(f"The old run would wait in {previous}, and something else lies there: move that away.")
    moving = folder / f"{PREVIOUS}.partial"
    make_folder(moving)
    for name in _OF_A_RUN:
        if (folder / name).exists():
            os.replace(folder / name, moving / name)
    os.replace(moving, previous)


def remove_previous(folder: Path) -> None:
    """Remove the run that was set aside for the one in `folder`, which has finished."""
    with suppress(OSError):
        _remove_run(folder / PREVIOUS)
        (folder / PREVIOUS).rmdir()


def _remove_run(folder: Path) -> None:
    """Remove a run's files, and no others."""
    for name in _OF_A_RUN:
        part = folder / name
        rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink(missing_ok=True)


def has_state(folder: Path) -> bool:
    """Whether a run has kept anything of its training."""
    return any((folder / name).exists() for name in _KEPT)


def unfinished_run(runs: Path = Path("runs")) -> Path:
    """The run that was stopped last. Raises `UsageError` where there is none."""
    found = stopped_runs(runs)
    if not found:
        finished = any(runs.glob(f"*/{HEAD_FILE}"))
        why = " (those there are finished, and their learning rate has come to its end)" if finished else ""
        raise UsageError(
            f"There is no unfinished run below {runs}/ to go on with{why}: start a new one, or name it with --out RUN."
        )
    return found[0]


def settings_of_run(folder: Path, given: TrainingSettings) -> TrainingSettings:
    """The settings that a run was started with, and on top of them what was given now."""
    return _read_run(folder).model_copy(update={name: getattr(given, name) for name in given.model_fields_set})


def check_same_run(folder: Path, resolved: TrainingSettings, record: RunRecord | None = None) -> None:
    """A resumed run must be the run that was killed. Raises `UsageError` naming settings, samples that differ."""
    before = _read_run(folder)
    if is_finished(folder):
        if before.epochs != resolved.epochs:
            raise UsageError(_cannot_go_on(folder))
        _check_result(folder, before)
    other = RunRecord.read(folder).differences(record) if record is not None else []
    if other:
        raise UsageError(
            f"{folder} was trained on something else ({'; '.join(other)}): bring that back, or start a new run, "
            f"from its head if you like (--init-from {folder})."
        )
    different = [
        f"{name} {getattr(before, name)} -> {getattr(resolved, name)}"
        for name in TrainingSettings.model_fields
        if name not in _FREE and getattr(before, name) != getattr(resolved, name)
    ]
    if different:
        raise UsageError(
            f"{folder} was started with other settings ({'; '.join(different)}): leave these away, or start anew in "
            f"another --out."
        )


def _check_result(folder: Path, settings: TrainingSettings) -> None:
    """Raise `UsageError` where the head of a finished run is not what came of it."""
    info, samples = read_head_info(folder / HEAD_FILE), RunRecord.read(folder).samples
    own = _decisive(settings)
    other = [
        f"{name} {info.training.get(name)}, not {own[name]}" for name in own if info.training.get(name) != own[name]
    ]
    if info.trained_on != image_digits(image for share, image, _ in samples.values() if share == "train"):
        other.append("other images")
    if other:
        raise UsageError(
            f"{folder / HEAD_FILE} is of another run than {SETTINGS_FILE} and {RECORD_FILE} beside it "
            f"({'; '.join(other)}): remove it, and `dsu train-head --resume --out {folder}` writes the run's own again."
        )


def _cannot_go_on(folder: Path) -> str:
    return (
        f"{folder} holds a finished run, which --resume can't prolong, since its learning rate has followed a cosine "
        f"down to the end of its epochs: start from its head in another folder (--init-from {folder} --out FOLDER), or "
        f"train anew in this one (--overwrite)."
    )


def _read_run(folder: Path) -> TrainingSettings:
    try:
        return read_settings(TrainingSettings, {}, folder / SETTINGS_FILE)
    except UsageError as error:
        raise DsuError(f"{folder} has no readable {SETTINGS_FILE} to resume by: start the run anew.") from error
