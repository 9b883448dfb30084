"""Run the unfinished part of a study: train, predict and evaluate each member, as the four commands would."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
import yaml

from dsu.errors import DsuError
from dsu.evaluation.ground_truth import find_judged_sets
from dsu.files import atomic_write, make_folder
from dsu.heads.head_file import HEAD_FILE, head_sha256, predictions_folder, read_head_info
from dsu.prediction.predict import predict
from dsu.prediction.targets import prepare_jobs
from dsu.progress import SILENT, Progress, Task, counted
from dsu.report.tables import as_csv, as_json
from dsu.runtime import choose_runtime, computing_threads, machine_name
from dsu.settings import PredictionSettings, TrainingSettings
from dsu.settings_file import read_settings
from dsu.study.plan import Member, Study
from dsu.study.results import Finished, Result, epochs_of, read_result, result_of_set, write_result
from dsu.study.side_by_side import places_for, side_by_side
from dsu.training.run_folders import SETTINGS_FILE
from dsu.training.runs import open_run

__all__ = ["run_study"]

_SAID_ALREADY: Final = ("device", "trains", "starts from")
"""Notes of a run that are the same for all, or that its own line says."""


def run_study(
    study: Study,
    progress: Progress = SILENT,
    finished: Callable[[list[Finished]], None] = lambda so_far: None,
    *,
    parallel: int = 1,
) -> list[Finished]:
    """Finish every member and return all results, in the members' order.

    Finished members are skipped; interrupted ones resume from their checkpoint; trained ones are only evaluated.

    Args:
        study: as it was opened.
        progress: who is told; each line begins with its member's name.
        finished: called after every member with the results so far.
        parallel: how many members run at once, each on a GPU or with its part of the processor's threads.

    Raises `DsuError` as training, prediction and evaluation do; of several at once when the others are done, naming
    those that failed. Raises `UsageError` if there are fewer GPUs.
    """
    results = {member.name: read_result(member.folder) for member in study.members}
    to_do = {member.name: _epochs_left(member) for member in study.members if results[member.name] is None}
    parallel = min(parallel, len(to_do))
    places = places_for(parallel, study.settings.device) if parallel > 1 else []
    make_folder(study.folder)
    settings = yaml.safe_dump(study.settings.model_dump(mode="json"), sort_keys=False)
    atomic_write(study.folder / SETTINGS_FILE, settings.encode())

    def so_far() -> list[Finished]:
        return [Finished(one, found) for one in study.members if (found := results[one.name]) is not None]

    for one in so_far():
        progress.say(f"{one.member.name}: done already, skipped")
    finished(so_far())
    started, trained, left, failed = time.perf_counter(), 0, sum(to_do.values()), list[str]()
    work = partial(_run_member, study, threads=torch.get_num_threads() if parallel > 1 else None)
    given: Iterator[tuple[str, Result | DsuError]] = (
        side_by_side(work, list(to_do), places, progress, left)
        if parallel > 1
        else ((name, work(name, progress)) for name in to_do)
    )
    for name, found in given:
        if isinstance(found, DsuError):
            failed.append(f"{name}: {str(found).removesuffix('.')}")
            progress.say(f"{name}: failed; the others continue")
            continue
        results[name] = found
        trained, left = trained + to_do[name], left - to_do[name]
        to_go = "" if parallel > 1 else _time_left(left, time.perf_counter() - started, trained)
        progress.say(f"{name}: done{to_go}")
        finished(so_far())
    if failed:
        raise DsuError(
            f"{len(failed)} of {counted(len(study.members), 'runs')} failed ({'; '.join(failed)}): run the same "
            "command again for the rest."
        )
    return so_far()


def _run_member(study: Study, name: str, progress: Progress, *, threads: int | None) -> Result:
    """Train what is left of a member and judge it.

    `threads` are all that the study may use, where this process has a part of them: it predicts with all, as alone.
    """
    [member] = (member for member in study.members if member.name == name)
    told = _Named(progress, name)
    if not (member.folder / HEAD_FILE).exists():
        _train(study, member, told, part=threads is not None)
    return _judge(study, member, told, threads)


def _epochs_left(member: Member) -> int:
    return member.settings.epochs - len(epochs_of(member.folder))


def _time_left(epochs: int, seconds: float, trained: int) -> str:
    """When the epochs that are left will be trained, by the seconds that others took; nothing where there are none."""
    if not epochs or not trained:
        return ""
    minutes, rest = divmod(round(seconds / trained * epochs), 60)
    return f"; {counted(epochs, 'epochs')} to go, about {minutes}:{rest:02d}"


def _train(study: Study, member: Member, progress: Progress, *, part: bool) -> None:
    with open_run(
        member.settings,
        paths=study.paths,
        weights=study.weights,
        out=member.folder,
        resume=(member.folder / SETTINGS_FILE).exists(),
        progress=progress,
        part=part,
    ) as run:
        trainer = run.trainer
        held_out = 0 if trainer.main.validation is None else len(trainer.main.validation.names)
        epochs = f", resumes after epoch {trainer.epoch}" if trainer.epoch else ""
        progress.say(
            f"{len(trainer.main.train.names):,} to train on, {held_out:,} held out, from "
            f"{' + '.join(member.cost.reads)}{epochs}"
        )
        for note in run.notes:
            if not note.startswith(_SAID_ALREADY):
                progress.say(note)
        trainer.run(progress)


def _judge(study: Study, member: Member, progress: Progress, threads: int | None) -> Result:
    """Predict and measure at the images' own sizes, and leave what `dsu predict` and `dsu eval` leave."""
    head = member.folder / HEAD_FILE
    # At the precision of training.
    precision = read_settings(TrainingSettings, {}, member.folder / SETTINGS_FILE).precision
    runtime = choose_runtime(member.settings.device, precision, "of training")
    out = predictions_folder(member.folder, head)
    how = PredictionSettings()
    with computing_threads(threads):
        jobs = prepare_jobs(
            [],
            head,
            read_head_info(head),
            out,
            how,
            lambda: runtime,
            paths=study.paths,
            end_to_end=False,
            held_out=not study.tests,
            progress=progress,
        )
        broken = predict(jobs, head, out, how, runtime, study.weights, progress).broken
    judged = find_judged_sets([job.name for job in jobs], out, None, study.paths)
    lost = [f"{one.name} has no prediction of {name}." for one in judged for name in one.missing]
    if broken or lost:
        raise DsuError(f"{member.name} can't be evaluated: {(broken or lost)[0]}")
    found = {one.name: one.evaluate(progress=progress) for one in judged}
    atomic_write(out / "metrics.json", as_json({member.name: found}).encode())
    atomic_write(out / "metrics.csv", as_csv({member.name: found}).encode())
    train_images = study.images - len(read_head_info(head).dataset["held_out"])
    result = Result(
        head_sha256=head_sha256(head),
        content=study.content,
        machine=machine_name(runtime),
        train_images=train_images,
        steps=math.ceil(train_images / member.settings.batch_size),
        seconds=epochs_of(member.folder),
        sets={name: result_of_set(one) for name, one in found.items()},
    )
    write_result(member.folder, result)
    return result


@dataclass(frozen=True)
class _Named:
    """Progress of one member, prefixed with its name."""

    progress: Progress
    name: str

    def say(self, text: str) -> None:
        self.progress.say(f"{self.name}: {text}")

    def task(self, label: str, total: int, unit: str = "images") -> AbstractContextManager[Task]:
        return self.progress.task(f"{self.name}, {label}", total, unit)
