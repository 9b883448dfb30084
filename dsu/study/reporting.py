"""Report a study: tables for the terminal, Markdown and LaTeX, and files in its folder: JSON, CSV and a figure for
print (one panel per metric, one dot per run, mean and spread of repeated runs).
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
from dsu.drawing import DPI, INK, PAGE_WIDTH, save_figures, style_axes
from dsu.features.stores import library_versions
from dsu.files import atomic_write
from dsu.metrics.figures import FIGURES, IMAGE_LEVEL, PER_IMAGE, RANDOM, SPOILT, arrow, figure_name, over_objects
from dsu.progress import clock, counted
from dsu.report.tables import csv_text, latex_text
from dsu.study.plan import FOLDER_STARTS, STUDY_FILE, Kind, Study
from dsu.study.results import Finished, Spread, groups, pooled, set_names, spread, spreads

_POOLED: Final = "all images"
"""Label of the row over all images of a cross-validation."""

_USUAL: Final = ("S", "F_adaptive", "E_mean", "MAE", "IoU")

_IN_LATEX: Final = str.maketrans({"↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--"})

_ONE_SEED: Final = "One seed per case: a difference may be chance; use `-n` for several seeds per case."

Cells = tuple[str, ...]


@dataclass(frozen=True)
class StudyTable:
    """The results on one set, as text cells: headings, one row per member, and summary rows."""

    headings: Cells
    members: list[Cells]
    summaries: list[Cells]

    def to_latex(self) -> str:
        """A `tabular` that needs the package booktabs."""

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
        """A Markdown table."""
        rule = ("---", *("--:" for _ in self.headings[1:]))
        lines = [self.headings, rule, *self.members, *self.summaries]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def default_figures(finished: Sequence[Finished]) -> tuple[str, ...]:
    """The figures shown by default: the paper's S, F, E and MAE, and IoU.

    If there are images without an object, figures that are meaningless for them are computed over the images with an
    object, and the image-level figures are added.
    """
    if not any(found.without_object for run in finished for found in run.result.sets.values()):
        return _USUAL
    usual = [over_objects(figure) if over_objects(figure) in SPOILT else figure for figure in _USUAL]
    return (*usual, *IMAGE_LEVEL)


def study_tables(kind: Kind, finished: Sequence[Finished], figures: Sequence[str]) -> list[StudyTable]:
    """One table per set.

    Args:
        kind: the kind of study; depth adds columns of costs, folds a row over all images.
        finished: members with their results.
        figures: names from `dsu.metrics.figures.FIGURES`, in the order of the columns.
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
            row(run.member.name, run.result.sets[name].figures, run.seconds, _costs(run) if costs else ())
            for run in members
        ]
        summaries, empty, by_group = [], ("",) * len(costs), groups(members)
        for group, by_figure in spreads(members, name, figures).items():
            label = f"{group} " if len(by_group) > 1 else ""
            by_figure["seconds"] = spread([run.seconds for run in by_group[group]])
            for what in ("mean", "sd"):
                values = {figure: getattr(found, what) for figure, found in by_figure.items()}
                summaries.append(row(f"{label}{what}", values, values["seconds"], empty))
        if kind == "folds" and len(members) > 1:
            summaries.append(row(_POOLED, pooled(members, name), None, empty))
        tables.append(StudyTable((name, *heads), rows, summaries))
    return tables


def _by_set(finished: Sequence[Finished]) -> Iterator[tuple[str, list[Finished]]]:
    """Each set's name with the members that were evaluated on it."""
    for name in set_names(finished):
        yield name, [run for run in finished if name in run.result.sets]


def _costs(run: Finished) -> Cells:
    cost, result = run.member.cost, run.result
    return (
        f"{result.epoch_seconds:.3g}",
        f"{result.step_seconds:.3g}",
        f"{cost.image_bytes / 1e6:.2f}",
        f"{cost.store_bytes / 1e9:.3g}",
    )


# ---- files ----


def write_record(study: Study, finished: Sequence[Finished]) -> None:
    """Write `study.json`: the study's definition and all results so far, with null for NaN."""
    content = {
        "kind": study.kind,
        "data": study.source.split,
        "evaluated_on": study.evaluated_on,
        "images": study.images,
        "content": study.content,
        "dsu": __version__,
        "libraries": dict(library_versions()),
        "settings": study.settings.model_dump(mode="json"),
        "members": [_member(run) for run in finished],
        "left_out": list(study.left_out),
        "sets": {name: _summary(study, members, name) for name, members in _by_set(finished)},
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(study.folder / STUDY_FILE, (text + "\n").encode())


def write_study(study: Study, finished: Sequence[Finished], figures: Sequence[str]) -> list[str]:
    """Write tables (Markdown, LaTeX, CSV) and the figure next to `study.json`; returns the names of all files.

    Args:
        study: the study; files are written into its folder.
        finished: all members with their results.
        figures: the metrics in the tables and the figure; the CSV files have all metrics.
    """
    tables = study_tables(study.kind, finished, figures)
    random = any("encoders" in found.conventions for run in finished for found in run.result.sets.values())
    notes = [f"Evaluated on: {study.evaluated_on}.", *([f"Encoders of {RANDOM}."] if random else []), *study.left_out]
    notes += [_ONE_SEED] if _single_seeds(study, finished) else []
    kinds = {(name, *found.conventions.items()) for run in finished for name, found in run.result.sets.items()}
    for name, *said in sorted(kinds):
        notes.append(f"Conventions of {name}: {'; '.join(f'{what}: {how}' for what, how in said)}.")
    per_image = (
        {"set": name, "member": run.member.name, **row}
        for name, members in _by_set(finished)
        for run in members
        for row in run.result.sets[name].per_image
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


def _member(run: Finished) -> dict[str, Any]:
    result = run.result
    return {
        "name": run.member.name,
        "group": run.member.group,
        "settings": run.member.settings.model_dump(mode="json"),
        "head_sha256": result.head_sha256,
        "machine": result.machine,
        "train_images": result.train_images,
        "epochs": len(result.seconds),
        "seconds": run.seconds,
        "seconds_per_epoch": result.epoch_seconds,
        "seconds_per_step": result.step_seconds,
        **asdict(run.member.cost),
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
    """Mean, standard deviation and number of values of each group; for folds also the figures over all images."""
    by_group = {
        group: {
            figure: {"mean": found.mean, "sd": found.sd if math.isfinite(found.sd) else None, "count": found.count}
            for figure, found in by_figure.items()
            if found.count
        }
        for group, by_figure in spreads(members, name, FIGURES).items()
    }
    return {"groups": by_group, **({_POOLED: pooled(members, name)} if study.kind == "folds" else {})}


def _rows(study: Study, finished: Sequence[Finished]) -> Iterator[dict[str, Any]]:
    """CSV rows: members, then summaries."""
    for name, members in _by_set(finished):
        for run in members:
            found = run.result.sets[name]
            row = {"set": name, "member": run.member.name, "images": found.images, "seconds": run.seconds}
            yield {**row, **found.figures}
        for group, by_figure in spreads(members, name, FIGURES).items():
            for what in ("mean", "sd"):
                values = {figure: getattr(found, what) for figure, found in by_figure.items()}
                known = {figure: value for figure, value in values.items() if not math.isnan(value)}
                yield {"set": name, "member": f"{group} {what}", **known}
        if study.kind == "folds":
            images = sum(run.result.sets[name].images for run in members)
            yield {"set": name, "member": _POOLED, "images": images, **pooled(members, name)}


# ---- the figure ----


_PANELS_PER_ROW: Final = 3
_DOT_COLOUR: Final = "#08519c"
_MEAN_COLOUR: Final = "#e8590c"
_X_LABELS: Final[dict[Kind, str]] = {
    "folds": "fold",
    "seeds": "seed",
    "depth": "adapted blocks N",
    "ablations": "ablation",
}

Value = Callable[[Finished], float]


def draw_study(study: Study, finished: Sequence[Finished], figures: Sequence[str], path: Path) -> None:
    """Draw the results as a PNG as wide as a printed page.

    For folds and seeds: one dot per run, the mean as a line and one standard deviation (n - 1) as a band. For depth and
    ablations: one dot per run above each case's name, with mean and standard deviation next to the dots of repeated
    runs. Depth has an additional panel with the seconds per epoch.

    Args:
        study: the study.
        finished: members with their results.
        figures: the metrics, one panel per metric and set.
        path: the file to write.
    """
    names = set_names(finished)
    panels: list[tuple[str, Value, bool]] = []  # title, value, whether its range is 0 to 1
    for name in names:
        of = f", {name}" if len(names) > 1 else ""
        panels += [
            (f"{figure_name(figure)} {arrow(figure)}{of}", partial(_figure, name=name, figure=figure), True)
            for figure in figures
        ]
    if study.kind == "depth":
        panels.append(("seconds per epoch ↓", _epoch_seconds, False))
    panels = [panel for panel in panels if any(not math.isnan(panel[1](run)) for run in finished)]
    down = -(-len(panels) // _PANELS_PER_ROW)
    page = Figure(figsize=(PAGE_WIDTH, 1.8 * down + 0.3), dpi=DPI, layout="constrained")
    cells = list(page.subplots(down, _PANELS_PER_ROW, squeeze=False).flat)
    repeats = study.kind in ("folds", "seeds")
    for axes, (title, value, is_share) in zip(cells, panels, strict=False):
        style_axes(axes, _X_LABELS[study.kind])
        axes.grid(visible=False, axis="x")
        # For folds and seeds, mean and spread are written below the title, which may be long.
        axes.set_title(title, fontsize=8, color=INK, loc="left", pad=15 if repeats else 3)
        (_draw_repeats if repeats else _draw_cases)(axes, study.kind, finished, value)
        low, high = axes.get_ylim()
        axes.set_ylim(_share_limits(low, high) if is_share else (0, high * 1.1))
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    for axes in cells[len(panels) :]:
        axes.set_visible(False)
    page.suptitle(f"{study.source.split}: {_subtitle(study, finished)}", fontsize=8, color=INK, x=0.01, ha="left")
    save_figures([page], [path], DPI)


def _figure(run: Finished, name: str, figure: str) -> float:
    found = run.result.sets.get(name)
    return math.nan if found is None else found.figures.get(figure, math.nan)


def _epoch_seconds(run: Finished) -> float:
    return run.result.epoch_seconds


def _subtitle(study: Study, finished: Sequence[Finished]) -> str:
    """The varied setting and the meaning of the marks."""
    if study.kind in ("folds", "seeds"):
        return f"{counted(len(finished), study.kind)}, mean (line) and standard deviation (band)"
    what = "adapters in front of Hiera's last N blocks" if study.kind == "depth" else "ablations of the paper"
    repeats = max(len(members) for members in groups(finished).values())
    single = f"{what}, one seed per case: differences may be chance"
    return single if repeats == 1 else f"{what}, {repeats} seeds per case, mean and standard deviation"


def _single_seeds(study: Study, finished: Sequence[Finished]) -> bool:
    """Whether the study compares cases that were trained once each."""
    return study.kind in ("depth", "ablations") and all(len(members) == 1 for members in groups(finished).values())


def _draw_repeats(axes: Axes, kind: Kind, finished: Sequence[Finished], value: Value) -> None:
    """One dot per run, in order, with mean and standard deviation as line and band."""
    values = [value(run) for run in finished]
    found = _spread(values)
    sd = ""
    if found.count > 1:
        sd = f" ± {found.sd:.4f}"
        axes.axhspan(found.mean - found.sd, found.mean + found.sd, color=_MEAN_COLOUR, alpha=0.15, linewidth=0)
    axes.axhline(found.mean, color=_MEAN_COLOUR, linewidth=1)
    axes.plot(range(len(values)), values, "o", color=_DOT_COLOUR, markersize=4, zorder=3, clip_on=False)
    axes.text(0, 1.05, f"{found.mean:.4f}{sd}", fontsize=7, color=_MEAN_COLOUR, transform=axes.transAxes)
    _label(axes, kind, [run.member.name for run in finished])


def _draw_cases(axes: Axes, kind: Kind, finished: Sequence[Finished], value: Value) -> None:
    """The dots of each case above its name; mean and spread of repeated cases next to them."""
    cases = groups(finished)
    means = []
    for place, members in enumerate(cases.values()):
        values = [value(run) for run in members]
        found = _spread(values)
        means.append(found.mean)
        # A single run shows no spread: its dot is hollow, and no line connects it to others.
        face = "none" if len(values) == 1 else _DOT_COLOUR
        axes.plot(
            [place] * len(values),
            values,
            "o",
            color=_DOT_COLOUR,
            mfc=face,
            markersize=4,
            alpha=0.8,
            zorder=3,
            clip_on=False,
        )
        if found.count > 1:
            axes.errorbar(
                place + 0.15, found.mean, found.sd, fmt="_", color=_MEAN_COLOUR, capsize=2.5, linewidth=1, markersize=6
            )
    if kind == "depth" and all(len(members) > 1 for members in cases.values()):  # only depths are ordered
        axes.plot(range(len(means)), means, color=_DOT_COLOUR, linewidth=1, alpha=0.5)
    _label(axes, kind, list(cases))


def _spread(values: Sequence[float]) -> Spread:
    return spread([value for value in values if not math.isnan(value)])


def _label(axes: Axes, kind: Kind, folders: Sequence[str]) -> None:
    """Label the x axis with the members' names, or every n-th one if there are many."""
    step = -(-len(folders) // 10)
    names = [folder.removeprefix(FOLDER_STARTS[kind]) for folder in folders[::step]]
    axes.set_xticks(range(0, len(folders), step), names)
    axes.set_xlim(-0.5, len(folders) - 0.5)


def _share_limits(low: float, high: float) -> tuple[float, float]:
    """Axis limits around `low` to `high`, within 0 to 1 (a band may exceed these) and at least 0.1 apart."""
    span = min(max((high - low) * 1.1, 0.1), 1)  # on a finer scale, random differences look important
    bottom = min(max((low + high - span) / 2, 0), 1 - span)
    return bottom, bottom + span
