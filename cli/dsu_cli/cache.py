"""`dsu cache`: what is stored, whether it is whole, and how to be rid of it."""

from pathlib import Path
from typing import Annotated

import typer

from dsu_cli import options
from dsu_cli.console import ConsoleProgress, bytes_text, fail, out

__all__ = ["cache"]

cache = typer.Typer(
    no_args_is_help=True,
    help="Look after stored features: what there is, whether it is whole.",
    epilog="Exit status: 0 also where there are no stores at all, which is said; 2 for a name that has none.",
)

_NAMES = "Data sets, splits, own folders or stores' folders"
_Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME|FOLDER...]", help=f"{_NAMES} (default: all).", show_default=False)
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@cache.command("list")
def list_(cache_root: options.CacheRoot = Path("features"), json: _Json = False, quiet: options.Quiet = False) -> None:
    """All stores, one a row: what they are of, their size, whether they are complete."""
    from dsu.features.upkeep import describe_stores
    from dsu_cli.cache_reports import print_json, stores_table

    states = describe_stores((), cache_root, ConsoleProgress(quiet=quiet))
    if json:
        print_json([state.to_json() for state in states])
    elif states:
        out.print(stores_table(states))


@cache.command()
def info(
    names: _Names = None,
    cache_root: options.CacheRoot = Path("features"),
    json: _Json = False,
    quiet: options.Quiet = False,
) -> None:
    """What a store holds, of which encoders, weights and images, and what it lacks."""
    from dsu.features.upkeep import describe_stores
    from dsu_cli.cache_reports import print_json, store_report

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
    keep: Annotated[bool, typer.Option("--keep", help="Only say what is damaged; mark nothing as missing.")] = False,
    workers: Annotated[int, typer.Option(help="Files read at a time.")] = 4,
    json: _Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Read every byte and compare it with its checksum, and the images with those that the features are of.

    Shards that are damaged lose their marker, so that they count as missing and the next `dsu cache-features` computes
    exactly these; their data is left where it is until then. Exit status 1 if anything is not as it was written, 0 if
    all is, or there are no stores.
    """
    from dsu.features.upkeep import verify_stores
    from dsu_cli.cache_reports import print_json, verification_lines

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
    name: Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="A data set, a split or a store's folder.")],
    cache_root: options.CacheRoot = Path("features"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Remove stores with all their features, after asking. Images and masks are never touched."""
    from dsu.features.upkeep import StoreState, remove_stores
    from dsu_cli.cache_reports import stores_table

    def ask(doomed: list[StoreState]) -> None:
        if not quiet:
            out.print(stores_table(doomed))
        if not yes:
            typer.confirm(f"Remove {'this store' if len(doomed) == 1 else 'these stores'}?", abort=True, err=True)

    removed = remove_stores(name, cache_root, before=ask)
    if not quiet:
        freed = bytes_text(sum(state.nbytes for state in removed))
        out.print(f"Removed {', '.join(str(state.path) for state in removed)}: {freed} freed.", markup=False)
