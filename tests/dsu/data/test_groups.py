"""Groups of images of the same object: found by similarity, or named."""

import io
import json
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dsu.data.groups import (
    Thumbnail,
    empty_thumbnail,
    find_similar,
    max_group_size,
    named_groups,
    paste_thumbnail,
    thumbnail_of,
)
from dsu.data.synthetic import draw_sample
from dsu.data.tiles import Tiling
from dsu.errors import UsageError
from dsu.progress import SILENT

TILES: Final = Path(__file__).with_name("magnetic_tiles.json")
"""Names of the images of each tile of MagneticTile, labelled by eye: same marks, grinding lines and edges."""


def drawn(seed: int) -> Image.Image:
    return Image.fromarray(draw_sample(np.random.default_rng(seed), (200, 300))[0])


def saved_anew(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=20)
    return Image.open(file)


def without_edges(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    return image.crop((int(left * width), int(top * height), int((1 - right) * width), int((1 - bottom) * height)))


CHANGES: Final[dict[str, Callable[[Image.Image], Image.Image]]] = {
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.5),
    "of less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.6),
    "saved anew": saved_anew,
    "smaller": lambda image: image.resize((90, 70)),
    "grey": lambda image: image.convert("L"),
    "cropped a little": lambda image: without_edges(image, 0.05, 0.05, 0.05, 0.05),
    "cropped at one side": lambda image: without_edges(image, 0.3, 0, 0, 0),
    "cropped further": lambda image: without_edges(image, 0, 0, 0.4, 0.2),
    "half of it": lambda image: without_edges(image, 0, 0, 0.5, 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_the_changed_copy_of_an_image_is_similar(change: str) -> None:
    images = {f"{seed:02}": drawn(seed) for seed in range(16)}
    changed = {f"{name} {change}": CHANGES[change](image) for name, image in images.items()}
    groups, chains = find_similar({name: thumbnail_of(image) for name, image in (images | changed).items()}, 8)
    assert groups == [[name, f"{name} {change}"] for name in images] and not chains


def test_uniform_images_are_not_similar() -> None:
    flat = {str(grey): thumbnail_of(Image.new("RGB", (60, 60), (grey, grey, grey))) for grey in (0, 90, 91, 255)}
    assert find_similar(flat, 4) == ([], [])
    assert find_similar({"alone": thumbnail_of(drawn(0))}, 4) == ([], [])


def test_a_chain_that_is_too_long_is_named_and_only_its_closest_images_are_grouped() -> None:
    """One scene from a fixed camera with small differences; two of the images were recompressed."""
    scene, found = drawn(3), dict[str, Image.Image]()
    for index in range(12):
        noise = np.random.default_rng(index).normal(0, 40, (scene.height, scene.width, 1))
        found[f"{index:02}"] = Image.fromarray((np.asarray(scene) + noise).clip(0, 255).astype(np.uint8))
    found |= {f"{name}-again": saved_anew(found[name]) for name in ("04", "07")}
    thumbnails = {name: thumbnail_of(image) for name, image in found.items()}
    groups, chains = find_similar(thumbnails, 4)
    assert chains == [sorted(thumbnails)]
    assert groups == [["04", "04-again"], ["07", "07-again"]]
    assert find_similar(thumbnails, 14) == ([sorted(thumbnails)], [])


def test_a_group_is_limited_to_a_part_of_the_images() -> None:
    assert max_group_size(100) == 25 and max_group_size(100, 0.1) == 10 and max_group_size(3) == 2


def test_merged_tiles_are_similar_to_their_image() -> None:
    image, whole = drawn(5), empty_thumbnail()
    for box in Tiling(64, 8).boxes(*image.size):
        paste_thumbnail(whole, image.crop(box).resize((128, 128)), box, image.size)
    assert np.corrcoef(np.asarray(whole).ravel(), thumbnail_of(image).ravel())[0, 1] > 0.9
    assert find_similar({"tiles": np.asarray(whole), "whole": thumbnail_of(image)}, 2)[0] == [["tiles", "whole"]]


@pytest.mark.data
def test_all_images_of_the_same_magnetic_tile_are_found_and_no_others(
    real_data: Path, record_property: Callable[[str, object], None]
) -> None:
    tiles = json.loads(TILES.read_text())
    paths = {name: _image(real_data / "MagneticTile", name) for tile in tiles for name in tile}
    thumbnails = {name: thumbnail_of(Image.open(path)) for name, path in paths.items()}
    groups, chains = find_similar(thumbnails, max_group_size(len(thumbnails)))
    true, found = ({pair for group in of for pair in combinations(sorted(group), 2)} for of in (tiles, groups))
    usual = _pairs_by_usual_hash(thumbnails, true)
    record_property("pairs of pictures of one tile, found", len(found & true))
    record_property("pairs of pictures of one tile, missed", len(true - found))
    record_property("pairs of pictures of one tile, false", len(found - true))
    record_property("pairs of pictures of one tile, found by the usual hash before its first false pair", int(usual))
    assert (len(thumbnails), Counter(map(len, tiles))[1], len(tiles)) == (303, 2, 53)
    assert found == true and len(true) == 748 and not chains
    assert usual < 500


@pytest.mark.data
def test_no_two_of_many_photographs_are_similar(real_data: Path) -> None:
    """A third of DUTS, since comparing images with parts of others takes time."""
    paths = sorted(real_data.glob("DUTS/*/*Image/*.jpg"))[::3]
    assert find_similar({str(path): thumbnail_of(Image.open(path)) for path in paths}, 100) == ([], [])


def _image(folder: Path, name: str) -> Path:
    kind, name = name.split("/")
    return folder / kind / "images" / f"{name}.jpg"


def _pairs_by_usual_hash(thumbnails: dict[str, Thumbnail], true: set[tuple[str, str]]) -> int:
    """Number of pairs that the usual perceptual hash (signs of 8 x 8 DCT coefficients of 32 x 32 pixels) finds before
    its first false one."""
    from scipy.fft import dctn

    names = sorted(thumbnails)
    small = np.stack([np.asarray(Image.fromarray(thumbnails[name]).resize((32, 32)), float) for name in names])
    waves = dctn(small, axes=(1, 2))[:, :8, :8].reshape(len(names), -1)[:, 1:]
    signs = np.where(waves > np.median(waves, axis=1, keepdims=True), 1, -1)
    pairs = {(names[i], names[j]): signs[i] @ signs[j] for i, j in combinations(range(len(names)), 2)}
    worst = max(agree for pair, agree in pairs.items() if pair not in true)
    return sum(agree > worst for pair, agree in pairs.items() if pair in true)


# ---- by name ----

NAMES: Final = ("exp1_num_12", "exp5_num_12", "exp2_num_7", "cold/exp1_num_7", "odd")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(SILENT, "say", lines.append)
    return lines


def test_a_pattern_groups_by_its_match(said: list[str]) -> None:
    found = named_groups(r"_num_(\d+)", NAMES)
    assert found["exp1_num_12"] == found["exp5_num_12"] != found["exp2_num_7"] == found["cold/exp1_num_7"]
    assert "odd" not in found and "matches no group for 1 images (odd)" in said[0]
    assert len(set(named_groups(".+", NAMES).values())) == len(NAMES), "each image is its own group"
    several = named_groups(r"(?:(cold)/)?exp\d+_num_(\d+)", NAMES)
    assert several["exp2_num_7"] != several["cold/exp1_num_7"], "all capturing groups count"


def test_a_file_groups_by_its_lines(tmp_path: Path, said: list[str]) -> None:
    file = tmp_path / "groups.csv"
    file.write_text("image,group\nexp1_num_12.jpg, a\nexp5_num_12,a\n\ncold/exp1_num_7.png,b\nodd,b\ngone.png,b\n")
    assert named_groups(str(file), NAMES) == {
        "exp1_num_12": "a",
        "exp5_num_12": "a",
        "cold/exp1_num_7": "b",
        "odd": "b",
    }
    assert any("gone.png" in line for line in said) and any("exp2_num_7" in line for line in said)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("exp1_num_12\n", "no comma in line 1"),
        ("odd,a\nodd.png,b\n", "odd in two groups"),
        ("image,group\nnobody,a\n", "matches none of the images"),
        (None, "No such file"),
        (b"\xff\xfe\x00", "not UTF-8 CSV"),
    ],
)
def test_an_invalid_file_of_groups_is_refused(content: str | bytes | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "groups.csv"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=words):
        named_groups(str(file), NAMES)


@pytest.mark.parametrize(
    ("pattern", "words"), [("(", "not a regular expression"), ("xyz", "matches none of the images")]
)
def test_an_invalid_or_unmatched_pattern_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        named_groups(pattern, NAMES)
