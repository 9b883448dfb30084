"""`dsu doctor`: whether one can work here, and what to do next."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from dsu_cli import options
from dsu_cli.console import key_table, out, print_json

_STYLES = {"fine": "", "note": "yellow", "broken": "bold red"}


def doctor(
    data_root: options.DataRoot = Path("data"),
    cache_root: options.CacheRoot = Path("features"),
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what there is to work with: device, libraries, weights, data, folders; and what to do next.

    Nothing is downloaded. Exit status 1 if something is broken.
    """
    from dsu.doctor import diagnose

    found = diagnose(data_root, cache_root)
    if json:
        print_json(found.to_json())
    else:
        rows: list[tuple[RenderableType, RenderableType]] = []
        for section, facts in found.sections.items():
            rows.append((Text(section, style="bold"), ""))
            rows += [(f"  {fact.what}", Text(fact.text, style=_STYLES[fact.state])) for fact in facts]
        out.print(key_table(rows, style="", whole=True))
        out.print("\nWhat to do next", style="bold")
        for step in found.next_steps:
            out.print(f"  {step}")
    if not found.working:
        raise typer.Exit(1)
