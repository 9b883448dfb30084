"""Run the unfinished part of a study: train, predict and evaluate each member, as the single commands would."""

import gc
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
from dsu.evaluation.ground_truth import find_evaluation_sets
from dsu.files import atomic_write, make_folder
from dsu.heads.head_file import HEAD_FILE, head_sha256, predictions_folder, read_head_info
from dsu.prediction.predict import predict
from dsu.prediction.targets import prepare_jobs
from dsu.progress import SILENT, Progress, Task, clock, counted
from dsu.report.tables import as_csv, as_json
from dsu.runtime import choose_runtime, computing_threads, machine_name
from dsu.settings import PredictionSettings, TrainingSettings
from dsu.settings_file import read_settings
from dsu.study.parallel import run_parallel, worker_environments
from dsu.study.plan import Member, Study
from dsu.study.results import Finished, Result, epochs_of, read_result, result_of_set, write_result
from dsu.training.run_folders import SETTINGS_FILE
from dsu.training.runs import open_run

_HIDDEN_NOTES: Final = ("device", "trains", "starts from")
"""Notes that are the same for all runs, or that the member's own line contains."""


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
        study: the study, from `open_study`.
        progress: receives messages; each line begins with its member's name.
        finished: called after every member with the results so far.
        parallel: number of members that run at once, each on its own GPU or with its part of the processor's threads.

    Raises `DsuError` as training, prediction and evaluation do. In parallel, the other members finish first, and the
    error names those that failed. Raises `UsageError` if there are fewer GPUs than parallel runs.
    """
    results = {member.name: read_result(member.folder) for member in study.members}
    to_do = {member.name: _epochs_left(member) for member in study.members if results[member.name] is None}
    parallel = min(parallel, len(to_do))
    environments = worker_environments(parallel, study.settings.device) if parallel > 1 else []
    make_folder(study.folder)
    settings = yaml.safe_dump(study.settings.model_dump(mode="json"), sort_keys=False)
    atomic_write(study.folder / SETTINGS_FILE, settings.encode())

    def so_far() -> list[Finished]:
        return [Finished(member, found) for member in study.members if (found := results[member.name]) is not None]

    for run in so_far():
        progress.say(f"{run.member.name}: done already, skipped")
    finished(so_far())
    started, trained, left, failed = time.perf_counter(), 0, sum(to_do.values()), list[str]()
    work = partial(_run_member, study, threads=torch.get_num_threads() if parallel > 1 else None)
    outcomes: Iterator[tuple[str, Result | DsuError]] = (
        run_parallel(work, list(to_do), environments, progress, left)
        if parallel > 1
        else ((name, work(name, progress)) for name in to_do)
    )
    for name, found in outcomes:
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
    """Finish a member's training and evaluate it.

    `threads` is set if members run in parallel: the number of threads of the whole study. This process trains with its
    part of them, which may change the last bits of weights on a CPU, but predicts with all.
    """
    [member] = (member for member in study.members if member.name == name)
    progress = _PrefixedProgress(progress, name)
    if not (member.folder / HEAD_FILE).exists():
        _train(study, member, progress, part=threads is not None)
        gc.collect()  # its trainer may be part of a reference cycle, and holds memory of the GPU
    return _evaluate(study, member, progress, threads)


def _epochs_left(member: Member) -> int:
    return member.settings.epochs - len(epochs_of(member.folder))


def _time_left(epochs: int, seconds: float, trained: int) -> str:
    """The estimated time for the remaining epochs, from the seconds that `trained` epochs took; may be empty."""
    if not epochs or not trained:
        return ""
    return f"; {counted(epochs, 'epochs')} to go, about {clock(seconds / trained * epochs)}"


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
            if not note.startswith(_HIDDEN_NOTES):
                progress.say(note)
        trainer.run(progress)


def _evaluate(study: Study, member: Member, progress: Progress, threads: int | None) -> Result:
    """Predict and evaluate at the images' own sizes, and write the same files as `dsu predict` and `dsu eval`."""
    head = member.folder / HEAD_FILE
    precision = read_settings(TrainingSettings, {}, member.folder / SETTINGS_FILE).precision
    runtime = choose_runtime(member.settings.device, precision, "of training")
    out = predictions_folder(member.folder, head)
    settings = PredictionSettings()
    with computing_threads(threads):
        jobs = prepare_jobs(
            [],
            head,
            read_head_info(head),
            out,
            settings,
            lambda: runtime,
            paths=study.paths,
            end_to_end=False,
            held_out=not study.tests,
            progress=progress,
        )
        broken = predict(jobs, head, out, settings, runtime, study.weights, progress).broken
    test_sets = find_evaluation_sets([job.name for job in jobs], out, None, study.paths)
    lost = [f"{test_set.name} has no prediction of {name}." for test_set in test_sets for name in test_set.missing]
    if broken or lost:
        raise DsuError(f"{member.name} can't be evaluated: {(broken or lost)[0]}")
    evaluations = {test_set.name: test_set.evaluate(progress=progress) for test_set in test_sets}
    atomic_write(out / "metrics.json", as_json({member.name: evaluations}).encode())
    atomic_write(out / "metrics.csv", as_csv({member.name: evaluations}).encode())
    train_images = study.images - len(read_head_info(head).dataset["held_out"])
    result = Result(
        head_sha256=head_sha256(head),
        content=study.content,
        machine=machine_name(runtime),
        train_images=train_images,
        steps=math.ceil(train_images / member.settings.batch_size),
        seconds=epochs_of(member.folder),
        sets={name: result_of_set(evaluation) for name, evaluation in evaluations.items()},
    )
    write_result(member.folder, result)
    return result


@dataclass(frozen=True)
class _PrefixedProgress:
    """Progress of one member; each line is prefixed with its name."""

    progress: Progress
    name: str

    def say(self, text: str) -> None:
        self.progress.say(f"{self.name}: {text}")

    def task(self, label: str, total: int, unit: str = "images") -> AbstractContextManager[Task]:
        return self.progress.task(f"{self.name}, {label}", total, unit)
