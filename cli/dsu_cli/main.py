"""The `dsu` command."""

import sys
from typing import Annotated

import typer

from dsu import __version__
from dsu_cli.bench import bench
from dsu_cli.cache import cache
from dsu_cli.cache_features import cache_features
from dsu_cli.check_equivalence import check_equivalence
from dsu_cli.checkpoints import export_checkpoint, import_checkpoint
from dsu_cli.datasets_command import datasets
from dsu_cli.demo import demo
from dsu_cli.doctor import doctor
from dsu_cli.evaluate import evaluate
from dsu_cli.head import head
from dsu_cli.predict import predict
from dsu_cli.study import study
from dsu_cli.train_head import train_head
from dsu_cli.visualize import visualize

__all__ = ["app", "run"]

app = typer.Typer(
    name="dsu",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""
DSU-Net: DINOv2 guides SAM 2 to the salient or camouflaged object, trained from cached features.

The usual order: `dsu cache-features NAME|FOLDER`, `dsu train-head`, `dsu predict`, `dsu eval`.
Each goes on with what the last one left. NAME is a benchmark (DUTS, CAMO, COD10K, ...), FOLDER your own images
and masks. No data at hand? `dsu demo`. Does it work here? `dsu doctor`.
""",
    epilog="""
Exit status: 0 done, 1 something failed or was skipped (and named), 2 wrong usage, 130 stopped by Ctrl-C.

Environment: DSU_DATA the folder of the benchmarks, DSU_CACHE of the stores, DSU_HIERA and DSU_DINO checkpoints of the
encoders, HF_HOME the Hugging Face cache, HF_HUB_OFFLINE=1 no network, NO_COLOR=1 no colours.
""",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dsu {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


_TRAINING_WORDS = """
While it trains, *data wait* is the share of the time in which steps wait for data to be read (much more than 0 %: the
disk or the processor is too slow, not the GPU), and *peak* the most memory held so far: on the GPU, or without one by
the process.
"""

_STEPS = "The four steps"
_HEADS = "Heads"
_LOOK = "What is here"
_TRY = "Trying, measuring, showing"

app.command("cache-features", rich_help_panel=_STEPS)(cache_features)
app.command("train-head", rich_help_panel=_STEPS, epilog=_TRAINING_WORDS)(train_head)
app.command("predict", rich_help_panel=_STEPS)(predict)
app.command("eval", rich_help_panel=_STEPS)(evaluate)
app.add_typer(head, name="head", rich_help_panel=_HEADS)
app.command("import-checkpoint", rich_help_panel=_HEADS)(import_checkpoint)
app.command("export-checkpoint", rich_help_panel=_HEADS)(export_checkpoint)
app.command("doctor", rich_help_panel=_LOOK)(doctor)
app.add_typer(datasets, name="datasets", rich_help_panel=_LOOK)
app.add_typer(cache, name="cache", rich_help_panel=_LOOK)
app.command("demo", rich_help_panel=_TRY)(demo)
app.command("check-equivalence", rich_help_panel=_TRY)(check_equivalence)
app.command("bench", rich_help_panel=_TRY)(bench)
app.add_typer(study, name="study", rich_help_panel=_TRY)
app.add_typer(visualize, name="visualize", rich_help_panel=_TRY)


_INTERRUPTED = 130
"""Status with which typer answers Ctrl-C, without a word."""


def run() -> None:
    """Run the command line; failures that the user can mend become one sentence and an exit status."""
    from dsu.environment import prepare_environment
    from dsu.errors import DsuError, UsageError
    from dsu_cli.console import Stopped, fail, listen

    listen(quiet="--quiet" in sys.argv)
    prepare_environment()
    try:
        app()
    except UsageError as error:
        fail(str(error))
        sys.exit(2)
    except DsuError as error:
        fail(str(error))
        sys.exit(1)
    except Stopped as stopped:
        fail(str(stopped))
        sys.exit(_INTERRUPTED)
    except SystemExit as left:
        if left.code == _INTERRUPTED:
            fail("Stopped. What was finished stays finished: run the same command again to go on.")
        raise
    except Exception as error:
        _fail_known(error)


def _fail_known(error: Exception) -> None:
    """Failures of libraries that a user can cause; anything else is a defect and keeps its traceback."""
    from dsu_cache.errors import CacheError
    from dsu_cli.console import fail

    if isinstance(error, CacheError):
        fail(str(error))
        sys.exit(1)
    if isinstance(error, OSError) and error.strerror:
        named = f" ({error.filename})" if error.filename else ""
        fail(f"{error.strerror}{named}: check that the path exists, may be written and has space left.")
        sys.exit(1)
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error):
        fail(
            "The device has too little memory: lower --batch-size or --encoder-batch-size, or choose a smaller "
            "--preset or input size."
        )
        sys.exit(1)
    raise error
