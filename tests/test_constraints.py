"""`.ci/constraints.txt` pins all packages for development, but not for users."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HOUSE = Path(__file__).parents[1]


def test_every_dependency_has_a_tested_version_that_it_allows() -> None:
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]
    lines = (HOUSE / ".ci" / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert len(pinned) == len(lines) - 1
    extras = project["optional-dependencies"]
    developed = [
        *project["dependencies"],
        *(line for name in ("dev", "export", "s3", "serve") for line in extras[name]),
    ]
    for line in developed:
        wanted = Requirement(line)
        if wanted.name != project["name"]:
            assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), line
            assert all(one.operator == ">=" for one in wanted.specifier), f"{line}: no upper bound for users"
