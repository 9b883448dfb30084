"""The traced graph equals the network, also in its ablations, for any batch size."""

import pytest
import torch
from support import toy_network
from torch import Tensor

from dsu.config import Ablation
from dsu.export.graph import WholeNetwork, input_sizes


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ["A", "C"])
@torch.no_grad()
def test_the_graph_equals_the_network_for_any_batch_size(ablation: Ablation) -> None:
    network = toy_network(adapt_last=2, feature_dtype=torch.float16, ablation=ablation).eval().requires_grad_(False)
    whole, sizes = WholeNetwork(network).eval(), input_sizes(network.config)
    assert list(sizes) == (["pixels"] if ablation == "A" else ["pixels", "dino_pixels"])

    def images(count: int) -> tuple[Tensor, ...]:
        return tuple(torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8) for side in sizes.values())

    two = images(2)
    expected = network(*(image.permute(0, 3, 1, 2) for image in two), start_feature="pixels").logits
    assert torch.allclose(whole(*two), expected, atol=1e-3 * expected.std().item())
    batch = torch.export.Dim("batch", min=1)
    # A batch size that is frozen in the graph is an error here.
    traced = torch.export.export(whole, images(5), dynamic_shapes=tuple({0: batch} for _ in sizes), strict=False)
    assert torch.allclose(traced.module()(*two), expected, atol=1e-3 * expected.std().item())
