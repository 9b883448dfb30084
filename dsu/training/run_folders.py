"""The folder of a training run: a new one, one to go on with, one that is another run's."""

from pathlib import Path
from typing import Final

from dsu.errors import DsuError, UsageError
from dsu.heads.head_file import HEAD_FILE, STATE_FILE, is_finished, stopped_runs
from dsu.settings import TrainingSettings
from dsu.settings_file import read_settings

__all__ = [
    "SETTINGS_FILE",
    "check_same_run",
    "has_state",
    "run_folder",
    "settings_of_run",
    "unfinished_run",
]

SETTINGS_FILE: Final = "settings.yaml"

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


def run_folder(out: Path | None, name: str, *, resume: bool, overwrite: bool) -> Path:
    """The folder to write into: a new one, unless a run is to be gone on with or started anew.

    Args:
        out: as given; None makes a folder called `name` below `runs/`.
        name: of data set and encoders.
        resume, overwrite: whether the run that is in `out` is meant.
    """
    if out is None:
        if Path(name).name != name:
            raise DsuError(
                f"The store's data set is called {name!r}, which names no folder: give the run's with --out."
            )
        base = Path("runs") / name
        numbered = [base, *(base.with_name(f"{base.name}-{index}") for index in range(2, 10_000))]
        return next(folder for folder in numbered if not folder.exists())
    if has_state(out) and not (resume or overwrite):
        if is_finished(out):
            raise UsageError(_cannot_go_on(out))
        raise UsageError(f"{out} holds a run already: go on with it (--resume), or start anew (--overwrite).")
    return out


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
    if not has_state(folder) and not (folder / SETTINGS_FILE).exists():
        raise UsageError(f"There is no run in {folder} to go on with: leave --resume away.")
    return _read_run(folder).model_copy(update={name: getattr(given, name) for name in given.model_fields_set})


def check_same_run(folder: Path, resolved: TrainingSettings) -> None:
    """A resumed run must be the run that was killed. Raises `UsageError` naming the settings that differ."""
    before = _read_run(folder)
    if is_finished(folder) and before.epochs != resolved.epochs:
        raise UsageError(_cannot_go_on(folder))
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
