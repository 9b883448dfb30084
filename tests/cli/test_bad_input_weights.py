"""Bad encoder weights and checkpoints: errors name them, and no code in them runs."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from house import House
from rubbish import Code, Refused, run_code, truncate
from safetensors.torch import save_file


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network and an empty cache, as if HF_HUB_OFFLINE=1 and HF_HOME were set before the first import."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("level", "words"),
    [
        ("S4", ("sam2.1_hiera_tiny.pt", "facebook/sam2.1-hiera-tiny", "--hiera-weights", "DSU_HIERA")),
        ("V", ("model.safetensors", "timm/vit_small_patch14_dinov2", "--dino-weights", "DSU_DINO")),
    ],
)
def test_missing_pretrained_weights(refused: Refused, drawn: Path, level: str, words: Sequence[str]) -> None:
    refused(["cache-features", drawn, "--preset", "tiny", "--features", level], *words, status=1)


def _run_code_in_zip(path: Path) -> None:
    torch.save({"model": Code(path)}, path)


def _half_a_checkpoint(path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1000)}}, path)
    truncate(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ("not at",)),
        (lambda path: path.mkdir(), ("not at",)),
        (lambda path: path.write_text("weights"), ("checkpoint",)),
        (lambda path: path.write_bytes(b""), ("can't be read", "download it again")),
        (_half_a_checkpoint, ("can't be read", "download it again")),
        (run_code, ("never runs code from a checkpoint",)),
        (_run_code_in_zip, ("never runs code from a checkpoint",)),
        (lambda path: torch.save({"model": [1, 2]}, path), ("not a state dict of tensors",)),
        (lambda path: torch.save({"model": {"a": torch.zeros(2)}}, path), ("checkpoint of", "published file")),
        (lambda path: torch.save(torch.nn.Linear(1, 1), path), ("never runs code from a checkpoint",)),
        (os.mkfifo, ("not at",)),
    ],
)
@pytest.mark.parametrize(("level", "option"), [("S4", "--hiera-weights"), ("V", "--dino-weights")])
def test_files_that_are_not_weights(
    refused: Refused,
    drawn: Path,
    tmp_path: Path,
    level: str,
    option: str,
    make: Callable[[Path], Any],
    words: Sequence[str],
) -> None:
    path = tmp_path / "weights.pt"
    make(path)
    command = ["cache-features", drawn, "--preset", "tiny", "--features", level, option, path]
    refused(command, path, *words, status=1)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_size(refused: Refused, drawn: Path, tmp_path: Path) -> None:
    from dsu.config import DINOS
    from dsu.encoders.frozen import build_dino

    path = tmp_path / "other.safetensors"
    save_file(build_dino(DINOS["toy"], 126).state_dict(), path)
    command = ["cache-features", drawn, "--preset", "tiny", "--features", "V", "--dino-weights", path]
    refused(command, path, "DINOv2 checkpoint of vits14", "published file of that size", status=1)


# ---- the authors' checkpoints ----

_SAM, _DINO = "backbone_sam.sam_encoder.", "backbone_dino.dino_encoder."


@pytest.fixture(scope="module")
def published(house: House) -> dict[str, torch.Tensor]:
    """A checkpoint under the authors' names."""
    from dsu.settings import EncoderWeights
    from dsu.sharing.published import export_head

    return export_head(house.run / "head.safetensors", EncoderWeights())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ("no checkpoint at", "check the path")),
        (lambda path: path.mkdir(), ("no checkpoint at", "check the path")),
        (os.mkfifo, ("no checkpoint at", "check the path")),
        (lambda path: path.symlink_to(path), ("no checkpoint at", "check the path")),
        (lambda path: path.write_bytes(b""), ("can't be read as a checkpoint", "download it again")),
        (lambda path: path.write_text("words"), ("contains more than weights", "give a file with tensors")),
        (_half_a_checkpoint, ("can't be read as a checkpoint", "download it again")),
        (run_code, ("never runs code from a checkpoint",)),
        (_run_code_in_zip, ("never runs code from a checkpoint",)),
        (lambda path: torch.save([torch.zeros(1)], path), ("not a state dict of tensors",)),
        (lambda path: torch.save({}, path), ("not a checkpoint of the published program", "is missing")),
        (lambda path: torch.save({"a": torch.zeros(1)}, path), ("not a checkpoint of the published program",)),
    ],
)
def test_files_that_are_not_checkpoints(
    refused: Refused, tmp_path: Path, make: Callable[[Path], Any], words: Sequence[str]
) -> None:
    path = tmp_path / "authors.pth"
    make(path)
    refused(["import-checkpoint", path, "-o", "head.safetensors"], path, *words, status=1)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "head.safetensors").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"side1.bias": None}, ("1 keys are missing", "side1.bias")),
        ({"other": torch.zeros(1)}, ("1 are unknown", "other")),
        ({"side1.bias": torch.zeros(7)}, ("tensors do not fit", "size mismatch")),
        ({f"{_SAM}patch_embed.proj.weight": torch.zeros(())}, ("other shapes",)),
        ({f"{_SAM}patch_embed.proj.weight": torch.zeros(5)}, ("have no official size", "width 5")),
        ({f"{_DINO}pos_embed": torch.zeros(1, 1, 48)}, ("position table does not fit any network", "dino_size")),
        ({f"{_DINO}pos_embed": torch.zeros(3)}, ("other shapes",)),
        ({"dino2sam_down14.depthwise.wt_filter": torch.zeros(())}, ("wt_filter", "not a Haar filter")),
        ({"dino2sam_down14.depthwise.iwt_filter": torch.ones(5, 3)}, ("iwt_filter", "not a Haar filter")),
    ],
)
def test_checkpoints_with_other_tensors(
    refused: Refused,
    tmp_path: Path,
    published: dict[str, torch.Tensor],
    changed: dict[str, torch.Tensor | None],
    words: Sequence[str],
) -> None:
    state = {name: tensor for name, tensor in {**published, **changed}.items() if tensor is not None}
    torch.save(state, tmp_path / "authors.pth")
    refused(["import-checkpoint", "authors.pth"], "authors.pth can't be imported", *words, status=1)


def test_a_head_is_not_a_published_checkpoint(refused: Refused, house: House) -> None:
    head = house.run / "head.safetensors"
    refused(["import-checkpoint", head, "-o", "other.safetensors"], head, "not a checkpoint of the published", status=1)


@pytest.mark.parametrize("command", [("import-checkpoint", "{}/authors.pth"), ("export-checkpoint", "{}")])
def test_files_of_checkpoints_that_cannot_be_written(
    refused: Refused, house: House, tmp_path: Path, published: dict[str, torch.Tensor], command: Sequence[str]
) -> None:
    torch.save(published, tmp_path / "authors.pth")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("precious")
    words = [command[0], command[1].format(tmp_path if "import" in command[0] else house.run)]
    refused([*words, "-o", "file"], "file already exists", "--overwrite")
    refused([*words, "-o", "folder", "--overwrite"], "folder already exists", "give another --out")
    refused([*words, "-o", "file/within/x"], "file/within", "Not a directory", "correct the path", status=1)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("make", "words", "status"),
    [
        (lambda path: None, ("no head at", "train one first"), 2),
        (lambda path: path.mkdir(), ("no head at", "train one first"), 2),
        (lambda path: path.write_text("words"), ("can't be read as a head",), 1),
        (lambda path: path.write_bytes(b""), ("can't be read as a head",), 1),
        (run_code, ("can't be read as a head",), 1),
        (lambda path: save_file({"a": torch.zeros(1)}, path), ("no dsu head",), 1),
    ],
)
def test_heads_that_cannot_be_exported(
    refused: Refused, tmp_path: Path, make: Callable[[Path], Any], words: Sequence[str], status: int
) -> None:
    make(tmp_path / "mine.safetensors")
    refused(["export-checkpoint", "mine.safetensors"], "mine.safetensors", *words, status=status)
    assert not (tmp_path / "checkpoint.pth").exists() and not (tmp_path / "ran").exists()
