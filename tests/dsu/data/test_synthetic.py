"""The demo's data set: reproducible, varied, and with visible objects."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dsu.data.datasets import Paths, find_dataset
from dsu.data.inspection import describe, inspect
from dsu.data.synthetic import draw_dataset, draw_sample

Sample = tuple[NDArray[np.uint8], NDArray[np.uint8]]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [draw_sample(np.random.default_rng((7, index))) for index in range(40)]


def digest(folder: Path) -> list[tuple[str, str]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [(file.relative_to(folder).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]


def test_it_is_a_data_set_without_warnings(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "shapes", train=4, test=2)
    splits = find_dataset(tmp_path / "shapes", Paths(tmp_path))
    assert [(split.name, split.kind, len(split.pairs)) for split in splits] == [
        ("shapes-TR", "train", 4),
        ("shapes-TE", "test", 2),
    ]
    for split in splits:
        assert len(describe(split, inspect(split))) == 2


def test_a_seed_is_reproducible_and_more_images_do_not_change_the_first(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "a", train=3, test=1)
    draw_dataset(tmp_path / "b", train=3, test=1)
    draw_dataset(tmp_path / "longer", train=5, test=1)
    draw_dataset(tmp_path / "other", train=3, test=1, seed=1)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert set(digest(tmp_path / "a")) < set(digest(tmp_path / "longer"))
    assert not {sha for _, sha in digest(tmp_path / "a")} & {sha for _, sha in digest(tmp_path / "other")}


def test_sizes_vary_within_bounds(samples: list[Sample]) -> None:
    sizes = {image.shape[:2] for image, _ in samples}
    assert len(sizes) > 30
    assert all(160 <= side <= 320 for size in sizes for side in size)
    assert draw_sample(np.random.default_rng(0), (64, 64))[0].shape == (64, 64, 3)


def test_masks_have_soft_edges_and_objects_of_moderate_size(samples: list[Sample]) -> None:
    for image, mask in samples:
        assert mask.shape == image.shape[:2]
        assert mask.dtype == image.dtype == np.uint8
        assert mask.min() == 0
        assert mask.max() == 255
        assert 0.01 < (mask > 127).mean() < 0.6
        assert 0 < ((mask > 20) & (mask < 235)).mean() < 0.1


def test_some_objects_are_salient_and_some_camouflaged_but_none_is_invisible(samples: list[Sample]) -> None:
    differences = np.array([_difference_from_surround(image, mask) for image, mask in samples])
    assert (differences > 0.2).mean() > 0.3, "salient"
    assert (differences < 0.15).mean() > 0.2, "camouflaged"
    assert differences.min() > 0.01


def _difference_from_surround(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> float:
    """The difference of object and background in mean colour, plus that in standard deviation, in 0..1 each."""
    inside, outside = image[mask > 200] / 255, image[mask < 50] / 255
    tone = np.abs(inside.mean(0) - outside.mean(0)).mean()
    return float(tone + np.abs(inside.std(0) - outside.std(0)).mean())
