"""`dsu cache`: list, inspect, verify, copy and remove feature stores."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsu.progress import counted
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, bytes_text, fail, key_table, out, print_json, table, with_urls

if TYPE_CHECKING:
    from dsu.features.maintenance import ArrayState, Copy, StoreState, Verification
    from dsu_cache import Damage

cache = typer.Typer(
    no_args_is_help=True,
    help="List, inspect, verify, copy and remove stored features.",
    epilog="Exit status: 0 if there are no stores at all (with a message), 2 for a name without a store.",
)

_Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME|FOLDER",
        help="Data sets, splits, your own folders, or store folders (default: all).",
        show_default=False,
    ),
]


@cache.command("list")
def list_(
    cache_root: options.CacheRoot = Path("features"), json: options.Json = False, quiet: options.Quiet = False
) -> None:
    """List all stores, one per row: data set, size, completeness."""
    from dsu.features.maintenance import describe_stores

    states = describe_stores((), cache_root, ConsoleProgress(quiet=quiet))
    if json:
        print_json([state.to_json() for state in states])
    elif states:
        out.print(stores_table(states))


@cache.command()
def info(
    names: _Names = None,
    cache_root: options.CacheRoot = Path("features"),
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what a store contains: arrays, encoders, weights, images, and what is missing."""
    from dsu.features.maintenance import describe_stores

    states = describe_stores(names or (), cache_root, ConsoleProgress(quiet=quiet))
    if json:
        print_json([state.to_json() for state in states])
    else:
        for state in states:
            out.print(store_report(state))


@cache.command()
def verify(
    names: _Names = None,
    cache_root: options.CacheRoot = Path("features"),
    keep: Annotated[bool, typer.Option("--keep", help="Only report damage; mark nothing as missing.")] = False,
    workers: Annotated[int, typer.Option(help="Number of files to read in parallel.")] = 4,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Verify the checksum of every byte, and check that the images are still the ones that the features were made from.

    Damaged shards lose their commit marker: they count as missing, and the next `dsu cache-features` recomputes exactly
    these. Their data stays on disk until then. Exit status 1 if anything is damaged or changed, else 0 (also if there
    are no stores).
    """
    from dsu.features.maintenance import verify_stores

    results = verify_stores(
        names or (),
        cache_root,
        mark=not keep,
        workers=options.one_of("--workers", workers, range(1, 129)),
        progress=ConsoleProgress(quiet=quiet),
    )
    if json:
        print_json([result.to_json() for result in results])
    for result in results:
        problems, remarks = verification_lines(result)
        for line in problems:
            fail(line)
        for line in () if quiet or json else remarks:
            out.print(line, markup=False)
    if not all(result.passed for result in results):
        raise typer.Exit(1)


@cache.command()
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="A data set, a split or a store folder.")],
    cache_root: options.CacheRoot = Path("features"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask for confirmation.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Remove stores with all their features, after confirmation. Images and masks are never touched."""
    from dsu.features.maintenance import remove_stores

    def ask(doomed: "list[StoreState]") -> None:
        if not quiet:
            out.print(stores_table(doomed))
        if not yes:
            typer.confirm(f"Remove {'this store' if len(doomed) == 1 else 'these stores'}?", abort=True, err=True)

    removed = remove_stores(name, cache_root, before=ask)
    if not quiet:
        freed = bytes_text(sum(state.nbytes for state in removed))
        gone = ", ".join(with_urls(str(state.path)) for state in removed)
        out.print(f"Removed {gone}: {freed} freed.", markup=False)


@cache.command()
def push(
    *,
    names: _Names = None,
    url: Annotated[str, typer.Argument(metavar="s3://BUCKET/PATH", help="Destination; laid out like a cache root.")],
    cache_root: options.CacheRoot = Path("features"),
    quiet: options.Quiet = False,
) -> None:
    """Copy stores to S3. `--cache-root s3://BUCKET/PATH` then reads them from there.

    Run it again at any time: it copies only what is missing. Credentials and location come from AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_REGION and, for services other than Amazon's, AWS_ENDPOINT_URL.
    """
    from dsu.features.maintenance import push_stores

    _tell_copies(push_stores(names or (), cache_root, url, ConsoleProgress(quiet=quiet)), quiet=quiet)


@cache.command()
def pull(
    url: Annotated[str, typer.Argument(metavar="s3://BUCKET/PATH", help="Source.")],
    names: _Names = None,
    cache_root: options.CacheRoot = Path("features"),
    quiet: options.Quiet = False,
) -> None:
    """Copy stores from S3 to the cache root, byte for byte as they were pushed. Only what is missing is copied."""
    from dsu.features.maintenance import pull_stores

    _tell_copies(pull_stores(url, names or (), cache_root, ConsoleProgress(quiet=quiet)), quiet=quiet)


# ---- what is printed ----


def _tell_copies(copies: Sequence["Copy"], *, quiet: bool) -> None:
    for one in () if quiet else copies:
        size = f"{counted(one.shards, 'shards')}, {bytes_text(one.nbytes)}" if one.shards else "nothing was missing"
        out.print(with_urls(f"{one.source} was copied to {one.target}: {size}."), markup=False)


_SHOWN = 5
"""Maximum number of samples to list by name."""


def stores_table(states: Sequence["StoreState"]) -> Table:
    """One row per store. On a narrow terminal the arrays are wrapped first, and names only at hyphens."""
    width = max(18, out.width - 62)  # the other columns need 62 characters if the arrays are wrapped
    names = [textwrap.fill(state.split or state.path.parent.name, width) for state in states]
    rows = (
        (
            name,
            state.path.name,
            f"{state.samples:,}" if state.split else "",
            " ".join(array.name for array in state.arrays),
            bytes_text(state.nbytes),
            _state_text(state),
            f"{state.changed:%Y-%m-%d %H:%M}",
        )
        for name, state in zip(names, states, strict=True)
    )
    headings = ("split", "encoders", "samples", "arrays", "size", "state", "last change")
    shown = table(headings, {"samples", "size"}, rows)
    shown.columns[0].no_wrap = True
    # Otherwise columns that are not wrapped would be cut off on a very narrow terminal.
    shown.columns[0].min_width = max((len(line) for name in names for line in name.splitlines()), default=0)
    return shown


def store_report(state: "StoreState") -> RenderableType:
    """All facts about one store, then one row per array."""
    facts = [("store", with_urls(str(state.path))), ("state", str(_state_text(state)))]
    facts += [("damaged", reason) for reason in state.damage]
    if state.split:
        kinds = {True: " (random weights)", False: " (pretrained weights)", None: ""}
        there = "" if state.source_there else " (no longer there)"
        facts += [
            ("images", f"{state.samples:,} of {state.split}, from {state.source}{there}"),
            ("encoders", f"{state.encoders}{kinds[state.random]}"),
        ]
        facts += [(f"  {encoder}", digest) for encoder, digest in _weights(state.arrays)]
        facts += [("compressor", state.compressor or "none"), ("orphaned rows", f"{state.orphaned_rows:,}")]
    if state.orphaned_objects:
        facts.append(("orphaned objects", f"{state.orphaned_objects:,} ({bytes_text(state.orphaned_bytes)})"))
    if state.writer:
        facts.append(("written by", state.writer))
    facts += [("size", bytes_text(state.nbytes)), ("last change", f"{state.changed:%Y-%m-%d %H:%M:%S}")]
    drift = {item for array in state.arrays for item in array.drift}
    facts += [("other version", item) for item in sorted(drift)]
    return Group(key_table(facts), *([_arrays_table(state.arrays)] if state.arrays else []), "")


def _arrays_table(arrays: Sequence["ArrayState"]) -> Table:
    """One row per array; the column of missing data appears only if something is missing."""
    lacking = [_lacks(array) for array in arrays]
    headings = ("array", "per sample", "type", "views", "shards", "size", *(["lacks"] if any(lacking) else []))
    rows = (
        (
            array.name,
            "x".join(map(str, array.item_shape)),
            array.dtype,
            str(len(array.views)),
            f"{array.shards - array.missing_shards} of {array.shards}",
            bytes_text(array.nbytes),
            Text(lacks, style="yellow"),
        )[: len(headings)]
        for array, lacks in zip(arrays, lacking, strict=True)
    )
    return table(headings, {"views", "shards", "size"}, rows)


def verification_lines(result: "Verification") -> tuple[list[str], list[str]]:
    """The problems, one sentence each, ending with the fix; and the other notes."""
    if result.unopenable:
        return [result.unopenable], []
    problems = [f"{result.path}/{_finding_text(finding)}." for finding in result.findings]
    for names, what in ((result.changed, "changed"), (result.new, "new"), (result.gone, "gone")):
        if names:
            problems.append(f"{result.split}: {_named(names)} {what} since the features were made.")
    read = "features, images and masks" if result.source_there else "features"
    remarks = [f"{result.split}: {bytes_text(result.nbytes)} of {read} read."]
    if not result.source_there:
        remarks.append(f"{result.split}: its images are no longer at {result.reference}, so they were not compared.")
    if result.passed:
        return problems, [with_urls(f"{result.path} is intact."), *remarks]
    again = f"`dsu cache-features {result.reference}`"
    if result.unmarked and any(finding.commit for finding in result.findings):
        problems.append(
            f"{result.path}: nothing was marked as missing ({result.unmarked}), so {again} leaves it unchanged."
        )
    else:
        marked = f"{result.marked:,} marked as missing, their data left on disk; " if result.marked else ""
        problems.append(f"{result.path}: {marked}{again} with the same options recomputes exactly what is listed here.")
    return problems, remarks


def _finding_text(finding: "Damage") -> str:
    text = str(finding)
    if finding.shard is not None:
        text += f" (array {finding.array}, view {finding.shard.view}, shard {finding.shard.shard})"
    if finding.unreadable:
        return f"{text}: {_named(finding.unreadable)} damaged; {len(finding.samples):,} in total to recompute"
    return f"{text}: {_named(finding.samples)} lost" if finding.samples else text


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{counted(len(names), 'samples')} ({shown})"


def _state_text(state: "StoreState") -> Text:
    if state.damage:
        return Text("damaged", style="bold red")
    if state.writer:
        return Text("being written", style="yellow")
    if state.complete:
        return Text("complete", style="green")
    lacking = {name for array in state.arrays for name in array.missing_samples}
    return Text(f"{counted(len(lacking), 'samples')} incomplete" if lacking else "nothing stored", style="yellow")


def _weights(arrays: Sequence["ArrayState"]) -> list[tuple[str, str]]:
    """What made the arrays, with the first digits of the weights' digest; `--json` has all of them."""
    found = {(array.encoder, array.weights) for array in arrays if array.encoder and array.weights}
    return sorted((encoder, f"sha256 {weights[:12]}") for encoder, weights in found if encoder is not None)


def _lacks(array: "ArrayState") -> str:
    if not array.views:
        return "everything"
    if not array.missing_shards:
        return ""
    return f"{counted(array.missing_shards, 'shards')}: {_named(array.missing_samples)}"
