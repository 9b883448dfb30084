"""Large images with tiles: cache, train, predict from the store and end to end, evaluate."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import TINY, Dsu, pixel_difference


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Six images of 150x100 with a small spot each; their names contain `@`, as tiles' names do."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "large" / name).mkdir(parents=True)
    for index in range(6):
        image = rng.integers(0, 90, (100, 150, 3), np.uint8)
        mask = np.zeros((100, 150), np.uint8)
        x, y = rng.integers(0, 140), rng.integers(0, 90)
        mask[y : y + 8, x : x + 8] = 255
        image[mask > 0] = 240
        Image.fromarray(image).save(tmp_path / "large" / "images" / f"a@{index}.png")
        Image.fromarray(mask).save(tmp_path / "large" / "masks" / f"a@{index}.png")
    return tmp_path / "large"


def test_from_tiles_to_scores(dsu: Dsu, large: Path, tmp_path: Path) -> None:
    tiles = ("--tile", 64, "--overlap", 16)
    stored = dsu("cache-features", large, *TINY, *tiles, "--views", "none").output
    assert "36 tiles of 6 pairs" in " ".join(stored.split())
    dsu("train-head", large, *tiles, "--epochs", 1, "--views", "none", "--balance", "--fold", "1/3", "--out", "run")
    said = dsu("predict", "--head", "run").output
    assert "2 from features" in said and "in tiles of 64 px with overlap 16" in said
    dsu("predict", "--head", "run", "--end-to-end", "--out", "live")
    masks = sorted(Path("run/predictions").rglob("*.png"))
    assert len(masks) == 2 and all(Image.open(mask).size == (150, 100) for mask in masks)
    for mask in masks:
        assert pixel_difference(mask, Path("live") / mask.relative_to("run/predictions")) == 0
    assert "2" in dsu("eval", "--predictions", "run/predictions").output
    whole = dsu("predict", large / "images", "--head", "run", "--tile", 0, "--out", "whole").output
    assert "in tiles" not in whole
    other = dsu("predict", large / "images", "--head", "run", "--tile", 80, "--out", "other").output
    assert "in tiles of 80 px with overlap 10" in other
    assert len(list(Path("other").rglob("*.png"))) == len(list(Path("whole").rglob("*.png"))) == 6


def test_a_broken_image_among_tiles_is_named_and_the_others_are_predicted(dsu: Dsu, large: Path) -> None:
    tiles = ("--tile", 64, "--overlap", 16)
    dsu("cache-features", large, *TINY, *tiles, "--views", "none")
    dsu("train-head", large, *tiles, "--epochs", 1, "--views", "none", "--adapt-last", 0, "--out", "run")
    (large / "images" / "a@3.png").write_bytes(b"nothing")
    result = dsu("predict", large / "images", "--head", "run", "--out", "out", exit_code=1)
    assert "a@3.png cannot be read" in result.output
    assert len(list(Path("out").rglob("*.png"))) == 5
