"""Cached augmentations depend only on content and number, change image and mask alike, and keep the object."""

import numpy as np
from hypothesis import given, settings, strategies as st
from PIL import Image

from dsu.data.decoding import Augmentation, augmentation


def painted(width: int, height: int, seed: int) -> tuple[Image.Image, np.ndarray]:
    """An image whose red channel is its mask, so that changes of the two can be compared."""
    mask = np.where(np.random.default_rng(seed).random((height, width)) < 0.3, 255, 0).astype(np.uint8)
    return Image.fromarray(np.stack([mask, mask * 0, mask * 0], axis=-1)), mask


@given(width=st.integers(1, 40), height=st.integers(1, 40), index=st.integers(1, 60), seed=st.integers(0, 99))
@settings(max_examples=100)
def test_image_and_mask_change_alike(width: int, height: int, index: int, seed: int) -> None:
    image, mask = painted(width, height, seed)
    view = augmentation(f"content{seed}", index)
    plain = Augmentation(view.crops, view.turns, view.mirrored, 1, 1, 1)  # without changes of colour
    turned, turned_mask = plain.apply(image, mask)
    assert turned_mask is not None
    assert np.array_equal(np.asarray(turned)[..., 0], turned_mask)
    assert turned.size == view.apply(image, mask)[0].size


@given(index=st.integers(1, 60), seed=st.integers(0, 99), x=st.integers(0, 63), y=st.integers(0, 47))
@settings(max_examples=100)
def test_the_object_is_never_cropped_away(index: int, seed: int, x: int, y: int) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[y, x] = 255
    _, cut = augmentation(str(seed), index).apply(Image.new("RGB", (64, 48)), mask)
    assert cut is not None and cut.max() == 255


def test_a_mask_of_another_size_is_cropped_in_proportion() -> None:
    image, mask = painted(40, 20, 0)
    double = np.repeat(np.repeat(mask, 2, 0), 2, 1)
    view = Augmentation(((0.5, 1.0, 0.0),), 1, False, 1, 1, 1)
    turned, cut = view.apply(image, double)
    assert cut is not None
    assert turned.size == (10, 20) and cut.shape == (40, 20)
    assert np.array_equal(np.asarray(turned)[..., 0], cut[::2, ::2])


def test_augmentations_depend_only_on_content_and_number_and_vary() -> None:
    assert augmentation("a", 3) == augmentation("a", 3)
    views = [augmentation(content, index) for content in ("a", "b") for index in range(1, 61)]
    assert len(set(views)) == 120
    assert {view.turns for view in views} == {0, 1, 2, 3} and {view.mirrored for view in views} == {True, False}
    assert all(0.5 <= side <= 1 and 0 <= x <= 1 and 0 <= y <= 1 for view in views for side, x, y in view.crops)
    assert all(0.7 <= view.brightness <= 1.3 for view in views)


def test_the_recipe_matches_its_version_number() -> None:
    """A change of cached augmentations must increase `RECIPE`, or stores would contain two kinds."""
    view = augmentation("content", 1)
    assert (view.turns, view.mirrored) == (2, False)
    assert np.round(view.crops[0], 6).tolist() == [0.779089, 0.031271, 0.146404]
    assert np.round([view.brightness, view.contrast, view.saturation], 6).tolist() == [0.921337, 1.210485, 0.829196]
