"""The four commands one after the other, as a user types them."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from support import TINY, Dsu, pixel_difference


def test_the_four_commands_use_the_previous_ones_results(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    said = dsu("cache-features", drawn, *TINY).output
    assert "12 " in said and "shapes-TR" in said and "shapes-TE" in said
    assert "cpu at fp32" in said and "free:" in said
    dsu("train-head", "--epochs", "2")
    [run] = (tmp_path / "runs").iterdir()
    assert {
        "head.safetensors",
        "last.safetensors",
        "best.safetensors",
        "settings.yaml",
        "metrics.csv",
        "curves.png",
    } <= {path.name for path in run.iterdir()}
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"] and all(float(row["val_S"]) > 0 for row in rows)
    assert dsu("predict").stdout.endswith("Next: `dsu eval`\n")
    truths = sorted((drawn / "test" / "masks").iterdir())
    for truth in truths:
        mask = Image.open(run / "predictions" / "shapes-TE" / truth.name)
        assert mask.mode == "L" and mask.size == Image.open(truth).size
    table = dsu("eval", "--json", "figures.json").output
    assert "shapes-TE" in table and "MAE" in table
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"shapes-TE"} and figures["shapes-TE"]["images"] == len(truths)
    assert {
        "S",
        "F_adaptive",
        "F_mean",
        "F_max",
        "F_weighted",
        "E_adaptive",
        "E_mean",
        "E_max",
        "MAE",
        "IoU",
        "Dice",
    } < set(figures["shapes-TE"])


def test_predictions_from_the_store_and_from_the_images_are_equal(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    dsu("cache-features", drawn, *TINY)
    dsu("train-head", "--epochs", "1", "--out", "run")
    dsu("predict", "--head", "run", "--out", "stored")
    dsu("predict", "--head", "run", "--out", "live", "--end-to-end")
    for path in sorted((tmp_path / "stored" / "shapes-TE").iterdir()):
        assert pixel_difference(path, tmp_path / "live" / "shapes-TE" / path.name) == 0


@pytest.mark.parametrize("adapt_last", [7, 4, 1, 0])
def test_training_from_the_store_and_end_to_end_gives_the_same_weights(
    dsu: Dsu, drawn: Path, tmp_path: Path, adapt_last: int
) -> None:
    dsu("cache-features", drawn, *TINY, "--level-views", 4)
    recipe = ("--epochs", "2", "--adapt-last", adapt_last, "--batch-size", "5")
    said = dsu("train-head", drawn, *recipe, "--out", "stored").output
    start = next(line for line in said.splitlines() if line.startswith("starts from"))
    assert ("pixels" in start) == (adapt_last >= 7), said
    dsu("train-head", drawn, *recipe, "--out", "live", "--end-to-end")
    stored, live = (load_file(tmp_path / run / "last.safetensors") for run in ("stored", "live"))
    assert stored.keys() == live.keys()
    assert [name for name in stored if not stored[name].equal(live[name])] == []


def test_repeating_stage_one_computes_nothing(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("c/**/*") if path.is_file()}
    said = dsu("cache-features", drawn, *TINY, "--features", "V").output
    assert "already stored" in said
    dsu("cache-features", drawn, *TINY, "--features", "V,S4")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("c/**/*") if path.is_file()}
    assert before.items() <= after.items() and len(after) == len(before) + 2


def test_only_new_and_changed_images_are_computed(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(drawn / "train", mine)
    dsu("cache-features", mine, *TINY, "--features", "V")
    first, second = sorted((mine / "images").iterdir())[:2]
    Image.open(first).convert("L").save(first)
    for folder, ending in (("images", ".jpg"), ("masks", ".png")):
        shutil.copy((mine / folder / second.name).with_suffix(ending), mine / folder / f"added{ending}")
    said = dsu("train-head", mine, "--epochs", "1", exit_code=1).output
    assert "1 new (added)" in said and f"1 changed ({first.stem})" in said and "dsu cache-features" in said
    # The added image is a copy of a stored one, so that only one row is computed.
    said = dsu("cache-features", mine, *TINY, "--features", "V").output
    assert "4 views" in said
    dsu("train-head", mine, "--epochs", "1")


def test_errors_for_other_weights_sizes_or_types_name_the_field(dsu: Dsu, drawn: Path) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V")
    said = dsu("cache-features", drawn, *TINY, "--features", "V", "--feature-dtype", "float32", exit_code=1).output
    assert "type" in said and "float16" in said and "float32" in said and "--rebuild" in said
    dsu("cache-features", drawn, *TINY, "--features", "V", "--feature-dtype", "float32", "--rebuild")
    said = dsu("train-head", "--precision", "bf16", exit_code=1).output
    assert "precision" in said and "fp32" in said and "bf16" in said


def test_a_killed_run_resumes_to_the_same_weights(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V")
    recipe = ["--epochs", "6", "--batch-size", "4"]
    dsu("train-head", *recipe, "--out", "whole")
    command = [sys.executable, "-c", "from dsu_cli.main import run; run()", "train-head", *recipe, "--out", "killed"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "head.safetensors").exists(), "the run was over before it could be killed"
    dsu("train-head", *recipe, "--out", "killed", "--resume")
    whole, resumed = (load_file(tmp_path / run / "last.safetensors") for run in ("whole", "killed"))
    assert [name for name in whole if not whole[name].equal(resumed[name])] == []
    assert _column(tmp_path / "whole", "loss") == _column(tmp_path / "killed", "loss")


def _column(run: Path, name: str) -> list[str]:
    return [row[name] for row in csv.DictReader((run / "metrics.csv").open())]


def test_an_own_folder_without_splits_is_evaluated_on_held_out_images(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    shutil.copytree(drawn / "train", tmp_path / "tiles")
    dsu("cache-features", "tiles", *TINY, "--features", "V")
    dsu("train-head", "--epochs", "1", "--val-fraction", "0.3")
    dsu("predict")
    dsu("eval", "--json", "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    [name] = figures
    assert name == "tiles-VAL" and 0 < figures[name]["images"] < 12
    assert "not normalised" in figures[name]["conventions"]["map"]


def test_predictions_keep_subfolders(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V")
    dsu("train-head", "--epochs", "1")
    images = sorted((drawn / "test" / "images").iterdir())
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    shutil.copy(images[0], tmp_path / "photos" / "a.jpg")
    Image.open(images[1]).save(tmp_path / "photos" / "a.png")
    shutil.copy(images[2], tmp_path / "photos" / "deep" / "b.jpg")
    (tmp_path / "photos" / "broken.jpg").write_text("no image")
    said = dsu("predict", "photos", images[3], "--out", "masks", exit_code=1).output
    assert "broken.jpg" in said and "4 written" in said and "1 skipped" in said
    written = {path.relative_to(tmp_path / "masks").as_posix() for path in (tmp_path / "masks").rglob("*.png")}
    assert written == {"photos/a_jpg.png", "photos/a_png.png", "photos/deep/b.png", f"{images[3].stem}.png"}
    assert "Next:" not in said, "nothing of it can be evaluated"
    said = dsu("predict", "photos", images[3], "--out", "masks", exit_code=1).output
    assert "4 already existed" in said
    assert dsu("predict", "--out", "my masks").stdout.endswith("Next: `dsu eval --predictions 'my masks'`\n")
    said = dsu("predict", "photos", "--out", "masks", "--kind", "overlay", exit_code=1).output
    assert "--overwrite" in said


def test_overlays_and_cutouts(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V")
    dsu("train-head", "--epochs", "1")
    image = sorted((drawn / "test" / "images").iterdir())[0]
    dsu("predict", image, "--out", "over", "--kind", "overlay")
    dsu("predict", image, "--out", "cut", "--kind", "cutout")
    dsu("predict", image, "--out", "hard", "--threshold", "0.5")
    name = f"{image.stem}.png"
    assert Image.open(tmp_path / "over" / name).mode == "RGB"
    assert Image.open(tmp_path / "cut" / name).mode == "RGBA"
    assert set(np.unique(np.asarray(Image.open(tmp_path / "hard" / name)))) <= {0, 255}


def test_options_override_settings_from_a_file(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V")
    (tmp_path / "mine.yaml").write_text("epochs: 3\nbatch_size: 6\nlr: 0.0005\n")
    dsu("train-head", "--config", "mine.yaml", "--epochs", "1", "--out", "run")
    settings = (tmp_path / "run" / "settings.yaml").read_text()
    assert "epochs: 1" in settings and "batch_size: 6" in settings and "lr: 0.0005" in settings


def test_help_and_version_are_fast() -> None:
    probe = "import sys, dsu_cli.main; print([m for m in ('torch', 'zarr', 'numpy') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]", "a heavy import stands outside of the commands"


def test_a_resumed_run_has_its_own_settings(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V")
    (tmp_path / "mine.yaml").write_text("epochs: 2\nlr: 0.0005\nseed: 7\n")
    dsu("train-head", "--config", "mine.yaml")
    [run] = (tmp_path / "runs").iterdir()
    whole = load_file(run / "head.safetensors")
    dsu("train-head", "--config", "mine.yaml", "--out", "runs/other")
    (tmp_path / "runs" / "other" / "head.safetensors").unlink()
    dsu("train-head", "--resume")
    again = load_file(tmp_path / "runs" / "other" / "head.safetensors")
    assert [name for name in whole if not whole[name].equal(again[name])] == []


def test_changed_images_are_predicted_again(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V")
    dsu("train-head", "--epochs", "1")
    photos = tmp_path / "photos"
    shutil.copytree(drawn / "test" / "images", photos)
    dsu("predict", "photos", "--out", "masks")
    first = sorted(photos.iterdir())[0]
    Image.open(first).resize((77, 55)).save(first)
    assert "1 written" in dsu("predict", "photos", "--out", "masks").output
    assert Image.open(tmp_path / "masks" / f"{first.stem}.png").size == (77, 55)


def test_predict_and_eval_distinguish_images_from_masks(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V")
    dsu("train-head", "--epochs", "1")
    said = dsu("predict", drawn / "test", "--out", "masks").output
    assert "5 written" in said and "5 masks" in said
    figures = tmp_path / "figures.json"
    dsu("eval", "--predictions", "masks", "--truth", drawn / "test", "--json", figures)
    assert next(iter(json.loads(figures.read_text()).values()))["images"] == 5
    dsu("predict", drawn / "test", "--out", "shown", "--kind", "overlay")
    assert "overlay" in dsu("eval", "--predictions", "shown", "--truth", drawn / "test", exit_code=2).output
