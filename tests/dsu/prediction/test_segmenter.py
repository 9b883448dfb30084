import numpy as np
import pytest
import torch
from PIL import Image

from dsu import Segmenter
from dsu.config import build_config
from dsu.errors import UsageError
from dsu.heads.head_file import HEAD_FILE, HeadInfo, save_head
from dsu.network.head import Head
from dsu.prediction.inference import finish_mask


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    config = build_config("toy", hiera_size=128, dino_size=126)
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_head(folder / HEAD_FILE, Head(config).state_dict(), HeadInfo(config=config))
    return Segmenter.load(folder, device="cpu")


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_a_mask_has_the_images_own_size_and_is_a_probability(segmenter: Segmenter) -> None:
    mask = segmenter.predict(picture(90, 60))
    assert mask.shape == (60, 90)
    assert mask.dtype == np.float32
    assert 0 < mask.min() < mask.max() < 1


def test_pil_and_arrays_and_batches_agree(segmenter: Segmenter) -> None:
    images = [picture(90, 60), picture(33, 47)]
    alone = [segmenter.predict(image) for image in images]
    together = segmenter.predict_batch([np.asarray(image) for image in images])
    for a, b in zip(alone, together, strict=True):
        assert np.allclose(a, b, atol=1e-5)


def test_a_grey_array_is_taken_and_floats_are_refused(segmenter: Segmenter) -> None:
    assert segmenter.predict(np.zeros((20, 30), np.uint8)).shape == (20, 30)
    with pytest.raises(UsageError, match="uint8"):
        segmenter.predict(np.zeros((20, 30, 3), np.float32))  # type: ignore[arg-type]


def test_finishing_is_bilinear_resize_sigmoid_and_minmax_only_where_asked() -> None:
    logits = torch.linspace(-3, 3, 64).reshape(1, 8, 8)
    plain = finish_mask(logits, (8, 8), "none")
    assert np.allclose(plain, logits[0].sigmoid().numpy())
    stretched = finish_mask(logits, (8, 8), "minmax")
    expected = (plain - plain.min()) / (plain.max() - plain.min() + 1e-8)
    assert np.allclose(stretched, expected)
    assert finish_mask(logits, (20, 10), "none").shape == (10, 20)
    flat = finish_mask(torch.zeros(1, 8, 8), (8, 8), "minmax")
    assert np.array_equal(flat, np.zeros((8, 8), np.float32)), "a constant map has no range to stretch"
