import math

import pytest
import torch

from dsu.settings import TrainingSettings
from dsu.training.trainer import learning_rate


@pytest.mark.parametrize("epochs", [1, 2, 50])
def test_the_learning_rate_is_torchs_cosine_per_epoch(epochs: int) -> None:
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
    assert (recipe.weight_decay, str(recipe.views)) == (5e-4, "flips")
    assert (recipe.region, recipe.bce) == ("iou", "plain")
