from pathlib import Path

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


def test_masks_have_the_images_size_and_are_probabilities(segmenter: Segmenter) -> None:
    mask = segmenter(picture(90, 60))
    assert mask.shape == (60, 90)
    assert mask.dtype == np.float32
    assert 0 < mask.min() < mask.max() < 1


def test_pil_and_arrays_and_batches_agree(segmenter: Segmenter) -> None:
    images = [picture(90, 60), picture(33, 47)]
    alone = [segmenter(image) for image in images]
    together = segmenter([np.asarray(image) for image in images])
    for a, b in zip(alone, together, strict=True):
        assert np.allclose(a, b, atol=1e-5)


def test_arrays_and_tensors_equal_their_images(segmenter: Segmenter) -> None:
    grey = picture(30, 20).convert("L")
    colours = np.asarray(picture(30, 20))
    mask = segmenter(picture(30, 20))
    deep = colours.astype(np.uint16) * 257
    chw = torch.from_numpy(colours.copy()).permute(2, 0, 1)
    same = [colours, deep, colours / 255, (colours / 255).astype(np.float32), chw, chw / 255, chw.numpy()]
    opaque = np.dstack([colours, np.full((20, 30), 255, np.uint8)])
    for one in (*same, opaque):
        assert np.array_equal(segmenter(one), mask)
    assert np.allclose(segmenter((chw / 255).bfloat16()), mask, atol=0.02)
    for one in (np.asarray(grey), np.asarray(grey)[..., None], torch.from_numpy(np.array(grey))[None]):
        assert np.array_equal(segmenter(one), segmenter(grey))
    batch = segmenter(torch.stack([chw, chw]))
    assert isinstance(batch, list)
    assert len(batch) == 2, "a tensor of four dimensions is several images"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (np.full((20, 30, 3), 2.0), "0 to 1"),
        (np.full((20, 30, 3), np.nan), "0 to 1"),
        (np.zeros((20, 30, 5), np.uint8), "shape"),
        (np.zeros((0, 30), np.uint8), "shape"),
        (np.zeros((20, 30), np.int64), "int64"),
        (3, "int"),
    ],
)
def test_invalid_images_are_refused_with_their_kind(segmenter: Segmenter, wrong: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        segmenter([wrong])  # type: ignore[list-item]


def test_a_folder_is_not_reported_as_a_damaged_image(segmenter: Segmenter, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder") as refused:
        segmenter(tmp_path)
    assert "remove" not in str(refused.value)


def test_an_empty_list_of_images_and_moving_to_a_device(segmenter: Segmenter) -> None:
    assert segmenter([]) == []
    image = picture(30, 20)
    before = segmenter(image)
    assert np.array_equal(segmenter.to("cpu")(image), before)
    with pytest.raises(UsageError, match="nowhere"):
        segmenter.to("nowhere")


def test_finishing_resizes_logits_and_normalises_only_on_request() -> None:
    logits = torch.linspace(-3, 3, 64).reshape(1, 8, 8)
    plain = finish_mask(logits, (8, 8), "none")
    assert np.allclose(plain, logits[0].sigmoid().numpy())
    stretched = finish_mask(logits, (8, 8), "minmax")
    expected = (plain - plain.min()) / (plain.max() - plain.min() + 1e-8)
    assert np.allclose(stretched, expected)
    assert finish_mask(logits, (20, 10), "none").shape == (10, 20)
    flat = finish_mask(torch.zeros(1, 8, 8), (8, 8), "minmax")
    assert np.array_equal(flat, np.zeros((8, 8), np.float32)), "a constant map has no range to stretch"
