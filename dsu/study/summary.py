"""Means and spreads of a study's members, and all images of a cross-validation together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from dsu.metrics.figures import PER_IMAGE, over_objects
from dsu.metrics.meters import ImageLevel
from dsu.study.plan import Member
from dsu.study.results import Result, SetResult

__all__ = ["Finished", "Spread", "groups", "pooled", "pooled_rows", "spread", "spreads"]


@dataclass(frozen=True)
class Finished:
    """A member and what came of it."""

    member: Member
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
        group: {figure: spread(_values(members, name, figure)) for figure in figures}
        for group, members in groups(finished).items()
        if len(members) > 1
    }


def _values(members: Sequence[Finished], name: str, figure: str) -> list[float]:
    return [
        one.result.sets[name].figures[figure]
        for one in members
        if name in one.result.sets and figure in one.result.sets[name].figures
    ]


def pooled_rows(finished: Sequence[Finished], name: str) -> list[dict[str, Any]]:
    """A row an image of all members' sets `name`, each with its member's name."""
    return [{"member": one.member.name, **row} for one in finished for row in one.result.sets[name].per_image]


def pooled(finished: Sequence[Finished], name: str) -> dict[str, float]:
    """Figures over all images of all members' sets `name`, as if one set had been judged.

    Means of the images' own figures; of the mean F and E, whose curves are averaged over images first, the members'
    figures weighted by their images, which is the same. F_max and E_max are left out: their curves are not kept.
    AUROC compares responses of different heads here, which need not be on one scale: it may lie below each fold's.
    """
    sets = [one.result.sets[name] for one in finished]
    rows = pooled_rows(finished, name)
    objects = [row for row in rows if not row["empty"]]
    found = {figure: mean(row[figure] for row in rows) for figure in PER_IMAGE}
    found |= {over_objects(figure): mean(row[figure] for row in objects) for figure in PER_IMAGE if objects}
    for figure in ("F_mean", "E_mean"):
        found[figure] = _weighted(sets, figure, lambda one: one.images)
        if objects:
            found[over_objects(figure)] = _weighted(sets, over_objects(figure), _with_object)
    level = ImageLevel(tuple(row["response"] for row in rows), tuple(row["empty"] for row in rows))
    return found | level.figures()


def _with_object(one: SetResult) -> int:
    return one.images - one.without_object


def _weighted(sets: Sequence[SetResult], figure: str, weight: Callable[[SetResult], int]) -> float:
    judged = [one for one in sets if weight(one)]
    return sum(one.figures[figure] * weight(one) for one in judged) / sum(weight(one) for one in judged)
