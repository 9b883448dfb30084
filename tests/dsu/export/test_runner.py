"""The runner reads images and computes masks like dsu: each of its functions is compared with dsu's."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dsu import runner
from dsu.data import decoding, images
from dsu.errors import DsuError
from dsu.prediction import inference

RNG = np.random.default_rng(4)
GREY16 = RNG.integers(0, 4096, (30, 40), dtype=np.uint16)
COLOURS = RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8)


def _turned(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS).save(path.with_suffix(".jpg"), exif=exif)


def _animation(path: Path) -> None:
    frames = [Image.fromarray(COLOURS), Image.fromarray(COLOURS[::-1].copy())]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:])


ODD: dict[str, Callable[[Path], Any]] = {
    **{f"exif {n}": lambda path, n=n: _turned(path, n) for n in range(1, 9)},
    "16 bits": lambda path: Image.fromarray(GREY16).save(path.with_suffix(".png")),
    "16 bits, tiff": lambda path: Image.fromarray(GREY16).save(path.with_suffix(".tif")),
    "floats up to 1": lambda path: Image.fromarray((GREY16 / 4096).astype(np.float32)).save(path.with_suffix(".tif")),
    "floats beyond 1": lambda path: Image.fromarray(GREY16.astype(np.float32)).save(path.with_suffix(".tif")),
    "32 bits": lambda path: Image.fromarray(GREY16.astype(np.int32)).save(path.with_suffix(".tif")),
    "palette": lambda path: Image.fromarray(COLOURS).quantize(16).save(path.with_suffix(".png")),
    "transparent palette": lambda path: (
        Image.fromarray(COLOURS).quantize(16).save(path.with_suffix(".png"), transparency=3)
    ),
    "alpha": lambda path: Image.fromarray(np.dstack([COLOURS, COLOURS[..., 0]])).save(path.with_suffix(".png")),
    "grey": lambda path: Image.fromarray(COLOURS[..., 0]).save(path.with_suffix(".png")),
    "grey and alpha": lambda path: Image.fromarray(COLOURS).convert("LA").save(path.with_suffix(".png")),
    "one bit": lambda path: Image.fromarray(COLOURS[..., 0] > 99).save(path.with_suffix(".png")),
    "cmyk": lambda path: Image.fromarray(COLOURS).convert("CMYK").save(path.with_suffix(".jpg")),
    "animation": _animation,
}


@pytest.mark.parametrize("depth", [None, (0.0, 4095.0), (-10.0, 3000.5)], ids=str)
@pytest.mark.parametrize("name", ODD)
def test_unusual_images_are_read_alike(name: str, depth: tuple[float, float] | None, tmp_path: Path) -> None:
    ODD[name](tmp_path / "image")
    [path] = tmp_path.iterdir()
    mine, own = runner.open_image(path, depth), images.read_image(path, depth=depth)
    assert mine.mode == "RGB" and mine.size == own.size
    assert np.array_equal(np.asarray(mine), np.asarray(own))
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(runner.open_image(opened, depth)), np.asarray(own))


@pytest.mark.parametrize(
    "pixels",
    [COLOURS, COLOURS[..., 0], np.moveaxis(COLOURS, -1, 0), COLOURS[..., :1], GREY16, COLOURS / 255],
    ids=["rgb", "grey", "channels first", "one channel", "uint16", "floats"],
)
def test_arrays_are_read_alike(pixels: np.ndarray) -> None:
    assert np.array_equal(np.asarray(runner.open_image(pixels)), np.asarray(decoding.open_image(pixels)))


@pytest.mark.parametrize(
    "bad",
    [np.zeros((2, 2, 5), np.uint8), np.zeros((0, 2), np.uint8), np.full((2, 2), np.nan), np.zeros((2, 2), np.int64)],
    ids=["channels", "empty", "nan", "integers"],
)
def test_arrays_that_are_no_images_are_refused_by_both(bad: np.ndarray) -> None:
    with pytest.raises(runner.ModelError):
        runner.open_image(bad)
    with pytest.raises(DsuError):
        decoding.open_image(bad)


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    for name, content in {"empty.png": b"", "text.jpg": b"no image", "cut.png": b"\x89PNG\r\n\x1a\n"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(runner.ModelError, match=name):
            runner.open_image(tmp_path / name)
    with pytest.raises(runner.ModelError, match="absent"):
        runner.open_image(tmp_path / "absent.png")


@pytest.mark.parametrize("size", [(7, 5), (64, 64), (200, 33), (1, 1), (333, 500)], ids=str)
@pytest.mark.parametrize("normalization", ["none", "minmax"])
def test_masks_from_logits_are_equal(size: tuple[int, int], normalization: Any) -> None:
    logits = (8 * RNG.standard_normal((64, 64))).astype(np.float32)
    mine = runner.mask_of(runner.resize_logits(logits, size), normalization)
    own = inference.finish_mask(torch.from_numpy(logits)[None], size, normalization)
    assert mine.shape == own.shape and mine.dtype == own.dtype
    assert np.abs(mine - own).max() < 1e-4


def test_extreme_logits_stay_probabilities() -> None:
    mask = runner.mask_of(np.array([[-1e4, -90.0, 0.0, 90.0, 1e4]], np.float32))
    assert mask.tolist() == [[0.0, pytest.approx(0, abs=1e-30), 0.5, 1.0, 1.0]]


def test_it_imports_only_three_packages() -> None:
    tree = ast.parse(Path(runner.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert others == {"numpy", "PIL", "onnxruntime"}
