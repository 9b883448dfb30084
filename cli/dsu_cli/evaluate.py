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
from dsu.errors import UsageError
from dsu.metrics.figures import FIGURES, IMAGE_LEVEL, METRICS, arrow, figure_name
from dsu.thresholds import DEFAULT_THRESHOLD
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, as_text, fail, key_table, table
from dsu_cli.console import out as console

if TYPE_CHECKING:
    from dsu.evaluation.evaluate import Evaluation
    from dsu.evaluation.ground_truth import JudgedSet
    from dsu.evaluation.thresholds import Thresholds
    from dsu.report.tables import Comparison, Line, Results

_PAPERS_OWN = "DSU-Net"
SHOWN = 10
"""How many missing predictions are named one by one."""

_TELLING = "What is told"
_ENDINGS = {".md": "markdown", ".tex": "latex", ".csv": "csv", ".json": "json", ".txt": "table"}
"""What a file of --out holds where --format does not say."""


def evaluate(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Sets (default: all).", show_default=False)
    ] = None,
    predictions: Annotated[
        list[Path] | None,
        typer.Option(
            "--predictions",
            metavar="[NAME=]FOLDER",
            help="Folder of predictions, or a run's folder (default: the newest run's); several are compared.",
        ),
    ] = None,
    truth: Annotated[Path | None, typer.Option("--truth", help="Folder of masks to judge them against.")] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Folder of the images that --report shows, where they are not found."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", help="Write a page (HTML) with figures, curves and every image.", rich_help_panel=_TELLING
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="NAME,...",
            help="Figures to tell, in this order, such as S,F_adaptive,E_mean,MAE (an unknown name lists all).",
            rich_help_panel=_TELLING,
        ),
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="table, markdown, latex, csv or json (default: table, or after the ending of --out).",
            rich_help_panel=_TELLING,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write what --format gives here: .md, .tex, .csv, ...", rich_help_panel=_TELLING),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="With all the paper's rows of the sets.", rich_help_panel=_TELLING)
    ] = False,
    conventions: Annotated[
        bool,
        typer.Option("--conventions", help="Say at length what the figures rest on.", rich_help_panel=_TELLING),
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the metrics here, too.", rich_help_panel=_TELLING)
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Likewise, as a table.", rich_help_panel=_TELLING)] = None,
    per_image: Annotated[
        Path | None, typer.Option("--per-image", help="Likewise, a row an image (CSV).", rich_help_panel=_TELLING)
    ] = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="Bring predictions to the size of their truth instead of refusing.")
    ] = False,
    normalize: Annotated[
        str | None, typer.Option(help="minmax stretches each map first (default: for benchmarks), none does not.")
    ] = None,
    training_images: Annotated[
        bool, typer.Option("--all", help="Judge images that the head was trained on, too.")
    ] = False,
    foreground: Annotated[
        list[int] | None,
        typer.Option("--foreground", help="Mask value that is foreground (default: as in training), several times."),
    ] = None,
    false_alarms: Annotated[
        float,
        typer.Option(
            "--false-alarms",
            metavar="SHARE",
            help="Of images without an object, how many one of the proposed thresholds may let raise an alarm.",
            rich_help_panel=_TELLING,
        ),
    ] = 0.05,
    workers: Annotated[int | None, typer.Option(help="Processes (default: one a core).")] = None,
    data_root: options.DataRoot = Path("data"),
    quiet: options.Quiet = False,
) -> None:
    """Judge predictions: S, F, E, MAE, IoU and Dice, beside the paper's figures.

    Where some images have no object, also false alarms, misses, AUROC, and the metrics over the images with one.
    Several runs stand side by side: `--predictions Ours=A --predictions B`. Where `dsu predict` has also predicted the
    validation share, thresholds are proposed from it and judged on the rest; `dsu head threshold` stores one. Writes
    `metrics.json`, `metrics.csv` and `thresholds.json` beside the predictions of dsu.
    """
    from dsu.data.datasets import Paths

    progress = ConsoleProgress(quiet=quiet)
    form = options.one_of("--format", format_ or _format_of(out), ("table", *get_args(ReportFormat)))
    chosen = options.names_of("--metrics", metrics, FIGURES)
    asked = options.one_of("--normalize", normalize, (None, "minmax", "none"))
    if not 0 <= false_alarms <= 1:
        raise UsageError(f"--false-alarms can't be {false_alarms:g}: give a share from 0 to 1, such as 0.05.")
    from dsu.report.page import check_report_path, write_report
    from dsu.report.tables import FORMATS, as_csv, as_json, as_per_image

    if report is not None:
        check_report_path(report)
    asked_for = {"--report": report, "--out": out, "--json": json, "--csv": csv, "--per-image": per_image}
    _check_files({option: path for option, path in asked_for.items() if path is not None})
    from dsu.evaluation.ground_truth import JudgedSet, find_judged_sets, named_predictions

    runs = named_predictions(predictions or [])
    named = any("=" in text and not Path(text).exists() for text in map(str, predictions or []))
    find = partial(
        find_judged_sets,
        names or [],
        truth=truth,
        paths=Paths(data_root),
        minmax=None if asked is None else asked == "minmax",
        images=images,
        training_images=training_images,
        # Beside one folder of masks, several folders of maps are one set, though each is called otherwise.
        called=truth.resolve().name if truth is not None and len(runs) > 1 else "",
        validation=True,
        beside=runs.values(),
    )
    judge = partial(JudgedSet.evaluate, resize=resize, foreground=foreground, workers=workers, progress=progress)
    judged: dict[str, _Judged] = {}
    for run, folder in runs.items():
        progress.say(f"judging {folder}")
        judged[run] = _Judged(run, folder, _judge(find(folder), folder, judge), bool(names), truth is None)
        judged[run].find_thresholds(false_alarms)
        for line in judged[run].left_out():
            progress.say(line)
    results = {run: one.shown for run, one in judged.items()}
    proposed = {run: one.thresholds for run, one in judged.items() if one.thresholds is not None}

    beside = published or len(runs) > 1 or named
    paper = published or (len(runs) == 1 and named)
    shown = _tables(results, chosen, beside=beside, published=paper, conventions=conventions, quiet=quiet)
    if chosen is None:
        lines = [line for one in judged.values() for line in one.at_own_threshold]
        tables = [part for run, one in proposed.items() for part in _thresholds(run, one, len(runs) > 1)]
        shown = Group(shown, *lines, *tables)
    told = ""
    if form != "table":
        told = FORMATS[form](results, with_paper=published, metrics=chosen, conventions=conventions)
    texts = [
        (out, told or as_text(shown)),
        (json, as_json(results, metrics=chosen)),
        (csv, as_csv(results, metrics=chosen)),
        (per_image, as_per_image(results)),
        *(file for one in judged.values() for file in one.files()),
    ]
    written = [_write(path, text) for path, text in texts if path is not None]
    if report is not None:
        written.append(_named(report))
        write_report(report, results, proposed, progress=progress)
    if told and out is None:
        typer.echo(told, nl=False)
    else:
        console.print(shown)
    for name in written:
        progress.say(f"Written: {name}")
    every = [one for run in judged.values() for one, _ in run.found.values()]
    if any(one.missing or one.extra or one.changed for one in every):
        raise typer.Exit(1)


def _judge(
    sets: "Sequence[JudgedSet]", folder: Path, evaluate: "Callable[[JudgedSet], Evaluation]"
) -> "dict[str, tuple[JudgedSet, Evaluation]]":
    """Every set of a folder with its evaluation, by name; what it has no prediction or no truth for is named first."""
    found = {}
    for one in sets:
        _name_lost(one, folder)
        found[one.name] = one, evaluate(one)
    return found


@dataclass
class _Judged:
    """One run: its sets, and what is told and kept of them.

    Attributes:
        run, folder: what it is called, and where its predictions are.
        found: all sets, by name.
        named: whether the user named the sets.
        own_data: whether they are judged against the data sets' own masks.
        thresholds: that were proposed.
        at_own_threshold: without those, what the run's own one does.
    """

    run: str
    folder: Path
    found: "dict[str, tuple[JudgedSet, Evaluation]]"
    named: bool
    own_data: bool
    thresholds: "Thresholds | None" = None
    at_own_threshold: Sequence[str] = ()

    @property
    def shown(self) -> "dict[str, Evaluation]":
        """Those that are told: beside fair sets, the one that thresholds are chosen by is there for these alone."""
        fair = [name for name, (one, _) in self.found.items() if not one.is_validation]
        return {name: self.found[name][1] for name in (self.named and self.found) or fair or self.found}

    def find_thresholds(self, false_alarms: float) -> None:
        """Propose thresholds from the validation share, or judge the run's own."""
        from dsu.evaluation.thresholds import find_thresholds
        from dsu.prediction.verdicts import threshold_of

        if self.own_data:
            self.thresholds = find_thresholds(self.found, self.folder, false_alarms)
        if self.thresholds is None:
            self.at_own_threshold = _at_own_threshold(self.run, threshold_of(self.folder), self.found)

    def left_out(self) -> list[str]:
        """Say which predictions were not judged, and why."""
        from dsu.evaluation.ground_truth import not_recorded, unjudged

        untrue = unjudged(self.folder) if self.own_data and not self.named else []
        others = not_recorded(self.folder) if self.own_data else []
        kinds = (("have no ground truth", untrue), ("are not of the head that made the others", others))
        return [f"left out, as they {why}: {', '.join(names)}" for why, names in kinds if names]

    def files(self) -> list[tuple[Path, str]]:
        """What is kept beside predictions of dsu; another method's folder is left as it is."""
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
    results: "Results", metrics: Sequence[str] | None, *, beside: bool, published: bool, conventions: bool, quiet: bool
) -> RenderableType:
    """The table or tables of a person, with how maps were normalised above, and all conventions below if asked for.

    `beside` has a column a run, called as the run is, and with `published` the paper's.
    """
    from dsu.report.tables import conventions_of, in_short

    parts: list[RenderableType] = [] if quiet else [Text(in_short(results), style="dim")]
    if beside:
        parts.append(_comparison_tables(results, with_paper=published, metrics=metrics))
    else:
        parts += [_metrics_table(sets, metrics) for sets in results.values()]
    if conventions:
        parts.append(Styled(key_table(conventions_of(results).items()), "dim"))
    return Group(*parts)


def _at_own_threshold(run: str, threshold: float, found: Mapping[str, tuple["JudgedSet", "Evaluation"]]) -> list[str]:
    """What the threshold that verdicts went by does to each set, where it is not the one that figures go by."""
    from dsu.metrics.thresholds import judge_threshold

    said = []
    for name, (judged, one) in found.items():
        if threshold != DEFAULT_THRESHOLD and not judged.predicted_otherwise:
            at, level = judge_threshold(threshold, one.image_level, one.levels), one.image_level
            found_of = f"{at.found} of {level.with_object} images with an object found"
            false = f"{at.false_alarms} false alarms on {level.without_object} without"
            whose = run if run == name else f"{run}, {name}"
            said.append(f"{whose}, at the head's threshold {threshold:g}: {found_of}, {false}, Dice {at.dice:.3f}.")
    return said


def _thresholds(run: str, found: "Thresholds", several: bool) -> list[RenderableType]:
    """A row a proposed threshold: what it does to the validation share and to the sets that it was not chosen by."""
    headings, *rows = found.table
    whose = f" for {run}" if several else ""
    parts: list[RenderableType] = ["", Text(f"Thresholds{whose}, {found.heading}"), table(headings, rows=rows)]
    if found.remark:
        parts.append(Text(found.remark, style="dim"))
    if found.bins:
        parts += ["", Text(f"Images of {found.validation} by response, and how many of them have an object")]
        parts.append(key_table(found.bins, style=""))
    return [*parts, Text("Store one with the head: `dsu head threshold VALUE`.", style="dim")]


def _metrics_table(sets: Mapping[str, "Evaluation"], metrics: Sequence[str] | None = None) -> RenderableType:
    """One row a figure, one column a set, beside it the paper's figures of DSU-Net where there are any."""
    from dsu.report.tables import Comparison, compare

    columns: list[tuple[str, Line]] = []
    notes: list[str] = []
    for name, found in sets.items():
        [comparison] = compare({name: {name: found}})
        *paper, own = comparison.lines
        columns += [(name, own), *(("paper", line) for line in paper if line.label == _PAPERS_OWN)]
        notes += own.notes(comparison.shown(metrics))
    together = Comparison("", tuple(line for _, line in columns))
    # Of several sets no figure is the best.
    table = _figures(together, columns, metrics, lambda line, figure: False)
    return Group(table, *(Text(note, style="dim") for note in notes))


def _comparison_tables(results: "Results", *, with_paper: bool, metrics: Sequence[str] | None = None) -> RenderableType:
    """A table a set: a row a figure, a column a run or published method, the best of each row bold."""
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
    """The figures asked for; else all metrics and, in parts of their own, what images without an object call for."""

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
    """What a file of that name holds. Raises `UsageError` for an ending that says nothing."""

    if out is None:
        return "table"
    if out.suffix.lower() not in _ENDINGS:
        raise UsageError(
            f"--out {out} doesn't say what to write: end it in {', '.join(_ENDINGS)}, or give --format as well."
        )
    return _ENDINGS[out.suffix.lower()]


def _check_files(asked_for: Mapping[str, Path]) -> None:
    """Check that each file can be written, and that none is written over another or over what is no evaluation."""
    from dsu.data.images import IMAGE_SUFFIXES
    from dsu.heads.head_file import HEAD_FILE
    from dsu.prediction.targets import RECORD_FILE

    options_of: dict[str, str] = {}
    for option, path in asked_for.items():
        options.file_to_write(option, path)
        other = options_of.setdefault(os.path.realpath(path), option)
        if other != option:
            raise UsageError(f"{other} and {option} both name {path}: give each a file of its own.")
        belongs = path.name == RECORD_FILE or (path.parent / HEAD_FILE).exists()
        if path.exists() and (belongs or path.suffix.lower() in IMAGE_SUFFIXES):
            kept = "what a run keeps" if belongs else "a picture"
            raise UsageError(f"{option} {path} would be written over {kept}: give another name.")


def _write(path: Path, text: str) -> str:
    """Write a file, in a folder that is made for it if need be; what to call it."""
    from dsu.files import atomic_write, make_folder

    named = _named(path)
    make_folder(path.parent)
    atomic_write(path, text.encode())
    return named


def _named(path: Path) -> str:
    """What to call a file that is about to be written."""
    return str(path) if path.parent.is_dir() else f"{path} (the folder {path.parent} is new)"


def _name_lost(judged: "JudgedSet", folder: Path) -> None:
    """Name what a set has no prediction or no ground truth for."""
    from dsu.evaluation.ground_truth import predict_again

    kinds = (
        ("has no prediction", judged.missing),
        ("has no ground truth", judged.extra),
        (f"is another image than was predicted (run {predict_again(folder)})", judged.changed),
    )
    for kind, lost in kinds:
        for name in lost[:SHOWN]:
            fail(f"{judged.name}: {name} {kind}.")
        if len(lost) > SHOWN:
            fail(f"{judged.name}: {len(lost) - SHOWN:,} more: each {kind}.")
