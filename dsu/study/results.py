"""What came of one run of a study, kept in its folder, so that a run that is judged needs no second look."""

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from dsu.data.images import file_sha256
from dsu.evaluation.evaluate import Evaluation
from dsu.files import atomic_write
from dsu.heads.head_file import HEAD_FILE
from dsu.report import compare
from dsu.training.trainer import METRICS_FILE

__all__ = ["RESULT_FILE", "Result", "SetResult", "epochs_of", "read_result", "result_of_set", "write_result"]

RESULT_FILE: Final = "judged.json"
"""In a member's folder, written last: where it stands and is of this head, the member is done."""


@dataclass(frozen=True)
class SetResult:
    """What a run scored on one set.

    Attributes:
        figures: by a name of `dsu.metrics.figures.FIGURES`; what is not defined is left out.
        images, without_object: how many were judged, and how many of them have no object.
        conventions: what the figures rest on, in words.
        per_image: a row an image, as `dsu.evaluation.evaluate.Evaluation.per_image`.
    """

    figures: Mapping[str, float]
    images: int
    without_object: int
    conventions: Mapping[str, str]
    per_image: list[dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        head_sha256: of the head that was judged.
        machine: on which it was trained last.
        train_images, steps: of an epoch.
        seconds: of every epoch's training; validating is not counted.
        sets: what it was judged on, by name.
    """

    head_sha256: str
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
    """The result of the head that is in a run's folder; None where that is not judged yet."""
    head = folder / HEAD_FILE
    try:
        content = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        sets = {name: SetResult(**found) for name, found in content.pop("sets").items()}
        result = Result(**content, sets=sets)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None  # to be judged once more
    return result if head.is_file() and result.head_sha256 == file_sha256(head) else None


def epochs_of(folder: Path) -> list[float]:
    """The seconds that each epoch of a run has trained for, as far as it has come."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [float(row["seconds"]) for row in csv.DictReader(file)]
