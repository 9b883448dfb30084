import os
from pathlib import Path

import pytest
import torch

from dsu.config import build_config
from dsu.errors import DsuError, UsageError
from dsu.files import atomic_write
from dsu.heads.head_file import HEAD_FILE, RUNS, HeadInfo, load_head, read_head_info, resolve_head, save_head
from dsu.network.head import Head


def test_a_head_loads_from_its_file_with_settings_and_statistics(tmp_path: Path) -> None:
    config = build_config("toy", adapt_last=3, hiera_size=128)
    head = Head(config)
    head.decoders[0].small[1].running_mean.fill_(2.5)
    info = HeadInfo(config=config, encoders={"hiera": "a", "dino": "b"}, epoch=3, metrics={"val_S": 0.5})
    save_head(tmp_path / HEAD_FILE, head.state_dict(), info)
    state, read = load_head(tmp_path / HEAD_FILE)
    assert read == info == read_head_info(tmp_path / HEAD_FILE)
    again = Head(read.config)
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_papers_head_is_about_29_megabytes(tmp_path: Path) -> None:
    config = build_config("large")
    save_head(tmp_path / HEAD_FILE, Head(config).state_dict(), HeadInfo(config=config))
    assert 28e6 < (tmp_path / HEAD_FILE).stat().st_size < 30e6


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    atomic_write(target, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DsuError, match="No space left"):
        atomic_write(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_newest_run_is_used_if_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="train-head"):
        resolve_head(None)
    for index, name in enumerate(("old", "new")):
        path = RUNS / name / HEAD_FILE
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        os.utime(path, (index, index))
    assert resolve_head(None) == RUNS / "new" / HEAD_FILE
    assert resolve_head(RUNS / "old") == RUNS / "old" / HEAD_FILE
