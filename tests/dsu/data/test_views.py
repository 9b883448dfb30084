import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from dsu.data.views import (
    MAX_AUGMENTATIONS,
    Views,
    draw_samples,
    draw_view,
    epoch_order,
    flip,
    view_count,
    view_index,
    view_name,
)

NAMES = [f"image-{index}" for index in range(400)]


def test_flip_equals_numpys_flips_and_is_its_own_inverse() -> None:
    batch = torch.arange(4 * 5 * 6 * 3, dtype=torch.int32).reshape(4, 5, 6, 3)
    flipped = flip(batch, torch.arange(4))
    expected = [batch[0], np.fliplr(batch[1]), np.flipud(batch[2]), np.flipud(np.fliplr(batch[3]))]
    for got, want in zip(flipped, expected, strict=True):
        assert np.array_equal(got.numpy(), np.asarray(want))
    assert torch.equal(flip(flipped, torch.arange(4)), batch)


def test_masks_flip_like_pixels() -> None:
    pixels = torch.randint(0, 255, (3, 4, 4, 3), dtype=torch.uint8)
    views = torch.tensor([3, 1, 2])
    assert torch.equal(flip(pixels, views)[..., 0], flip(pixels[..., 0], views))


@given(seed=st.integers(0, 99), epoch=st.integers(0, 99))
@settings(max_examples=20)
def test_draws_depend_only_on_seed_epoch_and_name(seed: int, epoch: int) -> None:
    shuffled = epoch_order(seed, epoch, NAMES)
    assert shuffled == epoch_order(seed, epoch, list(reversed(NAMES)))
    assert sorted(shuffled) == sorted(NAMES)
    # The order of two samples does not depend on which others exist.
    assert epoch_order(seed, epoch, NAMES[:50]) == [name for name in shuffled if name in set(NAMES[:50])]
    assert draw_view(seed, epoch, "image-7", Views(4)) == draw_view(seed, epoch, "image-7", Views(4))


def test_each_axis_is_flipped_half_of_the_time() -> None:
    for views, share in ((1, [1, 0, 0, 0]), (2, [0.5, 0.5, 0, 0]), (4, [0.25] * 4)):
        drawn = np.bincount(
            [draw_view(0, epoch, name, Views(views)) for epoch in range(10) for name in NAMES], minlength=4
        )
        assert np.abs(drawn / drawn.sum() - share).max() < 0.03


def test_epochs_and_seeds_differ() -> None:
    assert epoch_order(0, 0, NAMES) != epoch_order(0, 1, NAMES) != epoch_order(1, 1, NAMES)


@pytest.mark.parametrize("text", ["none", "width", "flips", "none+1", "flips+60"])
def test_views_are_formatted_as_they_are_parsed(text: str) -> None:
    assert str(Views.parse(text)) == text


def test_numbers_select_only_flips() -> None:
    assert [str(Views.parse(count)) for count in (1, 2, 4)] == ["none", "width", "flips"]


@pytest.mark.parametrize("text", ["3", "flips+61", "flips+", "+3", "flip", "", None, "flips+-1"])
def test_invalid_views_are_refused_with_the_valid_ones(text: str | None) -> None:
    with pytest.raises(ValueError, match=r"none, width or flips, or flips\+K with K up to 60"):
        Views.parse(text)


def test_every_view_has_its_own_index_and_raw_arrays_share_one_for_all_flips() -> None:
    views = Views(4, MAX_AUGMENTATIONS).numbers
    for array, distinct in (("V", 4 + MAX_AUGMENTATIONS), ("pixels", 1 + MAX_AUGMENTATIONS)):
        places = {view_index(array, view) for view in views}
        assert places == set(range(view_count(array))) and len(places) == distinct
    assert {view_index("mask", view) for view in range(4)} == {0}
    with pytest.raises(ValueError, match="extra2 horizontal"):
        view_index("V", 9)


def test_an_extra_view_is_not_flipped() -> None:
    batch = torch.randint(0, 255, (2, 4, 4, 3), dtype=torch.uint8)
    assert torch.equal(flip(batch, torch.tensor([4, 12])), batch)
    assert (view_name(0), view_name(3), view_name(12)) == ("identity", "both", "extra3")


def test_extra_views_are_drawn_like_flips() -> None:
    views = Views(4, 4)
    drawn = [draw_view(0, epoch, name, views) for epoch in range(10) for name in NAMES]
    assert set(drawn) == set(views.numbers)
    assert np.abs(np.unique(drawn, return_counts=True)[1] / len(drawn) - 1 / 8).max() < 0.03


@given(empties=st.integers(1, 399), seed=st.integers(0, 9), epoch=st.integers(0, 9))
@settings(max_examples=30)
def test_balanced_draws_have_equal_halves_that_are_even_within(empties: int, seed: int, epoch: int) -> None:
    empty = set(NAMES[:empties])
    drawn = draw_samples(seed, epoch, NAMES, empty)
    assert len(drawn) == len(set(drawn)) == len(NAMES)
    names = [name for name, _ in drawn]
    assert sum(name in empty for name in names) == len(NAMES) // 2
    for kind in (empty, set(NAMES) - empty):
        times = [names.count(name) for name in sorted(kind)]
        assert max(times) - min(times) <= 1
        assert all((name, turn) in set(drawn) for name in kind for turn in range(names.count(name)))


def test_samples_omitted_from_a_balanced_epoch_are_drawn_in_others() -> None:
    empty = set(NAMES[:20])
    seen = {name for epoch in range(12) for name, _ in draw_samples(0, epoch, NAMES, empty)}
    assert seen == set(NAMES)


def test_without_balance_each_sample_is_drawn_once_in_the_epochs_order() -> None:
    assert draw_samples(3, 1, NAMES, None) == [(name, 0) for name in epoch_order(3, 1, NAMES)]


def test_a_sample_that_is_drawn_twice_has_independent_views() -> None:
    first, second = ([draw_view(0, 0, name, Views(4), turn) for name in NAMES] for turn in (0, 1))
    assert 0.15 < np.mean(np.array(first) == np.array(second)) < 0.35
