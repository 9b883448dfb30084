"""Finding, pairing and inspecting data sets: many layouts of users' folders, as tiny trees."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from dsu.data.datasets import Paths, find_dataset, is_benchmark
from dsu.data.inspection import SampleMetadata, describe, inspect, unpaired, unreadable
from dsu.data.masks import MaskFormat
from dsu.data.pairing import Split, find_images, make_split
from dsu.errors import UsageError
from dsu.progress import SILENT, counted


def tree(root: Path, *files: str) -> Path:
    """Create empty files: finding and pairing do not open them."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def names(split: Split) -> list[str]:
    return [pair.name for pair in split.pairs]


def relative(path: Path | None, root: Path) -> str | None:
    return None if path is None else path.relative_to(root).as_posix()


def find_one(folder: Path, **options: str) -> Split:
    (split,) = find_dataset(folder, Paths(folder / "no data root", **options))
    return split


# ---- benchmarks ----


@pytest.mark.parametrize(
    ("wanted", "files", "expected"),
    [
        ("DUTS", "DUTS/DUTS-TR/DUTS-TR-Image/a.jpg DUTS/DUTS-TR/DUTS-TR-Mask/a.png", "DUTS-TR"),
        ("duts_te", "DUTS-TE/DUTS-TE-Image/a.jpg DUTS-TE/DUTS-TE-Mask/a.png", "DUTS-TE"),
        ("DUTS", "DUTS-TE/DUTS-TE/DUTS-TE-Image/a.jpg DUTS-TE/DUTS-TE/DUTS-TE-Mask/a.png", "DUTS-TE"),
        ("DUTS", "DUTS/DUTS-TE/Image/a.jpg DUTS/DUTS-TE/Mask/a.png", "DUTS-TE"),
        ("DUTS", "duts/DUTS_TE/im/a.jpg duts/DUTS_TE/gt/a.png", "DUTS-TE"),
        ("DUTS", "DUTS/test/images/a.jpg DUTS/test/masks/a.png", "DUTS-TE"),
        ("DUTS", "DUTS-TR/a.jpg DUTS-TR/a.png", "DUTS-TR"),
        ("dutomron", "DUT-OMRON/DUT-OMRON-image/a.jpg DUT-OMRON/pixelwiseGT-new-PNG/a.png", "DUT-OMRON"),
        ("DUT-OMRON", "DUT-OMRON-image/a.jpg pixelwiseGT-new-PNG/a.png", "DUT-OMRON"),
        ("DUT-OMRON", "DUT-OMRON-image/x/a.jpg pixelwiseGT-new-PNG/x/a.png", "DUT-OMRON"),
        ("HKU-IS", "HKU-IS/imgs/a.png HKU-IS/gt/a.png", "HKU-IS"),
        ("pascal_s", "PASCAL-S/datasets/imgs/pascal/a.jpg PASCAL-S/datasets/masks/pascal/a.png", "PASCAL-S"),
        ("PASCAL-S", "datasets/imgs/pascal/a.jpg datasets/masks/pascal/a.png datasets/imgs/ft/b.jpg", "PASCAL-S"),
        ("PASCAL-S", "pascals/Imgs/a.jpg pascals/GT/a.png", "PASCAL-S"),
        ("ECSSD", "ECSSD/images/a.jpg ECSSD/ground_truth_mask/a.png", "ECSSD"),
        ("ecssd", "ECSSD/images/images/a.jpg ECSSD/ground_truth_mask/ground_truth_mask/a.png", "ECSSD"),
        ("CAMO", "CAMO-V.1.0-CVIU2019/Images/Test/a.jpg CAMO-V.1.0-CVIU2019/GT/a.png", "CAMO-TE"),
        ("CAMO", "CAMO/CAMO-V.1.0-CVIU2019/Images/Test/a.jpg CAMO/CAMO-V.1.0-CVIU2019/GT/a.png", "CAMO-TE"),
        ("CAMO", "TestDataset/CAMO/Imgs/a.jpg TestDataset/CAMO/GT/a.png", "CAMO-TE"),
        ("CAMO", "CAMO/Imgs/a.jpg CAMO/GT/a.png", "CAMO-TE"),
        ("COD10K", "COD10K-v3/Test/Image/a.jpg COD10K-v3/Test/GT_Object/a.png", "COD10K-TE"),
        (
            "COD10K",
            "COD10K-v3/Test/Image/a.jpg COD10K-v3/Test/GT_Object/a.png COD10K-v3/Test/GT_Instance/a.png",
            "COD10K-TE",
        ),
        ("CHAMELEON", "TestDataset/CHAMELEON/Imgs/a.jpg TestDataset/CHAMELEON/GT/a.png", "CHAMELEON"),
        ("NC4K", "NC4K/Imgs/a.jpg NC4K/GT/a.png", "NC4K"),
        ("NC4K", "NC4K/img/a.jpg NC4K/gt/a.png NC4K/.DS_Store", "NC4K"),
        ("NC4K", "__MACOSX/x.jpg NC4K/__MACOSX/x/._a.jpg NC4K/Imgs/a.jpg NC4K/Imgs/._a.jpg NC4K/GT/a.png", "NC4K"),
    ],
)
def test_benchmarks_are_found_in_published_and_repacked_layouts(
    tmp_path: Path, wanted: str, files: str, expected: str
) -> None:
    (split,) = find_dataset(wanted, Paths(tree(tmp_path, *files.split())))
    assert (split.name, names(split), split.benchmark) == (expected, ["a"], True)
    assert split.kind == ("train" if expected.endswith("-TR") else "test")
    assert not split.images_without_mask
    assert not split.masks_without_image
    assert split.official_count is not None


def test_two_splits_can_share_a_folder_of_masks(tmp_path: Path) -> None:
    tree(tmp_path, "CAMO/Images/Train/a.jpg", "CAMO/Images/Test/b.jpg")
    tree(tmp_path, "CAMO/GT/a.png", "CAMO/GT/b.png", "CAMO/GT/c.png")
    train, test = find_dataset("CAMO", Paths(tmp_path))
    assert (train.name, names(train), test.name, names(test)) == ("CAMO-TR", ["a"], "CAMO-TE", ["b"])
    (alone,) = find_dataset("CAMO-TE", Paths(tmp_path))
    for split in (train, test, alone):
        assert [relative(mask, tmp_path) for mask in split.masks_without_image] == ["CAMO/GT/c.png"]


def test_cod10ks_images_without_camouflage_are_omitted_and_counted(tmp_path: Path) -> None:
    for name in ("COD10K-CAM-1", "COD10K-NonCAM-2", "COD10K-NonCAM-3"):
        tree(tmp_path, f"COD10K-v3/Train/Image/{name}.jpg", f"COD10K-v3/Train/GT_Object/{name}.png")
    (split,) = find_dataset("COD10K", Paths(tmp_path))
    assert (names(split), split.left_out, split.masks_without_image) == (["COD10K-CAM-1"], 2, ())
    assert any("2 images left out: by convention" in line for line in describe(split, inspect(split)))


COD_REPACKED = [
    "TrainDataset/Imgs/camourflage_1.jpg",
    "TrainDataset/GT/camourflage_1.png",
    "TrainDataset/Imgs/COD10K-CAM-2.jpg",
    "TrainDataset/GT/COD10K-CAM-2.png",
    "TrainDataset/Edge/camourflage_1.png",
    "TestDataset/NC4K/Imgs/3.jpg",
    "TestDataset/NC4K/GT/3.png",
    "TestDataset/COD10K/Imgs/COD10K-CAM-4.jpg",
    "TestDataset/COD10K/GT/COD10K-CAM-4.png",
]
COD_PUBLISHED = [
    "CAMO/Images/Train/camourflage_1.jpg",
    "CAMO/GT/camourflage_1.png",
    "COD10K-v3/Train/Image/COD10K-CAM-2.jpg",
    "COD10K-v3/Train/GT_Object/COD10K-CAM-2.png",
    "NC4K/Imgs/3.jpg",
    "NC4K/GT/3.png",
    "COD10K-v3/Test/Image/COD10K-CAM-4.jpg",
    "COD10K-v3/Test/GT_Object/COD10K-CAM-4.png",
]


@pytest.mark.parametrize("files", [COD_REPACKED, COD_PUBLISHED, [f"COD/{file}" for file in COD_REPACKED]])
def test_cod_is_one_training_split_and_the_available_test_splits(tmp_path: Path, files: list[str]) -> None:
    splits = {split.name: split for split in find_dataset("COD", Paths(tree(tmp_path, *files)))}
    assert list(splits) == ["COD-TR", "COD10K-TE", "NC4K"]
    assert names(splits["COD-TR"]) == ["COD10K-CAM-2", "camourflage_1"]
    assert splits["COD-TR"].official_count == 4040
    for name, member in (("CAMO-TR", "camourflage_1"), ("COD10K-TR", "COD10K-CAM-2")):
        (alone,) = find_dataset(name, Paths(tmp_path))
        assert (names(alone), alone.masks_without_image) == ([member], ())


def test_a_benchmarks_folder_is_recognised(tmp_path: Path) -> None:
    tree(tmp_path, "DUTS/DUTS-TE/DUTS-TE-Image/a.jpg", "DUTS/DUTS-TE/DUTS-TE-Mask/a.png")
    for folder in (tmp_path / "DUTS", tmp_path / "DUTS/DUTS-TE"):
        (split,) = find_dataset(folder, Paths(tmp_path / "elsewhere"))
        assert (split.name, split.benchmark) == ("DUTS-TE", True)


def test_an_absent_benchmark_is_refused_with_the_searched_folders(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError, match=r"DUTS-TE was not found below .*DUTS/DUTS-TE, DUTS-TE.*--data-root"):
            find_dataset("DUTS-TE", Paths(root))


@pytest.mark.parametrize("name", ["nope", "\0", "x" * 5000, "a/b/c"])
def test_an_unknown_name_is_refused_with_the_known_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"neither a folder .*DUTS, DUT-OMRON.*NC4K, COD.*--data-root.*DSU_DATA"):
        find_dataset(name, Paths(tmp_path))


def test_names_of_benchmarks() -> None:
    assert all(map(is_benchmark, ["DUTS", "duts-te", "DUT_OMRON", "cod", "COD-TR", "CAMO-TE"]))
    assert not any(map(is_benchmark, ["", ".", "/data/DUTS", "mine", "DUTS-XX"]))


# ---- users' folders ----


@pytest.mark.parametrize(
    ("files", "images", "masks"),
    [
        ("images/a.jpg masks/a.png", "images", "masks"),
        ("Imgs/a.bmp GT/a.tif edges/x.png", "Imgs", "GT"),
        ("IMAGE/a.jpg Ground_Truth/a_mask.png labels/a.txt", "IMAGE", "Ground_Truth"),
        ("mine-images/a.jpg mine-masks/a-seg.png", "mine-images", "mine-masks"),
        ("JPEGImages/a.jpg SegmentationClass/a.png Annotations/a.xml", "JPEGImages", "SegmentationClass"),
        ("images/a.jpg masks/a.jpg.png", "images", "masks"),
        ("unpacked/images/a.jpg unpacked/masks/a.png", "unpacked/images", "unpacked/masks"),
        ("a.jpg a.png", ".", "."),
        ("a.jpg a_mask.png", ".", "."),
        ("a.png a_mask.png", ".", "."),
        ("a.JPG a-GT.PNG notes.txt", ".", "."),
        ("images/a.png images/a_label.bmp", "images", "images"),
        ("a.jpg masks/a.png", ".", "masks"),
        ("a.jpg", ".", None),
        ("images/a.jpg", "images", None),
    ],
)
def test_images_and_masks_are_found_by_usual_names(tmp_path: Path, files: str, images: str, masks: str | None) -> None:
    home = tree(tmp_path / "mine", *files.split())
    split = find_one(home)
    assert (split.name, split.kind, split.benchmark, names(split)) == ("mine", "all", False, ["a"])
    assert (relative(split.images, home), relative(split.masks, home)) == (images, masks)
    assert (split.pairs[0].mask is None) == (masks is None)


def test_images_and_masks_may_be_together_in_subfolders(tmp_path: Path) -> None:
    split = find_one(
        tree(tmp_path / "parts", "kos01/P0.jpg", "kos01/P0_label.bmp", "kos02/P0.jpg", "kos02/P0_label.bmp")
    )
    assert names(split) == ["kos01/P0", "kos02/P0"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("train/images/a.jpg train/masks/a.png test/images/b.jpg test/masks/b.png", {"mine-TR": "a", "mine-TE": "b"}),
        ("train/images/a.jpg train/masks/a.png", {"mine-TR": "a"}),
        ("Training/a.jpg Training/a.png val/b.jpg val/b.png", {"mine-TR": "a", "mine-TE": "b"}),
        (
            "train/im/a.jpg train/gt/a.png val/im/b.jpg val/gt/b.png test/im/c.jpg test/gt/c.png",
            {"mine-TR": "a", "mine-TE": "c", "mine-VAL": "b"},
        ),
        ("images/train/a.jpg images/test/b.jpg masks/train/a.png masks/test/b.png", {"mine-TR": "a", "mine-TE": "b"}),
        ("images/train/a.jpg images/test/b.jpg masks/a.png masks/b.png", {"mine-TR": "a", "mine-TE": "b"}),
    ],
)
def test_folders_train_and_test_are_splits(tmp_path: Path, files: str, expected: dict[str, str]) -> None:
    home = tree(tmp_path / "mine", *files.split())
    splits = find_dataset(home, Paths(tmp_path))
    assert {split.name: names(split)[0] for split in splits} == expected
    assert [split.kind for split in splits] == ["train", "test", "test"][: len(splits)]
    assert not any(split.masks_without_image for split in splits)


@pytest.mark.parametrize(
    "files",
    [
        "photos/a.jpg defects/a.png",
        "images/a.jpg masks/a.png gt/a.png",
        "one/images/a.jpg two/images/b.jpg",
        "x/a.jpg y/a.png",
    ],
)
def test_an_ambiguous_folder_needs_named_subfolders(tmp_path: Path, files: str) -> None:
    home = tree(tmp_path / "mine", *files.split())
    with pytest.raises(UsageError, match=r"--images SUBFOLDER --masks SUBFOLDER") as caught:
        find_one(home)
    for folder in home.iterdir():
        assert folder.name in str(caught.value)


def test_named_subfolders_are_used(tmp_path: Path) -> None:
    home = tree(tmp_path / "mine", "raw/a.jpg", "defects/a.png", "masks/a.png", "b.jpg", "b.png")
    split = find_one(home, images="raw", masks="defects")
    assert (names(split), relative(split.pairs[0].mask, home)) == (["a"], "defects/a.png")
    with pytest.raises(UsageError, match="contains defects, masks, raw"):
        find_one(home, images="raw", masks="absent")
    with pytest.raises(UsageError, match="belong together"):
        find_one(home, images="raw")


def test_a_folder_is_found_below_the_data_root(tmp_path: Path) -> None:
    tree(tmp_path, "mine/images/a.jpg", "mine/masks/a.png")
    (split,) = find_dataset("mine", Paths(tmp_path))
    assert names(split) == ["a"]


def test_folders_without_images_or_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contains no images"):
        find_one(tree(tmp_path / "texts", "a.txt"))
    with pytest.raises(UsageError, match=r"no image in .* \(first files: a1\.jpg and b1\.png\)"):
        find_one(tree(tmp_path / "strangers", "images/a1.jpg", "masks/b1.png"))


# ---- pairing ----


def test_unpaired_files_are_listed(tmp_path: Path) -> None:
    images = [f"images/{index:02}.jpg" for index in range(15)]
    home = tree(tmp_path / "mine", *images, "masks/00.png", "masks/01.png", "masks/stray.png")
    split = find_one(home)
    assert names(split) == ["00", "01"]
    lines = "\n".join(unpaired(split))
    assert "13 images of mine without a mask, skipped: 02.jpg, 03.jpg" in lines
    assert "11.jpg and 3 more." in lines
    assert "1 mask of mine without an image: stray.png." in lines


def test_equal_stems_keep_their_extensions_and_subfolders(tmp_path: Path) -> None:
    home = tree(tmp_path / "mine", "images/a.jpg", "images/a.png", "images/x/b.jpg", "images/y/b.jpg")
    tree(home, "masks/a.png", "masks/x/b.png", "masks/y/b.png")
    split = find_one(home)
    assert names(split) == ["a.jpg", "a.png", "x/b", "y/b"]
    assert [relative(pair.mask, home / "masks") for pair in split.pairs] == ["a.png", "a.png", "x/b.png", "y/b.png"]


def test_masks_with_unique_names_may_be_in_other_subfolders(tmp_path: Path) -> None:
    split = find_one(tree(tmp_path / "mine", "images/x/a.jpg", "images/y/b.jpg", "masks/a.png", "masks/b_gt.png"))
    assert names(split) == ["x/a", "y/b"]


def test_the_exact_name_and_the_lossless_file_are_preferred(tmp_path: Path) -> None:
    home = tree(tmp_path / "mine", "images/a.jpg", "masks/a_mask.png", "masks/a.jpg", "masks/a.png")
    split = find_one(home)
    assert relative(split.pairs[0].mask, home) == "masks/a.png"
    assert [mask.name for mask in split.masks_without_image] == ["a.jpg", "a_mask.png"]


STEMS = st.sampled_from(["a", "b", "a_mask", "a.jpg", "x/a", "x/b", "gt", "_mask"])
FILES = st.sets(st.tuples(STEMS, st.sampled_from([".jpg", ".png", ".bmp"])).map("".join), max_size=9)


@settings(max_examples=120)
@given(images=FILES.filter(bool), masks=FILES)
def test_no_file_is_lost_and_no_name_is_used_twice(
    tmp_path_factory: pytest.TempPathFactory, images: set[str], masks: set[str]
) -> None:
    home = tree(tmp_path_factory.mktemp("any"), *(f"i/{file}" for file in images), *(f"m/{file}" for file in masks))
    (home / "m").mkdir(exist_ok=True)
    try:
        split = make_split("any", "any", "all", home / "i", home / "m")
    except UsageError:
        return
    assert max(Counter(names(split)).values()) == 1
    assert names(split) == sorted(names(split))
    found = {pair.image for pair in split.pairs} | set(split.images_without_mask)
    assert {relative(image, home / "i") for image in found} == images
    used = {pair.mask for pair in split.pairs} | set(split.masks_without_image)
    assert {relative(mask, home / "m") for mask in used} == masks


# ---- images for prediction ----


def test_images_are_found_below_a_folder(tmp_path: Path) -> None:
    tree(tmp_path, "b.JPG", "x/a.png", "x/.hidden.png", ".cache/a.png", "notes.txt", "folder.png/c.webp")
    (tmp_path / "x" / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tree(tmp_path.parent / f"{tmp_path.name} elsewhere", "d.tif"))
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["b.JPG", "folder.png/c.webp", "linked/d.tif", "x/a.png"]
    assert find_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"], "a given file is returned, whatever it is"


@pytest.mark.parametrize(("name", "reason"), [("absent", "does not exist"), ("empty", "contains no images")])
def test_a_folder_without_images_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=reason):
        find_images(tmp_path / name)


# ---- inspection ----


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Three good pairs of 20x12 pixels."""
    home = tmp_path / "mine"
    for folder in ("images", "masks"):
        (home / folder).mkdir(parents=True)
    for index, name in enumerate("abc"):
        Image.new("RGB", (20, 12), (index, 9, 9)).save(home / "images" / f"{name}.jpg")
        mask = np.zeros((12, 20), np.uint8)
        mask[3:9, index : index + 9] = 255
        Image.fromarray(mask).save(home / "masks" / f"{name}.png")
    return home


class Counted:
    """A progress that counts the units of its only task."""

    def __init__(self) -> None:
        self.total, self.done = 0, 0

    def say(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def advance(self, units: int = 1) -> None:
        self.done += units

    def task(self, label: str, total: int, unit: str = "images") -> "Counted":
        self.total = total
        return self

    def __enter__(self) -> "Counted":
        return self

    def __exit__(self, *_: object) -> None: ...


def test_a_sound_split_is_inspected_without_warnings(mine: Path) -> None:
    split, progress = find_one(mine), Counted()
    inspection = inspect(split, progress=progress)
    assert list(inspection.facts) == ["a", "b", "c"]
    assert inspection.facts["a"].size == inspection.facts["a"].mask_size == (20, 12)
    assert (inspection.undecodable, inspection.size_mismatches) == ((), ())
    assert inspection.mask_format == MaskFormat()
    assert describe(split, inspection) == [
        f"mine: 3 pairs of image and mask in {mine / 'images'}.",
        "Masks: grey levels, soft edges kept.",
    ]
    assert (progress.done, progress.total) == (3, 3)


def test_broken_files_are_named_and_only_their_samples_are_missing(mine: Path) -> None:
    (mine / "images" / "a.jpg").write_text("not found")
    cut = (mine / "masks" / "b.png").read_bytes()[:60]
    (mine / "masks" / "b.png").write_bytes(cut)
    split = find_one(mine)
    inspection = inspect(split)
    assert list(inspection.facts) == ["c"]
    assert [path.name for path, *_ in inspection.undecodable] == ["a.jpg", "b.png"]
    text, cut_off = unreadable(inspection)
    assert str(mine / "images" / "a.jpg") in text and "known image format" in text
    assert str(mine / "masks" / "b.png") in cut_off and "truncated" in cut_off


def test_masks_with_another_size_are_named(mine: Path) -> None:
    Image.new("L", (12, 20), 255).save(mine / "masks" / "b.png")
    Image.new("L", (10, 6), 255).save(mine / "masks" / "c.png")
    split = find_one(mine)
    inspection = inspect(split)
    assert inspection.size_mismatches == ("c",)
    (line,) = [line for line in describe(split, inspection) if "another size" in line]
    assert "c (20x12, mask 10x6)" in line
    (line,) = unreadable(inspection)
    assert "b.png" in line and "12x20 pixels have another aspect ratio than its image's 20x12, as if one were" in line


def test_only_changed_files_are_read_again(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = find_one(mine)
    first = inspect(split)
    known = {
        name: SampleMetadata.from_json(json.loads(json.dumps(facts.to_json()))) for name, facts in first.facts.items()
    }
    assert known == first.facts
    Image.new("L", (20, 12), 200).save(mine / "masks" / "b.png")
    os.utime(mine / "images" / "c.jpg", ns=(1, 1))
    read: list[str] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), real(path))[1])
    second = inspect(split, known)
    assert sorted(read) == ["b.jpg", "b.png", "c.jpg", "c.png"]
    assert second.facts["a"] is known["a"]
    assert second.facts["b"].mask_sha256 != known["b"].mask_sha256
    assert second.facts["c"].image_sha256 == known["c"].image_sha256


def test_a_split_without_masks_is_inspected(mine: Path) -> None:
    split = find_one(mine / "images")
    inspection = inspect(split)
    assert inspection.facts["a"].mask is None
    assert describe(split, inspection) == [f"images: 3 images without masks in {mine / 'images'}."]
    known = {name: SampleMetadata.from_json(facts.to_json()) for name, facts in inspection.facts.items()}
    assert inspect(split, known) == inspection
    assert inspect(find_one(mine), known).facts["a"].mask_sha256 is not None, "a mask that was added later is read"


def test_label_masks_are_recognised_and_given_values_are_used(mine: Path) -> None:
    for name, values in (("a", [0, 1]), ("b", [0, 2]), ("c", [0, 0])):
        Image.fromarray(np.repeat(np.array([values], np.uint8), 10, axis=1).repeat(12, axis=0)).save(
            mine / "masks" / f"{name}.png"
        )
    split = find_one(mine)
    inspection = inspect(split)
    assert inspection.mask_format == MaskFormat(labels=True)
    assert any("`--foreground 1 --foreground 2`" in line for line in describe(split, inspection))
    assert inspect(split, foreground=[2]).mask_format == MaskFormat((2,))
    with pytest.raises(UsageError, match="no mask contains the value 7"):
        inspect(split, inspection.facts, SILENT, foreground=[7])


def test_a_file_that_was_removed_meanwhile_is_named(mine: Path) -> None:
    split = find_one(mine)
    facts = inspect(split).facts
    (mine / "images" / "a.jpg").unlink()
    for known in (None, facts):
        assert [path.name for path, *_ in inspect(split, known).undecodable] == ["a.jpg"]


# ---- real data ----


@pytest.mark.data
def test_duts(real_data: Path) -> None:
    train, test = find_dataset("DUTS", Paths(real_data))
    assert (len(train.pairs), len(test.pairs)) == (1200, 299)
    assert (train.official_count, test.official_count) == (10_553, 5_019)
    inspection = inspect(test)
    assert describe(test, inspection)[1:] == ["Masks: grey levels, soft edges kept."]
    assert len(inspection.facts) == 299


@pytest.mark.data
def test_camo(real_data: Path) -> None:
    train, test = find_dataset("camo", Paths(real_data))
    assert (len(train.pairs), len(test.pairs)) == (100, 30)
    assert not train.masks_without_image
    assert [split.name for split in find_dataset("COD", Paths(real_data))] == ["CAMO-TE"]
    assert not inspect(train).undecodable


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "pairs", "empty"), [("MT_Blowhole", 115, 0), ("MT_Break", 85, 0), ("MT_Uneven", 103, 4)]
)
def test_a_factorys_folder_needs_no_renaming(real_data: Path, name: str, pairs: int, empty: int) -> None:
    split = find_one(real_data / "MagneticTile" / name)
    assert (split.name, split.kind, len(split.pairs)) == (name, "all", pairs)
    inspection = inspect(split)
    assert inspection.mask_format == MaskFormat()
    assert any(f"{counted(empty, 'masks')} without foreground" in line for line in describe(split, inspection)) == (
        empty > 0
    )


@pytest.mark.data
def test_the_magnetic_tiles_folder_is_ambiguous(real_data: Path) -> None:
    with pytest.raises(UsageError, match="MT_Blowhole, MT_Break, MT_Uneven"):
        find_one(real_data / "MagneticTile")
