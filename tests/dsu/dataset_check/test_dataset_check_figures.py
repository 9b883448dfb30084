"""Counts of the data-set check, compared with brute force; files of every kind, and the sheet of images."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from own_folder import SIZE, Mask, boxed, check, finding, photo, write
from PIL import Image
from rubbish import ODD, UNREADABLE

from dsu.data.datasets import Paths, find_dataset
from dsu.data.images import resize_mask
from dsu.data.inspection import inspect
from dsu.data.masks import MaskFormat, object_boxes
from dsu.dataset_check import file_counts, summary
from dsu.dataset_check.reading import measure
from dsu.dataset_check.sheet import draw_sheet
from dsu.errors import UsageError
from dsu.progress import in_threads

# ---- counts ----


def flooded(foreground: NDArray[np.bool_]) -> list[set[tuple[int, int]]]:
    """Connected areas (8-connectivity), computed pixel by pixel."""
    left = set(zip(*map(np.ndarray.tolist, np.nonzero(foreground)), strict=True))
    areas = []
    while left:
        area, front = set(), [left.pop()]
        while front:
            y, x = front.pop()
            area.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front += near
        areas.append(area)
    return areas


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.sampled_from([5, 17, 33]))
def test_what_a_mask_marks_is_what_counting_pixels_gives(
    tmp_path_factory: pytest.TempPathFactory, seed: int, width: int, height: int, side: int
) -> None:
    rng = np.random.default_rng(seed)
    grey = np.where(rng.random((height, width)) < rng.random() / 2, rng.integers(0, 256, (height, width)), 0)
    path = tmp_path_factory.mktemp("mask") / "mask.png"
    Image.fromarray(grey.astype(np.uint8)).save(path)
    found = measure(path, MaskFormat(), side)
    small = resize_mask(grey.astype(np.uint8), side) >= 128
    areas = flooded(grey >= 128)
    kept = 0
    for area in areas:
        # Sides are odd, so no pixel's centre is between two cells.
        cells = {(int((y + 0.5) * side / height), int((x + 0.5) * side / width)) for y, x in area}
        kept += any(small[cell] for cell in cells)
    assert (found.objects, found.vanished) == (len(areas), len(areas) - kept)
    assert found.left == small.sum()
    assert found.share == pytest.approx(np.mean(grey >= 128))
    assert found.soft == pytest.approx(np.mean((grey > 0) & (grey < 255)))
    boxes = {(y.start, y.stop, x.start, x.stop) for y, x in object_boxes(grey >= 128)}
    assert boxes == {
        (min(y for y, _ in area), max(y for y, _ in area) + 1, min(x for _, x in area), max(x for _, x in area) + 1)
        for area in areas
    }


def test_counts_equal_those_of_the_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    masks = [rng.choice([0, 0, 0, 255, 200, 3], (90 + index, 120)).astype(np.uint8) for index in range(7)]
    folder = write(
        tmp_path / "mine", {f"{index}.png": (photo(index, mask.shape[::-1]), mask) for index, mask in enumerate(masks)}
    )
    [split] = check(folder).splits
    row = summary(split)
    values = Counter(np.concatenate([mask.ravel() for mask in masks]).tolist())
    assert row["mask_values"] == {str(value): count for value, count in values.items()}
    shares = [np.mean(mask >= 128) for mask in masks]
    assert row["foreground_quartiles"] == pytest.approx(np.quantile(shares, [0.25, 0.5, 0.75]).tolist())
    assert (row["images"], row["pairs"], row["unreadable"], row["soft_masks"]) == (7, 7, 0, 7)
    assert (row["smallest"], row["median"], row["largest"]) == ((120, 90), (120, 93), (120, 96))


@pytest.mark.parametrize(
    "masks",
    [[boxed(255)], [boxed(1)], [boxed(1, 2)], [boxed(255), boxed(40)], [boxed(1, 2, 255), boxed()]],
    ids=["white", "ones", "labels", "grey", "ignored"],
)
def test_masks_are_read_as_in_stage_one(tmp_path: Path, masks: Sequence[Mask]) -> None:
    folder = write(tmp_path / "mine", {f"{index}.png": (photo(index), mask) for index, mask in enumerate(masks)})
    [split] = find_dataset(str(folder), Paths(tmp_path))
    inspection = inspect(split)
    [seen] = check(folder).splits
    assert seen.mask_format == inspection.mask_format
    assert seen.masks == [facts.mask for facts in inspection.facts.values()]
    assert [sample.size for sample in seen.samples] == [facts.size for facts in inspection.facts.values()]


# ---- unusual and broken files ----


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every unusual image with a mask of its size, and every kind of file that is no image."""
    folder = write(tmp_path_factory.mktemp("unusual") / "unusual", {})
    (folder / "masks").mkdir()
    for name, (make, size) in {**ODD, **{name: (make, SIZE) for name, (make, _) in UNREADABLE.items()}}.items():
        if len(name) < 240:
            make(folder / "images" / name)
            mask = np.zeros(size[::-1], np.uint8)
            mask[size[1] // 4 : size[1] // 2 + 1, size[0] // 4 : size[0] // 2 + 1] = 255
            Image.fromarray(mask).save(folder / "masks" / f"{Path(name).stem}.png")
    return folder


def test_unusual_and_broken_files_are_reported_and_do_not_stop(unusual: Path) -> None:
    found = check(unusual)
    [split] = found.splits
    assert {path.name for path, _ in split.unreadable} == set(UNREADABLE)
    assert len(split.samples) == sum(len(name) < 240 for name in ODD)
    assert not found.stops and not finding(found, "unreadable").sentence().count("\n")
    kinds = {(entry["what"], entry["kind"]): entry["read_as"] for entry in file_counts(found.splits)}
    assert kinds["images", "PNG, 16-bit grey"] == "scaled to 8 bits: 0 is black and 65535 white"
    assert kinds["images", "JPEG, RGB, rotated by EXIF"] == "unchanged, rotated upright"
    assert kinds["images", "PNG, RGB, alpha"].endswith("alpha dropped")
    assert kinds["images", "GIF, palette, several frames"].endswith("first frame only")
    assert any("CMYK" in kind for _, kind in kinds) and ("images", "TIFF, float") in kinds
    text = "".join(one.sentence() for one in found.findings)
    assert text.isprintable()


def test_a_sheet_of_unusual_files_is_drawn(unusual: Path, tmp_path: Path) -> None:
    found = check(unusual)
    draw_sheet(found, tmp_path / "sheet.png")
    first = (tmp_path / "sheet.png").read_bytes()
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.mode == "RGB" and sheet.width > 2000 and sheet.height > 1500
    draw_sheet(found, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes() == first


@pytest.mark.parametrize("masked", [True, False])
def test_a_sheet_of_one_image_is_drawn(tmp_path: Path, masked: bool) -> None:
    folder = write(tmp_path / "mine", {"a.png": (photo(1), boxed(255) if masked else None)})
    draw_sheet(check(folder), tmp_path / "sheet.pdf")
    assert (tmp_path / "sheet.pdf").read_bytes().startswith(b"%PDF")


def test_a_sheet_shows_masks_in_place_and_rings_small_objects(tmp_path: Path) -> None:
    """On grey images, coloured pixels are drawn: the mask's tint, and the yellow ring."""
    grey = Image.fromarray(np.random.default_rng(0).integers(90, 160, (400, 400)).astype(np.uint8))

    def colours(mask: NDArray[np.uint8]) -> tuple[int, int]:
        folder = write(tmp_path / f"mine{mask.sum()}", {"a.png": (grey, mask)})
        draw_sheet(check(folder), tmp_path / "sheet.png")
        pixels = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
        red, green, blue = (pixels[: pixels.shape[0] // 2, :, channel] for channel in range(3))
        return int(((red > 200) & (green < 60)).sum()), int(((red > 200) & (green > 180) & (blue < 60)).sum())

    large, small = np.zeros((400, 400), np.uint8), np.zeros((400, 400), np.uint8)
    large[100:300, 100:300], small[200:204, 200:204] = 255, 255
    assert colours(large)[0] > 500 and colours(large)[1] == 0
    assert colours(small)[1] > 100
    assert colours(np.zeros((400, 400), np.uint8)) == (0, 0)


# ---- threads ----


def test_results_are_in_order_and_errors_are_raised() -> None:
    assert list(in_threads(lambda x: x * x, range(50), "squares", workers=4)) == [x * x for x in range(50)]

    def fails(x: int) -> int:
        if x == 3:
            raise UsageError("three")
        return x

    taken: list[int] = []
    with pytest.raises(UsageError, match="three"):
        taken.extend(in_threads(fails, range(9), "fails", workers=2))
    assert list(in_threads(fails, [], "nothing")) == []
