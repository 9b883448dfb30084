import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsu.settings import TrainingSettings
from dsu.training import hold_out, learning_rate


def contents(count: int) -> dict[str, str]:
    return {f"s{index:03}": hashlib.sha256(str(index).encode()).hexdigest() for index in range(count)}


@given(count=st.integers(2, 200), fraction=st.sampled_from([0.05, 0.1, 0.3, 0.5]))
@settings(max_examples=40, deadline=None)
def test_held_out_samples_stay_held_out_when_others_come(count: int, fraction: float) -> None:
    train, held = hold_out(contents(count), fraction)
    assert sorted(train + held) == sorted(contents(count))
    assert held
    more_train, more_held = hold_out(contents(count + 50), fraction)
    # Only the one that a small set holds out for want of any other may change sides.
    assert len(set(held) - set(more_held)) <= (1 if len(held) == 1 else 0)
    assert set(train) <= set(more_train)


def test_the_share_is_about_the_fraction_and_nothing_without_one() -> None:
    _, held = hold_out(contents(5000), 0.1)
    assert 400 < len(held) < 600
    assert hold_out(contents(50), 0.0)[1] == []


def test_copies_of_an_image_stay_on_one_side() -> None:
    doubled = contents(300) | {f"copy-{name}": content for name, content in contents(300).items()}
    train, held = hold_out(doubled, 0.3)
    assert {name.removeprefix("copy-") for name in held}.isdisjoint({name.removeprefix("copy-") for name in train})


def test_a_set_of_one_image_can_still_be_trained_on() -> None:
    assert hold_out({"a": "x", "b": "x"}, 0.5)[0] or hold_out({"a": "x", "b": "x"}, 0.5)[1]
    assert hold_out({"a": hashlib.sha256(b"3").hexdigest()}, 0.0) == (["a"], [])


@pytest.mark.parametrize("epochs", [1, 2, 50])
def test_the_learning_rate_is_torchs_cosine_stepped_once_an_epoch(epochs: int) -> None:
    recipe = TrainingSettings(epochs=epochs)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs, eta_min=recipe.lr_min)
    for epoch in range(epochs):
        assert math.isclose(learning_rate(recipe, epoch), optimizer.param_groups[0]["lr"], rel_tol=1e-9)
        optimizer.step()
        schedule.step()


def test_the_papers_recipe_is_the_default() -> None:
    recipe = TrainingSettings()
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.lr_min) == (50, 8, 1e-3, 1e-7)
    assert (recipe.weight_decay, recipe.views, recipe.bce) == (5e-4, 4, "plain")
