"""The folder of a training run: who holds it, which run it is, what happens to the one before."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Final

from dsu.errors import DsuError, UsageError
from dsu.files import atomic_write, make_folder, sweep
from dsu.heads.head_file import HEAD_FILE, LOCK_FILE, PREVIOUS, STATE_FILE, is_finished, stopped_runs
from dsu.settings import TrainingSettings
from dsu.settings_file import read_settings
from dsu_cache import locked

__all__ = [
    "BEST_FILE",
    "LAST_FILE",
    "METRICS_FILE",
    "RECORD_FILE",
    "SETTINGS_FILE",
    "RunRecord",
    "check_same_run",
    "few",
    "has_state",
    "hold_new_run",
    "hold_old_run",
    "remove_previous",
    "settings_of_run",
    "unfinished_run",
]

SETTINGS_FILE: Final = "settings.yaml"
RECORD_FILE: Final = "run.json"
"""What the run is trained on: see `RunRecord`."""
LAST_FILE: Final = "last.safetensors"
BEST_FILE: Final = "best.safetensors"
METRICS_FILE: Final = "metrics.csv"

_OF_A_RUN: Final = (
    *(STATE_FILE, HEAD_FILE, LAST_FILE, BEST_FILE, RECORD_FILE, SETTINGS_FILE, METRICS_FILE),
    *("curves.png", "sheets", "tracking", "predictions"),
)
"""What belongs to a run in its folder; whatever else lies there is its user's."""

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
"""Settings that a run may be gone on with otherwise: they change nothing of what is trained."""


@dataclass(frozen=True)
class RunRecord:
    """What a run is trained on, kept beside its settings.

    Attributes:
        encoders: digests of the frozen weights.
        samples: of each name its share (`train`, `val` or `test`) and the SHA-256 of its image and mask.
    """

    encoders: Mapping[str, str]
    samples: Mapping[str, tuple[str, str, str | None]]

    def write(self, folder: Path) -> None:
        """Write it into a run's folder. Raises as `atomic_write`."""
        atomic_write(folder / RECORD_FILE, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """The record of a run. Raises `DsuError` where there is none that can be read."""
        try:
            content = json.loads((folder / RECORD_FILE).read_text())
            return cls(dict(content["encoders"]), {name: tuple(one) for name, one in content["samples"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DsuError(
                f"{folder} has no readable {RECORD_FILE}, which says what it was trained on: start the run anew."
            ) from error

    def differences(self, now: "RunRecord") -> list[str]:
        """What `now` has otherwise, in clauses."""
        found = [
            f"other weights of {name}" for name, digest in self.encoders.items() if now.encoders.get(name) != digest
        ]
        gone, new = self.samples.keys() - now.samples.keys(), now.samples.keys() - self.samples.keys()
        both = sorted(self.samples.keys() & now.samples.keys())
        changed = [name for name in both if self.samples[name][1:] != now.samples[name][1:]]
        moved = [name for name in both if self.samples[name][0] != now.samples[name][0]]
        kinds = (("gone", sorted(gone)), ("new", sorted(new)), ("changed", changed), ("in another share", moved))
        return found + [f"{kind}: {few(names)}" for kind, names in kinds if names]


def few(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


@contextmanager
def hold_new_run(out: Path | None, name: str, *, overwrite: bool) -> Iterator[Path]:
    """Take a folder for a new run, alone inside a `with`; the run that was in it is set aside first.

    Args:
        out: as given; None makes a folder called `name` below `runs/`, numbered where there is one.
        name: of data set and encoders.
        overwrite: whether a run that is in `out` may be replaced.

    Raises `UsageError` for a folder that holds a run, and `BusyError` for one that is being trained.
    """
    taken: Path | None = None
    if out is None:
        out = taken = _make_numbered(Path("runs"), name)
    make_folder(out)
    try:
        with locked(out / LOCK_FILE, f"{out} is being trained"):
            sweep(out)
            if has_state(out):
                if not overwrite:
                    raise UsageError(
                        _cannot_go_on(out)
                        if is_finished(out)
                        else f"{out} holds a run already: go on with it (--resume), or start anew (--overwrite)."
                    )
                _set_aside(out)
            yield out
    finally:
        if taken is not None and {path.name for path in taken.iterdir()} <= {LOCK_FILE}:
            rmtree(taken)


@contextmanager
def hold_old_run(folder: Path) -> Iterator[None]:
    """Hold the folder of a run that is to be gone on with, alone inside a `with`.

    Raises `UsageError` where there is no run, and `BusyError` where it is being trained.
    """
    if not has_state(folder) and not (folder / SETTINGS_FILE).exists():
        raise UsageError(f"There is no run in {folder} to go on with: leave --resume away.")
    with locked(folder / LOCK_FILE, f"{folder} is being trained"):
        sweep(folder)
        yield


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


def _set_aside(folder: Path) -> None:
    """Move a run's files to `FOLDER.previous`, where they stay until the new run has finished.

    Where there is such a folder, the new run was begun and never finished: then it is its files that go.
    """
    previous = _previous(folder)
    if is_finished(folder):
        remove_previous(folder)
    moving = previous.with_name(previous.name + ".partial")
    parts = [folder / name for name in _OF_A_RUN if (folder / name).exists()]
    if previous.exists():
        for part in parts:
            rmtree(part) if part.is_dir() else part.unlink()
        return
    make_folder(moving)
    for part in parts:
        os.replace(part, moving / part.name)
    os.replace(moving, previous)


def remove_previous(folder: Path) -> None:
    """Remove the run that was set aside for the one in `folder`, which has finished."""
    rmtree(_previous(folder), ignore_errors=True)


def _previous(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.with_name(folder.name + PREVIOUS)


def has_state(folder: Path) -> bool:
    """Whether a run has kept anything that it can be gone on with from."""
    return any((folder / name).exists() for name in (STATE_FILE, HEAD_FILE))


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
    if is_finished(folder) and before.epochs != resolved.epochs:
        raise UsageError(_cannot_go_on(folder))
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
