"""`dsu doctor` and `dsu datasets`: the machine, the data and the stores, before any work."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from support import Dsu


@pytest.fixture
def duts(drawn: Path, tmp_path: Path) -> Path:
    """A data root with a small DUTS that has one image in both splits."""
    root = tmp_path / "sets"
    for part, name in (("train", "DUTS-TR"), ("test", "DUTS-TE")):
        shutil.copytree(drawn / part, root / "DUTS" / name)
    test_image, train_image = (
        sorted((root / "DUTS" / name / "images").iterdir())[0] for name in ("DUTS-TE", "DUTS-TR")
    )
    shutil.copy(train_image, test_image)
    return root


def test_the_doctor_describes_the_machine_and_the_next_step(dsu: Dsu, duts: Path) -> None:
    said = dsu("doctor", "--data-root", duts).output
    for words in ("device", "torch", "precision", "DUTS-TR 12", "cache root", "GB free", "What to do next", "toy"):
        assert words in said, words
    assert "dsu cache-features DUTS" in said.split("What to do next")[1]
    found = json.loads(dsu("doctor", "--data-root", duts, "--json").output)
    assert found["working"] and found["data"]["benchmarks"] == {"DUTS-TR": 12, "DUTS-TE": 5}


def test_the_doctor_fails_if_something_is_broken(dsu: Dsu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSU_DINO", "gone.safetensors")
    said = dsu("doctor", exit_code=1).output
    assert "gone.safetensors" in said.split("What to do next")[1]
    assert json.loads(dsu("doctor", "--json", exit_code=1).output)["problems"][-1]["what"] == "DSU_DINO"


def test_datasets_are_counted_and_missing_ones_have_a_download_page(dsu: Dsu, duts: Path) -> None:
    said = dsu("datasets", "--data-root", duts).output
    assert "DUTS-TR" in said and "12" in said and "10,553" in said and "DUTS/DUTS-TR/images" in said
    assert "cse.cuhk.edu.hk" in said and "saliencydetection.net/duts" in said
    states = json.loads(dsu("datasets", "--data-root", duts, "--json").output)
    assert {state["split"]: state["pairs"] for state in states}["DUTS-TE"] == 5 and len(states) == 13


def test_a_missing_data_root_is_reported(dsu: Dsu) -> None:
    said = dsu("datasets").output
    assert "no folder data" in said and "--data-root" in said and "ECSSD" in said


def test_overlaps_name_each_pair(dsu: Dsu, duts: Path) -> None:
    said = dsu("datasets", "--data-root", duts, "--overlaps").output
    assert "DUTS-TR 12, DUTS-TE 5" in said and "reading DUTS-TR" in said
    found = json.loads(dsu("datasets", "--data-root", duts, "--overlaps", "--json", "--quiet").output)
    [same] = found["exact"]
    first = min(path.stem for path in (duts / "DUTS" / "DUTS-TR" / "images").iterdir())
    assert same["train_name"] == first and first in said.split("Identical pixels")[1]


def test_an_image_that_cannot_be_read_is_named(dsu: Dsu, duts: Path) -> None:
    last = sorted((duts / "DUTS" / "DUTS-TR" / "images").iterdir())[-1]
    last.write_text("no image")
    said = dsu("datasets", "--data-root", duts, "--overlaps", exit_code=1).output
    assert last.name in said and "cannot be read" in said
    Image.open(sorted(last.parent.iterdir())[0]).verify()


def test_names_with_brackets_are_printed_literally(dsu: Dsu, duts: Path) -> None:
    odd = duts.rename(duts.with_name("[bold]sets"))
    (odd / "DUTS" / "DUTS-TR").rename(odd / "DUTS-TR")
    assert "[bold]sets" in dsu("doctor", "--data-root", odd).output
    assert "DUTS-TR/images" in dsu("datasets", "--data-root", odd).output
