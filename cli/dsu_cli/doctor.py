"""`dsu doctor`: check the environment and suggest what to do next."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from dsu_cli import options
from dsu_cli.console import key_table, out, print_json, say

if TYPE_CHECKING:
    from dsu.doctor import Fact

_STYLES = {"fine": "", "note": "yellow", "broken": "bold red"}
_NAMES = 19
"""Length of the longest name: it aligns the sections, which are printed one by one as they are ready."""


def doctor(
    data_root: options.DataRoot = Path("data"),
    cache_root: options.CacheRoot = Path("features"),
    json: options.Json = False,
) -> None:
    """Check the environment (device, libraries, weights, data, folders) and suggest what to do next.

    Nothing is downloaded. Exit status 1 if something is broken.
    """
    from dsu.doctor import diagnose

    seen: list[Fact] = []

    def show(section: str, facts: Sequence["Fact"]) -> None:
        out.print(section, style="bold")
        rows = [(f"  {fact.what:<{_NAMES}}", Text(fact.text, style=_STYLES[fact.state])) for fact in facts]
        out.print(key_table(rows, style="", whole=True))
        seen.extend(facts)
        if section == "folders" and not any(fact.state == "broken" for fact in seen):
            say("loading torch ...")

    if json:
        found = diagnose(data_root, cache_root)
        print_json(found.to_json())
    else:
        found = diagnose(data_root, cache_root, on_section=show)
        out.print("\nWhat to do next", style="bold")
        for step in found.next_steps:
            out.print(f"  {step}")
    if not found.working:
        raise typer.Exit(1)
