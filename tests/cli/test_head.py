"""`dsu head`, and predicting with an exported head."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from house import House
from hub import FakeHub, serving
from rubbish import Refused
from support import Dsu, pixel_difference


def test_info_describes_a_head(dsu: Dsu, house: House) -> None:
    said = dsu("head", "info", house.run).output
    for words in ("Hiera toy at 128 px", "random weights", "M parameters", "shapes-TR", "epochs 1", "after epoch 1"):
        assert words in said, words
    facts = json.loads(dsu("head", "info", house.run / "head.safetensors", "--json").output)
    assert facts["epoch"] == 1 and facts["dataset"]["split"] == "shapes-TR" and len(facts["encoders"]) == 2


def test_an_exported_head_gives_the_same_predictions(dsu: Dsu, house: House, tmp_path: Path) -> None:
    said = dsu("head", "export", house.run, "-o", "given", "--name", "me/shapes").output
    assert "README.md" in said and "apache-2.0" in said and "hf upload me/shapes given" in said
    images = house.data / "test" / "images"
    dsu("predict", images, "--head", house.run, "--out", "before")
    dsu("predict", images, "--head", "given")
    after = tmp_path / "runs" / "given" / "predictions" / "images"
    pictures = sorted(after.iterdir())
    assert len(pictures) == 2 and not (tmp_path / "given" / "predictions").exists()
    assert {pixel_difference(one, tmp_path / "before" / one.name) for one in pictures} == {0}
    card = (tmp_path / "given" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"
    assert str(house.data.parent) not in card


def test_the_card_has_the_scores_of_eval(dsu: Dsu, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    dsu("eval", "--predictions", mine.predictions)
    dsu("head", "export", mine.run, "-o", "given")
    card = (tmp_path / "given" / "README.md").read_text()
    [index] = yaml.safe_load(card.split("---\n")[1])["model-index"]
    figures = json.loads((mine.predictions / "metrics.json").read_text())["shapes-TE"]
    found = {metric["type"]: metric["value"] for metric in index["results"][0]["metrics"]}
    assert found == {name: pytest.approx(figures[name]) for name in found} and found["S"] > 0
    assert "shapes-TE" in dsu("head", "info", mine.run).output


def test_the_card_marks_figures_of_a_part_of_a_benchmark(dsu: Dsu, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    shutil.copytree(house.data / "test", tmp_path / "data" / "ECSSD")
    dsu("predict", "ECSSD", "--head", mine.run, "--data-root", "data")
    dsu("eval", "ECSSD", "--predictions", mine.run, "--data-root", "data")
    said = " ".join(dsu("head", "info", mine.run).output.split())
    assert "2 images; not comparable with the paper, evaluated on 2 of the set's 1,000 images" in said
    dsu("head", "export", mine.run, "-o", "given")
    assert "evaluated on 2 of the set's 1,000 images" in (tmp_path / "given" / "README.md").read_text()


def test_the_card_names_missing_predictions(dsu: Dsu, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    sorted((mine.predictions / "shapes-TE").iterdir())[0].unlink()
    assert "evaluated on 1 of the set's 2 images" in dsu("eval", "--predictions", mine.run, exit_code=1).stdout
    said = " ".join(dsu("head", "info", mine.run).output.split())
    assert "(1 image; 1 more without a prediction)" in said


def test_bad_requests_give_one_sentence(refused: Refused, house: House, tmp_path: Path) -> None:
    refused(["head", "info"], "no trained head below runs/", "dsu train-head")
    refused(["head", "info", "nowhere"], "nowhere", "train one first")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("precious")
    refused(["head", "export", house.run, "-o", "full"], "full", "not empty", "--overwrite")
    refused(["head", "export", house.run, "-o", house.run, "--overwrite"], "run folder", "--out")
    refused(["head", "export", house.run, "-o", "new", "--name", "two words"], "--name two words", "OWNER/NAME")
    refused(["predict", "--head", house.run, "--revision", "v1"], "--revision", "OWNER/NAME")


def test_an_exported_head_needs_a_source(refused: Refused, dsu: Dsu, house: House) -> None:
    dsu("head", "export", house.run, "-o", "given", "--quiet")
    refused(["predict", "--head", "given"], "does not record its training data", "folder or image files")


def test_downloads_use_the_hubs_environment_variables(dsu: Dsu, house: House, tmp_path: Path) -> None:
    """In a new process, since the library reads HF_HOME and HF_ENDPOINT when it is imported."""
    dsu("head", "export", house.run, "-o", "given", "--quiet")
    files = {path.name: path.read_bytes() for path in (tmp_path / "given").iterdir()}
    image = sorted((house.data / "test" / "images").iterdir())[0]
    command = [sys.executable, "-c", "from dsu_cli.main import run; run()", "predict", image, "--head", "me/shapes"]
    with serving(FakeHub({"me/shapes": files})) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf")}
        environment.pop("HF_HUB_OFFLINE", None)
        online = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert online.returncode == 0, online.stderr
    assert (tmp_path / "runs" / "me--shapes" / "predictions" / f"{image.stem}.png").exists()
    assert (tmp_path / "hf" / "hub" / "models--me--shapes").is_dir()
    offline = subprocess.run(
        [*command[:-1], "me/none"],
        cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert offline.returncode == 1 and "Traceback" not in offline.stderr
    assert "HF_HUB_OFFLINE is set" in " ".join(offline.stderr.split())
