"""Prints `.ci/constraints.txt`: the installed versions of all that `dsu-net[dev]` needs.

python tests/constraints_file.py > .ci/constraints.txt
"""

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["pinned"]


def pinned() -> dict[str, str]:
    """The version of each distribution that is needed, directly or not, by name."""
    found: dict[str, str] = {}
    waiting = [Requirement("dsu-net[dev]")]
    seen: set[str] = set()
    while waiting:
        wanted = waiting.pop()
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        try:
            here = distribution(wanted.name)
        except PackageNotFoundError:  # for another system
            if not found:
                raise
            continue
        found[canonicalize_name(wanted.name)] = here.version
        for line in here.requires or ():
            needed = Requirement(line)
            environments: list[dict[str, str]] = [{"extra": extra} for extra in ("", *wanted.extras)]
            if needed.marker is None or any(needed.marker.evaluate(one) for one in environments):
                waiting.append(needed)
    found.pop("dsu-net", None)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    print("# The versions that CI tests; `python tests/constraints_file.py` writes them. Users are not bound to them.")
    for name, version in pinned().items():
        print(f"{name}=={version}")
