"""Regression tests for evaluation: each case once gave a wrong figure, or lost files silently."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from house import House
from numpy.typing import NDArray
from PIL import Image
from support import Dsu

from dsu_cache import locked

Map = NDArray[Any]
SIZES: Final = ((60, 40), (64, 44), (68, 48))
"""Widths and heights of synthetic masks."""


def box(width: int, height: int) -> NDArray[np.uint8]:
    """A mask (H, W) with a box that changes its place in every rotation."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 8 : height // 2, width // 4 : width // 2] = 255
    return mask


def saved(folder: Path | str, make: Callable[[Map], Map], ending: str = "png") -> Path:
    """Write images made from the boxes into a folder."""
    Path(folder).mkdir(parents=True)
    for index, size in enumerate(SIZES):
        Image.fromarray(make(box(*size))).save(Path(folder) / f"{index}.{ending}")
    return Path(folder)


def photograph(mask: Map) -> Map:
    """Noise (H, W, 3) of a mask's size, with black pixels."""
    return np.random.default_rng(0).integers(0, 256, (*mask.shape, 3), dtype=np.uint8)


# ---- files that are not maps or masks ----

NO_MAPS: Final = {
    "zeros and ones": (lambda mask: mask // 255, "png", "have no value above 1"),
    "16 bits of which 8 are used": (lambda mask: mask.astype(np.uint16), "png", "have no value above 1"),
    "floats up to 255": (lambda mask: mask.astype(np.float32), "tif", "0.tif contains floats from 0 to 255"),
    "logits": (lambda mask: mask.astype(np.float32) / 32 - 4, "tif", "0.tif contains floats from -4 to 3.969"),
}


@pytest.mark.parametrize("kind", NO_MAPS)
def test_maps_of_another_range_are_refused(dsu: Dsu, kind: str) -> None:
    make, ending, reason = NO_MAPS[kind]
    saved("truth", lambda mask: mask)
    saved("maps", make, ending)
    result = dsu("eval", "--predictions", "maps", "--truth", "truth", exit_code=1)
    assert reason in result.stderr and "--resize" not in result.stderr, result.output


@pytest.mark.parametrize("grey", [False, True])
def test_photographs_are_refused_as_ground_truth(dsu: Dsu, grey: bool) -> None:
    saved("maps", lambda mask: mask)
    saved("truth", (lambda mask: photograph(mask)[..., 0]) if grey else photograph)
    result = dsu("eval", "--predictions", "maps", "--truth", "truth", exit_code=1)
    assert "0.png is a photograph, not a mask" in result.stderr


@pytest.mark.parametrize("options", [(), ("--resize",)])
def test_rotated_maps_are_refused(dsu: Dsu, options: tuple[str, ...]) -> None:
    saved("truth", lambda mask: mask)
    saved("maps", np.transpose)
    result = dsu("eval", "--predictions", "maps", "--truth", "truth", *options, exit_code=1)
    assert "is rotated" in result.stderr and "--resize" not in result.stderr


# ---- maps of another image, set or head ----


def test_images_from_another_folder_with_the_same_name_are_refused(dsu: Dsu, house: House, drawn: Path) -> None:
    for place, part in (("a", "train"), ("b", "test")):
        shutil.copytree(drawn / part / "images", Path(place, "images"))
    into = ("--head", house.run, "--out", "maps", "--quiet")
    for source in ("images", "images/0000.jpg"):
        dsu("predict", Path("a", source), *into)
        before = {path: path.read_bytes() for path in Path("maps").rglob("*.png")}
        assert "give --overwrite or another --out" in dsu("predict", Path("b", source), *into, exit_code=1).stderr
        assert {path: path.read_bytes() for path in Path("maps").rglob("*.png")} == before
    Path("a").rename("moved")
    assert "12 already existed" in dsu("predict", Path("moved", "images"), *into[:-1]).output


def test_predictions_are_never_written_among_images(dsu: Dsu, house: House, drawn: Path) -> None:
    shutil.copytree(drawn / "test", "tiles")
    for source, out in (("tiles/images", "tiles"), ("tiles/images/0000.jpg", "tiles/images")):
        result = dsu("predict", source, "--head", house.run, "--out", out, exit_code=2)
        assert "would be among the images" in result.stderr
    assert not list(Path("tiles/images").glob("*.png"))


@pytest.mark.parametrize("to", ["old/0000.png", "0000_mask.png"])
@pytest.mark.parametrize("own_truth", [True, False])
def test_moved_and_renamed_maps_are_not_evaluated(
    dsu: Dsu, house: House, tmp_path: Path, to: str, own_truth: bool
) -> None:
    """A map that was moved or renamed inside its set's folder does not count as a prediction."""
    mine = house.copied(tmp_path)
    inner = mine.predictions / "shapes-TE"
    (inner / "old").mkdir()
    (inner / "0000.png").rename(inner / to)
    truth = () if own_truth else ("--truth", house.data / "test" / "masks")
    result = dsu("eval", "--predictions", mine.predictions, *truth, "--format", "json", exit_code=1)
    assert "0000 has no prediction" in result.stderr and '"images": 1' in result.stdout


def test_a_changed_image_is_not_evaluated_with_its_old_map(dsu: Dsu, house: House, tmp_path: Path) -> None:
    data = shutil.copytree(house.data / "test", tmp_path / "ECSSD")
    roots = ("--data-root", tmp_path)
    dsu("predict", "ECSSD", "--head", house.run, "--out", "maps", *roots, "--quiet")
    for path in (data / "images" / "0000.jpg", data / "masks" / "0000.png"):
        picture = Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture.save(path)
    result = dsu("eval", "--predictions", "maps", "--format", "json", *roots, exit_code=1)
    assert json.loads(result.stdout)["ECSSD"]["images"] == 1
    assert "0000 has changed since it was predicted" in result.stderr
    dsu("predict", "ECSSD", "--head", house.run, "--out", "maps", *roots, "--quiet")
    dsu("eval", "--predictions", "maps", *roots)


def test_ground_truth_belongs_to_the_named_set(dsu: Dsu, house: House, tmp_path: Path) -> None:
    for name in ("ECSSD", "CHAMELEON"):
        shutil.copytree(house.data / "test", tmp_path / name)
    dsu("predict", "ECSSD", "CHAMELEON", "--head", house.run, "--out", "maps", "--data-root", tmp_path, "--quiet")
    of_truth = ("--predictions", "maps", "--truth", tmp_path / "ECSSD" / "masks", "--format", "json", "--quiet")
    for names in ((), ("HKU-IS",)):
        assert "ECSSD, CHAMELEON: name the one" in dsu("eval", *names, *of_truth, exit_code=2).stderr
    own = json.loads(dsu("eval", "ECSSD", "--predictions", "maps", "--data-root", tmp_path, "--format", "json").stdout)
    named = json.loads(dsu("eval", "ECSSD", *of_truth).stdout)
    assert named["ECSSD"]["S"] == own["ECSSD"]["S"]


def test_old_maps_of_a_retrained_run_are_refused_with_any_ground_truth(dsu: Dsu, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    head = mine.run / "head.safetensors"
    head.write_bytes((mine.run / "last.safetensors").read_bytes() + b" ")
    result = dsu("eval", "--predictions", mine.run, "--truth", house.data / "test" / "masks", exit_code=2)
    assert "belongs to another head" in result.stderr
    result = dsu("visualize", "predictions", "--predictions", mine.run, exit_code=2)
    assert "belongs to another head" in result.stderr


def test_maps_are_not_evaluated_during_prediction(dsu: Dsu, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    with locked(mine.predictions / ".predictions.lock", "held"):
        assert "is predicting into" in dsu("eval", "--predictions", mine.run, exit_code=2).stderr


# ---- remarks on figures ----


def test_eval_reports_normalisation_and_thresholds_of_prediction(dsu: Dsu, house: House) -> None:
    options = ("--threshold", "0.5", "--normalize", "minmax")
    dsu(*house.predict("--out", "maps", *options, "--quiet"))
    said = "stretched (min-max) and binarised at 0.5 when predicted"
    for form in ("table", "markdown", "latex", "json"):
        assert said in " ".join(dsu("eval", "--predictions", "maps", "--format", form).stdout.split()), form


def test_runs_evaluated_on_different_images_are_not_ranked(dsu: Dsu) -> None:
    saved("truth", lambda mask: mask)
    saved("good", lambda mask: mask)
    saved("other", lambda mask: mask // 2)
    both = ("eval", "--predictions", "good", "--predictions", "other", "--truth", "truth", "--format", "markdown")
    assert "**1.000**" in dsu(*both).stdout
    Path("other/1.png").unlink()
    said = dsu(*both, exit_code=1).stdout
    assert "**" not in said and "different images" in said
    said = dsu(*both, "--common").stdout
    assert "**1.000**" in said and "different images" not in said
    assert "give one" in dsu(*both, "--common", "--all", exit_code=2).stderr
    others = Path("truth").rename("all"), Path("other").rename("once")
    for path in sorted(others[1].iterdir())[1:]:
        path.unlink()
    only = next(others[1].iterdir()).name
    Path("good", only).unlink()
    both = ("eval", "--predictions", "good", "--predictions", "once", "--truth", "all", "--common")
    assert "no images in common" in dsu(*both, exit_code=2).stderr


def test_figures_of_training_images_are_marked_in_a_model_card(dsu: Dsu, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    dsu("predict", house.data / "train" / "images", "--head", mine.run, "--quiet")
    record = json.loads((mine.predictions / "predictions.json").read_text())
    record["sets"]["shapes-TE"]["trained_on"] = ["0000"]
    (mine.predictions / "predictions.json").write_text(json.dumps(record))
    dsu("eval", "shapes-TE", "--predictions", mine.run, "--all", "--quiet")
    dsu("head", "export", mine.run, "--out", "shared")
    front, _, text = Path("shared/README.md").read_text().removeprefix("---\n").partition("\n---\n")
    assert "trained on 1 of 2 images" in " ".join(front.split()) and "trained on 1 of 2 images" in text


def test_figures_are_removed_when_maps_are_replaced(dsu: Dsu, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    dsu("eval", "--predictions", mine.run, "--quiet")
    assert "shapes-TE" in dsu("head", "info", mine.run).stdout.split()
    dsu(*mine.predict("--normalize", "minmax", "--overwrite", "--quiet"))
    assert "shapes-TE" not in dsu("head", "info", mine.run).stdout.split()
    assert not list(mine.predictions.glob("metrics.*"))


# ---- no files are lost ----


def test_evaluating_one_set_keeps_the_figures_of_others(dsu: Dsu, house: House, tmp_path: Path) -> None:
    mine, roots = house.copied(tmp_path), ("--data-root", tmp_path)
    shutil.copytree(house.data / "test", tmp_path / "ECSSD")
    dsu(*mine.predict("ECSSD", *roots, "--quiet"))
    dsu("eval", "--predictions", mine.run, *roots, "--quiet")
    files = [mine.predictions / name for name in ("metrics.json", "metrics.csv")]
    whole = [path.read_text() for path in files]
    dsu("eval", "ECSSD", "--predictions", mine.run, *roots, "--quiet")
    assert [path.read_text() for path in files] == whole
    dsu(*mine.predict("ECSSD", *roots, "--overwrite", "--quiet"))
    assert set(json.loads(files[0].read_text())) == {"shapes-TE"}


WRITTEN_OVER: Final = {
    "one another": ("--json", "a.txt", "--csv", "a.txt"),
    "a mask": ("--json", "truth/0.png"),
    "a record": ("--per-image", "RUN/predictions/predictions.json"),
    "a training's figures": ("--csv", "RUN/metrics.csv"),
}


@pytest.mark.parametrize("what", WRITTEN_OVER)
def test_output_files_never_replace_other_files(dsu: Dsu, house: House, tmp_path: Path, what: str) -> None:
    mine = house.copied(tmp_path)
    saved("truth", lambda mask: mask)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    options = [word.replace("RUN", str(mine.run)) for word in WRITTEN_OVER[what]]
    dsu("eval", "--predictions", "truth", "--truth", "truth", *options, exit_code=2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


SPOILT: Final = {
    "no names": {"source": None},
    "names that are none": {"source": None, "names": [1]},
    "trained on a number": {"source": None, "names": [], "trained_on": 5},
    "stamps of text": {"source": None, "names": ["a"], "stamps": {"a": "x"}},
    "a list": [],
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_damaged_record_is_named(dsu: Dsu, house: House, tmp_path: Path, kind: str) -> None:
    mine = house.copied(tmp_path)
    path = mine.predictions / "predictions.json"
    record = json.loads(path.read_text())
    record["sets"]["spoilt"] = SPOILT[kind]
    path.write_text(json.dumps(record))
    assert "predictions.json is damaged" in dsu("eval", "--predictions", mine.run, exit_code=1).stderr
    assert "is damaged" in dsu(*mine.predict("--quiet"), exit_code=1).stderr
