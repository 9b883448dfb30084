from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dsu.errors import DsuError
from dsu.pictures import cutout, overlay


def grey_ground(height: int = 30, width: int = 40) -> NDArray[np.uint8]:
    return np.full((height, width, 3), 100, np.uint8)


def box(height: int = 30, width: int = 40) -> NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    mask[10:20, 10:30] = 255
    return mask


def test_an_overlay_tints_the_object_and_outlines_it() -> None:
    drawn = overlay(grey_ground(), box())
    assert (drawn.mode, drawn.size) == ("RGB", (40, 30))
    pixels = np.asarray(drawn).astype(int)
    inside, edge, outside = pixels[15, 20], pixels[15, 10], pixels[2, 2]
    assert outside.tolist() == [100, 100, 100]
    assert edge.tolist() == [255, 32, 140]
    assert 100 < inside[0] < 255


def test_pixels_below_the_threshold_are_neither_tinted_nor_outlined() -> None:
    unsure = box() // 4  # 63 of 255: 0.247
    assert np.array_equal(np.asarray(overlay(grey_ground(), unsure)), grey_ground())
    assert not np.asarray(cutout(grey_ground(), unsure)).any()
    pixels = np.asarray(overlay(grey_ground(), unsure, 0.24)).astype(int)
    assert pixels[15, 10].tolist() == [255, 32, 140] and 100 < pixels[15, 20, 0] < 130
    assert np.array_equal(np.asarray(cutout(grey_ground(), unsure, 0.24))[..., 3], unsure)


def test_the_given_image_does_not_change() -> None:
    image = Image.fromarray(grey_ground())
    overlay(image, box())
    cutout(image, box())
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), grey_ground())


def test_a_cutouts_opacity_is_the_mask(tmp_path: Path) -> None:
    Image.fromarray(grey_ground()).save(tmp_path / "image.png")
    Image.fromarray(box()).save(tmp_path / "mask.png")
    for image, mask in ((grey_ground(), box()), (tmp_path / "image.png", tmp_path / "mask.png")):
        drawn = cutout(image, mask)
        assert drawn.mode == "RGBA"
        assert np.array_equal(np.asarray(drawn)[..., 3], box())
        assert np.array_equal(np.asarray(drawn)[..., :3], np.where(box()[..., None] > 0, grey_ground(), 0))


@pytest.mark.parametrize("draw", [overlay, cutout])
def test_a_mask_of_another_size_is_refused(draw: Any) -> None:
    with pytest.raises(DsuError, match="image has 40x30 pixels and the mask 20x10"):
        draw(grey_ground(), box(10, 20))
