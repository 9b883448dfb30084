"""Images that training and test splits share, found by their pixels."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dsu.data.benchmarks import survey
from dsu.data.datasets import Paths, find_dataset
from dsu.data.groups import NEAR, ImageSignature, Overlaps, copies, find_overlaps
from dsu.data.pairing import Split


def picture(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """A structured image, different for every seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def duts(root: Path, train: dict[str, Image.Image], test: dict[str, Image.Image]) -> tuple[Split, ...]:
    """A data set of these images, saved in the format of their extension."""
    for part, images in (("TR", train), ("TE", test)):
        for folder in ("Image", "Mask"):
            (root / f"DUTS/DUTS-{part}/DUTS-{part}-{folder}").mkdir(parents=True)
        for name, image in images.items():
            image.save(root / f"DUTS/DUTS-{part}/DUTS-{part}-Image/{name}")
            mask = Image.new("L", image.size, 255)
            mask.save(root / f"DUTS/DUTS-{part}/DUTS-{part}-Mask/{Path(name).stem}.png")
    return find_dataset("DUTS", Paths(root))


def names(overlaps: Overlaps) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    exact, near = ({(one.train.name, one.test.name) for one in found} for found in (overlaps.exact, overlaps.near))
    return exact, near


def test_copies_are_found_by_their_pixels_regardless_of_names(tmp_path: Path) -> None:
    train = {"a.png": picture(1), "b.png": picture(2), "c.png": picture(3)}
    found = find_overlaps(duts(tmp_path, train, {"x.bmp": picture(1), "b.png": picture(9)}))
    assert names(found) == ({("a", "x")}, set())
    [copy] = found.exact
    assert (copy.train.split, copy.test.split, copy.likeness) == ("DUTS-TR", "DUTS-TE", 1.0)
    assert copy.train.path.name == "a.png" and copy.test.path.name == "x.bmp"
    assert found.images == {"DUTS-TR": 3, "DUTS-TE": 2} and not found.broken


def test_recompressed_and_resized_copies_are_reported_separately_and_others_are_not(tmp_path: Path) -> None:
    train = {f"{seed}.png": picture(seed) for seed in range(8)}
    test = {
        "saved.jpg": picture(1),
        "smaller.png": picture(2, (60, 45)),
        "soft.png": picture(3).filter(ImageFilter.GaussianBlur(1)),
        "other.png": picture(50),
    }
    found = find_overlaps(duts(tmp_path, train, test))
    assert names(found) == (set(), {("1", "saved"), ("2", "smaller"), ("3", "soft")})
    assert [one.likeness for one in found.near] == sorted((one.likeness for one in found.near), reverse=True)
    assert all(NEAR <= one.likeness <= 1 for one in found.near)


def test_uniform_images_match_only_exact_copies(tmp_path: Path) -> None:
    grey = Image.new("RGB", (50, 50), (90, 90, 90))
    train = {"grey.png": grey, "white.png": Image.new("RGB", (50, 50), "white")}
    found = find_overlaps(duts(tmp_path, train, {"copy.png": grey, "light.png": Image.new("RGB", (50, 50), "#eee")}))
    assert names(found) == ({("grey", "copy")}, set())


def test_the_same_bytes_with_another_shape_are_another_image(tmp_path: Path) -> None:
    values = np.arange(2 * 8 * 3, dtype=np.uint8).reshape(2, 8, 3)
    wide, high = Image.fromarray(values), Image.fromarray(values.reshape(8, 2, 3))
    assert names(find_overlaps(duts(tmp_path, {"a.png": wide}, {"b.png": high})))[0] == set()


def test_an_unreadable_image_is_named_and_the_rest_is_compared(tmp_path: Path) -> None:
    splits = duts(tmp_path, {"a.png": picture(1), "b.png": picture(2)}, {"x.png": picture(1)})
    splits[0].pairs[1].image.write_text("no image")
    found = find_overlaps(splits)
    assert names(found)[0] == {("a", "x")}
    [line] = found.broken
    assert "b.png" in line and found.images["DUTS-TR"] == 1


def test_copies_are_grouped_by_their_pixels_in_order() -> None:
    seeds = [3, 1, 2, 1, 3, 4, 1]
    images = [ImageSignature.of(picture(seed), "mine", str(at), Path(f"{at}.png")) for at, seed in enumerate(seeds)]
    assert [[image.name for image in group] for group in copies(images)] == [["0", "4"], ["1", "3", "6"]]


def test_splits_without_a_counterpart_have_no_overlaps(tmp_path: Path) -> None:
    splits = duts(tmp_path, {"a.png": picture(1)}, {"x.png": picture(1)})
    for few in ((), splits[:1], splits[1:]):
        found = find_overlaps(few)
        assert not found.exact and not found.near


@pytest.mark.data
def test_among_real_photographs_only_copies_are_found(real_data: Path, tmp_path: Path) -> None:
    for part in ("Train", "Test"):
        (tmp_path / "CAMO" / "Images" / part).mkdir(parents=True)
    (tmp_path / "CAMO" / "GT").symlink_to(real_data / "CAMO" / "GT")
    copied, *_ = images = sorted((real_data / "CAMO" / "Images" / "Train").iterdir())
    for image in images[:40]:
        shutil.copy(image, tmp_path / "CAMO" / "Images" / "Train")
    others = sorted((real_data / "CAMO" / "Images" / "Test").iterdir())
    for image in others:
        shutil.copy(image, tmp_path / "CAMO" / "Images" / "Test")
    assert find_overlaps(find_dataset("CAMO", Paths(tmp_path))).near == ()
    small = Image.open(copied).convert("RGB")
    small.thumbnail((200, 200))
    small.save(tmp_path / "CAMO" / "Images" / "Test" / others[0].name, quality=60)
    [found] = find_overlaps(find_dataset("CAMO", Paths(tmp_path))).near
    assert (found.train.name, found.test.name) == (copied.stem, others[0].stem)


# ---- the survey ----


def test_the_survey_compares_counts_with_the_official_numbers(tmp_path: Path) -> None:
    duts(tmp_path, {"a.png": picture(1), "b.png": picture(2)}, {"x.png": picture(3)})
    states = {state.sought.name: state for state in survey(tmp_path)}
    assert len(states) == 13, "nine benchmarks, three of them with two splits, and COD-TR"
    assert (states["DUTS-TR"].pairs, states["DUTS-TR"].sought.official_count) == (2, 10_553)
    assert not states["DUTS-TR"].complete and states["DUTS-TE"].pairs == 1
    assert states["ECSSD"].found is None and states["ECSSD"].to_json()["page"].startswith("http")
    assert states["DUTS-TR"].to_json()["images"].endswith("DUTS-TR-Image")


def test_an_ambiguous_folder_is_reported_and_the_survey_continues(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / "ECSSD" / name).mkdir(parents=True)
        picture(1).save(tmp_path / "ECSSD" / name / "a.png")
    duts(tmp_path, {"a.png": picture(1)}, {"x.png": picture(3)})
    states = {state.sought.name: state for state in survey(tmp_path)}
    assert "can't be told" in (states["ECSSD"].problem or "") and states["DUTS-TR"].pairs == 1


def test_a_missing_data_root_has_no_benchmarks(tmp_path: Path) -> None:
    assert not any(state.found or state.problem for state in survey(tmp_path / "nowhere"))
