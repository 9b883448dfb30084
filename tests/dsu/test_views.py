import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsu.views import VIEWS, draw_view, epoch_order, flip

NAMES = [f"image-{index}" for index in range(400)]


def test_flip_is_numpys_flip_of_each_sample_and_undoes_itself() -> None:
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
@settings(max_examples=20, deadline=None)
def test_what_is_drawn_depends_on_seed_epoch_and_name_alone(seed: int, epoch: int) -> None:
    shuffled = epoch_order(seed, epoch, NAMES)
    assert shuffled == epoch_order(seed, epoch, list(reversed(NAMES)))
    assert sorted(shuffled) == sorted(NAMES)
    # A sample's place relative to others does not depend on who else is there.
    assert epoch_order(seed, epoch, NAMES[:50]) == [name for name in shuffled if name in set(NAMES[:50])]
    assert draw_view(seed, epoch, "image-7", 4) == draw_view(seed, epoch, "image-7", 4)


def test_each_axis_flips_half_of_the_time() -> None:
    for views, share in ((1, [1, 0, 0, 0]), (2, [0.5, 0.5, 0, 0]), (4, [0.25] * 4)):
        drawn = np.bincount([draw_view(0, epoch, name, views) for epoch in range(10) for name in NAMES], minlength=4)
        assert np.abs(drawn / drawn.sum() - share).max() < 0.03, VIEWS


def test_epochs_and_seeds_differ() -> None:
    assert epoch_order(0, 0, NAMES) != epoch_order(0, 1, NAMES) != epoch_order(1, 1, NAMES)
