"""From maps to a decision: thresholds from the validation share, evaluated on the test share, stored with the head."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluations import draw_cases
from house import House
from PIL import Image
from rubbish import Refused
from support import TINY, Dsu

from dsu.heads.head_file import head_sha256, load_head


@pytest.fixture
def tiles(drawn: Path, tmp_path: Path) -> Path:
    """Twelve images, a third of them without an object."""
    shutil.copytree(drawn / "train", tmp_path / "tiles")
    for mask in sorted((tmp_path / "tiles" / "masks").iterdir())[::3]:
        Image.new("L", Image.open(mask).size).save(mask)
    return tmp_path / "tiles"


RUN = ("--head", "run", "--quiet")


def test_a_threshold_is_proposed_evaluated_stored_and_used(dsu: Dsu, tiles: Path) -> None:
    dsu("cache-features", tiles, *TINY, "--features", "V", "--views", "none")
    shares = ("--val-fraction", "0.4", "--test-fraction", "0.3")
    dsu("train-head", "--epochs", 1, "--views", "none", *shares, "--out", "run", "--adapt-last", 0)
    dsu("predict", *RUN)
    predictions = Path("run/predictions")
    assert {path.name for path in predictions.iterdir() if path.is_dir()} == {"tiles-VAL", "tiles-TEST"}
    said = dsu("eval", "--predictions", "run", "--report", "report.html").stdout
    page = Path("report.html").read_text("utf-8")
    assert '<section id="thresholds">' in page and "proposed from tiles-VAL only" in page and "Calibration" in page
    assert "tiles-TEST" in said.splitlines()[1], "the share that nothing was chosen by is what is told"
    assert "Thresholds, proposed from tiles-VAL only" in said and "dsu head threshold VALUE" in said
    found = json.loads((predictions / "thresholds.json").read_text())
    assert found["validation"] == "tiles-VAL" and set(found["images"]) == {"tiles-VAL", "tiles-TEST"}
    rules = {one["rule"]: one for one in found["proposals"]}
    assert {"best pixels", "no misses", "balanced", "false alarms up to 5 %", "default"} == set(rules)
    for name, counts in found["images"].items():
        for one in rules.values():
            at = one["sets"][name]
            assert at["found"] + at["missed"] == counts["with_object"]
            assert at["false_alarms"] + at["silent"] == counts["without_object"]
            # The same as computed from the maps, for every image.
            maps = [np.asarray(Image.open(path)) for path in (predictions / name).rglob("*.png")]
            alarms = sum(bool((grey / 255 >= one["threshold"] - 1e-9).any()) for grey in maps)
            assert at["found"] + at["false_alarms"] == alarms
    assert rules["no misses"]["sets"]["tiles-VAL"]["missed"] == 0
    assert set(json.loads((predictions / "metrics.json").read_text())) == {"tiles-TEST"}

    threshold = rules["no misses"]["threshold"]
    head = Path("run/head.safetensors")
    digest, (before, _), written = head_sha256(head), load_head(head), head.stat().st_mtime_ns
    maps = {path: path.read_bytes() for path in predictions.rglob("*.png")}
    assert f"threshold {threshold:g}" in dsu("head", "threshold", threshold, "run").stdout
    after, info = load_head(head)
    assert info.threshold == threshold and head_sha256(head) == digest and head.stat().st_mtime_ns == written
    assert all(before[name].equal(after[name]) for name in before)

    dsu("predict", *RUN)
    assert {path: path.read_bytes() for path in predictions.rglob("*.png")} == maps, "predictions stay valid"
    rows = {row["file"]: row for row in csv.DictReader((predictions / "table.csv").open(newline=""))}
    assert {float(row["threshold"]) for row in rows.values()} == {threshold}
    for file, row in rows.items():
        above = int((np.asarray(Image.open(predictions / file)) / 255 >= threshold - 1e-9).sum())
        assert int(row["area"]) == above and row["verdict"] == ("alarm" if above else "clear")
    assert "the head's own" in dsu("eval", "--predictions", "run").stdout
    at = rules["no misses"]["sets"]["tiles-TEST"]
    phrase = f"tiles-TEST: {at['found']} of {found['images']['tiles-TEST']['with_object']} images with an object found"
    assert phrase in " ".join(dsu("head", "info", "run").stdout.split())
    dsu("head", "export", "run", "--out", "shared")
    card = Path("shared/README.md").read_text()
    assert f"alarm threshold of `dsu predict` is {threshold:g}" in card and phrase in card
    dsu("predict", tiles / "images", "--head", "shared", "--out", "masks", "--quiet")
    assert json.loads(Path("masks/table.json").read_text())[0]["threshold"] == threshold
    said = " ".join(dsu("eval", "--predictions", "masks", "--truth", tiles / "masks", "--all").stdout.split())
    assert f"at the head's threshold {threshold:g}:" in said and "false alarms on 4 without" in said
    for kind, changed in (("overlay", lambda p, i: (p != i).any(-1)), ("cutout", lambda p, i: p[..., 3] > 0)):
        dsu("predict", tiles / "images", "--head", "shared", "--out", kind, "--kind", kind, "--quiet")
        for image in sorted((tiles / "images").iterdir())[:3]:
            grey = np.asarray(Image.open(f"masks/{image.stem}.png"))
            shown = changed(np.asarray(Image.open(f"{kind}/{image.stem}.png")), np.asarray(Image.open(image)))
            assert shown.any() == (grey / 255 >= threshold - 1e-9).any()
    dsu("head", "threshold", "0.9", "shared")
    again = ("predict", tiles / "images", "--head", "shared", "--out", "overlay", "--kind", "overlay")
    assert "other settings: give --overwrite" in dsu(*again, exit_code=1).output
    assert "12 written to overlay" in dsu(*again, "--overwrite").output


def test_invalid_thresholds_are_refused(refused: Refused, dsu: Dsu, house: House, tmp_path: Path) -> None:
    run = house.copied(tmp_path).run
    for value in ("0", "1.01", "half", "nan"):
        refused(["head", "threshold", value, run], f"VALUE can't be {value!r}", "or none")
    assert "threshold none, so 0.5 applies" in dsu("head", "threshold", "none", run).stdout
    refused(["eval", "--predictions", run, "--false-alarms", "5"], "--false-alarms can't be 5", "such as 0.05")


def test_faint_maps_give_a_warning(dsu: Dsu, tmp_path: Path) -> None:
    for case in draw_cases(tmp_path / "drawn", ["0", "1", "2"]):
        Image.open(case.prediction).point(lambda value: value // 4).save(case.prediction)
    one = ("eval", "--predictions", "drawn/maps", "--truth", "drawn/masks")
    said = dsu(*one).stdout
    assert "IoU and Dice count pixels above 0.5" in said and "lower threshold" in said
    assert "lower threshold" not in dsu(*one, "--normalize", "minmax").stdout
    assert "lower threshold" not in dsu(*one, "--metrics", "S,MAE").stdout


def test_binarised_maps_are_not_called_faint(dsu: Dsu, house: House) -> None:
    images = house.data / "test" / "images"
    for words in ((), ("--threshold", "1")):
        out = f"masks{len(words)}"
        dsu(*house.predict(images, "--out", out, *words, "--quiet"))
        said = dsu("eval", "--predictions", out, "--truth", house.data / "test" / "masks").stdout
        assert ("binarised at 1.0 when predicted" in said) is bool(words) and "lower threshold" not in said


def test_another_methods_flat_folder_is_evaluated_as_a_named_set(dsu: Dsu, tmp_path: Path) -> None:
    cases = draw_cases(tmp_path / "x", ["0", "1", "2"])
    (tmp_path / "data" / "ECSSD").mkdir(parents=True)
    (tmp_path / "x" / "images").rename(tmp_path / "data/ECSSD/images")
    (tmp_path / "x" / "masks").rename(tmp_path / "data/ECSSD/ground_truth_mask")
    for image in (tmp_path / "data/ECSSD/images").iterdir():
        Image.open(image).convert("RGB").save(image.with_suffix(".jpg"))
        image.unlink()
    said = dsu("eval", "ECSSD", "--predictions", "Blur=x/maps").stdout
    assert "Blur" in said and "DSU-Net" in said and "evaluated on 3" in said
    left = sorted(path.name for path in (tmp_path / "x" / "maps").iterdir())
    assert left == [f"{case.name}.png" for case in cases], "nothing is written into another method's folder"


def test_another_methods_maps_are_evaluated_on_a_runs_share(dsu: Dsu, tiles: Path) -> None:
    """The other method's maps are of all images; only the run's record has the share."""
    dsu("cache-features", tiles, *TINY, "--features", "V", "--views", "none", "--quiet")
    shares = ("--val-fraction", "0.4", "--test-fraction", "0.3", "--views", "none", "--adapt-last", 0)
    dsu("train-head", "--epochs", 1, *shares, "--out", "run", "--quiet")
    dsu("predict", *RUN)
    shutil.copytree(tiles / "masks", "theirs")
    both = ("--predictions", "Ours=run", "--predictions", "Theirs=theirs")
    count = len(list(Path("run/predictions/tiles-TEST").rglob("*.png")))
    for names in (("tiles-TEST",), ()):
        said = dsu("eval", *names, *both, "--format", "json").stdout
        found = json.loads(said)
        assert found["Ours"].keys() == found["Theirs"].keys() == {"tiles-TEST"}
        assert found["Ours"]["tiles-TEST"]["images"] == found["Theirs"]["tiles-TEST"]["images"] == count < 12
        assert found["Theirs"]["tiles-TEST"]["MAE"] < 0.01
    refused = dsu("eval", "--predictions", "theirs", exit_code=2).output
    assert "give --truth" in refused, "alone, nothing says what they are of"
