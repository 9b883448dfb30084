"""`dsu predict`: masks for benchmarks, folders and files."""

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dsu.distributed import connect
from dsu.errors import UsageError
from dsu.settings import EncoderWeights, PredictionSettings, RuntimeSettings
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, fail, out as console, say

if TYPE_CHECKING:
    from dsu.prediction.writing import Outcome


@options.with_settings(PredictionSettings, RuntimeSettings)
def predict(
    given: Mapping[str, Any],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE", help="Benchmarks, folders or image files; - reads an image.", show_default=False
        ),
    ] = None,
    head: Annotated[
        Path | None,
        typer.Option(
            "--head",
            metavar="PATH|OWNER/NAME",
            help="A run folder, an exported folder or model.onnx, head.safetensors, or a head on the hub (default: the "
            "newest run).",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a head on the hub.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Where masks go: a folder, or for one image a .png or - for standard output (default: predictions/, "
            "overlays/ or cutouts/ in the run folder; for an exported model, next to it).",
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--table", help="Also write the verdicts here, as .csv or .json (an output folder always gets them)."
        ),
    ] = None,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Predict from the images even if features are stored.")
    ] = False,
    data_root: options.DataRoot = Path("data"),
    cache_root: options.CacheRoot = Path("features"),
    images: options.Images = None,
    masks: options.Masks = None,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    quiet: options.Quiet = False,
) -> None:
    """Predict 8-bit masks at the images' own sizes, and a table of which images contain an object.

    Without a SOURCE: the test images of the head's data set, or its held-out images. No ground truth is needed.
    """
    from dsu.data.datasets import Paths, check_places
    from dsu.files import atomic_write, make_folder
    from dsu.heads.head_file import resolve_head
    from dsu.hub import is_hub_name
    from dsu.prediction.verdicts import table_text
    from dsu.settings_file import read_settings

    settings, runtime = read_settings(PredictionSettings, given), read_settings(RuntimeSettings, given)
    if table is not None and table.suffix.lower() not in (".csv", ".json"):
        raise UsageError(f"--table {table} has no known format: give a name that ends in .csv or .json.")
    options.file_to_write("--table", table)
    check_places(sources or [], out, overwrite=settings.overwrite)  # before torch, which takes seconds to load
    if head is None or not is_hub_name(head):
        resolve_head(head, revision=revision)
    from dsu.api import predict_with

    with connect() as world, _piped(sources or [], out) as (named, place):
        outcome = predict_with(
            named,
            head,
            settings,
            runtime,
            EncoderWeights(hiera_weights, dino_weights),
            Paths(data_root, cache_root, images, masks),
            revision=revision,
            out=place,
            end_to_end=end_to_end,
            progress=ConsoleProgress(quiet=quiet),
            world=world,
        )
    if not world.is_main:
        return
    if table is not None:
        make_folder(table.parent)
        atomic_write(table, table_text(outcome.rows.values(), table.suffix.lower()).encode())
    for line in outcome.broken:
        fail(line.replace(named[0], _INPUT) if sources == ["-"] else line)
    if not quiet:
        _tell(outcome, table, piped=place != out)
    if outcome.broken:
        raise typer.Exit(1)


_INPUT: Final = "standard input"


@contextmanager
def _piped(sources: list[str], out: Path | None) -> Iterator[tuple[list[str], Path | None]]:
    """Sources and --out with each `-` replaced by a temporary file for standard input or output."""
    reads, writes = "-" in sources, out == Path("-") or (out is None and sources == ["-"])
    if not (reads or writes):
        yield sources, out
        return
    if len(sources) != 1 or Path(sources[0]).is_dir():
        raise UsageError(
            f"{'--out - takes' if writes else 'With - there is'} one image: predict folders and other images "
            "separately."
        )
    if reads and sys.stdin.isatty():
        raise UsageError("Standard input is a terminal: pipe an image into it, as in `dsu predict - < a.jpg`.")
    if writes and sys.stdout.isatty():
        raise UsageError("A mask can't go to a terminal: give --out FILE.png, or pipe the output.")
    with TemporaryDirectory() as home:
        spooled = Path(home, _INPUT, _INPUT)
        if reads:
            content = sys.stdin.buffer.read()
            if not content:
                raise UsageError("Standard input is empty: give an image, as in `dsu predict - < a.jpg`.")
            spooled.parent.mkdir()
            spooled.write_bytes(content)
        mask = Path(home, "mask.png") if writes else out
        yield [str(spooled)] if reads else sources, mask
        if writes and mask is not None and mask.exists():
            sys.stdout.buffer.write(mask.read_bytes())
            sys.stdout.buffer.flush()


def _tell(outcome: "Outcome", table: Path | None, *, piped: bool) -> None:
    """How many masks were written and where, the verdicts, and the next command."""
    from dsu.heads.head_file import RUNS
    from dsu.prediction.verdicts import TABLE_FILES, summary

    tell = say if piped else console.print
    already = f", {outcome.kept:,} already existed" if outcome.kept else ""
    place = "standard output" if piped else outcome.folder
    tell(f"{outcome.written:,} written to {place}{already}, {len(outcome.broken):,} skipped")
    files = [outcome.folder / name for name in TABLE_FILES] if outcome.folder.is_dir() else []
    found = summary(outcome.rows.values())
    if found:
        where = ", ".join(map(str, [*files, *([table] if table else [])]))
        tell(found + (f": {where}" if where else ""))
    if outcome.has_truth and not piped:
        # `dsu eval` finds the newest predictions below runs/ without a name.
        known = outcome.folder in RUNS.glob("*/predictions")
        named = [] if known else ["--predictions", str(outcome.folder)]
        tell(f"Next: `{shlex.join(['dsu', 'eval', *named])}`")
