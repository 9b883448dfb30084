"""Full disks, missing permissions, and files removed during a command: a clear error, and finished work is kept."""

import ctypes
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
import yaml
from faults import FullDisk
from house import House, stage_one
from PIL import Image
from rubbish import Refused
from safetensors.torch import load_file
from support import Dsu

STRIDE: Final = {"cache-features": 5, "train-head": 7, "predict": 1}
"""Every n-th operation fails once; 1 tries all operations, in two minutes."""


def commands(name: str, out: Path, house: House, mine: Path) -> list[object]:
    """A command that writes only below `out`."""
    return {
        "cache-features": stage_one(mine, "--cache-root", out),
        "train-head": [*house.train("--views", "1", "--val-fraction", "0.4", "--epochs", "2"), "--out", out],
        "predict": house.predict(mine / "images", "--out", out, "--batch-size", "2"),
    }[name]


def features(out: Path) -> dict[str, bytes]:
    """The contents of a store; reading verifies every chunk's checksum."""
    from dsu_cache import Store

    [path] = (out / "mine").iterdir()
    store = Store.open(path)
    names = store.manifest.names
    read = store.reader(list(store.arrays)).read([store.manifest.row(name) for name in names], [0] * len(names))
    return {name: values.tobytes() for name, values in read.items()}


def head(out: Path) -> dict[str, bytes]:
    """The weights of a run's result, and of its last and best state."""
    assert (out / "curves.png").is_file() and (out / "metrics.csv").is_file()
    return {
        f"{file}/{name}": tensor.numpy().tobytes()
        for file in ("head", "best", "last")
        for name, tensor in load_file(out / f"{file}.safetensors").items()
    }


def pictures(out: Path) -> dict[str, bytes]:
    """The masks."""
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def grey_levels_apart(one: bytes, other: bytes) -> int:
    """The largest difference between two PNGs."""
    first, second = (np.asarray(Image.open(io.BytesIO(data)), int) for data in (one, other))
    return int(np.abs(first - second).max())


RESULTS: Final[dict[str, Callable[[Path], dict[str, bytes]]]] = {
    "cache-features": features,
    "train-head": head,
    "predict": pictures,
}

WHOLE: Final[dict[str, Callable[[Path], object]]] = {
    ".png": lambda path: Image.open(path).load(),
    ".safetensors": load_file,
    ".pt": lambda path: torch.load(path, weights_only=True),
    ".yaml": lambda path: yaml.safe_load(path.read_text())["epochs"],
    ".csv": lambda path: path.read_text().endswith("\n") or 1 / 0,
    ".json": lambda path: json.loads(path.read_text()),
    ".lock": lambda path: path.read_text(),
}
"""Reads a file to its end."""


@pytest.mark.parametrize("name", STRIDE)
def test_a_full_disk_at_any_operation(
    dsu: Dsu, request: pytest.FixtureRequest, house: House, mine: Path, tmp_path: Path, name: str
) -> None:
    calm = FullDisk(tmp_path / "calm")
    with calm.mounted():
        dsu(*commands(name, tmp_path / "calm", house, mine))
    expected = RESULTS[name](tmp_path / "calm")
    assert calm.operations > 10
    survived = 0
    for full_at in range(1, calm.operations + 1, STRIDE[name]):
        out = tmp_path / str(full_at)
        command = commands(name, out, house, mine)
        with FullDisk(out.parent, full_at).mounted():
            said = " ".join(dsu(*command, exit_code=1).output.split())
        assert said.count("error:") == 1, said
        error = said[said.index("error:") :]
        assert str(out) in error and "No space left on device" in error and "space" in error.split("device")[1], error
        if name != "cache-features":  # a store detects its own truncated records
            left = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"]
            assert [path for path in left if path.name.startswith(".")] == []
            for path in left:
                WHOLE[path.suffix](path)
        resume = ["--resume"] if (out / "settings.yaml").exists() else []
        dsu(*command, *resume)
        found = RESULTS[name](out)
        if name == "predict":  # batches have other images than before, which may change the last bits
            assert found.keys() == expected.keys()
            assert all(grey_levels_apart(found[file], expected[file]) <= 1 for file in expected), full_at
        else:
            assert found == expected, full_at
        shutil.rmtree(out)
        survived += 1
    request.node.user_properties.append(("failed writes survived", survived))


# ---- files removed during a command ----


def before(patch: pytest.MonkeyPatch, where: str, act: Callable[[], object], call: int = 1) -> None:
    """Run a function just before the `call`-th call of a method."""
    module, _, method = where.rpartition(".")
    owner: Any = pytest.importorskip(module.rpartition(".")[0])
    owner = getattr(owner, module.rpartition(".")[2])
    real, calls = getattr(owner, method), iter(range(1, 1_000_000))

    def acting(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            act()
        return real(*arguments, **options)

    patch.setattr(owner, method, acting)


def test_images_removed_between_plan_and_extraction(
    dsu: Dsu, refused: Refused, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        before(patch, "dsu.features.extraction.extract", lambda: mine.rename(tmp_path / "away"))
        said = dsu(*stage_one(mine), exit_code=1).output
    assert f"error: {mine}/images/000" in " ".join(said.split()) and "No such file or directory" in said
    assert "restore it" in said
    (tmp_path / "away").rename(mine)
    refused.handled(stage_one(mine))
    assert set(features(tmp_path / "features")) == {"V", "pixels", "mask"}


@pytest.mark.parametrize("command", ["cache-features", "train-head", "check-equivalence"])
def test_a_mask_removed_during_extraction(
    dsu: Dsu, refused: Refused, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    mask = mine / "masks" / "0002.png"
    content = mask.read_bytes()
    again: Sequence[object] = stage_one(mine)
    if command != "cache-features":
        dsu(*again)
        again = {
            "train-head": ["train-head", "--end-to-end", "--views", "1", "--epochs", "2", "--out", "run"],
            "check-equivalence": ["check-equivalence", "--views", "1", "--steps", "1"],
        }[command]
    call = 2 if command == "train-head" else 1
    where = "dsu.training.trainer.Trainer._train_epoch" if command == "train-head" else "dsu.datasets.ImageDataset.read"
    with monkeypatch.context() as patch:
        before(patch, where, mask.unlink, call)
        said = " ".join(dsu(*again, exit_code=1).output.split())
    assert f"error: {mask} cannot be read as an image (No such file or directory): restore it" in said
    mask.write_bytes(content)
    if command == "train-head":
        assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] == 1
        again = [*again, "--resume"]
    refused.handled(again)


def test_a_store_removed_while_it_is_written(
    refused: Refused, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        # Renamed first, to remove it at once: other threads are writing into it.
        before(
            patch,
            "dsu_cache.Store.write_shard",
            lambda: shutil.rmtree((tmp_path / "features").rename(tmp_path / "away")),
            2,
        )
        refused(stage_one(mine), "features/mine", "No such file", status=1)
    refused.handled(stage_one(mine))
    assert set(features(tmp_path / "features")) == {"V", "pixels", "mask"}


def test_a_run_folder_removed_during_training(
    refused: Refused, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*house.train("--views", "1", "--epochs", "2"), "--out", "run"]
    with monkeypatch.context() as patch:
        before(patch, "dsu.training.trainer.Trainer._train_epoch", lambda: shutil.rmtree(tmp_path / "run"), 2)
        refused(command, "run no longer belongs to this run", "renamed or removed", "--resume", status=1)
    assert not (tmp_path / "run").exists()
    refused.handled(command)


def test_an_output_folder_removed_during_prediction(
    refused: Refused, house: House, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = house.predict(mine / "images", "--out", "out", "--batch-size", "1")
    with monkeypatch.context() as patch:
        before(patch, "dsu.data.decoding.ImageProcessor.fit", lambda: shutil.rmtree(tmp_path / "out"), 4)
        refused(command, "out/000", "can't be written (No such file or directory)", "fix the", status=1)
    refused.handled(command, "4 written")
    assert len(pictures(tmp_path / "out")) == 4


@pytest.mark.parametrize("kind", ["mask", "overlay"])
def test_an_image_removed_during_prediction(
    dsu: Dsu, house: House, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    image = mine / "images" / "0003.jpg"
    command = house.predict(mine / "images", "--out", "out", "--batch-size", "1", "--kind", kind)
    # For an overlay, the image is read again after its prediction.
    where = "dsu.data.decoding.ImageProcessor.fit" if kind == "mask" else "dsu.network.network.DSUNet.forward"
    with monkeypatch.context() as patch:
        before(patch, where, image.unlink, 4 if kind == "overlay" else 1)
        said = dsu(*command, exit_code=1).output
    assert f"{image} cannot be read as an image (No such file or directory)" in said
    assert "3 written" in said and len(pictures(tmp_path / "out")) == 3


# ---- permissions, which root ignores ----

_FORBIDDEN: Final = """
import json, sys
from unittest.mock import patch
from dsu_cli.main import run
for command in json.loads(sys.argv[1]):
    with patch.object(sys, "argv", ["dsu", *command]):
        try:
            run()
        except SystemExit as left:
            print("status", left.code, flush=True)
"""


def _without_privileges() -> None:
    """Drop root's capabilities to read and write any file, in a new process (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    for capability in (1, 2):
        if os.geteuid() == 0 and ctypes.CDLL(None).prctl(24, capability, 0, 0, 0):
            raise OSError(errno.EPERM, "capabilities cannot be given up here")


def test_files_and_folders_without_permission(house: House, mine: Path, tmp_path: Path) -> None:
    home = house.copied(tmp_path / "copy")
    (mine / "images" / "0000.jpg").chmod(0)
    (mine / "masks" / "0001.png").chmod(0)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    roots = ("--cache-root", home.features)
    asked: list[tuple[Sequence[object], int, Sequence[str]]] = [
        (
            stage_one(mine, "--quiet"),
            1,
            ["/0000.jpg cannot be read (Permission", "/0001.png cannot be read"],
        ),
        (stage_one(mine, "--cache-root", locked), 1, ["Permission denied", f"{locked}"]),
        (
            home.train("--views", "1", "--out", locked / "run"),
            1,
            [f"{locked}/run can't be created (Permission denied)"],
        ),
        (home.predict(mine / "images", "--out", "out"), 1, ["0000.jpg cannot be read as an image (Permission"]),
        (["predict", "--head", home.run, *roots, "--out", locked], 1, [f"{locked}/", "Permission denied"]),
        (["eval", "--predictions", home.predictions, "--json", locked / "x.json"], 1, ["Permission", "x.json"]),
        (["export-checkpoint", home.run, "-o", locked / "x.pth"], 1, [f"{locked}/x.pth can't be written (Permission"]),
        (["train-head", mine, "--config", locked / "mine.yaml"], 2, ["mine.yaml can't be read"]),
    ]
    words = json.dumps([[str(word) for word in command] for command, _, _ in asked])
    try:
        done = subprocess.run(
            [sys.executable, "-c", _FORBIDDEN, words],
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "300", "OMP_NUM_THREADS": "1"},
            preexec_fn=_without_privileges,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
    except subprocess.SubprocessError:
        pytest.skip("root cannot give its privileges up here")
    finally:
        locked.chmod(0o700)
    assert "Traceback" not in done.stdout, done.stdout
    said = done.stdout.split("status ")
    for (command, status, wanted), before_status, after in zip(asked, said, said[1:], strict=False):
        assert after.startswith(f"{status}\n"), (command, done.stdout)
        told = " ".join(before_status.split())
        assert "error:" in told and [text for text in wanted if text not in told] == [], (command, told)
    assert len(said) == len(asked) + 1 and not any(locked.iterdir())
