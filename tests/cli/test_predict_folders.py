"""Predicting folders of images that also contain masks or predictions."""

import shutil
from pathlib import Path

from house import House
from support import TINY, Dsu


def test_masks_next_to_the_images_are_not_predicted(dsu: Dsu, drawn: Path, house: House) -> None:
    shutil.copytree(drawn / "test", "own")
    for number, named in enumerate(("own", "./own", Path.cwd() / "own")):
        said = dsu("predict", named, "--head", house.run, "--out", f"masks-{number}").output
        assert "5 masks among the images are left out" in said
        written = [path.name for path in Path(f"masks-{number}").rglob("*.png")]
        assert len(written) == 5, written


def test_masks_in_a_folder_of_data_sets_are_not_predicted(dsu: Dsu, drawn: Path, house: House) -> None:
    for name in ("first", "second"):
        shutil.copytree(drawn / "test", Path("all") / name)
    said = dsu("predict", "all", "--head", house.run, "--out", "out").output
    assert "10 masks among the images are left out" in said
    assert len(list(Path("out").rglob("*.png"))) == 10


def test_both_kinds_of_voc_masks_are_not_predicted(dsu: Dsu, drawn: Path, house: House) -> None:
    shutil.copytree(drawn / "test" / "images", "voc/JPEGImages")
    for name in ("SegmentationClass", "SegmentationObject"):
        shutil.copytree(drawn / "test" / "masks", Path("voc") / name)
    said = dsu("predict", "voc", "--head", house.run, "--out", "out").output
    assert "10 masks among the images are left out" in said
    assert len(list(Path("out").rglob("*.png"))) == 5


def test_predictions_among_the_images_are_not_reported_as_images(dsu: Dsu, drawn: Path, house: House) -> None:
    shutil.copytree(drawn / "train", "own")
    dsu("predict", drawn / "test" / "images", "--head", house.run, "--out", "own/images/predicted", "--quiet")
    said = dsu("cache-features", "own", *TINY, "--dry-run").output
    assert "12 pairs" in said and "without a mask" not in said
