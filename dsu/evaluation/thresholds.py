"""Thresholds for a run: proposed from its validation images, evaluated on others."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsu.errors import DsuError
from dsu.evaluation.evaluate import Evaluation
from dsu.evaluation.ground_truth import EvaluationSet
from dsu.heads.head_file import HEAD_FILE, read_head_info
from dsu.metrics.thresholds import AtThreshold, calibration, evaluate_threshold, propose_thresholds
from dsu.thresholds import DEFAULT_THRESHOLD


@dataclass(frozen=True)
class Thresholds:
    """Proposed thresholds and their effect.

    Attributes:
        validation: the set that thresholds were chosen on.
        sets: the validation set and the sets that thresholds were evaluated on, by name.
        proposals: each rule's name, its threshold, and the threshold's effect on each set.
        calibration: calibration on the validation set, see `dsu.metrics.thresholds.calibration`.
        not_evaluated: sets whose maps were normalised or binarised, so that no threshold applies.
    """

    validation: str
    sets: Mapping[str, Evaluation]
    proposals: list[tuple[str, float, dict[str, AtThreshold]]]
    calibration: list[tuple[float, float, int, int]]
    not_evaluated: tuple[str, ...]

    @property
    def heading(self) -> str:
        """Where thresholds come from, and whether they were tested on other images."""
        alone = f"proposed from {self.validation} only"
        lacking = "; not tested on other images: train with --test-fraction to keep some for that"
        return alone if len(self.sets) > 1 else alone + lacking

    @property
    def table(self) -> list[list[str]]:
        """For people: headings, and one row per threshold with its effect on each set."""
        rows = [["threshold", "", *(f"{name}\nfound, false, Dice" for name in self.sets)]]
        for rule, threshold, found in self.proposals:
            rows.append([f"{threshold:g}", rule])
            for name, at in found.items():
                level = self.sets[name].image_level
                alarms = f"{at.false_alarms}/{level.without_object}" if level.without_object else "–"
                rows[-1].append(f"{at.found}/{level.with_object}, {alarms}, {at.dice:.3f}")
        return rows

    @property
    def remark(self) -> str:
        """Which sets no threshold was evaluated on, and the way out; empty if there are none."""
        left_out = ", ".join(self.not_evaluated)
        return (
            f"Not evaluated on {left_out}, whose maps are normalised or binarised: predict with --normalize none."
            if left_out
            else ""
        )

    @property
    def bins(self) -> list[tuple[str, str]]:
        """The calibration for people: ranges of responses, and how many of their images have an object."""
        return [(f"{low:.2f} to {high:.2f}", f"{some} of {images}") for low, high, images, some in self.calibration]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "validation": self.validation,
            "images": {
                name: {"with_object": one.image_level.with_object, "without_object": one.image_level.without_object}
                for name, one in self.sets.items()
            },
            "proposals": [
                {"rule": rule, "threshold": threshold, "sets": {name: asdict(at) for name, at in found.items()}}
                for rule, threshold, found in self.proposals
            ],
            "calibration": [
                {"from": low, "to": high, "images": images, "with_object": with_object}
                for low, high, images, with_object in self.calibration
            ],
        }


def find_thresholds(
    evaluated: Mapping[str, tuple[EvaluationSet, Evaluation]], predictions: Path, false_alarms: float
) -> Thresholds | None:
    """Propose thresholds from a run's validation share; None without one, or if its maps are normalised or binarised.

    Args:
        evaluated: all sets of the run, and their scores.
        predictions: their folder.
        false_alarms: the share of images without an object that may raise a false alarm, for one of the rules.
    """
    whole = {name: found for name, (one, found) in evaluated.items() if not one.predicted_otherwise}
    validation = next((name for name in whole if evaluated[name][0].is_validation), None)
    if validation is None:
        return None
    sets = {validation: whole[validation], **whole}
    chosen_by = sets[validation]
    rules = dict(propose_thresholds(chosen_by.image_level, chosen_by.levels, false_alarms))
    with suppress(DsuError):  # predictions may have no head next to them
        own = read_head_info(predictions.parent / HEAD_FILE).threshold
        rules |= {"the head's own": own} if own is not None else {}
    rules["default"] = DEFAULT_THRESHOLD
    proposals = [
        (rule, at, {name: evaluate_threshold(at, one.image_level, one.levels) for name, one in sets.items()})
        for rule, at in rules.items()
    ]
    others = tuple(name for name in evaluated if name not in whole)
    return Thresholds(validation, sets, proposals, calibration(chosen_by.image_level), others)
