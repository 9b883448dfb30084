"""`dsu eval`: predictions against ground truth."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Group, RenderableType
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from dsu.choices import ReportFormat
from dsu.distributed import connect
from dsu.errors import UsageError
from dsu.metrics.figures import FIGURES, IMAGE_LEVEL, METRICS, arrow, figure_name
from dsu.progress import Progress
from dsu.thresholds import DEFAULT_THRESHOLD
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, as_text, fail, key_table, out as console, table

if TYPE_CHECKING:
    from dsu.evaluation.evaluate import Evaluation
    from dsu.evaluation.ground_truth import EvaluationSet
    from dsu.evaluation.thresholds import Thresholds
    from dsu.report.tables import Comparison, Line, Results

_PAPERS_OWN = "DSU-Net"
SHOWN = 10
"""Maximum number of missing predictions to list by name."""

_OUTPUT = "Output"
_ENDINGS = {".md": "markdown", ".tex": "latex", ".csv": "csv", ".json": "json", ".txt": "table"}
"""The format of --out by its ending, without --format."""


def evaluate(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Test sets (default: all).", show_default=False)
    ] = None,
    predictions: Annotated[
        list[Path] | None,
        typer.Option(
            "--predictions",
            metavar="[NAME=]FOLDER",
            help="Folder of predictions, or a run's folder (default: the newest run's); several are compared.",
        ),
    ] = None,
    truth: Annotated[
        Path | None, typer.Option("--truth", help="Folder of ground-truth masks (default: the data sets' own).")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Folder of the images for --report, if they are not found automatically."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", help="Write an HTML page with scores, curves and every image.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="NAME,...",
            help="Metrics to print, in this order, such as S,F_adaptive,E_mean,MAE (an unknown name lists all).",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="table, markdown, latex, csv or json (default: by the extension of --out, else table).",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Write the table to this file: .md, .tex, .csv, .json or .txt.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Add the methods that the paper compares.", rich_help_panel=_OUTPUT)
    ] = False,
    conventions: Annotated[
        bool,
        typer.Option("--conventions", help="Explain how the scores were computed.", rich_help_panel=_OUTPUT),
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write the scores as JSON.", rich_help_panel=_OUTPUT)
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Also write the scores as CSV.", rich_help_panel=_OUTPUT)
    ] = None,
    per_image: Annotated[
        Path | None,
        typer.Option("--per-image", help="Also write the scores of each image as CSV.", rich_help_panel=_OUTPUT),
    ] = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="Resize predictions to their masks instead of refusing other sizes.")
    ] = False,
    normalize: Annotated[
        str | None,
        typer.Option(help="minmax: min-max normalise each map first (default for benchmarks); none: don't."),
    ] = None,
    training_images: Annotated[
        bool, typer.Option("--all", help="Also evaluate images that the head was trained on.")
    ] = False,
    common: Annotated[
        bool,
        typer.Option(
            "--common",
            help="Compare runs fairly: evaluate only images that all have predicted and none of the heads was trained "
            "on.",
        ),
    ] = False,
    foreground: Annotated[
        list[int] | None,
        typer.Option("--foreground", help="Mask value that is foreground (default: as in training); repeatable."),
    ] = None,
    false_alarms: Annotated[
        float,
        typer.Option(
            "--false-alarms",
            metavar="SHARE",
            help="Largest fraction of false alarms, among images without an object, for one of the proposed "
            "thresholds.",
            rich_help_panel=_OUTPUT,
        ),
    ] = 0.05,
    workers: Annotated[int | None, typer.Option(help="Number of processes (default: one per core).")] = None,
    data_root: options.DataRoot = Path("data"),
    quiet: options.Quiet = False,
) -> None:
    """Evaluate predictions: S, F, E, MAE, IoU and Dice, next to the paper's scores.

    If some images have no object: also false alarms, misses, AUROC, and the metrics over images with an object. To
    compare runs: `--predictions Ours=A --predictions B`. If `dsu predict` has also predicted the validation images,
    thresholds are proposed from these and evaluated on the other sets; `dsu head threshold` stores one. Writes
    `metrics.json`, `metrics.csv` and `thresholds.json` next to predictions of dsu, except with `--common`.
    """
    from dsu.data.datasets import Paths

    progress = ConsoleProgress(quiet=quiet)
    form = options.one_of("--format", format_ or _format_of(out), ("table", *get_args(ReportFormat)))
    chosen = options.names_of("--metrics", metrics, FIGURES)
    asked = options.one_of("--normalize", normalize, (None, "minmax", "none"))
    if not 0 <= false_alarms <= 1:
        raise UsageError(f"--false-alarms can't be {false_alarms:g}: give a fraction from 0 to 1, such as 0.05.")
    if common and training_images:
        raise UsageError("--common leaves out images that a head was trained on, and --all includes them: give one.")
    from dsu.report.page import check_report_path
    from dsu.report.tables import FORMATS

    if report is not None:
        check_report_path(report)
    files = {"--report": report, "--out": out, "--json": json, "--csv": csv, "--per-image": per_image}
    asked_for = {option: path for option, path in files.items() if path is not None}
    _check_files(asked_for)
    from dsu.evaluation.ground_truth import EvaluationSet, find_evaluation_sets, in_common, named_predictions

    runs = named_predictions(predictions or [])
    named = any("=" in text and not Path(text).exists() for text in map(str, predictions or []))
    find = partial(
        find_evaluation_sets,
        names or [],
        truth=truth,
        paths=Paths(data_root),
        minmax=None if asked is None else asked == "minmax",
        images=images,
        training_images=training_images or common,
        # With one folder of masks, several folders of maps are predictions of one set, whatever their names.
        called=truth.resolve().name if truth is not None and len(runs) > 1 else "",
        validation=True,
        beside=runs.values(),
    )
    evaluate_set = partial(
        EvaluationSet.evaluate, resize=resize, foreground=foreground, workers=workers, progress=progress
    )
    evaluated: dict[str, _RunEvaluation] = {}
    with connect() as world:
        found = [world.broadcast_object(partial(find, folder)) for folder in runs.values()]
        for (run, folder), sets in zip(runs.items(), in_common(found) if common else found, strict=True):
            progress.say(f"evaluating {folder}")
            scored = {}
            for one in sets:
                _name_lost(one, folder)
                scored[one.name] = one, evaluate_set(one, world=world)
            evaluated[run] = _RunEvaluation(run, folder, scored, bool(names), truth is None and not common)
            evaluated[run].find_thresholds(false_alarms)
            for line in evaluated[run].left_out():
                progress.say(line)
    if not world.is_main:
        return
    results = {run: one.shown for run, one in evaluated.items()}
    side_by_side = published or len(runs) > 1 or named
    paper = published or (len(runs) == 1 and named)
    shown = _tables(results, chosen, side_by_side=side_by_side, published=paper, conventions=conventions, quiet=quiet)
    if chosen is None:
        lines = [line for one in evaluated.values() for line in one.at_own_threshold]
        tables = [part for one in evaluated.values() for part in _thresholds(one.run, one.thresholds, len(runs) > 1)]
        shown = Group(shown, *lines, *tables)
    text = ""
    if form != "table":
        text = FORMATS[form](results, with_paper=published, metrics=chosen, conventions=conventions)
    if text and out is None:
        typer.echo(text, nl=False)
    else:
        console.print(shown)
    _write_files(asked_for, text or as_text(shown), list(evaluated.values()), chosen, progress)
    every = [one for run in evaluated.values() for one, _ in run.found.values()]
    if any(one.missing or one.extra or one.changed for one in every):
        raise typer.Exit(1)


@dataclass
class _RunEvaluation:
    """The evaluation of one run.

    Attributes:
        run, folder: its name, and the folder of its predictions.
        found: all sets, by name.
        named: whether the user named the sets.
        own_data: whether the ground truths are the data sets' own, neither those of `--truth` nor only `--common` ones.
        thresholds: proposed thresholds.
        at_own_threshold: without proposals, the effect of the run's own threshold.
    """

    run: str
    folder: Path
    found: "dict[str, tuple[EvaluationSet, Evaluation]]"
    named: bool
    own_data: bool
    thresholds: "Thresholds | None" = None
    at_own_threshold: Sequence[str] = ()

    @property
    def shown(self) -> "dict[str, Evaluation]":
        """The sets to print: without the validation share, which is only for thresholds, if there are others."""
        fair = [name for name, (one, _) in self.found.items() if not one.is_validation]
        return {name: self.found[name][1] for name in (self.named and self.found) or fair or self.found}

    def find_thresholds(self, false_alarms: float) -> None:
        """Propose thresholds from the validation share, or evaluate the run's own."""
        from dsu.evaluation.thresholds import find_thresholds
        from dsu.prediction.verdicts import threshold_of

        if self.own_data:
            self.thresholds = find_thresholds(self.found, self.folder, false_alarms)
        if self.thresholds is None:
            self.at_own_threshold = _at_own_threshold(self.run, threshold_of(self.folder), self.found)

    def left_out(self) -> list[str]:
        """Which predictions were not evaluated, and why."""
        from dsu.evaluation.ground_truth import not_recorded, without_truth

        untrue = without_truth(self.folder) if self.own_data and not self.named else []
        others = not_recorded(self.folder) if self.own_data else []
        kinds = (("no ground truth", untrue), ("from another head", others))
        return [f"left out ({why}): {', '.join(names)}" for why, names in kinds if names]

    def files(self) -> list[tuple[Path, str]]:
        """Files to write next to predictions of dsu; another method's folder stays as it is."""
        from dsu.evaluation.ground_truth import kept_figures
        from dsu.prediction.record import THRESHOLDS_FILE
        from dsu.report.tables import as_json, figures_as_csv

        if not self.own_data or not any(one.recorded for one, _ in self.found.values()):
            return []
        figures = {**kept_figures(self.folder), **loads(as_json({self.run: self.shown}))}
        texts = {"metrics.json": dumps(figures, indent=2) + "\n", "metrics.csv": figures_as_csv(figures)}
        if self.thresholds is not None:
            texts[THRESHOLDS_FILE] = dumps(self.thresholds.to_json(), indent=2) + "\n"
        return [(self.folder / name, text) for name, text in texts.items()]


def _tables(
    results: "Results",
    metrics: Sequence[str] | None,
    *,
    side_by_side: bool,
    published: bool,
    conventions: bool,
    quiet: bool,
) -> RenderableType:
    """The tables for people, with the main conventions above and, if asked for, all of them below.

    With `side_by_side`, each run has a column with its name; with `published`, so have the paper's methods.
    """
    from dsu.report.tables import conventions_of, in_short

    parts: list[RenderableType] = [] if quiet else [Text(in_short(results), style="dim")]
    if side_by_side:
        parts.append(_comparison_tables(results, with_paper=published, metrics=metrics))
    else:
        parts += [_metrics_table(sets, metrics) for sets in results.values()]
    if conventions:
        parts.append(Styled(key_table(conventions_of(results).items()), "dim"))
    return Group(*parts)


def _at_own_threshold(
    run: str, threshold: float, found: Mapping[str, tuple["EvaluationSet", "Evaluation"]]
) -> list[str]:
    """The effect on each set of the threshold of the verdicts, if that is not the default."""
    from dsu.metrics.thresholds import evaluate_threshold

    said = []
    for name, (of, one) in found.items():
        if threshold != DEFAULT_THRESHOLD and not of.predicted_otherwise:
            at, level = evaluate_threshold(threshold, one.image_level, one.levels), one.image_level
            found_of = f"{at.found} of {level.with_object} images with an object found"
            false = f"{at.false_alarms} false alarms on {level.without_object} without"
            whose = run if run == name else f"{run}, {name}"
            said.append(f"{whose}, at the head's threshold {threshold:g}: {found_of}, {false}, Dice {at.dice:.3f}.")
    return said


def _thresholds(run: str, found: "Thresholds | None", several: bool) -> list[RenderableType]:
    """One row per proposed threshold: its effect on the validation share and on the other sets."""
    if found is None:
        return []
    headings, *rows = found.table
    whose = f" for {run}" if several else ""
    parts: list[RenderableType] = ["", Text(f"Thresholds{whose}, {found.heading}"), table(headings, rows=rows)]
    if found.remark:
        parts.append(Text(found.remark, style="dim"))
    if found.bins:
        parts += ["", Text(f"Images of {found.validation} by response, and the fraction with an object")]
        parts.append(key_table(found.bins, style=""))
    return [*parts, Text("Store one with the head: `dsu head threshold VALUE`.", style="dim")]


def _metrics_table(sets: Mapping[str, "Evaluation"], metrics: Sequence[str] | None) -> RenderableType:
    """One row per metric, one column per set, and next to it the paper's scores of DSU-Net, if there are any."""
    from dsu.report.tables import Comparison, compare

    columns: list[tuple[str, Line]] = []
    notes: list[str] = []
    for name, found in sets.items():
        [comparison] = compare({name: {name: found}})
        *paper, own = comparison.lines
        columns += [(name, own), *(("paper", line) for line in paper if line.label == _PAPERS_OWN)]
        notes += own.notes(comparison.shown(metrics))
    together = Comparison("", tuple(line for _, line in columns))
    # Scores of different sets are not compared, so none is marked as the best.
    table = _figures(together, columns, metrics, lambda line, figure: False)
    return Group(table, *(Text(note, style="dim") for note in notes))


def _comparison_tables(results: "Results", *, with_paper: bool, metrics: Sequence[str] | None) -> RenderableType:
    """One table per set: one row per metric, one column per run or published method, the best of each row bold."""
    from dsu.metrics.paper import published
    from dsu.report.tables import compare

    parts: list[RenderableType] = []
    for comparison in compare(results, published if with_paper else None):
        columns = [
            (line.label + (f"\npaper{' ≈' if line.approximate else ''}" if line.published else ""), line)
            for line in comparison.lines
        ]
        table = _figures(comparison, columns, metrics, comparison.is_best)
        parts += [table, *(Text(note, style="dim") for note in comparison.notes(metrics)), ""]
    return Group(*parts)


def _figures(
    comparison: "Comparison",
    columns: Sequence[tuple[str, "Line"]],
    metrics: Sequence[str] | None,
    is_best: Callable[["Line", str], bool],
) -> Table:
    """The metrics asked for, else all, with separate parts for images with and without an object."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(comparison.name, no_wrap=True)
    for heading, line in columns:
        style = "dim" if line.published else ""
        table.add_column(Text(heading, style=style, overflow="fold"), justify="right", style=style)
    lines = [line for _, line in columns]
    _add_rows(table, lines, metrics or METRICS, is_best)
    _add_counts(table, lines, "images", lambda line: line.images or 0)
    if metrics is None and comparison.with_empties:
        table.add_row()
        _add_counts(table, lines, "images without an object", lambda line: line.without_object)
        _add_rows(table, lines, IMAGE_LEVEL, is_best)
        table.add_row()
        _add_counts(table, lines, "images with an object", lambda line: (line.images or 0) - line.without_object)
        _add_rows(table, lines, [name for name in comparison.shown() if name not in (*METRICS, *IMAGE_LEVEL)], is_best)
    return table


def _add_rows(
    table: Table, lines: Sequence["Line"], figures: Sequence[str], is_best: Callable[["Line", str], bool]
) -> None:
    for figure in figures:
        cells = []
        for line in lines:
            absent = "" if line.published else "–"
            text = f"{line.figures[figure]:.{3 if line.published else 4}f}" if figure in line.figures else absent
            cells.append(Text(text, style="bold not dim" if is_best(line, figure) else ""))
        table.add_row(f"{figure_name(figure)} {arrow(figure)}", *cells)


def _add_counts(table: Table, lines: Sequence["Line"], what: str, count: Callable[["Line"], int]) -> None:
    cells = ("" if line.published else f"{count(line):,}" for line in lines)
    table.add_row(Text(what, style="dim"), *cells)


def _format_of(out: Path | None) -> str:
    """The format of a file by its ending. Raises `UsageError` for an unknown one."""
    if out is None:
        return "table"
    if out.suffix.lower() not in _ENDINGS:
        raise UsageError(f"--out {out} has no known extension: use {', '.join(_ENDINGS)}, or give --format as well.")
    return _ENDINGS[out.suffix.lower()]


def _check_files(asked_for: Mapping[str, Path]) -> None:
    """Check that each file can be written, and that none would overwrite another one, an image or a run's files."""
    from dsu.data.images import IMAGE_SUFFIXES
    from dsu.data.pairing import PREDICTIONS_FILE
    from dsu.heads.head_file import HEAD_FILE

    options_of: dict[str, str] = {}
    for option, path in asked_for.items():
        options.file_to_write(option, path)
        other = options_of.setdefault(os.path.realpath(path), option)
        if other != option:
            raise UsageError(f"{other} and {option} both name {path}: give each its own file.")
        belongs = path.name == PREDICTIONS_FILE or (path.parent / HEAD_FILE).exists()
        if path.exists() and (belongs or path.suffix.lower() in IMAGE_SUFFIXES):
            kept = "a file of a run" if belongs else "an image"
            raise UsageError(f"{option} {path} would overwrite {kept}: give another name.")


def _write_files(
    asked_for: Mapping[str, Path],
    table: str,
    evaluated: Sequence[_RunEvaluation],
    metrics: Sequence[str] | None,
    progress: Progress,
) -> None:
    """Write the files asked for, by option (`table` for --out), and those next to predictions of dsu; name each."""
    from dsu.files import atomic_write, make_folder
    from dsu.report.page import write_report
    from dsu.report.tables import as_csv, as_json, as_per_image

    results = {one.run: one.shown for one in evaluated}
    texts: dict[str, Callable[[], str]] = {
        "--out": lambda: table,
        "--json": lambda: as_json(results, metrics=metrics),
        "--csv": lambda: as_csv(results, metrics=metrics),
        "--per-image": lambda: as_per_image(results),
    }
    files = [(path, texts[option]()) for option, path in asked_for.items() if option in texts]
    for path, text in (*files, *(file for one in evaluated for file in one.files())):
        named = f"Written: {_named(path)}"
        make_folder(path.parent)
        atomic_write(path, text.encode())
        progress.say(named)
    if (report := asked_for.get("--report")) is not None:
        named = f"Written: {_named(report)}"
        write_report(
            report, results, {one.run: one.thresholds for one in evaluated if one.thresholds}, progress=progress
        )
        progress.say(named)


def _named(path: Path) -> str:
    """The name for people of a file that is about to be written."""
    return str(path) if path.parent.is_dir() else f"{path} (the folder {path.parent} is new)"


def _name_lost(one: "EvaluationSet", folder: Path) -> None:
    """Name what can't be evaluated: predictions or ground truths without the other, and changed images."""
    from dsu.evaluation.ground_truth import predict_again

    kinds = (
        ("has no prediction", one.missing),
        ("has no ground truth", one.extra),
        (f"has changed since it was predicted (run {predict_again(folder)})", one.changed),
    )
    for kind, lost in kinds:
        for name in lost[:SHOWN]:
            fail(f"{one.name}: {name} {kind}.")
        if len(lost) > SHOWN:
            fail(f"{one.name}: {len(lost) - SHOWN:,} more: each {kind}.")
