"""Commands for the authors' checkpoint format."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import TINY, Dsu

from dsu.sharing.published import published_name


@pytest.fixture
def head(dsu: Dsu, drawn: Path, tmp_path: Path) -> Path:
    dsu("cache-features", drawn, *TINY, "--features", "V")
    dsu("train-head", "--epochs", "1", "--out", "run")
    return tmp_path / "run" / "head.safetensors"


def test_a_head_is_unchanged_after_export_and_import(dsu: Dsu, head: Path, tmp_path: Path) -> None:
    dsu("export-checkpoint", "run", "-o", "authors.pth")
    state = torch.load(tmp_path / "authors.pth", weights_only=True)
    assert "backbone_sam.sam_encoder.blocks.0.prompt_learn.0.weight" in state
    assert "rfb4.conv_cat.bn.running_mean" in state
    said = dsu("import-checkpoint", "authors.pth", "-o", "back.safetensors").output
    assert "NOT" not in said
    before, after = load_file(head), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_imports_report_unofficial_encoders(dsu: Dsu, drawn: Path, head: Path, tmp_path: Path) -> None:
    dsu("export-checkpoint", "run", "-o", "authors.pth")
    state = torch.load(tmp_path / "authors.pth", weights_only=True)
    state[published_name("hiera.blocks.2.norm1.weight")][0] += 1
    torch.save(state, tmp_path / "other.pth")
    said = dsu("import-checkpoint", "other.pth", "-o", "back.safetensors").output
    assert "hiera: NOT the random weights of toy" in said
    [image, *_] = sorted((drawn / "test" / "images").iterdir())
    said = dsu("predict", image, "--head", "back.safetensors", "--out", "masks", exit_code=1).output
    assert "other weights of hiera" in said


@pytest.mark.parametrize("damage", ["missing", "unknown"])
def test_missing_and_unknown_keys_are_named(dsu: Dsu, head: Path, tmp_path: Path, damage: str) -> None:
    dsu("export-checkpoint", "run", "-o", "authors.pth")
    state = torch.load(tmp_path / "authors.pth", weights_only=True)
    if damage == "missing":
        del state["side2.bias"]
    else:
        state["extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    said = dsu("import-checkpoint", "other.pth", "-o", "back.safetensors", exit_code=1).output
    assert ("side2.bias" if damage == "missing" else "extra.weight") in said
    assert not (tmp_path / "back.safetensors").exists()


def test_existing_files_are_not_replaced(dsu: Dsu, head: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.pth").write_text("precious")
    said = dsu("export-checkpoint", "run", "-o", "mine.pth", exit_code=2).output
    assert "mine.pth" in said and "--overwrite" in said
    assert (tmp_path / "mine.pth").read_text() == "precious"


def test_unsupported_heads_are_not_exported(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V")
    dsu("train-head", "--epochs", "1", "--adapt-last", "2", "--out", "run")
    assert "--adapt-last" in dsu("export-checkpoint", "run", exit_code=1).output


def test_check_equivalence_passes_with_json(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V")
    said = dsu("check-equivalence", "--steps", "2", "--json", "report.json").output
    assert "pass" in said and "FAIL" not in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] and {row["absolute"] for row in report["rows"]} == {0.0}
