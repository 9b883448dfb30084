"""`dsu head list`."""

import json
import os
from pathlib import Path

import pytest
import torch
from support import Dsu

from dsu.config import build_config
from dsu.heads.head_file import HEAD_FILE, HeadInfo, save_head


def keep_head(run: Path, hours_ago: float, adapt_last: int = 7, **fields: object) -> None:
    run.mkdir(parents=True)
    config = build_config("toy", adapt_last=adapt_last)
    info = HeadInfo.model_validate({"config": config.model_dump(), **fields})
    save_head(run / HEAD_FILE, {"weight": torch.zeros(1)}, info)
    written = (run / HEAD_FILE).stat().st_mtime - hours_ago * 3600
    os.utime(run / HEAD_FILE, (written, written))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    keep_head(
        folder / "tiles",
        5.5,
        adapt_last=2,
        dataset={"split": "tiles-TR"},
        training={"epochs": 50},
        epoch=37,
        metrics={"val_S": 0.91234, "val_MAE": 0.0212, "val_IoU": 0.8765, "val_loss": 0.3},
    )
    keep_head(folder / "deeper" / "newest", 0.1, dataset={"split": "DUTS-TR"}, training={"epochs": 50}, epoch=50)
    keep_head(folder / "imported", 24 * 60)
    return folder


def test_heads_of_tiles_are_marked_and_the_headings_explained(dsu: Dsu, runs: Path) -> None:
    said = dsu("head", "list").output
    assert "N: Hiera's last N blocks have adapters." in said and "(tiles)" not in said
    cut = {"split": "large-TR", "tile": 512, "overlap": 64}
    keep_head(runs / "cut", 0, dataset=cut, metrics={"val_S": 0.9})
    said = dsu("head", "list").output
    assert said.count("(tiles)") == 2 and "large-TR (tiles)" in said and "for (tiles) its tiles" in said
    assert [head["tiled"] for head in json.loads(dsu("head", "list", "--json").stdout)] == [True, False, False, False]


def test_heads_are_listed_newest_first_with_their_facts(dsu: Dsu, runs: Path) -> None:
    first, *rows = [line.split() for line in dsu("head", "list").stdout.splitlines()]
    assert first == ["head", "data", "network", "N", "epoch", "S", "MAE", "IoU", "age"]
    assert rows == [
        ["runs/deeper/newest", "DUTS-TR", "toy", "7", "50/50", "6", "min"],
        ["runs/tiles", "tiles-TR", "toy", "2", "37/50", "0.9123", "0.0212", "0.8765", "5", "h"],
        ["runs/imported", "not", "recorded", "toy", "7", "60", "d"],
    ]


def test_columns_are_aligned(dsu: Dsu, runs: Path) -> None:
    heading, *lines = dsu("head", "list").stdout.splitlines()
    assert {line.rindex(unit) + len(unit) for line, unit in zip(lines, ("min", "h", "d"), strict=True)} == {
        len(heading.rstrip())
    }


def test_json_has_all_facts(dsu: Dsu, runs: Path) -> None:
    listed = json.loads(dsu("head", "list", runs.parent, "--json").stdout)
    assert [Path(head["path"]).name for head in listed] == ["newest", "tiles", "imported"]
    tiles = listed[1]
    assert (tiles["data"], tiles["adapt_last"], tiles["depth"], tiles["epoch"], tiles["epochs"]) == (
        "tiles-TR",
        2,
        7,
        37,
        50,
    )
    assert tiles["held_out"]["S"] == 0.91234 and tiles["held_out"]["loss"] == 0.3 and tiles["damage"] is None


def test_unreadable_heads_are_listed_with_the_reason(dsu: Dsu, runs: Path) -> None:
    (runs / "torn").mkdir()
    (runs / "torn" / HEAD_FILE).write_bytes(b"torn")
    said = dsu("head", "list", exit_code=1).output
    assert "runs/torn/head.safetensors can't be read as a head" in said and "tiles-TR" in said
    listed = json.loads(dsu("head", "list", "--json", exit_code=1).stdout)
    assert [bool(head["damage"]) for head in listed] == [True, False, False, False]


def test_an_empty_list_of_heads(dsu: Dsu, tmp_path: Path) -> None:
    assert "no heads below runs: train one with `dsu train-head`" in dsu("head", "list").output
    assert json.loads(dsu("head", "list", "--json").stdout) == []
    assert "no folder nowhere" in dsu("head", "list", "nowhere", exit_code=2).output
