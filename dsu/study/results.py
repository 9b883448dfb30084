"""Results of a study's runs, kept in their folders; means, spreads, and scores over all folds' images."""

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
from dsu.report.tables import compare
from dsu.training.run_folders import METRICS_FILE, has_state

if TYPE_CHECKING:
    from dsu.study.plan import Member

__all__ = [
    "Finished",
    "Result",
    "SetResult",
    "Spread",
    "epochs_of",
    "groups",
    "pooled",
    "read_result",
    "result_of_set",
    "set_names",
    "spread",
    "spreads",
    "write_result",
]

RESULT_FILE: Final = "judged.json"
"""In a member's folder, written last: if it exists for this head, the member is done."""


@dataclass(frozen=True)
class SetResult:
    """What a run scored on one set.

    Attributes:
        figures: by a name of `dsu.metrics.figures.FIGURES`; what is not defined is left out.
        images, without_object: how many were judged, and how many of them have no object.
        conventions: what the figures rest on, in words.
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
        head_sha256: of the head that was judged.
        content: of the images that it was trained and judged on, as `Study.content`.
        machine: on which it was trained last.
        train_images, steps: of an epoch.
        seconds: of every epoch's training; validating is not counted.
        sets: what it was judged on, by name.
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
        """Of an epoch once it runs: the median, without the first where there are others."""
        return median(self.seconds[1:] or self.seconds)

    @property
    def step_seconds(self) -> float:
        """Of an optimiser step, likewise."""
        return self.epoch_seconds / self.steps


def result_of_set(found: Evaluation) -> SetResult:
    """The figures that `dsu eval` tells, to all digits."""
    [comparison] = compare({"": {"": found}}, None)
    [line] = comparison.lines
    return SetResult(
        dict(line.figures), found.images, line.without_object, dict(found.conventions), list(found.per_image)
    )


def write_result(folder: Path, result: Result) -> None:
    """Keep a result in its run's folder. Raises as `atomic_write`."""
    atomic_write(folder / RESULT_FILE, (json.dumps(asdict(result)) + "\n").encode())


def read_result(folder: Path) -> Result | None:
    """The result of the head that is in a run's folder; None if that is not judged yet."""
    head = folder / HEAD_FILE
    try:
        content = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        sets = {name: SetResult(**found) for name, found in content.pop("sets").items()}
        result = Result(**content, sets=sets)
        return result if head.is_file() and result.head_sha256 == head_sha256(head) else None
    except (OSError, ValueError, TypeError, AttributeError, KeyError, DsuError):
        return None  # to be judged once more


def epochs_of(folder: Path) -> list[float]:
    """The seconds that each epoch of a run has trained for, as far as it has come.

    Raises `DsuError` if the table of epochs is gone or was damaged, as by a spreadsheet.
    """
    path = folder / METRICS_FILE
    if not has_state(folder):
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [float(row["seconds"]) for row in csv.DictReader(file)]
    except FileNotFoundError:
        if not is_finished(folder):  # stopped within its first epoch
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
        """Of its training."""
        return sum(self.result.seconds)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) of `count` values; NaN where there is none, or only one."""

    mean: float
    sd: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Of any number of values."""
    return Spread(mean(values) if values else math.nan, stdev(values) if len(values) > 1 else math.nan, len(values))


def set_names(finished: Sequence[Finished]) -> list[str]:
    """The sets that members were judged on, in order."""
    return list(dict.fromkeys(name for one in finished for name in one.result.sets))


def groups(finished: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Members that measure the same, by what they measure, in order."""
    found: dict[str, list[Finished]] = {}
    for one in finished:
        found.setdefault(one.member.group, []).append(one)
    return found


def spreads(finished: Sequence[Finished], name: str, figures: Sequence[str]) -> dict[str, dict[str, Spread]]:
    """Mean and spread of each figure on the set `name`, a group of several members at a time.

    A figure that is not defined for a member (a fold without an image without an object, say) is left out of it.
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
    return [one.result.sets[name] for one in finished if name in one.result.sets]


def pooled(finished: Sequence[Finished], name: str) -> dict[str, float]:
    """Figures over all images of all members' sets `name`, as if one set had been judged.

    Means of the images' own figures; of the mean F and E, whose curves are averaged over images first, the members'
    figures weighted by their images, which is the same. F_max and E_max are left out: their curves are not kept.
    AUROC compares responses of different heads here, which need not be on one scale: it may lie below each fold's.
    """
    sets = _sets(finished, name)
    rows = [row for found in sets for row in found.per_image]
    objects = [row for row in rows if not row["empty"]]
    found = {figure: mean(row[figure] for row in rows) for figure in PER_IMAGE}
    found |= {over_objects(figure): mean(row[figure] for row in objects) for figure in PER_IMAGE if objects}
    for figure in ("F_mean", "E_mean"):
        found[figure] = _weighted(sets, figure, [one.images for one in sets])
        if objects:
            with_object = [one.images - one.without_object for one in sets]
            found[over_objects(figure)] = _weighted(sets, over_objects(figure), with_object)
    level = ImageLevel(tuple(row["response"] for row in rows), tuple(row["empty"] for row in rows))
    return found | level.figures()


def _weighted(sets: Sequence[SetResult], figure: str, weights: Sequence[int]) -> float:
    """A figure's mean; a set of no weight may lack it."""
    return sum(w * one.figures[figure] for one, w in zip(sets, weights, strict=True) if w) / sum(weights)
