"""Tiles cover an image and are merged without seams; as samples they equal crops of the image."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from dsu.data.datasets import Paths, find_dataset
from dsu.data.images import Box, image_head, mask_box, read_image, read_mask
from dsu.data.inspection import inspect
from dsu.data.masks import examine_mask
from dsu.data.pairing import Pair
from dsu.data.tiles import Tiling, cached, image_name, tiled
from dsu.errors import UsageError
from dsu.runner import TileBlender

SIZES = st.integers(1, 700)


@given(width=SIZES, height=SIZES, size=st.integers(1, 300), data=st.data())
@settings(max_examples=200)
def test_tiles_cover_the_image_with_enough_overlap_and_equal_size(
    width: int, height: int, size: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, size // 2))
    boxes = Tiling(size, overlap).boxes(width, height)
    covered = np.zeros((height, width), int)
    for left, top, right, bottom in boxes:
        assert left >= 0 and top >= 0 and right <= width and bottom <= height
        assert (right - left, bottom - top) == (min(size, width), min(size, height))
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    for axis in (0, 1):
        spans = sorted({(box[axis], box[axis + 2]) for box in boxes})
        assert all(first[1] - second[0] >= overlap for first, second in itertools.pairwise(spans))


@given(width=SIZES, height=SIZES, size=st.integers(8, 300), data=st.data())
@settings(max_examples=60)
def test_blending_tiles_that_agree_gives_their_values(width: int, height: int, size: int, data: st.DataObject) -> None:
    """If overlapping tiles agree on every pixel, blending returns these values: weights sum to one everywhere."""
    boxes = Tiling(size, data.draw(st.integers(0, size // 2))).boxes(width, height)
    image = np.random.default_rng(0).normal(0, 5, (height, width)).astype(np.float32)
    blender = TileBlender(boxes)
    for left, top, right, bottom in reversed(boxes):
        blender.add((left, top, right, bottom), image[top:bottom, left:right])
    np.testing.assert_allclose(blender.logits, image, atol=2e-5)


def test_tiles_that_disagree_fade_into_each_other() -> None:
    """One tile is 0, the next 1: values change gradually within the overlap, and not outside of it."""
    boxes = Tiling(100, 40).boxes(160, 50)
    assert boxes == [(0, 0, 100, 50), (60, 0, 160, 50)]
    blender = TileBlender(boxes)
    for value, box in enumerate(boxes):
        blender.add(box, np.full((50, 100), value, np.float32))
    row = blender.logits[25]
    assert (row[:60] == 0).all() and (row[100:] == 1).all()
    assert np.diff(row).max() <= 1 / 40 + 1e-6 and (np.diff(row) >= 0).all()


@pytest.mark.parametrize(("size", "overlap"), [(100, 51), (100, -1), (0, 0)])
def test_invalid_sizes_and_overlaps_are_refused(size: int, overlap: int) -> None:
    with pytest.raises(UsageError, match="from 0 to half the --tile"):
        Tiling(size, overlap)


def test_options_make_a_tiling() -> None:
    assert Tiling.of(None, None) is None
    assert Tiling.of(512, None) == Tiling(512, 64)
    with pytest.raises(UsageError, match="needs --tile"):
        Tiling.of(None, 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A large image, a small one, one rotated by EXIF, and one whose mask has half its size."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "own" / name).mkdir(parents=True)

    def save(name: str, width: int, height: int, turned: bool = False, shrunk: int = 1) -> None:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        exif = Image.Exif()
        if turned:
            exif[0x0112] = 6
        image.save(tmp_path / "own" / "images" / f"{name}.png", exif=exif)
        mask = np.zeros((height // shrunk, width // shrunk), np.uint8)
        mask[: height // shrunk // 4, : width // shrunk // 4] = 255
        upright = Image.fromarray(mask).transpose(Image.Transpose.ROTATE_270) if turned else Image.fromarray(mask)
        upright.save(tmp_path / "own" / "masks" / f"{name}.png")

    save("large", 130, 100)
    save("small", 30, 40)
    save("turned", 100, 60, turned=True)
    save("shrunk", 120, 80, shrunk=2)
    return tmp_path / "own"


def test_the_samples_of_a_tiled_split_are_its_tiles(folder: Path) -> None:
    [split] = find_dataset(folder, Paths(folder.parent))
    tiles = tiled(split, Tiling(64, 16))
    assert tiles.name == "own-tiles-64-16"
    by_image: dict[str, list[Pair]] = {}
    for pair in tiles.pairs:
        by_image.setdefault(image_name(pair.name), []).append(pair)
    assert by_image.keys() == {pair.name for pair in split.pairs}
    assert {name: len(pairs) for name, pairs in by_image.items()} == {"large": 6, "small": 1, "turned": 2, "shrunk": 6}
    assert len({pair.name for pair in tiles.pairs}) == len(tiles.pairs)
    assert tiled(split, None) is split
    for pair in split.pairs:
        assert image_head(pair.image).size == read_image(pair.image).size


def test_the_metadata_of_a_tile_describes_the_tile(folder: Path) -> None:
    [split] = find_dataset(folder, Paths(folder.parent))
    tiles = tiled(split, Tiling(64, 16))
    facts = inspect(tiles).facts
    assert facts.keys() == {pair.name for pair in tiles.pairs}
    whole = inspect(split).facts
    for pair in tiles.pairs:
        fact = facts[pair.name]
        assert fact.box == pair.box and fact.image_sha256 == whole[image_name(pair.name)].image_sha256
        assert pair.box is not None and pair.mask is not None
        image, mask = read_image(pair.image), read_mask(pair.mask)
        left, top, right, bottom = mask_box(pair.box, image.size, (mask.shape[1], mask.shape[0]))
        cut = folder / "cut.png"
        Image.fromarray(mask[top:bottom, left:right]).save(cut)
        assert (fact.mask_size, fact.mask) == ((right - left, bottom - top), examine_mask(cut))
        assert fact.size == image.crop(pair.box).size
    assert len({fact.content for fact in facts.values()}) == len(facts)
    # Known samples are not read again, and metadata survives JSON.
    kept = {name: type(fact).from_json(fact.to_json()) for name, fact in facts.items()}
    assert inspect(tiles, kept).facts == facts == kept


def test_an_unreadable_image_is_named_once_and_the_others_are_tiled(folder: Path) -> None:
    (folder / "images" / "large.png").write_bytes(b"nothing")
    [split] = find_dataset(folder, Paths(folder.parent))
    found = inspect(tiled(split, Tiling(64, 16)))
    assert [path.name for path, *_ in found.undecodable] == ["large.png"]
    assert {image_name(name) for name in found.facts} == {"small", "turned", "shrunk"}


def test_a_box_scaled_to_a_masks_size_is_never_empty() -> None:
    box: Box = (3, 3, 4, 4)
    assert mask_box(box, (100, 100), (10, 10)) == (0, 0, 1, 1)
    assert mask_box((0, 0, 100, 100), (100, 100), (37, 11)) == (0, 0, 37, 11)


def test_a_cached_value_is_made_once_for_all_threads() -> None:
    made: list[int] = []
    started = threading.Event()

    def make(key: int) -> int:
        made.append(key)
        started.wait(0.05)
        return key * key

    kept = cached(make, most=2)
    threads = [threading.Thread(target=kept, args=(key,)) for key in (1, 2, 1, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [1, 2] and kept(1) == 1
    kept(3)
    assert kept(2) == 4 and sorted(made) == [1, 2, 2, 3]  # 2 was the least recently used


def test_an_error_is_raised_at_every_call() -> None:
    def make(key: str) -> str:
        raise UsageError(key)

    kept = cached(make)
    for _ in range(2):
        with pytest.raises(UsageError, match="broken"):
            kept("broken")
