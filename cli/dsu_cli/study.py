"""`dsu study`: several runs from one store that differ in one thing."""

from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dsu.metrics.figures import FIGURES
from dsu.progress import counted
from dsu.settings import MACHINE, EncoderWeights, TrainingSettings
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, as_text, key_table, out as console, table

if TYPE_CHECKING:
    from dsu.study.plan import Member, StudyRequest
    from dsu.study.reporting import StudyTable

study = typer.Typer(
    no_args_is_help=True,
    help="Train several runs from one store that differ in one thing; compare them in one table and one plot.",
)

_Seeds = Annotated[int, typer.Option("-n", "--seeds", help="Number of seeds for each case.", min=1)]


def _run(
    given: Mapping[str, Any],
    request: "StudyRequest",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The study's folder (default: named after data and study, in studies/)."),
    ] = None,
    config: options.Config = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics", metavar="NAME,...", help="Metrics to show, such as S,MAE (an unknown name lists all)."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what is done and what remains, then stop.")] = False,
    parallel: Annotated[
        int,
        typer.Option(
            "--parallel",
            metavar="K",
            min=1,
            help="Number of runs at once: each on its own GPU, or on a CPU with its part of the threads.",
            rich_help_panel=MACHINE,
        ),
    ] = 1,
    data_root: options.DataRoot = Path("data"),
    cache_root: options.CacheRoot = Path("features"),
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    random_weights: options.RandomWeights = False,
    quiet: options.Quiet = False,
) -> None:
    from dsu.data.datasets import Paths
    from dsu.settings_file import read_settings

    chosen = options.names_of("--metrics", metrics, FIGURES)
    settings = read_settings(TrainingSettings, given, config)
    from dsu.study.plan import open_study

    progress = ConsoleProgress(quiet=quiet)
    plan = open_study(
        request,
        settings,
        paths=Paths(data_root, cache_root),
        weights=EncoderWeights(hiera_weights, dino_weights, random_weights),
        out=out,
        progress=progress,
    )
    if dry_run or not quiet:
        runs, epochs = counted(len(plan.members), "runs"), counted(plan.settings.epochs, "epochs")
        facts = {
            "study": f"{plan.kind}, {runs} of {epochs}",
            "data": f"{plan.source.split}: {counted(plan.images, 'samples')}",
            "evaluated on": plan.evaluated_on,
            "folder": str(plan.folder),
        }
        console.print(key_table(facts.items()))
    for line in plan.left_out:
        progress.say(line)
    if dry_run:
        console.print(key_table([(member.name, _state(member)) for member in plan.members]))
        return
    from dsu.study.reporting import default_figures, study_tables, write_record, write_study
    from dsu.study.running import run_study

    finished = run_study(plan, progress, lambda so_far: write_record(plan, so_far), parallel=parallel)
    figures = chosen or default_figures(finished)
    files = write_study(plan, finished, figures)
    for one in study_tables(plan.kind, finished, figures):
        console.print(as_text(_shown(one)), end="")
    progress.say(f"Written to {plan.folder}: {', '.join(files)}")
    if plan.left_out:
        raise typer.Exit(1)


def _command(*set_by_study: str) -> Callable[[Callable[..., "StudyRequest"]], Callable[..., "StudyRequest"]]:
    """Turn a function into a command with its own options, those of `_run`, and the settings."""

    def decorate(request_of: Callable[..., "StudyRequest"]) -> Callable[..., "StudyRequest"]:
        own, (given, _, *shared) = signature(request_of).parameters, signature(_run).parameters.values()

        def called(given: Mapping[str, Any], **values: Any) -> None:
            _run(given, request_of(**{name: values.pop(name) for name in own}), **values)

        command = options.with_parameters(called, [given, *own.values(), *shared], request_of)
        study.command()(
            options.with_settings(TrainingSettings, without=("end_to_end", "track", *set_by_study))(command)
        )
        return request_of

    return decorate


@_command("fold", "val_fraction", "keep")
def folds(k: Annotated[int, typer.Option("-k", "--folds", help="Number of folds.", min=2)] = 5) -> "StudyRequest":
    """Cross-validation: K runs, each evaluated on the fold that it was not trained on; together, every image once.

    Folds are stratified by images with and without an object; copies and tiles of an image stay together. Each run's
    last weights are evaluated, never the best: the held-out fold must not select them.
    """
    from dsu.study.plan import StudyRequest

    return StudyRequest("folds", k)


@_command("seed")
def seeds(
    n: Annotated[int, typer.Option("-n", "--seeds", help="Number of seeds, from 0 to N - 1.", min=2)] = 5,
) -> "StudyRequest":
    """Train with several seeds and nothing else changed, to see how much of a difference is chance.

    All runs are evaluated on the test split, or without one on the same held-out images. A larger N later adds runs.
    """
    from dsu.study.plan import StudyRequest

    return StudyRequest("seeds", n)


@_command("adapt_last")
def depth(
    depths: Annotated[
        str | None,
        typer.Option(
            "--depths",
            metavar="N,...",
            help="Numbers of adapted blocks, or all (default: none, the last Hiera stage, a quarter, a half, all).",
        ),
    ] = None,
    n: _Seeds = 1,
) -> "StudyRequest":
    """Train with adapters in front of Hiera's last N blocks, for several N: accuracy, time, disk.

    What a run reads, and so its speed, depends on the levels that are stored in all the views it draws. MB/image is the
    data that a step reads per image; store GB is the total for all images in all these views.
    """
    from dsu.study.plan import StudyRequest

    return StudyRequest("depth", n, tuple(part.strip() for part in depths.split(",")) if depths is not None else ())


@_command("ablation")
def ablations(n: _Seeds = 1) -> "StudyRequest":
    """Train the paper's setting (none) and its ablations A, B and C (its Tables VII and VIII).

    If the store lacks DINOv2 maps for an ablation, it is skipped and the command that stores them is printed (exit
    status 1).
    """
    from dsu.study.plan import StudyRequest

    return StudyRequest("ablations", n)


def _state(member: "Member") -> str:
    """The member's state in words."""
    from dsu.study.results import epochs_of

    if member.state == "begun":
        return f"started: {len(epochs_of(member.folder))} of {counted(member.settings.epochs, 'epochs')}"
    return "trained, not evaluated yet" if member.state == "trained" else member.state


def _shown(found: "StudyTable") -> Table:
    """Members, an empty line, then the summary rows; numbers are never broken, whatever the width."""
    shown = table([heading.replace(" with an", "\nwith an") for heading in found.headings])
    for column in shown.columns:
        column.no_wrap = True
        column.justify = "left" if column is shown.columns[0] else "right"
    gap: list[tuple[str, ...]] = [()] if found.summaries else []
    for cells in (*found.members, *gap, *found.summaries):
        shown.add_row(*cells)
    return shown
