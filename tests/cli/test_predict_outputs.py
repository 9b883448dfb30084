"""Outputs of `dsu predict`: one file, a mirrored folder, standard output; the table; overlays next to masks."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from house import House
from PIL import Image
from rubbish import Refused
from support import Dsu


@pytest.fixture
def photo(house: House) -> Path:
    return sorted((house.data / "test" / "images").iterdir())[0]


@pytest.fixture
def batch(drawn: Path, tmp_path: Path) -> Path:
    """Three images in two folders, and a file that is not an image."""
    images = sorted((drawn / "test" / "images").iterdir())
    for inner, image in zip(("monday", "monday", "tuesday/late"), images, strict=False):
        (tmp_path / "batch" / inner).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, tmp_path / "batch" / inner)
    (tmp_path / "batch" / "monday" / "broken.jpg").write_text("no image")
    return tmp_path / "batch"


def rows_of(file: Path) -> dict[str, dict[str, str]]:
    with file.open(newline="") as lines:
        return {row["image"]: row for row in csv.DictReader(lines)}


def test_one_image_is_written_to_the_given_file_only(dsu: Dsu, house: House, photo: Path) -> None:
    said = dsu("predict", photo, "--head", house.run, "--out", "new/mask.png").output
    assert "1 written to new/mask.png" in said
    assert [path.name for path in Path("new").iterdir()] == ["mask.png"]
    assert Image.open("new/mask.png").size == Image.open(photo).size
    dsu("predict", photo, "--head", house.run, "--out", "folder")
    assert Path(f"folder/{photo.stem}.png").read_bytes() == Path("new/mask.png").read_bytes()
    dsu("predict", photo, "--head", house.run, "--out", "cut.png", "--kind", "cutout", "--table", "row.json")
    assert Image.open("cut.png").mode == "RGBA"
    [row] = json.loads(Path("row.json").read_text())
    assert row["image"] == photo.name and row["file"] == "cut.png" and row["seconds"] > 0


def test_an_output_file_needs_one_image(refused: Refused, house: House, photo: Path) -> None:
    shutil.copy(photo, "mine.png")
    head = ("--head", house.run, "--out")
    refused(["predict", photo.parent, *head, "mask.png"], "mask.png must be a folder", "single image file")
    refused(["predict", photo, photo, *head, "mask.png"], "must be a folder")
    refused(["predict", photo, *head, "mask.jpg"], "a .jpg", "give a .png")
    refused(["predict", "mine.png", *head, "mine.png"], "overwrite an input")
    refused(["predict", photo, *head, "mine.png"], "mine.png already exists", "--overwrite")
    refused(["predict", "absent.jpg", *head, "mask.png"], "no image at absent.jpg")
    refused(["predict", photo, *head, "m.png", "--table", "t.xlsx"], "--table t.xlsx", ".csv or .json")


def test_an_output_folder_mirrors_the_input_with_table_and_record(dsu: Dsu, house: House, batch: Path) -> None:
    said = dsu("predict", batch, "--head", house.run, "--out", "masks", exit_code=1).output
    assert "3 written to masks, 1 skipped" in said and "masks/table.csv" in said
    pictures = {path.relative_to("masks").as_posix() for path in Path("masks").rglob("*.png")}
    assert pictures == {path.relative_to(batch).with_suffix(".png").as_posix() for path in batch.rglob("0*.jpg")}
    rows = rows_of(Path("masks/table.csv"))
    assert rows["monday/broken.jpg"]["verdict"] == "no mask" and "broken.jpg" in rows["monday/broken.jpg"]["problem"]
    for name, row in rows.items():
        if row["verdict"] == "no mask":
            continue
        grey = np.asarray(Image.open(Path("masks", row["file"])))
        above = int((grey >= 128).sum())
        assert row["verdict"] == ("alarm" if above else "clear") and int(row["area"]) == above, name
        assert float(row["response"]) == round(int(grey.max()) / 255, 4) and float(row["seconds"]) > 0
    assert {row["set"] for row in rows.values()} == {""} and len(rows) == 4
    assert (
        "0 written to masks, 3 already existed"
        in dsu("predict", batch, "--head", house.run, "--out", "masks", exit_code=1).output
    )
    assert rows_of(Path("masks/table.csv")) == rows


def test_a_mirrored_folder_can_be_evaluated_and_belongs_to_its_source(dsu: Dsu, refused: Refused, house: House) -> None:
    test = house.data / "test"
    dsu("predict", test / "images", "--head", house.run, "--out", "masks")
    told = json.loads(dsu("eval", "--predictions", "masks", "--truth", test / "masks", "--format", "json").stdout)
    assert told["masks"]["images"] == 2
    shutil.copytree(test / "images", "other")
    refused(
        ["predict", "other", "--head", house.run, "--out", "masks"], "contains predictions of", "--overwrite", status=1
    )


def test_standard_input_and_output(house: House, photo: Path, tmp_path: Path, dsu: Dsu) -> None:
    dsu("predict", photo, "--head", house.run, "--out", "mask.png")
    command = [sys.executable, "-m", "dsu", "predict", "-", "--head", str(house.run)]
    for more in ([], ["--out", "-"]):
        piped = subprocess.run(command + more, input=photo.read_bytes(), capture_output=True, cwd=tmp_path, check=True)
        assert piped.stdout == Path("mask.png").read_bytes()
        assert "written to standard output" in piped.stderr.decode()
    broken = subprocess.run(command, input=b"no image", capture_output=True, cwd=tmp_path, check=False)
    assert broken.returncode == 1 and broken.stdout == b""
    assert "standard input cannot be read as an image" in broken.stderr.decode()
    empty = subprocess.run(command, input=b"", capture_output=True, cwd=tmp_path, check=False)
    assert empty.returncode == 2 and b"Standard input is empty" in empty.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.png"]
    out = dsu("predict", photo, "--head", house.run, "--out", "-").stdout_bytes
    assert Image.open(io.BytesIO(out)).size == Image.open(photo).size


def test_overlays_are_written_next_to_the_runs_masks(dsu: Dsu, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    for kind in ("overlay", "cutout"):
        dsu(*mine.predict("--kind", kind))
        pictures = sorted((mine.run / f"{kind}s" / "shapes-TE").glob("*.png"))
        assert len(pictures) == 2
    assert "0 written" in dsu(*mine.predict()).output, "and the masks are as they were"


def test_images_set_apart_for_testing_are_predicted_next_to_a_test_split(
    dsu: Dsu, house: House, tmp_path: Path
) -> None:
    shares = ("--views", "1", "--test-fraction", "0.4", "--val-fraction", "0", "--sheet-every", "0")
    dsu(*house.train(*shares, "--out", "own"))
    dsu("predict", "--head", "own", "--cache-root", house.features)
    found = {path.name: len(list(path.iterdir())) for path in Path("own/predictions").iterdir() if path.is_dir()}
    assert found == {"shapes-TE": 2, "shapes-TR-TEST": 2}
    assert {"shapes-TE", "shapes-TR-TEST"} <= {*dsu("eval", "--predictions", "own").stdout.split()}


def test_the_home_folder_and_its_parents_are_refused(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "pictures").mkdir(parents=True)
    refused(["predict", tmp_path / "home"], "is your home folder", "name a folder of images in it")
    refused(["predict", tmp_path], "a parent of your home folder")
    refused(["predict", tmp_path / "home" / "pictures"], "There is no trained head")


def test_a_removed_table_is_written_again_from_the_masks(dsu: Dsu, house: House, batch: Path) -> None:
    (batch / "monday" / "broken.jpg").unlink()
    dsu("predict", batch, "--head", house.run, "--out", "masks")
    before = rows_of(Path("masks/table.csv"))
    for name in ("table.csv", "table.json"):
        Path("masks", name).unlink()
    assert "3 already existed" in dsu("predict", batch, "--head", house.run, "--out", "masks").output
    after = rows_of(Path("masks/table.csv"))
    assert {name: row | {"seconds": ""} for name, row in before.items()} == after
