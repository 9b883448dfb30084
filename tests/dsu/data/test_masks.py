"""The format of masks is chosen for a whole set: grey levels, labels or colours, never all black."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from PIL import Image

from dsu.data.masks import MaskFacts, MaskFormat, choose_mask_format, describe_mask_format, examine_mask
from dsu.errors import UsageError

Masks = Sequence[NDArray[np.generic] | Image.Image]

OBJECT = np.zeros((8, 8), np.uint8)
OBJECT[2:6, 2:6] = 1
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]


def facts_of(folder: Path, masks: Masks) -> list[MaskFacts]:
    found = []
    for index, mask in enumerate(masks):
        image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        image.save(folder / f"{index}.png")
        found.append(examine_mask(folder / f"{index}.png"))
    return found


def read_all(folder: Path, masks: Masks, foreground: Sequence[int] | None = None) -> list[NDArray[np.uint8]]:
    mask_format = choose_mask_format(facts_of(folder, masks), foreground)
    return [mask_format.read(folder / f"{index}.png") for index in range(len(masks))]


def paletted(indices: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(indices)
    image.putpalette(PALETTE)
    return image


def colours(*values: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The object in vertical stripes of the given colours."""
    canvas = np.zeros((8, 8, 3), np.uint8)
    for column, value in zip(range(2, 6), values * 4, strict=False):
        canvas[2:6, column] = value
    return canvas


def test_grey_sets_keep_soft_edges_and_dark_masks(tmp_path: Path) -> None:
    soft = np.arange(256, dtype=np.uint8).reshape(16, 16)
    masks = [OBJECT * 255, soft, OBJECT * 90, OBJECT * 0]
    for mask, expected in zip(read_all(tmp_path, masks), masks, strict=True):
        assert np.array_equal(mask, expected)


def test_binary_masks_with_jpeg_noise_are_grey(tmp_path: Path) -> None:
    noisy = OBJECT * 250
    noisy[0] = (1, 2, 3, 4, 1, 2, 3, 4)
    noisy[1] = 2
    assert np.array_equal(read_all(tmp_path, [noisy])[0], noisy)


@pytest.mark.parametrize(
    "masks",
    [
        [OBJECT],
        [OBJECT, OBJECT * 5, OBJECT * 2],
        [OBJECT * 3, np.where(OBJECT > 0, 7, 0).astype(np.uint8), np.pad(OBJECT[1:-1, 1:-1], 1) * 100],
        [OBJECT.astype(np.uint16) * 7],
        [OBJECT.astype(np.uint16) * 1001],
        [OBJECT.astype(np.uint16) * 255],
        [OBJECT.astype(np.uint16) * 65535],
        [paletted(OBJECT), paletted(OBJECT * 3)],
        [colours((128, 0, 0)), colours((0, 128, 0), (0, 0, 200)), colours((128, 128, 128))],
    ],
    ids=["0/1", "0..5", "to 100", "16-bit labels", "ids", "8-bit in 16", "16-bit", "palette", "colours, one grey"],
)
def test_labels_of_every_kind_are_foreground(tmp_path: Path, masks: Masks) -> None:
    for mask in read_all(tmp_path, masks):
        assert np.array_equal(mask, OBJECT * 255)


def test_a_label_map_with_ignored_pixels_is_recognised(tmp_path: Path) -> None:
    voc = OBJECT * 15
    voc[2, 2:5] = 255
    assert np.array_equal(read_all(tmp_path, [voc, OBJECT * 3])[0], OBJECT * 255)


def test_soft_16_bit_masks_are_scaled(tmp_path: Path) -> None:
    soft = np.arange(256, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(read_all(tmp_path, [soft * 257])[0], soft)
    assert np.array_equal(read_all(tmp_path, [soft])[0], soft)


@pytest.mark.parametrize(
    ("mask", "foreground"),
    [
        (OBJECT + OBJECT.T * 0 + np.eye(8, dtype=np.uint8) * 4, [1, 5]),
        (paletted(OBJECT * 2), [2]),
        (colours((255, 0, 0)), [0xFF0000]),
        (OBJECT.astype(np.uint16) * 4000, [4000]),
    ],
    ids=["grey", "palette", "colour", "16 bits"],
)
def test_given_foreground_values_are_used(
    tmp_path: Path, mask: NDArray[np.generic] | Image.Image, foreground: list[int]
) -> None:
    assert np.array_equal(read_all(tmp_path, [mask], foreground)[0], OBJECT * 255)


def test_white_as_foreground_of_coloured_masks_includes_masks_of_only_white(tmp_path: Path) -> None:
    masks = [colours((255, 0, 0), (255, 255, 255)), colours((255, 255, 255))]
    both, white = read_all(tmp_path, masks, [0xFFFFFF])
    assert np.array_equal(white, OBJECT * 255)
    assert both.sum() == white.sum() / 2


def test_a_foreground_value_that_no_mask_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"value 9 of --foreground: they contain the values 0, 1, 3\."):
        choose_mask_format(facts_of(tmp_path, [OBJECT, OBJECT * 3]), [9])


def test_labels_without_background_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"choose from `--foreground 1 --foreground 2 --foreground 3` \(they contain the values 1, 2, 3\)",
    ):
        choose_mask_format(facts_of(tmp_path, [OBJECT + 1, OBJECT * 2 + 1]))


def test_white_masks_without_background_are_accepted(tmp_path: Path) -> None:
    assert choose_mask_format(facts_of(tmp_path, [OBJECT * 0 + 255])) == MaskFormat()


def test_assumptions_about_masks_are_reported(tmp_path: Path) -> None:
    def said(masks: Masks, foreground: Sequence[int] | None = None) -> str:
        facts = facts_of(tmp_path, masks)
        return "\n".join(describe_mask_format(choose_mask_format(facts, foreground), facts))

    assert said([OBJECT * 255]) == "Masks: grey levels, soft edges kept."
    assert "1 mask without foreground" in said([OBJECT * 255, OBJECT * 0])
    assert "2 masks without foreground" in said([OBJECT * 255, OBJECT * 0, OBJECT * 0])
    for masks in ([OBJECT * 5], [paletted(OBJECT)], [colours((128, 0, 0))]):
        assert "foreground" in said(masks) and "--foreground" not in said(masks), "one value leaves no choice"
    for masks in ([OBJECT, OBJECT * 2], [paletted(OBJECT), paletted(OBJECT * 2)]):
        assert "any of `--foreground 1 --foreground 2`." in said(masks)
    assert "any of `--foreground VALUE`, once for each value." in said([OBJECT * value for value in range(1, 9)])
    assert "8388608 (#800000)" in said([colours((128, 0, 0))])
    assert "the value 5 is foreground" in said([OBJECT * 5], [5])
    assert "the values 1, 5 are foreground" in said([OBJECT * 5, OBJECT], [1, 5])
    many = [OBJECT * value for value in range(151)]
    assert "darker than half" in said(many), "like ADE20K's labels: too many values to be sure"
    assert "`--foreground VALUE`, once for each value" in said(many)


@settings(max_examples=60)
@given(
    st.lists(
        st.builds(
            MaskFacts,
            kind=st.sampled_from(["grey", "deep", "indices", "colours"]),
            values=st.none() | st.lists(st.integers(0, 255), min_size=1, max_size=4).map(tuple),
            minimum=st.just(0),
            maximum=st.integers(0, 255),
            dark=st.integers(0, 99),
            bright=st.integers(0, 99),
        )
    )
)
def test_any_facts_give_a_format_and_survive_json(facts: list[MaskFacts]) -> None:
    mask_format = choose_mask_format(facts)
    assert MaskFormat.from_json(json.loads(json.dumps(mask_format.to_json()))) == mask_format
    assert [MaskFacts.from_json(json.loads(json.dumps(mask.to_json()))) for mask in facts] == facts
    describe_mask_format(mask_format, facts)


def test_a_foreground_survives_json() -> None:
    mask_format = MaskFormat((2, 5))
    assert MaskFormat.from_json(json.loads(json.dumps(mask_format.to_json()))) == mask_format


@pytest.mark.data
@pytest.mark.parametrize("folder", ["DUTS/DUTS-TR/DUTS-TR-Mask", "CAMO/GT", "MagneticTile/MT_Uneven/masks"])
def test_real_sets_are_grey(real_data: Path, folder: str) -> None:
    masks = sorted((real_data / folder).iterdir())[:150]
    assert choose_mask_format([examine_mask(path) for path in masks]) == MaskFormat()
