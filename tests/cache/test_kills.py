"""A store whose writer is killed at any write can be completed, with exactly the same bytes.

Every third write is tested by default, and every write with `DSU_KILLS=300` or any number above that of the writes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from kills import Forks

from dsu_cache import Store, audit

KILLS = int(os.environ.get("DSU_KILLS", "30"))


def contents(store: Path) -> dict[str, bytes]:
    """The content of every file except the locks; manifests get one name, since a kill may skip a number."""
    files = [path for path in store.rglob("*") if path.is_file() and path.name not in ("lock", "readers")]
    names = {path: str(path.relative_to(store)) for path in files}
    names |= {path: f"generation of {path.parent.name}" for path in files if path.stem.isdecimal() and path.suffix}
    assert len(set(names.values())) == len(files), f"two generations: {sorted(names.values())}"
    return {names[path]: path.read_bytes() for path in files}


def test_a_kill_at_any_write_does_not_change_the_final_store(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with Forks(tmp_path, "toy_store:run") as forks:
        whole = forks.run(["whole"])
        assert whole.status == 0, whole.said
        wanted = contents(tmp_path / "whole")
        assert audit(Store.open(tmp_path / "whole")) == []
        numbers = range(1, whole.writes + 1, 1 if whole.writes < KILLS else 3)
        for number in numbers:
            assert forks.run(["killed"], at_write=number, opened=number % 2 == 0).killed
            outcome = forks.run(["killed"])
            assert outcome.status == 0, (number, outcome.said)
            found = contents(tmp_path / "killed")
            assert found.keys() == wanted.keys(), number
            assert [name for name in found if found[name] != wanted[name]] == [], number
            shutil.rmtree(tmp_path / "killed")
    record_property("kills survived by a toy store", len(numbers))
