"""Imports go one way: dsu_cli -> dsu -> dsu_cache, and within dsu from later rooms to earlier ones."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]

ROOMS = (
    ("choices", "environment", "errors", "progress", "runner", "thresholds"),
    ("config", "distributed", "files", "hub", "runtime"),
    ("loss",),
    ("data",),
    ("batches", "pictures", "settings"),
    ("settings_file",),
    ("datasets", "drawing"),
    ("encoders",),
    ("heads",),
    ("network",),
    ("graphs",),
    ("features",),
    ("metrics",),
    ("training",),
    ("export",),
    ("prediction",),
    ("evaluation",),
    ("sharing",),
    ("equivalence",),
    ("dataset_check", "report", "visualization"),
    ("serving", "study"),
    ("bench", "doctor", "api"),
)
"""A module or room of `dsu` may import those on earlier lines, and a room its own modules."""

PLACE = {name: place for place, line in enumerate(ROOMS) for name in line}


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, including inside functions, but not imports for type checking only."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def files(package: str) -> list[Path]:
    return sorted((HOUSE / package).rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(HOUSE / "dsu").with_suffix("").parts[0]


@pytest.mark.parametrize(
    ("package", "forbidden"), [("cache/dsu_cache", ("dsu", "dsu_cli")), ("dsu", ("dsu_cli",))], ids=["cache", "dsu"]
)
def test_packages_import_one_way(package: str, forbidden: tuple[str, ...]) -> None:
    wrong = [
        f"{path.relative_to(HOUSE)} imports {name}"
        for path in files(package)
        if path.name != "__main__.py"  # `python -m dsu` runs the command line
        for name in imported(path)
        if name.split(".")[0] in forbidden
    ]
    assert wrong == []


def test_every_room_is_listed() -> None:
    there = {room_of(path) for path in files("dsu")} - {"__init__", "__main__"}
    assert there == set(PLACE), "a new room needs its place in ROOMS"


def test_rooms_import_only_earlier_ones() -> None:
    wrong = []
    for path in files("dsu"):
        own = room_of(path)
        for name in imported(path):
            parts = name.split(".")
            if parts[0] != "dsu" or len(parts) == 1 or own in ("__init__", "__main__") or parts[1] == own:
                continue
            if PLACE[parts[1]] >= PLACE[own]:
                wrong.append(f"{path.relative_to(HOUSE)} imports {name}")
    assert wrong == []
