"""What a study tells: its table, for the terminal and for Markdown alike, and the files in its folder: JSON, CSV, and a
picture for print (a panel a figure, a dot a run, mean and spread where runs are repeated).
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsu import __version__
from dsu.drawing import DPI, INK, PAGE_WIDTH, dress, save_figures
from dsu.features.stores import library_versions
from dsu.files import atomic_write
from dsu.metrics.figures import FIGURES, IMAGE_LEVEL, PER_IMAGE, RANDOM, SPOILT, arrow, figure_name, over_objects
from dsu.progress import clock, counted
from dsu.report.tables import csv_text, latex_text
from dsu.study.plan import FOLDER_STARTS, STUDY_FILE, Kind, Study
from dsu.study.results import Finished, Spread, groups, pooled, set_names, spread, spreads

__all__ = ["StudyTable", "default_figures", "draw_study", "study_tables", "write_record", "write_study"]

_POOLED: Final = "all images"
"""The row of a cross-validation in which every image counts once."""

_USUAL: Final = ("S", "F_adaptive", "E_mean", "MAE", "IoU")

_IN_LATEX: Final = str.maketrans({"↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--"})

_ONE_SEED: Final = "One seed each: a difference may be chance; use `-n` for several seeds per case."

Cells = tuple[str, ...]


@dataclass(frozen=True)
class StudyTable:
    """What a study found on one set, as cells: headings, one row per member, rows that sum them up."""

    headings: Cells
    members: list[Cells]
    summaries: list[Cells]

    def to_latex(self) -> str:
        """One `tabular` for the package booktabs."""

        def row(cells: Cells) -> str:
            return " & ".join(latex_text(cell).translate(_IN_LATEX) for cell in cells) + r" \\"

        lines = [
            f"\\begin{{tabular}}{{l{'r' * (len(self.headings) - 1)}}}",
            r"\toprule",
            row(self.headings),
            r"\midrule",
        ]
        lines += map(row, self.members)
        lines += [r"\midrule", *map(row, self.summaries)] if self.summaries else []
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

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
        values = [found.get(figure, math.nan) for figure in figures]
        numbers = ("–" if math.isnan(value) else f"{value:.4f}" for value in values)
        return (label, *numbers, "" if seconds is None else clock(seconds), *more)

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
    """Write the files for people and spreadsheets, next to `study.json`; returns their names.

    Args:
        study: whose folder is written to.
        finished: all members with their results.
        figures: that the table and the picture show; the CSV has all that there are.
    """
    tables = study_tables(study.kind, finished, figures)
    random = any("encoders" in found.conventions for one in finished for found in one.result.sets.values())
    notes = [f"Evaluated on: {study.judged_on}.", *([f"Encoders of {RANDOM}."] if random else []), *study.lacking]
    notes += [_ONE_SEED] if _single_seeds(study, finished) else []
    kinds = {(name, *found.conventions.items()) for one in finished for name, found in one.result.sets.items()}
    for name, *said in sorted(kinds):
        notes.append(f"Conventions of {name}: {'; '.join(f'{what}: {how}' for what, how in said)}.")
    per_image = (
        {"set": name, "member": one.member.name, **row}
        for name, members in _by_set(finished)
        for one in members
        for row in one.result.sets[name].per_image
    )
    files = {
        "study.md": "\n".join([*(table.to_markdown() for table in tables), *(f"{note}\n" for note in notes)]),
        "study.tex": "".join(
            ["% needs \\usepackage{booktabs}\n", *(f"% {note}\n" for note in notes), *(t.to_latex() for t in tables)]
        ),
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


# ---- the picture ----


_ACROSS: Final = 3
"""Panels side by side."""
_DOT: Final = "#08519c"
_MEAN: Final = "#e8590c"
_X_LABELS: Final[dict[Kind, str]] = {
    "folds": "fold",
    "seeds": "seed",
    "depth": "adapted blocks N",
    "ablations": "ablation",
}

Value = Callable[[Finished], float]


def draw_study(study: Study, finished: Sequence[Finished], figures: Sequence[str], path: Path) -> None:
    """Write a PNG as wide as a printed page.

    Folds and seeds have a dot a run, the mean as a line and one standard deviation (n - 1) as a band; of depth and
    ablations each case has its dots, and where it has several runs its mean and spread beside them. Depth has a
    panel more: seconds an epoch.

    Args:
        study: what was varied.
        finished: members with their results.
        figures: a panel each, a set of images at a time.
        path: the file to write.
    """
    names = set_names(finished)
    panels: list[tuple[str, Value, bool]] = []  # title, value, whether it lives in 0 to 1
    for name in names:
        of = f", {name}" if len(names) > 1 else ""
        panels += [
            (f"{figure_name(figure)} {arrow(figure)}{of}", partial(_figure, name=name, figure=figure), True)
            for figure in figures
        ]
    if study.kind == "depth":
        panels.append(("seconds an epoch ↓", _epoch_seconds, False))
    panels = [panel for panel in panels if any(not math.isnan(panel[1](one)) for one in finished)]
    down = -(-len(panels) // _ACROSS)
    page = Figure(figsize=(PAGE_WIDTH, 1.8 * down + 0.3), dpi=DPI, layout="constrained")
    cells = list(page.subplots(down, _ACROSS, squeeze=False).flat)
    repeats = study.kind in ("folds", "seeds")
    for axes, (title, value, is_share) in zip(cells, panels, strict=False):
        dress(axes, _X_LABELS[study.kind])
        axes.grid(visible=False, axis="x")
        # Folds and seeds have mean and spread on a line of their own below the name, which may be long.
        axes.set_title(title, fontsize=8, color=INK, loc="left", pad=15 if repeats else 3)
        (_draw_repeats if repeats else _draw_cases)(axes, study.kind, finished, value)
        low, high = axes.get_ylim()
        axes.set_ylim(_share_limits(low, high) if is_share else (0, high * 1.1))
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    for axes in cells[len(panels) :]:
        axes.set_visible(False)
    page.suptitle(f"{study.source.split}: {_words(study, finished)}", fontsize=8, color=INK, x=0.01, ha="left")
    save_figures([page], [path], DPI)


def _figure(one: Finished, name: str, figure: str) -> float:
    found = one.result.sets.get(name)
    return math.nan if found is None else found.figures.get(figure, math.nan)


def _epoch_seconds(one: Finished) -> float:
    return one.result.epoch_seconds


def _words(study: Study, finished: Sequence[Finished]) -> str:
    """What is varied and what the marks mean."""
    if study.kind in ("folds", "seeds"):
        return f"{counted(len(finished), study.kind)}, mean (line) and standard deviation (band)"
    what = "adapters in front of Hiera's last N blocks" if study.kind == "depth" else "ablations of the paper"
    repeats = max(len(members) for members in groups(finished).values())
    single = f"{what}, one seed each: differences may be chance"
    return single if repeats == 1 else f"{what}, {repeats} seeds each, mean and standard deviation"


def _single_seeds(study: Study, finished: Sequence[Finished]) -> bool:
    """Whether cases are compared that were trained only once each."""
    return study.kind in ("depth", "ablations") and all(len(members) == 1 for members in groups(finished).values())


def _draw_repeats(axes: Axes, kind: Kind, finished: Sequence[Finished], value: Value) -> None:
    """A dot a run in order, over the band that they span."""
    values = [value(one) for one in finished]
    found = _spread(values)
    sd = ""
    if found.count > 1:
        sd = f" ± {found.sd:.4f}"
        axes.axhspan(found.mean - found.sd, found.mean + found.sd, color=_MEAN, alpha=0.15, linewidth=0)
    axes.axhline(found.mean, color=_MEAN, linewidth=1)
    axes.plot(range(len(values)), values, "o", color=_DOT, markersize=4, zorder=3, clip_on=False)
    axes.text(0, 1.05, f"{found.mean:.4f}{sd}", fontsize=7, color=_MEAN, transform=axes.transAxes)
    _label(axes, kind, [one.member.name for one in finished])


def _draw_cases(axes: Axes, kind: Kind, finished: Sequence[Finished], value: Value) -> None:
    """The dots of each case above its name; of repeated cases mean and spread beside them."""
    cases = groups(finished)
    means = []
    for place, members in enumerate(cases.values()):
        values = [value(one) for one in members]
        found = _spread(values)
        means.append(found.mean)
        # One run is a sample, not a result: its dot is hollow, and no line leads from it to the next.
        face = "none" if len(values) == 1 else _DOT
        axes.plot(
            [place] * len(values), values, "o", color=_DOT, mfc=face, markersize=4, alpha=0.8, zorder=3, clip_on=False
        )
        if found.count > 1:
            axes.errorbar(
                place + 0.15, found.mean, found.sd, fmt="_", color=_MEAN, capsize=2.5, linewidth=1, markersize=6
            )
    if kind == "depth" and all(len(members) > 1 for members in cases.values()):  # an order, so that a line has meaning
        axes.plot(range(len(means)), means, color=_DOT, linewidth=1, alpha=0.5)
    _label(axes, kind, list(cases))


def _spread(values: Sequence[float]) -> Spread:
    return spread([value for value in values if not math.isnan(value)])


def _label(axes: Axes, kind: Kind, folders: Sequence[str]) -> None:
    """As many names below the places as there is room for."""
    step = -(-len(folders) // 10)
    names = [folder.removeprefix(FOLDER_STARTS[kind]) for folder in folders[::step]]
    axes.set_xticks(range(0, len(folders), step), names)
    axes.set_xlim(-0.5, len(folders) - 0.5)


def _share_limits(low: float, high: float) -> tuple[float, float]:
    """Limits around `low` to `high` with some room, within 0 to 1 (a band may reach beyond) and not too near."""
    span = min(max((high - low) * 1.1, 0.1), 1)  # on a finer scale chance looks like a difference
    bottom = min(max((low + high - span) / 2, 0), 1 - span)
    return bottom, bottom + span
