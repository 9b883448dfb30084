"""Prediction on several processes: the same masks, records and tables as with one process."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image
from support import TINY, Dsu
from torchrun import lines, said, torchrun

from dsu.runtime import computing_threads

QUICK = ("--epochs", "1", "--val-fraction", "0.2", "--out", "run", "--quiet")


@pytest.fixture
def trained(dsu: Dsu, drawn: Path, tmp_path: Path) -> Path:
    """A run, a new folder with six images, two of which are training images in other files, and a test split."""
    dsu("cache-features", drawn, *TINY, "--features", "V", "--quiet")
    dsu("train-head", *QUICK)
    new = tmp_path / "new"
    new.mkdir()
    for folder, count in (("train", 3), ("test", 3)):
        for path in sorted((drawn / folder / "images").iterdir())[:count]:
            Image.open(path).convert("RGB").save(new / f"{folder}{path.stem}.tif")
    (new / "broken.png").write_bytes(b"no picture")
    return new


def found(folder: str) -> tuple[dict[str, bytes], object, list[dict[str, str]]]:
    """Masks by name, the record, and the table without times."""
    root = Path(folder)
    masks = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.png")}
    with (root / "table.csv").open(newline="") as table:
        rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(table)]
    return masks, json.loads((root / "predictions.json").read_text()), rows


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_give_the_same_predictions(dsu: Dsu, trained: Path, processes: int) -> None:
    options = ("predict", str(trained), "--head", "run", "--batch-size", "2")
    with computing_threads(1):  # as in each of the processes
        dsu(*options, "--out", "one", exit_code=1)
    several = torchrun([*options, "--out", "many"], processes)
    told = said(several)
    assert several.returncode == 1 and len(lines(told, "error:")) <= 1
    assert "6 written to many, 1 skipped" in told and told.count("written to many") == 1, "one process speaks"
    assert "broken.png" in told
    masks, record, rows = found("one")
    assert found("many") == (masks, record, rows)
    assert len(masks) == 6 and sum(name.startswith("train") for name in record["sets"][""]["trained_on"]) >= 2  # type: ignore[index]


def test_sets_from_a_store_are_divided_and_existing_masks_stay(dsu: Dsu, trained: Path) -> None:
    dsu("predict", "--head", "run", "--out", "one", "--quiet")
    first = sorted(Path("one").rglob("*.png"))
    assert first
    dsu("predict", "--head", "run", "--out", "many", "--quiet")
    for path in sorted(Path("many").rglob("*.png"))[::2]:
        path.unlink()
    told = said(torchrun(["predict", "--head", "run", "--out", "many"]))
    assert f"{len(first) // 2:,} already existed" in told, told
    assert found("many") == found("one")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [(["new/train0000.tif", "--out", "mask.png"], "One image needs one process"), (["nosuch"], "nosuch")],
)
def test_indivisible_predictions_are_refused_with_one_line(trained: Path, arguments: list[str], why: str) -> None:
    process = torchrun(["predict", *arguments, "--head", "run"])
    told = said(process)
    assert process.returncode and why in told and len(lines(told, "error:")) == 1, told
