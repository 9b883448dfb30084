"""Thresholds for a run: proposed from its validation images, evaluated on others."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsu.errors import DsuError
from dsu.evaluation.evaluate import Evaluation
from dsu.evaluation.ground_truth import JudgedSet
from dsu.heads.head_file import HEAD_FILE, read_head_info
from dsu.metrics.thresholds import AtThreshold, calibration, judge_threshold, propose_thresholds
from dsu.thresholds import DEFAULT_THRESHOLD

__all__ = ["Thresholds", "find_thresholds"]


@dataclass(frozen=True)
class Thresholds:
    """Proposed thresholds and their effect.

    Attributes:
        validation: the set that thresholds were chosen on.
        sets: the validation set and those that they were judged on, by name.
        proposals: each rule's name, its threshold, and what that does to each set.
        calibration: of the validation set, see `dsu.metrics.thresholds.calibration`.
        not_judged: sets whose maps are stretched or cut, of which no threshold can be judged.
    """

    validation: str
    sets: Mapping[str, Evaluation]
    proposals: list[tuple[str, float, dict[str, AtThreshold]]]
    calibration: list[tuple[float, float, int, int]]
    not_judged: tuple[str, ...]

    @property
    def heading(self) -> str:
        """Where thresholds come from, and whether other images test them."""
        alone = f"proposed from {self.validation} only"
        lacking = "; no other images test them: --test-fraction in training sets some apart"
        return alone if len(self.sets) > 1 else alone + lacking

    @property
    def table(self) -> list[list[str]]:
        """For people: headings, and one row per threshold that says what it does to each set."""
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
        """Which sets no threshold is judged on, and the way out; empty if all are judged."""
        left_out = ", ".join(self.not_judged)
        return (
            f"Not evaluated on {left_out}, which are stretched or binarised: predict with --normalize none."
            if left_out
            else ""
        )

    @property
    def bins(self) -> list[tuple[str, str]]:
        """The calibration for people: responses, and how many images of them have an object."""
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
    judged: Mapping[str, tuple[JudgedSet, Evaluation]], predictions: Path, false_alarms: float
) -> Thresholds | None:
    """Propose thresholds from the validation share among sets of one run; None if there is none, or not as it was.

    Args:
        judged: all sets of the run, and what they scored.
        predictions: their folder.
        false_alarms: the share of images without an object that may raise an alarm.
    """
    whole = {name: found for name, (one, found) in judged.items() if not one.predicted_otherwise}
    validation = next((name for name in whole if judged[name][0].is_validation), None)
    if validation is None:
        return None
    sets = {validation: whole[validation], **whole}
    chosen_by = sets[validation]
    rules = dict(propose_thresholds(chosen_by.image_level, chosen_by.levels, false_alarms))
    with suppress(DsuError):  # no head beside it: its predictions can be judged all the same
        own = read_head_info(predictions.parent / HEAD_FILE).threshold
        rules |= {"the head's own": own} if own is not None else {}
    rules["default"] = DEFAULT_THRESHOLD
    proposals = [
        (rule, at, {name: judge_threshold(at, one.image_level, one.levels) for name, one in sets.items()})
        for rule, at in rules.items()
    ]
    others = tuple(name for name in judged if name not in whole)
    return Thresholds(validation, sets, proposals, calibration(chosen_by.image_level), others)
