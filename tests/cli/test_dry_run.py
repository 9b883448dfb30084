from pathlib import Path

import pytest
from support import TINY, Dsu


def test_a_dry_run_lists_the_work_and_encodes_nothing(dsu: Dsu, drawn: Path) -> None:
    said = dsu("cache-features", drawn / "train", *TINY, "--dry-run").output
    assert "to write" in said and "Nothing was encoded" in said
    assert not [path for path in Path("features").glob("*/*/*/c/**/*") if path.is_file()]
    assert "Nothing was encoded" not in dsu("cache-features", drawn / "train", *TINY).output


def test_a_first_dry_run_needs_no_weights(dsu: Dsu, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(Path.cwd() / "empty"))
    said = dsu("cache-features", drawn / "train", "--dry-run").output
    assert "to write" in said and "Nothing was encoded" in said
    assert not Path("features").exists()
