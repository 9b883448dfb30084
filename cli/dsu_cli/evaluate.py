"""`dsu eval`: predictions against ground truth."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsu_cli import options

if TYPE_CHECKING:
    from dsu.ground_truth import JudgedSet

SHOWN = 10
"""How many missing predictions are named one by one."""

_TELLING = "What is told"


def evaluate(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Sets (default: all).", show_default=False)
    ] = None,
    predictions: Annotated[
        list[Path] | None,
        typer.Option(
            "--predictions",
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
    format_: Annotated[
        str, typer.Option("--format", help="table, markdown, latex, csv or json.", rich_help_panel=_TELLING)
    ] = "table",
    published: Annotated[
        bool, typer.Option("--published", help="With all the paper's rows of the sets.", rich_help_panel=_TELLING)
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
        str | None, typer.Option(help="minmax stretches each map first (default: as predicted), none does not.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes (default: one a core).")] = None,
    data_root: options.DataRoot = Path("data"),
    quiet: options.Quiet = False,
) -> None:
    """Judge predictions: S, F, E, MAE, IoU and Dice, beside the paper's figures.

    Several runs stand side by side: `--predictions A --predictions B`. Writes `metrics.json` and `metrics.csv` beside
    the predictions.
    """
    from dsu.evaluation import Evaluation
    from dsu.evaluation import evaluate as judge
    from dsu.files import make_folder, write_durably
    from dsu.ground_truth import find_judged_sets, name_runs, newest_predictions
    from dsu.report import FORMATS, as_csv, as_json, as_per_image, compare, write_report
    from dsu.report.page import check_report_path
    from dsu_cli.console import ConsoleProgress, key_table, out
    from dsu_cli.parsing import one_of
    from dsu_cli.reports import comparison_tables, metrics_table, published_figures

    progress = ConsoleProgress(quiet=quiet)
    form = one_of("--format", format_, ("table", *FORMATS))
    asked = one_of("--normalize", normalize, (None, "minmax", "none"))
    if report is not None:
        check_report_path(report)
    runs = name_runs(predictions or [newest_predictions()])
    # Beside one folder of masks, several folders of maps are one set, though each is called otherwise.
    wanted = names or ([truth.resolve().name] if truth is not None and len(runs) > 1 else [])
    results: dict[str, dict[str, Evaluation]] = {}
    complete = True
    for run, folder in runs.items():
        progress.say(f"judging {folder}")
        results[run] = {}
        minmax = None if asked is None else asked == "minmax"
        for judged in find_judged_sets(wanted, folder, truth, data_root=data_root, minmax=minmax, images=images):
            complete &= _name_lost(judged)
            results[run][judged.name] = judge(
                judged.cases, normalize=judged.minmax, resize=resize, workers=workers, progress=progress
            )
    written = [(json, as_json(results)), (csv, as_csv(results)), (per_image, as_per_image(results))]
    if truth is None:
        for run, folder in runs.items():
            alone = {run: results[run]}
            written += [(folder / "metrics.json", as_json(alone)), (folder / "metrics.csv", as_csv(alone))]
    for path, text in written:
        if path is not None:
            make_folder(path.parent)
            write_durably(path, text.encode())
    if report is not None:
        write_report(report, results, progress=progress)
    if form != "table":
        typer.echo(FORMATS[form](results, with_paper=published), nl=False)
    elif published or len(runs) > 1:
        out.print(comparison_tables(results, with_paper=published))
    else:
        [sets] = results.values()
        out.print(metrics_table(sets, published_figures(sets)))
        for comparison in compare(results):
            for line in comparison.incomparable:
                progress.say(f"{comparison.name}: not comparable with the paper, {line.remark}.")
    if not quiet:
        if form == "table":
            found = next(iter(next(iter(results.values())).values()))
            out.print(key_table(list(found.conventions.items())), style="dim")
        for path in (*(path for path, _ in written), report):
            if path is not None:
                progress.say(f"Written: {path}")
    if not complete:
        raise typer.Exit(1)


def _name_lost(judged: "JudgedSet") -> bool:
    """Name what a set has no prediction or no ground truth for; whether there is nothing of the kind."""
    from dsu_cli.console import fail

    for kind, lost in (("has no prediction", judged.missing), ("has no ground truth", judged.extra)):
        for name in lost[:SHOWN]:
            fail(f"{judged.name}: {name} {kind}.")
        if len(lost) > SHOWN:
            fail(f"{judged.name}: {len(lost) - SHOWN:,} more: each {kind}.")
    return not (judged.missing or judged.extra)
