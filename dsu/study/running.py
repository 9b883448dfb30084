"""Running what is not done of a study: train, predict, judge, member by member, as the four commands would."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

import yaml

from dsu.errors import DsuError
from dsu.evaluation.ground_truth import find_judged_sets
from dsu.files import atomic_write, make_folder
from dsu.heads.head_file import HEAD_FILE, head_sha256, predictions_folder, read_head_info
from dsu.prediction.predict import predict
from dsu.prediction.targets import prepare_jobs
from dsu.progress import SILENT, Progress, Task, counted
from dsu.report import as_csv, as_json
from dsu.runtime import choose_runtime, machine_name
from dsu.settings import PredictionSettings, TrainingSettings
from dsu.settings_file import read_settings
from dsu.study.plan import Member, Study
from dsu.study.results import Finished, Result, epochs_of, read_result, result_of_set, write_result
from dsu.training.run_folders import SETTINGS_FILE
from dsu.training.runs import open_run

__all__ = ["run_study"]

_SAID_ALREADY: Final = ("device", "trains", "starts from")
"""Notes of a run that are the same for all, or that its own line says."""


def run_study(
    study: Study, progress: Progress = SILENT, finished: Callable[[list[Finished]], None] = lambda so_far: None
) -> list[Finished]:
    """Bring every member to its end and give all their results, in the members' order.

    A member that is done is not touched; one that was killed goes on from its checkpoint; one that is trained is
    only judged.

    Args:
        study: as it was opened.
        progress: who is told; each line begins with its member's name.
        finished: called after every member with the results so far.

    Raises `DsuError` as training, prediction and evaluation do.
    """
    make_folder(study.folder)
    settings = yaml.safe_dump(study.settings.model_dump(mode="json"), sort_keys=False)
    atomic_write(study.folder / SETTINGS_FILE, settings.encode())
    results: list[Finished] = []
    finished(results)
    started, trained, left = time.perf_counter(), 0, sum(map(_epochs_left, study.members))
    for member in study.members:
        told = _Named(progress, member.name)
        result = read_result(member.folder)
        if result is None:
            epochs = _epochs_left(member)
            if not (member.folder / HEAD_FILE).exists():
                _train(study, member, told)
            result = _judge(study, member, told)
            trained, left = trained + epochs, left - epochs
            told.say(f"done{_time_left(left, time.perf_counter() - started, trained)}")
        else:
            told.say("done already, skipped")
        results.append(Finished(member, result))
        finished(results)
    return results


def _epochs_left(member: Member) -> int:
    return member.settings.epochs - len(epochs_of(member.folder))


def _time_left(epochs: int, seconds: float, trained: int) -> str:
    """When the epochs that are left will be trained, by the seconds that others took; nothing where there are none."""
    if not epochs or not trained:
        return ""
    minutes, rest = divmod(round(seconds / trained * epochs), 60)
    return f"; {counted(epochs, 'epochs')} to go, about {minutes}:{rest:02d}"


def _train(study: Study, member: Member, progress: Progress) -> None:
    with open_run(
        member.settings,
        paths=study.paths,
        weights=study.weights,
        out=member.folder,
        resume=(member.folder / SETTINGS_FILE).exists(),
        progress=progress,
    ) as run:
        trainer = run.trainer
        held_out = 0 if trainer.main.validation is None else len(trainer.main.validation.names)
        epochs = f", goes on after epoch {trainer.epoch}" if trainer.epoch else ""
        progress.say(
            f"{len(trainer.main.train.names):,} to train on, {held_out:,} held out, from "
            f"{' + '.join(member.cost.reads)}{epochs}"
        )
        for note in run.notes:
            if not note.startswith(_SAID_ALREADY):
                progress.say(note)
        trainer.run(progress)


def _judge(study: Study, member: Member, progress: Progress) -> Result:
    """Predict and measure at the images' own sizes, and leave what `dsu predict` and `dsu eval` leave."""
    head = member.folder / HEAD_FILE
    # At the precision of training.
    precision = read_settings(TrainingSettings, {}, member.folder / SETTINGS_FILE).precision
    runtime = choose_runtime(member.settings.device, precision, "of training")
    out = predictions_folder(member.folder, head)
    how = PredictionSettings()
    jobs = prepare_jobs(
        [],
        head,
        read_head_info(head),
        out,
        how,
        runtime,
        paths=study.paths,
        end_to_end=False,
        held_out=not study.tests,
        progress=progress,
    )
    broken = predict(jobs, head, out, how, runtime, study.weights, progress).broken
    judged = find_judged_sets([job.name for job in jobs], out, None, study.paths)
    lost = [f"{one.name} has no prediction of {name}." for one in judged for name in one.missing]
    if broken or lost:
        raise DsuError(f"{member.name} can't be judged: {(broken or lost)[0]}")
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
    """Progress of one member: its name stands before everything."""

    progress: Progress
    name: str

    def say(self, text: str) -> None:
        self.progress.say(f"{self.name}: {text}")

    def task(self, label: str, total: int, unit: str = "images") -> AbstractContextManager[Task]:
        return self.progress.task(f"{self.name}, {label}", total, unit)
