"""Features and steps at official sizes are bit-identical for any batch size and any number of threads.

`tiny` has the smallest official encoders. Its Hiera stage 4 has 121 tokens, for which matrix libraries choose different
kernels depending on the number of samples.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dsu.config import build_config
from dsu.encoders.weights import load_dino, load_hiera
from dsu.loss import SegmentationLoss
from dsu.network.network import DSUNet
from dsu.settings import EncoderWeights

FEATURES = ("V", "S1", "S2", "S3", "S4", "B6")
SAMPLES = 9

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network() -> DSUNet:
    """A network with adapters in the last stage only, so that a step resumes from S3."""
    config = build_config("tiny", adapt_last=2)
    weights = EncoderWeights(random=True)
    torch.manual_seed(0)
    return DSUNet(
        config,
        load_hiera(config, weights)[0],
        load_dino(config, weights)[0],
        feature_dtype=torch.float16,
    )


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = (352, 518)
    first, second = (
        torch.randint(0, 256, (SAMPLES, 3, side, side), dtype=torch.uint8, generator=generator) for side in sides
    )
    return first, second


@pytest.fixture(scope="module")
def alone(network: DSUNet, images: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Every sample encoded separately, as stage one does on a CPU."""
    rows = [network.encode(images[0][[i]], images[1][[i]], FEATURES) for i in range(SAMPLES)]
    return {name: torch.cat([row[name] for row in rows]) for name in FEATURES}


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_features_depend_only_on_their_sample(
    network: DSUNet, images: tuple[Tensor, Tensor], alone: dict[str, Tensor]
) -> None:
    together = network.encode(*images, FEATURES)
    assert [name for name in FEATURES if not torch.equal(together[name], alone[name])] == []


@pytest.mark.usefixtures("_threads")
def test_features_do_not_depend_on_the_number_of_threads(
    network: DSUNet, images: tuple[Tensor, Tensor], alone: dict[str, Tensor]
) -> None:
    if not torch.backends.mkl.is_available():
        pytest.skip("only Intel's matrix library guarantees this")
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found = network.encode(images[0][:1], images[1][:1], FEATURES)
        assert [name for name in FEATURES if not torch.equal(found[name], alone[name][:1])] == [], threads


def test_blocks_of_several_samples_are_padded(network: DSUNet, images: tuple[Tensor, Tensor]) -> None:
    """As on a GPU: each sample has the same features in a full block, a short one, and alone."""
    network.encoder_batch_size = 3
    try:
        whole = network.encode(images[0][:4], images[1][:4], FEATURES)
        for start, stop in ((0, 2), (3, 4)):
            part = network.encode(images[0][start:stop], images[1][start:stop], FEATURES)
            assert [name for name in FEATURES if not torch.equal(part[name], whole[name][start:stop])] == []
    finally:
        network.encoder_batch_size = None


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 3), (0, 8), (7, 9)])
def test_steps_from_stored_features_equal_steps_from_images(
    network: DSUNet, images: tuple[Tensor, Tensor], alone: dict[str, Tensor], start: int, stop: int
) -> None:
    """Loss and all gradients, at several batch sizes."""
    mask = (images[0][start:stop, :1] > 127).float()
    stored = {name: alone[name][start:stop] for name in ("V", "S1", "S2", "S3")}
    pixels, guides = images[0][start:stop], images[1][start:stop]
    network.train()
    found = []
    for inputs in ({"features": stored}, {"pixel_values": pixels, "guide_values": guides, "start_feature": "S3"}):
        network.zero_grad()
        loss = SegmentationLoss()(network(**inputs), mask)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    (loss, gradients), (other_loss, other_gradients) = found
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    assert [name for name in gradients if not torch.equal(gradients[name], other_gradients[name])] == []
