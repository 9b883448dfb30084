"""Results of a study's runs, stored in their folders; means, spreads, and scores over the images of all folds."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any, Final

from dsu.errors import DsuError
from dsu.evaluation.evaluate import Evaluation
from dsu.files import atomic_write
from dsu.heads.head_file import HEAD_FILE, head_sha256, is_finished
from dsu.metrics.figures import PER_IMAGE, over_objects
from dsu.metrics.image_level import ImageLevel
from dsu.report.tables import figures_of
from dsu.training.run_folders import METRICS_FILE, has_state

if TYPE_CHECKING:
    from dsu.study.plan import Member

RESULT_FILE: Final = "evaluation.json"
"""Written last in a member's folder: a member is done if this file exists and belongs to the current head."""


@dataclass(frozen=True)
class SetResult:
    """A run's scores on one set.

    Attributes:
        figures: scores by their names in `dsu.metrics.figures.FIGURES`; undefined ones are left out.
        images, without_object: number of evaluated images, and how many of them have no object.
        conventions: how maps and masks were read, in words.
        per_image: one row per image, as `dsu.evaluation.evaluate.Evaluation.per_image`.
    """

    figures: Mapping[str, float]
    images: int
    without_object: int
    conventions: Mapping[str, str]
    per_image: list[dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        head_sha256: hash of the evaluated head.
        content: hash of the images for training and evaluation, see `Study.content`.
        machine: the last machine that trained it.
        train_images, steps: number per epoch.
        seconds: training time of every epoch, without validation.
        sets: scores by the set's name.
    """

    head_sha256: str
    content: str
    machine: str
    train_images: int
    steps: int
    seconds: list[float]
    sets: Mapping[str, SetResult]

    @property
    def epoch_seconds(self) -> float:
        """Typical seconds per epoch: the median, without the first (slower) epoch if there are others."""
        return median(self.seconds[1:] or self.seconds)

    @property
    def step_seconds(self) -> float:
        """Typical seconds per optimiser step."""
        return self.epoch_seconds / self.steps


def result_of_set(found: Evaluation) -> SetResult:
    """The scores that `dsu eval` prints, unrounded."""
    without_object, conventions = found.image_level.without_object, dict(found.conventions)
    return SetResult(figures_of(found), found.images, without_object, conventions, list(found.per_image))


def write_result(folder: Path, result: Result) -> None:
    """Write a result into its run's folder. Raises as `atomic_write`."""
    atomic_write(folder / RESULT_FILE, (json.dumps(asdict(result)) + "\n").encode())


def read_result(folder: Path) -> Result | None:
    """The result of the head in a run's folder; None if this head was not evaluated, or the file is damaged."""
    head = folder / HEAD_FILE
    try:
        content = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        sets = {name: SetResult(**found) for name, found in content.pop("sets").items()}
        result = Result(**content, sets=sets)
        return result if head.is_file() and result.head_sha256 == head_sha256(head) else None
    except (OSError, ValueError, TypeError, AttributeError, KeyError, DsuError):
        return None  # evaluated again


def epochs_of(folder: Path) -> list[float]:
    """Training seconds of each finished epoch of a run.

    Raises `DsuError` if the table of epochs is missing or damaged, for instance by a spreadsheet program.
    """
    path = folder / METRICS_FILE
    if not has_state(folder):
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [float(row["seconds"]) for row in csv.DictReader(file)]
    except FileNotFoundError:
        if not is_finished(folder):  # stopped during its first epoch
            return []
        found = "is gone"
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        found = f"can't be read ({type(error).__name__}: {error})"
    raise DsuError(f"{path} {found}: `dsu train-head --resume --out {folder}` restores it from the checkpoint.")


# ---- several runs ----


@dataclass(frozen=True)
class Finished:
    """A member and its result."""

    member: "Member"
    result: Result

    @property
    def seconds(self) -> float:
        """Its training time."""
        return sum(self.result.seconds)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) of `count` values: NaN without values; the latter also for one value."""

    mean: float
    sd: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of any number of values."""
    return Spread(mean(values) if values else math.nan, stdev(values) if len(values) > 1 else math.nan, len(values))


def set_names(finished: Sequence[Finished]) -> list[str]:
    """The names of all members' sets, in order."""
    return list(dict.fromkeys(name for run in finished for name in run.result.sets))


def groups(finished: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Members by group, in order."""
    found: dict[str, list[Finished]] = {}
    for run in finished:
        found.setdefault(run.member.group, []).append(run)
    return found


def spreads(finished: Sequence[Finished], name: str, figures: Sequence[str]) -> dict[str, dict[str, Spread]]:
    """Mean and spread of each figure on the set `name`, for every group with several members.

    Members for which a figure is undefined do not count for it, such as folds in which every image has an object.
    """
    return {
        group: {
            figure: spread([found.figures[figure] for found in _sets(members, name) if figure in found.figures])
            for figure in figures
        }
        for group, members in groups(finished).items()
        if len(members) > 1
    }


def _sets(finished: Sequence[Finished], name: str) -> list[SetResult]:
    return [run.result.sets[name] for run in finished if name in run.result.sets]


def pooled(finished: Sequence[Finished], name: str) -> dict[str, float]:
    """Figures over all images of all members' sets `name`, as if they were one set.

    Per-image figures are averaged over images. F_mean and E_mean come from curves that are averaged over images: here
    the members' values are averaged, weighted by their number of images, which gives the same. F_max and E_max are
    left out, since the curves are not stored. AUROC compares responses of different heads, which may have different
    scales: it may be lower than each fold's.
    """
    sets = _sets(finished, name)
    rows = [row for found in sets for row in found.per_image]
    objects = [row for row in rows if not row["empty"]]
    found = {figure: mean(row[figure] for row in rows) for figure in PER_IMAGE}
    found |= {over_objects(figure): mean(row[figure] for row in objects) for figure in PER_IMAGE if objects}
    for figure in ("F_mean", "E_mean"):
        found[figure] = _weighted_mean(sets, figure, [scores.images for scores in sets])
        if objects:
            with_object = [scores.images - scores.without_object for scores in sets]
            found[over_objects(figure)] = _weighted_mean(sets, over_objects(figure), with_object)
    level = ImageLevel(tuple(row["response"] for row in rows), tuple(row["empty"] for row in rows))
    return found | level.figures()


def _weighted_mean(sets: Sequence[SetResult], figure: str, weights: Sequence[int]) -> float:
    """A figure's weighted mean; it may be undefined for sets of weight 0."""
    return sum(w * scores.figures[figure] for scores, w in zip(sets, weights, strict=True) if w) / sum(weights)
