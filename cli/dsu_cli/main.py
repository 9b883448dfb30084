"""The `dsu` command."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Annotated, Final, NoReturn

import typer

from dsu import __version__
from dsu.distributed import World
from dsu.errors import DsuError, UsageError
from dsu_cli.bench import bench
from dsu_cli.cache import cache
from dsu_cli.cache_features import cache_features
from dsu_cli.check_equivalence import check_equivalence
from dsu_cli.console import Stopped, fail, listen, prepare_streams
from dsu_cli.datasets import datasets
from dsu_cli.demo import demo
from dsu_cli.doctor import doctor
from dsu_cli.evaluate import evaluate
from dsu_cli.export import export
from dsu_cli.heads import export_checkpoint, head, import_checkpoint
from dsu_cli.predict import predict
from dsu_cli.serve import serve
from dsu_cli.study import study
from dsu_cli.train_head import train_head
from dsu_cli.visualize import visualize

app = typer.Typer(
    name="dsu",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""
DSU-Net: DINOv2 guides SAM 2 to the salient or camouflaged object, trained from cached features.

The usual order: `dsu cache-features NAME|FOLDER`, `dsu train-head`, `dsu predict`, `dsu eval`.
Each command uses the newest result of the previous one. NAME is a benchmark (DUTS, CAMO, COD10K, ...), FOLDER your own
images and masks. No data? Try `dsu demo`. Problems? Try `dsu doctor`.
""",
    epilog="""
Exit status: 0 done, 1 something failed or was skipped (and named), 2 wrong usage, 130 stopped by Ctrl-C.

Environment: DSU_DATA benchmark folder, DSU_CACHE store folder, DSU_SCRATCH folder for S3 downloads,
DSU_SCRATCH_LIMIT its maximum size (such as 200GB), DSU_HIERA and DSU_DINO checkpoints of the encoders,
HF_HOME Hugging Face cache, HF_HUB_OFFLINE=1 no network, NO_COLOR=1 no colours.
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
During training, *data wait* is the share of time that steps wait for data (much more than 0 %: the
disk or the processor is too slow, not the GPU), and *peak* is the peak memory so far: of the GPU, or without one of
the process.
"""

_PANELS: dict[str, dict[str, typer.Typer | Callable[..., None]]] = {
    "The four steps": {
        "cache-features": cache_features,
        "train-head": train_head,
        "predict": predict,
        "eval": evaluate,
    },
    "Heads": {
        "head": head,
        "export": export,
        "serve": serve,
        "import-checkpoint": import_checkpoint,
        "export-checkpoint": export_checkpoint,
    },
    "Environment and data": {"doctor": doctor, "datasets": datasets, "cache": cache},
    "Try, measure, compare": {
        "demo": demo,
        "check-equivalence": check_equivalence,
        "bench": bench,
        "study": study,
        "visualize": visualize,
    },
}
"""Commands and command groups, in the help's order."""

for _panel, _commands in _PANELS.items():
    for _name, _command in _commands.items():
        if isinstance(_command, typer.Typer):
            app.add_typer(_command, name=_name, rich_help_panel=_panel)
        else:
            _words = _TRAINING_WORDS if _command is train_head else None
            app.command(_name, rich_help_panel=_panel, epilog=_words)(_command)


_DIVIDED: Final = ("cache-features", "train-head", "predict", "eval")
"""Commands that can run in several processes."""

_INTERRUPTED = 130
"""typer's exit status for Ctrl-C; it prints nothing."""


def run() -> None:
    """Run the command line. Errors that the user can fix become one sentence and an exit status."""
    from dsu.environment import prepare_environment

    prepare_streams()
    listen(quiet="--quiet" in sys.argv)
    prepare_environment()
    try:
        _check_working_folder()
        with _one_speaks():
            app()
    except DsuError as error:
        fail(str(error))
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except Stopped as stopped:
        _stop(str(stopped))
    except (SystemExit, KeyboardInterrupt) as left:
        if isinstance(left, SystemExit) and left.code != _INTERRUPTED:
            raise
        _stop("Stopped. Finished work is kept: run the same command again to continue.")
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:  # a bug keeps its traceback
            raise
        fail(sentence)
        sys.exit(1)


def _stop(sentence: str) -> NoReturn:
    """Exit after Ctrl-C. Threads finish what they are doing: a second Ctrl-C would abort the process in the middle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fail(sentence)
    sys.exit(_INTERRUPTED)


def _check_working_folder() -> None:
    """Raise `UsageError` if the working folder is gone, before a library fails with a less clear message."""
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError("The working folder no longer exists: change to another one.") from error


@contextmanager
def _one_speaks() -> Iterator[None]:
    """Silence all processes but the first; the first one that fails prints the reason.

    Raises `UsageError` for a command that runs in one process only.
    """
    world = World.of_environment()
    with ExitStack() as silenced:
        if not world.is_main:
            nowhere = silenced.enter_context(open(os.devnull, "w"))
            silenced.enter_context(redirect_stdout(nowhere))
            silenced.enter_context(redirect_stderr(nowhere))
        try:
            _check_divided(world)
            yield
        except (Exception, SystemExit) as error:
            done = isinstance(error, SystemExit) and not error.code
            torch = sys.modules.get("torch.distributed")
            if not (done or world.is_main or (torch is not None and torch.is_initialized())):
                time.sleep(5)  # the first fails likewise: the launcher ends this one before it says so, too
            raise


def _check_divided(world: World) -> None:
    if world.size > 1 and not set(_DIVIDED) & set(sys.argv[1:2]):
        raise UsageError(
            f"This command runs in one process, but {world.size} were started: start it without torchrun or srun; only "
            f"{', '.join(_DIVIDED[:-1])} and {_DIVIDED[-1]} support several."
        )


def _sentence(error: Exception) -> str | None:
    """The message for a library error that a user can cause; None for a bug."""
    if isinstance(error, ImportError) and "failed to map" in str(error):
        return "This process's memory limit is too low for torch: raise it (ulimit -v, or the container's)."
    if "unable to allocate shared memory" in str(error):
        return "The shared memory, /dev/shm, is full: free some, or give the container more (--shm-size)."
    from dsu_cache.files import CacheError

    if isinstance(error, CacheError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        named = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{named}: check that the path exists, is writable and has free space."
    texts = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or any(text in str(error) for text in texts):
        return (
            "The device has too little memory: lower --batch-size or --encoder-batch-size, train with "
            "--gradient-checkpointing or a lower --adapt-last, or choose a smaller --preset or input size."
        )
    return None
