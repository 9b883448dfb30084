"""A study's table, for the terminal and for Markdown alike, and what it leaves in its folder: JSON, CSV, a picture."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from dsu import __version__
from dsu.features.stores import library_versions
from dsu.files import atomic_write
from dsu.metrics.figures import FIGURES, IMAGE_LEVEL, PER_IMAGE, RANDOM, SPOILT, arrow, figure_name, over_objects
from dsu.report.tables import csv_text
from dsu.study.picture import draw_study
from dsu.study.plan import STUDY_FILE, Kind, Study
from dsu.study.results import Finished, groups, pooled, set_names, spread, spreads

__all__ = ["StudyTable", "default_figures", "study_tables", "write_record", "write_study"]

_POOLED: Final = "all images"
"""The row of a cross-validation in which every image counts once."""

_USUAL: Final = ("S", "F_adaptive", "E_mean", "MAE", "IoU")

Cells = tuple[str, ...]


@dataclass(frozen=True)
class StudyTable:
    """What a study found on one set, as cells: headings, a row a member, rows that sum them up."""

    headings: Cells
    members: list[Cells]
    summaries: list[Cells]

    def to_markdown(self) -> str:
        """Ready to paste."""
        rule = ("---", *("--:" for _ in self.headings[1:]))
        lines = [self.headings, rule, *self.members, *self.summaries]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def default_figures(finished: Sequence[Finished]) -> tuple[str, ...]:
    """What is told unless asked otherwise: the paper's S, F, E and MAE, and IoU.

    Where there are images without an object, those that they spoil are over the images with one, and the figures of
    whole images come on top.
    """
    if not any(found.without_object for one in finished for found in one.result.sets.values()):
        return _USUAL
    usual = [over_objects(figure) if over_objects(figure) in SPOILT else figure for figure in _USUAL]
    return (*usual, *IMAGE_LEVEL)


def study_tables(kind: Kind, finished: Sequence[Finished], figures: Sequence[str]) -> list[StudyTable]:
    """A table a set.

    Args:
        kind: of study: depth also tells costs, folds all images together.
        finished: members with their results.
        figures: which to tell, in order, of `dsu.metrics.figures.FIGURES`.
    """
    costs = ("s/epoch", "s/step", "MB/image", "store GB") if kind == "depth" else ()
    heads = (*(f"{figure_name(figure)} {arrow(figure)}" for figure in figures), "time", *costs)

    def row(label: str, found: Mapping[str, float], seconds: float | None, more: Cells) -> Cells:
        return (label, *(_number(found.get(figure, math.nan)) for figure in figures), _time(seconds), *more)

    tables = []
    for name, members in _by_set(finished):
        rows = [
            row(one.member.name, one.result.sets[name].figures, one.seconds, _costs(one) if costs else ())
            for one in members
        ]
        summaries, empty, by_group = [], ("",) * len(costs), groups(members)
        for group, by_figure in spreads(members, name, figures).items():
            label = f"{group} " if len(by_group) > 1 else ""
            by_figure["seconds"] = spread([one.seconds for one in by_group[group]])
            for what in ("mean", "sd"):
                values = {figure: getattr(found, what) for figure, found in by_figure.items()}
                summaries.append(row(f"{label}{what}", values, values["seconds"], empty))
        if kind == "folds" and len(members) > 1:
            summaries.append(row(_POOLED, pooled(members, name), None, empty))
        tables.append(StudyTable((name, *heads), rows, summaries))
    return tables


def _by_set(finished: Sequence[Finished]) -> Iterator[tuple[str, list[Finished]]]:
    """The sets, each with the members that were judged on it."""
    for name in set_names(finished):
        yield name, [one for one in finished if name in one.result.sets]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _costs(one: Finished) -> Cells:
    cost, result = one.member.cost, one.result
    return (
        f"{result.epoch_seconds:.3g}",
        f"{result.step_seconds:.3g}",
        f"{cost.image_bytes / 1e6:.2f}",
        f"{cost.store_bytes / 1e9:.3g}",
    )


# ---- files ----


def write_record(study: Study, finished: Sequence[Finished]) -> None:
    """Write `study.json`: what the study is, and every number that is known so far; NaN becomes null."""
    content = {
        "kind": study.kind,
        "data": study.source.split,
        "judged_on": study.judged_on,
        "images": study.images,
        "content": study.content,
        "dsu": __version__,
        "libraries": dict(library_versions()),
        "settings": study.settings.model_dump(mode="json"),
        "members": [_member(one) for one in finished],
        "left_out": list(study.lacking),
        "sets": {name: _summary(study, members, name) for name, members in _by_set(finished)},
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(study.folder / STUDY_FILE, (text + "\n").encode())


def write_study(study: Study, finished: Sequence[Finished], figures: Sequence[str]) -> list[str]:
    """Write what is read by people and spreadsheets, beside `study.json`; the files' names.

    Args:
        study: whose folder is written to.
        finished: all members with their results.
        figures: that the table and the picture show; the CSV has all that there are.
    """
    tables = "\n".join(table.to_markdown() for table in study_tables(study.kind, finished, figures))
    random = any("encoders" in found.conventions for one in finished for found in one.result.sets.values())
    notes = [f"Judged on: {study.judged_on}.", *([f"Encoders of {RANDOM}."] if random else []), *study.lacking]
    per_image = (
        {"set": name, "member": one.member.name, **row}
        for name, members in _by_set(finished)
        for one in members
        for row in one.result.sets[name].per_image
    )
    files = {
        "study.md": tables + "".join(f"\n{note}\n" for note in notes),
        "study.csv": csv_text(("set", "member", *FIGURES, "images", "seconds"), _rows(study, finished)),
        "per_image.csv": csv_text(("set", "member", "name", *PER_IMAGE, "response", "empty"), per_image),
    }
    for name, text in files.items():
        atomic_write(study.folder / name, text.encode())
    draw_study(study, finished, figures, study.folder / "study.png")
    return [STUDY_FILE, *files, "study.png"]


def _member(one: Finished) -> dict[str, Any]:
    result = one.result
    return {
        "name": one.member.name,
        "group": one.member.group,
        "settings": one.member.settings.model_dump(mode="json"),
        "head_sha256": result.head_sha256,
        "machine": result.machine,
        "train_images": result.train_images,
        "epochs": len(result.seconds),
        "seconds": one.seconds,
        "seconds_per_epoch": result.epoch_seconds,
        "seconds_per_step": result.step_seconds,
        **asdict(one.member.cost),
        "sets": {
            name: {
                "figures": dict(found.figures),
                "images": found.images,
                "images_without_object": found.without_object,
                "conventions": dict(found.conventions),
            }
            for name, found in result.sets.items()
        },
    }


def _summary(study: Study, members: Sequence[Finished], name: str) -> dict[str, Any]:
    """Of each group mean, standard deviation and number of values; of folds also all images together."""
    by_group = {
        group: {
            figure: {"mean": one.mean, "sd": one.sd if math.isfinite(one.sd) else None, "count": one.count}
            for figure, one in by_figure.items()
            if one.count
        }
        for group, by_figure in spreads(members, name, FIGURES).items()
    }
    return {"groups": by_group, **({_POOLED: pooled(members, name)} if study.kind == "folds" else {})}


def _rows(study: Study, finished: Sequence[Finished]) -> Iterator[dict[str, Any]]:
    """Members, then what sums them up, under the same columns."""
    for name, members in _by_set(finished):
        for one in members:
            found = one.result.sets[name]
            row = {"set": name, "member": one.member.name, "images": found.images, "seconds": one.seconds}
            yield {**row, **found.figures}
        for group, by_figure in spreads(members, name, FIGURES).items():
            for what in ("mean", "sd"):
                values = {figure: getattr(one, what) for figure, one in by_figure.items()}
                known = {figure: value for figure, value in values.items() if not math.isnan(value)}
                yield {"set": name, "member": f"{group} {what}", **known}
        if study.kind == "folds":
            images = sum(one.result.sets[name].images for one in members)
            yield {"set": name, "member": _POOLED, "images": images, **pooled(members, name)}
