"""What stands side by side: every run's figures on a set, the paper's rows, and which of them are best."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, TypeVar

from dsu.evaluation.evaluate import Evaluation
from dsu.metrics.figures import FIGURES, IMAGE_LEVEL, LOWER_IS_BETTER, METRICS, SPOILT, figure_name, over_objects
from dsu.metrics.image_level import ImageLevel
from dsu.metrics.paper import PublishedRow, incomparable, judged_in_part, published

__all__ = ["PLACES", "Comparison", "Line", "Results", "by_kind", "compare"]

Results = Mapping[str, Mapping[str, Evaluation]]
"""Of every run, by its name, what each set scored, by the set's name."""

T = TypeVar("T", bound=Hashable)

PLACES: Final = 3
"""Decimals that stand beside the paper's, which prints as many."""

_UNCERTAIN: Final = "last digits hard to read in the paper's scan"
_MIXED: Final = "The runs were judged on different images, so no figure is marked as the best."
_NOISE: Final = (
    "min-max normalisation turns the least noise on images without an object into full range, which S, E and MAE over "
    "all images count: --normalize none judges the maps as they are"
)
_STRETCHED: Final = (
    "every map reaches full range, as those do that were min-max normalised when they were predicted, so false "
    "alarms, misses and AUROC say nothing: predict with --normalize none"
)


@dataclass(frozen=True)
class Line:
    """One run's or published method's figures on one set.

    Attributes:
        label: The run's or the method's name.
        figures: What is known of it, by a name of `FIGURES`.
        images: How many images a run was judged on; None for published figures.
        approximate: Whether a published last digit is hard to read.
        remark: Why a run's figures are not to be compared with published ones; empty where they are.
        image_level: What a run's images answered; None for published figures.
        minmax: Whether a run's maps were min-max normalised when they were judged.
        missing: How many more images the set has, which the run has no prediction of.
        trained_on: How many of its images the run was trained on.
        faint: Why its IoU and Dice are next to nothing, where its maps are faint.
    """

    label: str
    figures: Mapping[str, float]
    images: int | None = None
    approximate: bool = False
    remark: str = ""
    image_level: ImageLevel | None = None
    minmax: bool = False
    missing: int = 0
    trained_on: int = 0
    faint: str = ""

    @property
    def published(self) -> bool:
        """Whether these are the paper's figures."""
        return self.images is None

    @property
    def title(self) -> str:
        """The label, saying of published figures that they are the paper's."""
        return f"{self.label} (paper{', approximate' if self.approximate else ''})" if self.published else self.label

    @property
    def without_object(self) -> int:
        """How many of the images have no object."""
        return 0 if self.image_level is None else self.image_level.without_object

    def notes(self, shown: Sequence[str]) -> list[str]:
        """What a reader of the figures called `shown` should know of this run's, in sentences."""
        found = [f"not comparable with the paper, {self.remark}"] if self.remark else []
        if self.missing and self.images is not None and not self.remark:
            found.append(judged_in_part(self.images, self.images + self.missing))
        if self.trained_on:
            found.append(f"trained on {self.trained_on:,} of the {self.images:,} images, so the figures flatter it")
        if self.faint and {"IoU", "Dice"} & {*shown}:
            found.append(self.faint)
        if self.image_level is not None:
            undefined = [figure_name(name) for name in shown if name in FIGURES and name not in self.figures]
            if undefined:
                found.append(f"{', '.join(undefined)} not defined, since {self.image_level.lacking}")
        if self.image_level is not None and self.without_object:
            if self.minmax and {*shown} & {*METRICS}:
                found.append(_NOISE)
            if self.image_level.stretched and {*shown} & {*IMAGE_LEVEL}:
                found.append(_STRETCHED)
        return [f"{self.label}: {note}." for note in found]


@dataclass(frozen=True)
class Comparison:
    """All lines of one set, the paper's first."""

    name: str
    lines: tuple[Line, ...]
    mixed: bool = False
    """Whether the runs were not all judged on the same images, so that no figure is the best."""

    def is_best(self, line: Line, metric: str) -> bool:
        """Whether no other line prints a better figure; of nothing to compare with, nothing is best.

        Beside published figures, runs that are not comparable with them are out of the contest.
        """
        if self.mixed:
            return False
        beside_paper = any(other.published for other in self.lines)
        rivals = [other for other in self.lines if metric in other.figures and not (beside_paper and other.remark)]
        choose = min if metric in LOWER_IS_BETTER else max
        figures = [round(other.figures[metric], PLACES) for other in rivals]
        return line in rivals and len(rivals) > 1 and round(line.figures[metric], PLACES) == choose(figures)

    @property
    def printed(self) -> list[str]:
        """The metrics that the paper prints of the set; none for sets of which it prints nothing."""
        paper = [line for line in self.lines if line.published]
        return [name for name in METRICS if any(name in line.figures for line in paper)]

    def shown(self, metrics: Sequence[str] | None = None) -> tuple[str, ...]:
        """The figures to tell: those asked for, else all metrics, and what images without an object call for."""
        if metrics is not None:
            return tuple(metrics)
        return (*METRICS, *((*IMAGE_LEVEL, *SPOILT) if self.with_empties else ()))

    def notes(self, metrics: Sequence[str] | None = None) -> list[str]:
        """What a reader of the table should know of single lines, in sentences."""
        uncertain = [line.label for line in self.lines if line.approximate]
        found = [f"{' and '.join(uncertain)}: {_UNCERTAIN}."] if uncertain else []
        found += [_MIXED] if self.mixed else []
        return found + [note for line in self.lines for note in line.notes(self.shown(metrics))]

    @property
    def with_empties(self) -> bool:
        """Whether any run was judged on images without an object."""
        return any(line.without_object for line in self.lines)


def compare(results: Results, paper: Callable[[str], tuple[PublishedRow, ...]] | None = published) -> list[Comparison]:
    """Put every set's figures side by side.

    Args:
        results: What was judged.
        paper: Gives the published rows of a set (`published` or `ablations` of `dsu.metrics.paper`); None: without
            them.

    Returns:
        A comparison a set, in the order in which the runs first name them.
    """
    names = dict.fromkeys(chain.from_iterable(results.values()))
    return [
        Comparison(
            name,
            (
                *(Line(row.method, row.figures, approximate=row.approximate) for row in (paper(name) if paper else ())),
                *(_line(run, name, sets[name]) for run, sets in results.items() if name in sets),
            ),
            mixed=len({_images_of(sets[name]) for sets in results.values() if name in sets}) > 1,
        )
        for name in names
    ]


def by_kind(named: Iterable[tuple[str, T]]) -> dict[T, list[str]]:
    """The names of those that are alike."""
    kinds: dict[T, list[str]] = {}
    for name, kind in named:
        kinds.setdefault(kind, []).append(name)
    return kinds


def _images_of(found: Evaluation) -> frozenset[str]:
    """Which images a run was judged on."""
    return frozenset(one.name for one in found.judged)


def _line(run: str, name: str, found: Evaluation) -> Line:
    restricted = {over_objects(metric): figure for metric, figure in found.object_metrics.items()}
    return Line(
        run,
        found.metrics | restricted | found.image_level.figures(),
        found.images,
        remark=incomparable(name, found.images, minmax=found.normalize),
        image_level=found.image_level,
        minmax=found.normalize,
        missing=found.missing,
        trained_on=found.trained_on,
        faint=found.faint,
    )
