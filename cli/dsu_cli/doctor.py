"""`dsu doctor`: whether one can work here, and what to do next."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from dsu_cli import options
from dsu_cli.cache_reports import print_json
from dsu_cli.console import out

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
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for section, findings in found.sections.items():
            table.add_row(Text(section, style="bold"))
            for finding in findings:
                table.add_row(f"  {finding.what}", Text(finding.text, style=_STYLES[finding.state]))
        out.print(table)
        out.print("\nWhat to do next", style="bold")
        for step in found.next_steps:
            out.print(f"  {step}")
    if not found.working:
        raise typer.Exit(1)
