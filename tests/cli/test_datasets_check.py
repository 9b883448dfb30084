"""`dsu datasets check`: a page of problems, before any work."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import Dsu


@pytest.fixture
def folder(drawn: Path, tmp_path: Path) -> Path:
    """A user's folder with a file that is no image, a black mask, and a mask without image."""
    mine = tmp_path / "tiles"
    for inner in ("images", "masks"):
        shutil.copytree(drawn / "train" / inner, mine / inner)
    first, second, third, *_ = sorted((mine / "images").iterdir())
    first.write_text("no image")
    mask = mine / "masks" / f"{second.stem}.png"
    Image.fromarray(np.zeros_like(np.asarray(Image.open(mask)))).save(mask)
    third.unlink()
    return mine


def test_the_page_lists_counts_and_problems(dsu: Dsu, folder: Path) -> None:
    said = dsu("datasets", "check", "tiles").output
    first, second, third, *_ = sorted(path.stem for path in (folder / "masks").iterdir())
    figures, rest = said.split("\nfiles ", 1)
    files, found = rest.split("Problems")
    for line in ("pairs 11", "unreadable files 1", "masks without an image 1", "masks without foreground 1"):
        assert line in " ".join(figures.split()), line
    assert "grey levels" in files and "PNG" in files
    hurts = [line for line in found.splitlines() if line.startswith("will hurt")]
    known = [line for line in found.splitlines() if line.startswith("good to know")]
    assert any(first in line and "cannot be read: 1" in line for line in hurts)
    assert any("without foreground: 1" in line and second in line for line in known)
    assert any(third in line and "without an image: 1" in line for line in known)
    assert "will stop" not in said and found.index("will hurt") < found.index("good to know")
    assert "reading tiles" in said and "masks/s" in said


def test_json_contains_all_names_and_nothing_else_is_printed(dsu: Dsu, folder: Path) -> None:
    found = json.loads(dsu("datasets", "check", folder, "--json", "--quiet").output)
    assert found["stops"] is False and found["input_size"] == 352
    [split] = found["splits"]
    assert split["pairs"] == 11 and split["unreadable"] == 1 and split["mask_format"]["labels"] is False
    by_key = {one["key"]: one for one in found["findings"]}
    assert by_key["unreadable"]["count"] == len(by_key["unreadable"]["names"]) == 1
    assert {entry["what"] for entry in found["files"]} == {"images", "masks"}


def test_benchmarks_are_checked_by_name(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    for part, name in (("train", "DUTS-TR"), ("test", "DUTS-TE")):
        shutil.copytree(drawn / part, tmp_path / "data" / "DUTS" / name)
    for kind in ("images", "masks"):
        first, second = (min((tmp_path / "data" / "DUTS" / name / kind).iterdir()) for name in ("DUTS-TR", "DUTS-TE"))
        shutil.copy(first, second)
    said = dsu("datasets", "check", "DUTS").output
    assert "12 of 10,553" in said and "5 of 5,019" in said
    assert "test images identical to training images: 1 (DUTS-TE " in said


def test_status_is_1_only_if_training_would_stop(dsu: Dsu, folder: Path) -> None:
    shutil.rmtree(folder / "masks")
    said = dsu("datasets", "check", folder, exit_code=1).output
    assert "will stop" in said and "--masks" in said
    assert "There" not in dsu("datasets", "check", "nowhere", exit_code=2).output.split("error:")[0]


def test_ambiguous_masks_are_reported_with_their_options(dsu: Dsu, folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.where(np.asarray(Image.open(path)) > 127, np.uint8(2), np.uint8(1))).save(path)
    said = dsu("datasets", "check", folder, exit_code=1).output
    assert "--foreground 1 --foreground 2" in " ".join(said.split()) and "will stop" in said
    assert "Next:" not in said
    said = dsu("datasets", "check", folder, "--foreground", 2).output
    assert "foreground where 2" in said


def test_the_last_line_is_the_next_command(dsu: Dsu, folder: Path, tmp_path: Path) -> None:
    def last(*arguments: object) -> str:
        return str(dsu("datasets", "check", *arguments).stdout.splitlines()[-1])

    assert last(folder) == f"Next: `dsu cache-features {folder}`"
    mine = folder.rename(tmp_path / "my tiles")
    (mine / "masks").rename(mine / "second one")
    options = ("--images", "images", "--masks", "second one", "--foreground", "255", "--foreground", "254")
    typed = f"'{mine}' --images images --masks 'second one' --foreground 255 --foreground 254"
    assert last(mine, *options) == f"Next: `dsu cache-features {typed}`"
    assert "Next" not in last(mine, *options, "--quiet")


def test_a_sheet_is_drawn_on_request_and_overwrites_nothing(dsu: Dsu, folder: Path) -> None:
    dsu("datasets", "check", folder)
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["tiles"]
    said = dsu("datasets", "check", folder, "--sheet", "look/sheet.png").output
    assert "Drawn: look/sheet.png" in said
    with Image.open("look/sheet.png") as sheet:
        assert sheet.width > 2000
    mask = max((folder / "masks").iterdir())
    for taken in ("look/sheet.png", mask):
        said = dsu("datasets", "check", folder, "--sheet", taken, exit_code=2).output
        assert "already exists" in said and "mask_format" not in said
    dsu("datasets", "check", folder, "--sheet", "look/sheet.png", "--overwrite")
    assert "give a .png or a .pdf" in dsu("datasets", "check", folder, "--sheet", "a.txt", exit_code=2).output


def test_lost_objects_are_counted_at_the_networks_input_size(dsu: Dsu, folder: Path) -> None:
    assert "objects lost at 128x128" in dsu("datasets", "check", folder, "--hiera-size", 128).output
    assert "hiera_size" in dsu("datasets", "check", folder, "--hiera-size", 100, exit_code=2).output


def test_options_before_check_are_refused(dsu: Dsu, folder: Path) -> None:
    for option in (("--json",), ("--data-root", folder.parent)):
        said = dsu("datasets", *option, "check", folder, exit_code=2).output
        assert f"{option[0]} is an option of check" in said


def test_help_describes_check_and_datasets_without_it_lists(dsu: Dsu) -> None:
    assert "[check NAME|FOLDER]" in dsu("datasets", "--help").output
    said = " ".join(dsu("datasets", "check", "--help").output.split())
    assert "Exit status: 1 if something will stop training" in said
    assert "ECSSD" in dsu("datasets").output
