"""The format of a user's masks, chosen or given in stage one, holds in every later command."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import TINY, Dsu


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Ten images with label maps: 1 is dust, in all; 2 is the defect, in every other one. The path contains a space."""
    home = tmp_path / "my tiles"
    rng = np.random.default_rng(0)
    for kind in ("pics", "maps"):
        (home / kind).mkdir(parents=True)
    for index in range(10):
        mask = np.zeros((60, 80), np.uint8)
        mask[5:15, 5:25] = 1
        if index % 2:
            mask[30:50, 40:70] = 2
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)).save(home / "pics" / f"i{index}.png")
        Image.fromarray(mask).save(home / "maps" / f"i{index}.png")
    return home


MINE = ("--images", "pics", "--masks", "maps", "--foreground", 2)


def empties(file: Path) -> dict[str, bool]:
    with file.open(newline="") as rows:
        return {row["name"]: row["empty"] == "True" for row in csv.DictReader(rows)}


def test_foreground_values_are_remembered(dsu: Dsu, labels: Path) -> None:
    dsu("cache-features", labels, *MINE, *TINY, "--views", "none")
    dsu("train-head", "--epochs", 1, "--views", "none", "--adapt-last", 0, "--fold", "1/2", "--out", "run")
    dsu("predict", "--head", "run")
    said = dsu("eval", "--predictions", "run", "--per-image", "rows.csv", "--conventions").output
    assert "values 2" in said
    found = empties(Path("rows.csv"))
    assert 4 <= len(found) <= 6 and set(found.values()) == {True, False}
    assert all(empty == (int(name[1:]) % 2 == 0) for name, empty in found.items())
    dsu("study", "folds", labels, "-k", 2, "--epochs", 1, "--views", "none", "--adapt-last", 0, "--out", "study")
    assert empties(Path("study/per_image.csv")) == {f"i{index}": index % 2 == 0 for index in range(10)}
    # Without the values, the same command uses the recorded ones: nothing has to be computed.
    again = " ".join(dsu("cache-features", labels, *MINE[:4], *TINY, "--views", "none").output.split())
    assert "the value 2 is foreground" in again and "already stored" in again, again
    for words, expected in ((("--foreground", 2), "values 2"), ((), "labels other than 0")):
        folder = labels / "maps"
        said = dsu(
            "eval",
            "--predictions",
            "run/predictions/my tiles-VAL",
            "--truth",
            folder,
            "--conventions",
            *words,
            exit_code=1,
        )
        assert expected in said.output


def test_the_suggested_command_is_complete_and_quoted(dsu: Dsu, labels: Path) -> None:
    dsu("cache-features", labels, *MINE, *TINY, "--views", "none")
    Image.new("RGB", (80, 60)).save(labels / "pics" / "i3.png")
    said = " ".join(dsu("train-head", "--epochs", 1, exit_code=1).output.split())
    assert "1 changed (i3)" in said
    network = "--hiera toy --dino toy --hiera-size 128 --dino-size 126"
    assert f"dsu cache-features '{labels}' --images pics --masks maps --foreground 2 {network}`" in said


def test_a_mask_of_another_size_than_its_image_can_be_evaluated(dsu: Dsu, labels: Path) -> None:
    for path in (labels / "maps").iterdir():
        Image.open(path).resize((40, 30), Image.Resampling.NEAREST).save(path)
    dsu("cache-features", labels, *MINE, *TINY, "--views", "none")
    dsu("train-head", "--epochs", 1, "--views", "none", "--adapt-last", 0, "--fold", "1/2", "--out", "run")
    dsu("predict", "--head", "run")
    dsu("eval", "--predictions", "run")
    # A prediction with neither of the two sizes is still refused.
    [first, *_] = sorted(Path("run/predictions").rglob("*.png"))
    Image.open(first).resize((55, 55)).save(first)
    assert "has 55x55 pixels" in dsu("eval", "--predictions", "run", exit_code=1).output


def test_maps_are_not_normalised_for_evaluation_with_a_folder_of_masks(dsu: Dsu, labels: Path) -> None:
    dsu("cache-features", labels, *MINE, *TINY, "--views", "none")
    dsu("train-head", "--epochs", 1, "--views", "none", "--adapt-last", 0, "--out", "run")
    for words, form in (((), "none"), (("--normalize", "minmax"), "minmax")):
        out = Path(f"all-{form}")
        dsu("predict", labels / "pics", "--head", "run", "--out", out, *words)
        said = dsu("eval", "--predictions", out, "--truth", labels / "maps", "--foreground", 2, "--all").output
        assert "Maps: value / 255, not normalised" in said
