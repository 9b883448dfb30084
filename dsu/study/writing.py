"""What a study leaves in its folder: all numbers as JSON and CSV, the table as Markdown, the picture."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dsu import __version__
from dsu.features.stores import library_versions
from dsu.files import atomic_write
from dsu.metrics.figures import FIGURES, PER_IMAGE, RANDOM
from dsu.study.picture import draw_study
from dsu.study.plan import STUDY_FILE, Study
from dsu.study.summary import Finished, pooled, pooled_rows, spreads
from dsu.study.tables import POOLED, set_names, study_tables

__all__ = ["write_record", "write_study"]


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
        "sets": {name: _summary(study, finished, name) for name in set_names(finished)},
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
    files = {
        "study.md": tables + "".join(f"\n{note}\n" for note in notes),
        "study.csv": _csv(("set", "member", *FIGURES, "images", "seconds"), _rows(study, finished)),
        "per_image.csv": _csv(
            ("set", "member", "name", *PER_IMAGE, "response", "empty"),
            ({"set": name, **row} for name in set_names(finished) for row in pooled_rows(finished, name)),
        ),
    }
    for name, text in files.items():
        atomic_write(study.folder / name, text.encode())
    draw_study(study, finished, figures, study.folder / "study.png")
    return [STUDY_FILE, *files, "study.png"]


def _member(one: Finished) -> dict[str, Any]:
    result, cost = one.result, one.member.cost
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
        **asdict(cost),
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


def _summary(study: Study, finished: Sequence[Finished], name: str) -> dict[str, Any]:
    """Of each group mean, standard deviation and number of values; of folds also all images together."""
    members = [one for one in finished if name in one.result.sets]
    found: dict[str, Any] = {
        "groups": {
            group: {
                figure: {"mean": one.mean, "sd": one.sd if math.isfinite(one.sd) else None, "count": one.count}
                for figure, one in by_figure.items()
                if one.count
            }
            for group, by_figure in spreads(members, name, FIGURES).items()
        }
    }
    if study.kind == "folds":
        found[POOLED] = pooled(members, name)
    return found


def _rows(study: Study, finished: Sequence[Finished]) -> Iterable[dict[str, Any]]:
    """Members, then what sums them up, under the same columns."""
    for name in set_names(finished):
        members = [one for one in finished if name in one.result.sets]
        for one in members:
            found = one.result.sets[name]
            yield {
                "set": name,
                "member": one.member.name,
                **found.figures,
                "images": found.images,
                "seconds": one.seconds,
            }
        for group, by_figure in spreads(members, name, FIGURES).items():
            for what in ("mean", "sd"):
                values = {figure: getattr(one, what) for figure, one in by_figure.items()}
                yield {"set": name, "member": f"{group} {what}", **_without_nan(values)}
        if study.kind == "folds":
            images = sum(one.result.sets[name].images for one in members)
            yield {"set": name, "member": POOLED, **pooled(members, name), "images": images}


def _without_nan(values: Mapping[str, float]) -> dict[str, float]:
    return {figure: value for figure, value in values.items() if not math.isnan(value)}


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
