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
from dsu_cli.console import ConsoleProgress, as_text, key_table, table
from dsu_cli.console import out as console

if TYPE_CHECKING:
    from dsu.study.plan import Asked, Member
    from dsu.study.telling import StudyTable

__all__ = ["study"]

study = typer.Typer(
    no_args_is_help=True,
    help="Several runs from one store that differ in one thing: one table, one picture, mean and spread.",
)

_Seeds = Annotated[int, typer.Option("-n", "--seeds", help="Runs of each, by seed.", min=1)]


def _run(
    given: Mapping[str, Any],
    asked: "Asked",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The study's folder (default: named after data and study, in studies/)."),
    ] = None,
    config: options.Config = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics", metavar="NAME,...", help="Figures to tell, such as S,MAE (an unknown name lists all)."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is done and what is to do, and stop.")] = False,
    parallel: Annotated[
        int,
        typer.Option(
            "--parallel",
            metavar="K",
            min=1,
            help="Runs side by side: one a GPU, or on a CPU each with its part of the threads.",
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

    plan = open_study(
        asked,
        settings,
        paths=Paths(data_root, cache_root),
        weights=EncoderWeights(hiera_weights, dino_weights, random_weights),
        out=out,
        progress=ConsoleProgress(quiet=quiet),
    )
    if dry_run or not quiet:
        runs, epochs = counted(len(plan.members), "runs"), counted(plan.settings.epochs, "epochs")
        facts = {
            "study": f"{plan.kind}, {runs} of {epochs}",
            "data": f"{plan.source.split}: {counted(plan.images, 'samples')}",
            "judged on": plan.judged_on,
            "folder": str(plan.folder),
        }
        console.print(key_table(facts.items()))
    progress = ConsoleProgress(quiet=quiet)
    for line in plan.lacking:
        progress.say(line)
    if dry_run:
        console.print(key_table([(member.name, _state(member)) for member in plan.members]))
        return
    from dsu.study.running import run_study
    from dsu.study.telling import default_figures, study_tables, write_record, write_study

    finished = run_study(plan, progress, lambda so_far: write_record(plan, so_far), parallel=parallel)
    figures = chosen or default_figures(finished)
    files = write_study(plan, finished, figures)
    for one in study_tables(plan.kind, finished, figures):
        console.print(as_text(_shown(one)), end="")
    progress.say(f"Written to {plan.folder}: {', '.join(files)}")
    if plan.lacking:
        raise typer.Exit(1)


def _command(*set_by_study: str) -> Callable[[Callable[..., "Asked"]], Callable[..., "Asked"]]:
    """Make a command of a function that says what is asked: with its own options, those of `_run`, and the settings."""

    def decorate(asks: Callable[..., "Asked"]) -> Callable[..., "Asked"]:
        own, (given, _, *shared) = signature(asks).parameters, signature(_run).parameters.values()

        def called(given: Mapping[str, Any], **values: Any) -> None:
            _run(given, asks(**{name: values.pop(name) for name in own}), **values)

        command = options.with_parameters(called, [given, *own.values(), *shared], asks)
        study.command()(
            options.with_settings(TrainingSettings, without=("end_to_end", "track", *set_by_study))(command)
        )
        return asks

    return decorate


@_command("fold", "val_fraction", "keep")
def folds(k: Annotated[int, typer.Option("-k", "--folds", help="Parts.", min=2)] = 5) -> "Asked":
    """Cross-validate: K runs, each judged on the part that it was not trained on; together every image once.

    Images with an object and without one are dealt out apart; copies and tiles of an image stay together. The last
    state of each run is judged, never the best: the fold that judges must not choose.
    """
    from dsu.study.plan import Asked

    return Asked("folds", k)


@_command("seed")
def seeds(n: Annotated[int, typer.Option("-n", "--seeds", help="Seeds 0 to N - 1.", min=2)] = 5) -> "Asked":
    """Train with several seeds and nothing else changed: how much of a difference is chance.

    All are judged on the test split, or without one on the same images held out. A larger N later adds runs.
    """
    from dsu.study.plan import Asked

    return Asked("seeds", n)


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
) -> "Asked":
    """Train with adapters in front of the last N of Hiera's blocks, for several N: accuracy, time, disk.

    What a run reads, and so how fast it is, depends on the levels that are stored in all the views that it draws:
    MB/image is what a step reads for an image, store GB what that is for all images in all these views.
    """
    from dsu.study.plan import Asked

    return Asked("depth", n, tuple(part.strip() for part in depths.split(",")) if depths is not None else ())


@_command("ablation")
def ablations(n: _Seeds = 1) -> "Asked":
    """Train the paper's setting (none) and its ablations A, B and C (its Tables VII and VIII).

    Those whose DINOv2 maps the store lacks are left out, and the command that stores them is named (exit status 1).
    """
    from dsu.study.plan import Asked

    return Asked("ablations", n)


def _state(member: "Member") -> str:
    """In words."""
    from dsu.study.results import epochs_of

    if member.state == "begun":
        return f"begun: {len(epochs_of(member.folder))} of {counted(member.settings.epochs, 'epochs')}"
    return "trained, to be judged" if member.state == "trained" else member.state


def _shown(found: "StudyTable") -> Table:
    """Members, then below an empty line what sums them up; numbers stay whole, whatever the width."""
    shown = table([heading.replace(" with an", "\nwith an") for heading in found.headings])
    for column in shown.columns:
        column.no_wrap = True
        column.justify = "left" if column is shown.columns[0] else "right"
    gap: list[tuple[str, ...]] = [()] if found.summaries else []
    for cells in (*found.members, *gap, *found.summaries):
        shown.add_row(*cells)
    return shown
