"""The check of a data set: every finding, on a folder made for it (for counts see `test_dataset_check_figures`)."""

from pathlib import Path
from typing import Final

import numpy as np
import pytest
from numpy.typing import NDArray
from own_folder import SIZE, Mask, boxed, check, finding, photo, plain, write
from PIL import Image, ImageFilter

from dsu.data.datasets import Paths, find_dataset
from dsu.data.inspection import inspect
from dsu.dataset_check import Finding, check_dataset, file_counts, other_files, summary
from dsu.dataset_check.rules import FEW, SEVERITIES
from dsu.dataset_check.sheet import draw_sheet
from dsu.errors import UsageError


def names(one: Finding) -> list[str]:
    return [case.name for case in one.cases]


def test_a_sound_folder_has_no_findings(tmp_path: Path) -> None:
    found = check(write(tmp_path / "mine", plain(FEW)))
    assert found.findings == () and not found.stops
    few = check(write(tmp_path / "few", plain(FEW - 1)))
    assert [(one.key, one.severity) for one in few.findings] == [("few", "will hurt")]


def deep(image: Image.Image, factor: int) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * factor)


def turned_by_exif(image: Image.Image, path: Path, orientation: int = 3) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


def specks(size: tuple[int, int]) -> NDArray[np.uint8]:
    mask = np.zeros(size[::-1], np.uint8)
    mask[10:12, 10:12] = mask[-30:-28, -50:-48] = 255
    return mask


def shades() -> NDArray[np.uint8]:
    """More values than a label map has, all darker than half of white."""
    return np.random.default_rng(0).integers(40, 110, SIZE[::-1]).astype(np.uint8)


ONE: Final[dict[str, tuple[Image.Image, Mask]]] = {
    "flat": (Image.new("RGB", SIZE, (80, 81, 80)), boxed(255)),
    "large": (photo(99, (2100, 600)), boxed(255, size=(2100, 600))),
    "small": (photo(99, (120, 60)), boxed(255)[:60]),
    "long": (photo(99, (300, 70)), boxed(255, size=(300, 70))),
    "alpha": (photo(99).convert("RGBA"), boxed(255)),
    "mask-scaled": (photo(99, (240, 180)), boxed(255)),
    "faint-masks": (photo(99), boxed(90)),
    "empty-masks": (photo(99), boxed()),
    "full-masks": (photo(99), boxed(ground=255)),
    "grey-masks": (photo(99), np.where(boxed(255) > 0, np.uint8(255), shades())),
    "vanishing": (photo(99, (1600, 1200)), specks((1600, 1200))),
    "tiny": (photo(99, (352, 352)), specks((352, 352))),
}
"""A pair that causes the finding of this name, and no other, in a folder of sound pairs."""

FURTHER: Final = {"faint-masks": {"empty-masks"}}
"""Further findings that such a pair must cause."""

SEVERE: Final = ("flat", "faint-masks", "full-masks", "vanishing")


@pytest.mark.parametrize("key", ONE)
def test_one_bad_pair_among_sound_ones_is_named(tmp_path: Path, key: str) -> None:
    found = check(write(tmp_path / "mine", {**plain(5), "odd.png": ONE[key]}))
    one = finding(found, key)
    assert names(one) == ["odd"] and one.count == 1 and one.split == "mine"
    assert one.severity == ("will hurt" if key in SEVERE else "good to know")
    assert one.sentence().startswith(f"{one.what}: 1 (odd") and one.remedy.endswith(".")
    assert not found.stops
    concerned = {one.key for one in found.findings if "odd" in names(one)}
    assert concerned == {key} | FURTHER.get(key, set())


@pytest.mark.parametrize("key", ONE)
def test_sound_pairs_cause_no_finding(tmp_path: Path, key: str) -> None:
    assert key not in {one.key for one in check(write(tmp_path / "mine", plain(5))).findings}


def test_findings_are_ordered_by_severity(tmp_path: Path) -> None:
    odd = {f"{key}.png": pair for key, pair in ONE.items()}
    severities = [SEVERITIES.index(one.severity) for one in check(write(tmp_path / "mine", odd)).findings]
    assert severities == sorted(severities) and len(set(severities)) == 2


def test_vanishing_objects_depend_on_the_input_size(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {**plain(2), "odd.png": ONE["vanishing"]})
    lost = finding(check(folder), "vanishing")
    assert "2 of 4 objects leave no pixel at 352x352" in lost.what and "become empty: 1;" in lost.remedy
    assert "vanishing" not in {one.key for one in check(folder, side=1024).findings}


def test_a_mask_that_becomes_empty_is_severe_even_among_many_objects(tmp_path: Path) -> None:
    many = np.zeros((400, 400), np.uint8)
    many.reshape(20, 20, 20, 20)[:, 5:15, :, 5:15] = 255
    pairs = {"many.png": (photo(7, (400, 400)), many), "odd.png": ONE["vanishing"]}
    lost = finding(check(write(tmp_path / "mine", pairs)), "vanishing")
    assert lost.severity == "will hurt" and "2 of 402 objects" in lost.what
    many[:2, :2] = 255
    pairs = {"many.png": (photo(7, (1600, 1600)), np.kron(many, np.ones((4, 4), np.uint8)))}
    pairs["many.png"][1][1500, 1599] = 255
    lost = finding(check(write(tmp_path / "specks", pairs)), "vanishing")
    assert lost.severity == "good to know" and "1 of 402 objects" in lost.what


def test_a_dark_16_bit_image_is_only_flat(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {**plain(3), "odd.png": (deep(Image.new("L", SIZE, 7), 257), boxed(255))})
    assert {one.key for one in check(folder).findings if "odd" in names(one)} == {"flat"}


def test_images_with_more_than_8_bits_are_read_on_the_scale_of_their_set(tmp_path: Path) -> None:
    twelve = {f"{index}.png": (deep(photo(index), 16), boxed(255)) for index in range(4)}
    found = check(write(tmp_path / "mine", twelve))
    assert "dim" not in {one.key for one in found.findings}
    assert file_counts(found.splits)[0]["read_as"] == "scaled to 8 bits: 0 is black and 4095 white"
    assert found.splits[0].samples[0].brightest > 200
    again = photo(2).crop((6, 4, 114, 86))
    mixed = {
        **twelve,
        "again.png": (deep(again, 16), boxed(255, size=again.size)),
        "16.png": (deep(photo(9), 257), boxed(255)),
    }
    found = check(write(tmp_path / "mixed", mixed))
    assert set(names(finding(found, "dim"))) == {"0", "1", "2", "3", "again"}
    assert finding(found, "dim").severity == "will hurt" and names(finding(found, "groups")) == ["2 = again"]


def test_all_splits_share_one_scale_for_images_with_more_than_8_bits(tmp_path: Path) -> None:
    for split, factor in (("train", 64), ("test", 16)):
        write(
            tmp_path / "mine" / split, {f"{index}.png": (deep(photo(index), factor), boxed(255)) for index in range(2)}
        )
    assert [split.depth for split in check(tmp_path / "mine").splits] == [(0, 16383)] * 2


@pytest.mark.parametrize("mask", [boxed(255).T, boxed(255)[:, :100], boxed(255, size=(120, 92)), photo(99)])
def test_masks_that_stage_one_leaves_out_are_named(tmp_path: Path, mask: Mask) -> None:
    folder = write(tmp_path / "mine", {**plain(5), "odd.png": (photo(99), mask)})
    found = check(folder)
    [split] = find_dataset(str(folder), Paths(tmp_path))
    left_out = [(path, reason) for path, reason, _ in inspect(split).undecodable]
    assert [path.name for path, _ in left_out] == ["odd.png"] and found.splits[0].unreadable == tuple(left_out)
    assert left_out[0][1] in finding(found, "unreadable").sentence() and not found.stops


def test_a_mask_drawn_on_the_stored_pixels_is_rotated_with_its_image(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", plain(3))
    turned_by_exif(photo(9), folder / "images" / "odd.jpg", orientation=6)
    Image.fromarray(boxed(255)).save(folder / "masks" / "odd.png")
    found = check(folder)
    assert {one.key for one in found.findings} == {"few", "turned"}
    assert found.splits[0].samples[0].mask.size == SIZE[::-1]  # type: ignore[union-attr]
    assert draw_sheet(found, tmp_path / "sheet.png").exists()


def test_masks_with_soft_edges_are_not_grey_masks(tmp_path: Path) -> None:
    soft = Image.fromarray(boxed(255, 255)).filter(ImageFilter.GaussianBlur(0.7))
    found = check(write(tmp_path / "mine", {**plain(3), "soft.png": (photo(9), soft)}))
    assert [one.key for one in found.findings] == ["few"] and summary(found.splits[0])["soft_masks"] == 1


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_exif_rotation_is_found_even_if_it_keeps_the_size(tmp_path: Path, suffix: str) -> None:
    folder = write(tmp_path / "mine", plain(3))
    turned_by_exif(photo(9), folder / "images" / f"odd{suffix}")
    Image.fromarray(boxed(255)).save(folder / "masks" / "odd.png")
    assert names(finding(check(folder), "turned")) == ["odd"]


def test_unpaired_files_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {**plain(3), "alone.png": (photo(8), None)})
    Image.fromarray(boxed(255)).save(folder / "masks" / "lost.png")
    found = check(folder)
    assert names(finding(found, "images-without-mask")) == ["alone.png"]
    assert names(finding(found, "masks-without-image")) == ["lost.png"]
    assert finding(found, "masks-without-image").severity == "will hurt"
    (folder / "images" / "alone.png").unlink()
    assert finding(check(folder), "masks-without-image").severity == "good to know"


def test_jpeg_masks_and_other_files_are_reported(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", plain(3), kind=".jpg")
    for name in ("images/a.heic", "images/b.HEIC", "labels.json", ".hidden.xml"):
        (folder / name).write_text("")
    found = check(folder)
    assert finding(found, "jpeg-masks").count == 3
    assert names(finding(found, "other-pictures")) == ["2 .heic"]
    assert names(finding(found, "other-files")) == ["1 .json"]
    assert other_files(folder) == {".heic": 2, ".json": 1}


COLOURS: Final = np.stack([boxed(200, 0), boxed(0, 200), boxed()], axis=-1)

LABELS: Final[dict[str, tuple[list[Mask], str | None, str]]] = {
    "ones": ([boxed(1)], None, ""),
    "several": ([boxed(1, 2)], "several-labels", "any of `--foreground 1 --foreground 2`."),
    "colours": ([Image.fromarray(COLOURS)], "several-labels", "(51200 (#00C800), 13107200 (#C80000))"),
    "ignored": ([boxed(1, 2, 255)], "ignored-label", "--foreground 1 --foreground 2."),
    "inverted": ([255 - boxed(255)], "inverted-masks", "invert the masks"),
    "dark": ([boxed(255), shades()], "dark-masks", "--foreground VALUE`, once for each"),
}


@pytest.mark.parametrize("case", LABELS)
def test_ambiguous_masks_are_reported(tmp_path: Path, case: str) -> None:
    masks, key, words = LABELS[case]
    folder = write(
        tmp_path / "mine", {f"{index}.png": (photo(index), mask) for index, mask in enumerate([*masks, *masks])}
    )
    found = check(folder)
    about_masks = {"several-labels", "ignored-label", "inverted-masks", "dark-masks", "faint-masks"}
    said = {one.key for one in found.findings} & about_masks - {"faint-masks"}
    assert said == ({key} if key else set())
    if key:
        assert words in finding(found, key).sentence()


def test_given_foreground_values_resolve_ambiguity(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {**plain(2), "odd.png": (photo(9), boxed(1, 2, 255))})
    found = check(folder, foreground=[2])
    assert not {"ignored-label", "several-labels", "faint-masks"} & {one.key for one in found.findings}
    assert names(finding(found, "empty-masks")) == ["plain0", "plain1"]
    assert finding(found, "empty-masks").severity == "will hurt"


# ---- findings that prevent training ----


def test_a_folder_without_masks_stops(tmp_path: Path) -> None:
    found = check(write(tmp_path / "mine", {"a.png": (photo(1), None), "b.png": (photo(2), None)}))
    assert found.stops and [one.key for one in found.findings] == ["no-masks"]


def test_masks_with_unclear_foreground_stop(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {f"{index}.png": (photo(index), boxed(2, ground=1)) for index in range(3)})
    found = check(folder)
    assert found.stops and "choose from `--foreground 1 --foreground 2`" in finding(found, "unclear-masks").sentence()
    assert summary(found.splits[0])["mask_values"].keys() == {"1", "2"}
    assert not check(folder, foreground=[2]).stops
    assert (
        "no mask contains the value 7".upper() in finding(check(folder, foreground=[7]), "unclear-masks").remedy.upper()
    )


def test_a_folder_without_readable_images_stops(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", plain(2))
    for path in (folder / "images").iterdir():
        path.write_text("no image")
    found = check(folder)
    assert found.stops and finding(found, "no-pairs").severity == "will stop"
    assert finding(found, "unreadable").count == 2


def test_a_folder_with_only_test_images_stops_but_a_test_benchmark_does_not(tmp_path: Path) -> None:
    write(tmp_path / "mine" / "test", plain(2))
    assert finding(check(tmp_path / "mine"), "no-training-split").severity == "will stop"
    write(tmp_path / "ECSSD", plain(2))
    found = check_dataset("ECSSD", Paths(tmp_path))
    assert finding(found, "no-training-split").severity == "good to know" and not found.stops


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a folder"):
        check(tmp_path / "nowhere")


# ---- copies ----


def test_copies_are_found_within_and_across_splits(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write(folder / "train", {**plain(3), "again.bmp": (photo(1), boxed(255))})
    write(
        folder / "test", {**plain(2, start=50), "known.png": (photo(2), boxed(255)), "near.jpg": (photo(0), boxed(255))}
    )
    found = check(folder)
    assert names(finding(found, "copies")) == ["again = plain1"]
    assert names(finding(found, "leaks")) == ["mine-TE known = mine-TR plain2"]
    assert names(finding(found, "near-leaks")) == ["mine-TE near = mine-TR plain0"]
    assert "contradictions" not in {one.key for one in found.findings}


def test_copies_with_different_masks_are_contradictions(tmp_path: Path) -> None:
    pairs = {**plain(3), "again.png": (photo(1), boxed(0, 255)), "same.png": (photo(2), boxed(255))}
    assert names(finding(check(write(tmp_path / "mine", pairs)), "contradictions")) == ["again = plain1"]


def test_many_copies_give_a_short_sentence(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {f"{index}.png": (photo(0), boxed(255)) for index in range(9)})
    assert names(finding(check(folder), "copies")) == ["0 = 1 = 2 = 3 = ... (9 in all)"]


def test_similar_images_are_named_and_chains_of_them_need_a_decision(tmp_path: Path) -> None:
    again = photo(2).crop((6, 4, 114, 86))
    few = check(write(tmp_path / "few", {**plain(8), "again.jpg": (again, boxed(255))}))
    assert names(finding(few, "groups")) == ["again = plain2"]
    grey = {f"grey{level}.png": (photo(0).point(lambda v, at=level: v * at // 9), boxed(255)) for level in range(3, 9)}
    chain = finding(check(write(tmp_path / "chain", {**plain(2, start=50), **grey})), "chains")
    assert names(chain) == ["grey3 = grey4 = grey5 = grey6 = ... (6 in all)"] and "--group" in chain.remedy


# ---- real data ----


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "pairs", "empty", "tiles", "keys"),
    [
        ("MT_Blowhole", 115, 0, 19, {"tiny"}),
        ("MT_Break", 85, 0, 15, {"vanishing", "grey-masks"}),
        ("MT_Uneven", 103, 4, 17, {"vanishing", "empty-masks", "tiny", "grey-masks"}),
    ],
)
def test_findings_in_real_defect_images(
    real_data: Path, name: str, pairs: int, empty: int, tiles: int, keys: set[str]
) -> None:
    found = check_dataset(f"MagneticTile/{name}", Paths(real_data))
    row = summary(found.splits[0])
    assert (row["pairs"], row["empty_masks"], row["masks_read_as"]) == (pairs, empty, "grey levels")
    assert {one.key for one in found.findings} == {*keys, "groups"} and not found.stops
    assert finding(found, "groups").count == tiles, "the number of tiles with several images"


@pytest.mark.data
def test_real_photographs_have_no_findings(real_data: Path) -> None:
    assert check_dataset("CAMO", Paths(real_data)).findings == ()
