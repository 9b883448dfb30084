"""`dsu eval`: predictions against ground truth."""

from pathlib import Path
from typing import Annotated

import typer

from dsu_cli import options

SHOWN = 10
"""How many missing predictions are named one by one."""


def evaluate(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Sets (default: all).", show_default=False)
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="Folder of predictions (default: the newest run's).")
    ] = None,
    truth: Annotated[Path | None, typer.Option("--truth", help="Folder of masks to judge them against.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the metrics of every set here, too.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Likewise, as a table.")] = None,
    per_image: Annotated[Path | None, typer.Option("--per-image", help="Likewise, a row an image (CSV).")] = None,
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

    Writes `metrics.json` and `metrics.csv` beside the predictions.
    """
    from dsu.evaluation import evaluate, write_csv, write_json, write_per_image
    from dsu.ground_truth import find_judged_sets, newest_predictions
    from dsu_cli.console import ConsoleProgress, fail, key_table, out
    from dsu_cli.parsing import one_of
    from dsu_cli.reports import metrics_table, published_figures

    progress = ConsoleProgress(quiet=quiet)
    folder = predictions or newest_predictions()
    progress.say(f"judging {folder}")
    asked = one_of("--normalize", normalize, (None, "minmax", "none"))
    sets = find_judged_sets(
        names or [], folder, truth, data_root=data_root, minmax=None if asked is None else asked == "minmax"
    )
    results = {}
    for judged in sets:
        for kind, lost in (("has no prediction", judged.missing), ("has no ground truth", judged.extra)):
            for name in lost[:SHOWN]:
                fail(f"{judged.name}: {name} {kind}.")
            if len(lost) > SHOWN:
                fail(f"{judged.name}: {len(lost) - SHOWN:,} more: each {kind}.")
        results[judged.name] = evaluate(
            judged.cases, normalize=judged.minmax, resize=resize, workers=workers, progress=progress
        )
    for path, write in ((json, write_json), (csv, write_csv), (per_image, write_per_image)):
        if path is not None:
            write(path, results)
    if truth is None:
        write_json(folder / "metrics.json", results)
        write_csv(folder / "metrics.csv", results)
    out.print(metrics_table(results, published_figures(results)))
    if not quiet:
        out.print(key_table(list(next(iter(results.values())).conventions.items())), style="dim")
        if truth is None:
            out.print(f"Written: {folder / 'metrics.json'}, {folder / 'metrics.csv'}", markup=False)
    if any(judged.missing or judged.extra for judged in sets):
        raise typer.Exit(1)
