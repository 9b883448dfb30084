"""Bad heads, predictions and ground truths."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from house import House
from PIL import Image
from rubbish import Refused, run_code, truncate
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import Dsu

from dsu.heads.head_file import load_head, save_head

# ---- heads and predictions ----


def test_prediction_without_a_head(refused: Refused, tmp_path: Path) -> None:
    refused(["predict"], "no trained head below runs/", "dsu train-head", "--head")
    refused(["predict", "--head", "nowhere"], "nowhere", "run folder", "train one first")
    refused(["predict", "--head", tmp_path], tmp_path, "run folder", "train one first")


def _rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a head with the same tensors and other metadata."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["dsu"])
    changed = change(content)
    save_file(load_file(path), path, {"dsu": changed if isinstance(changed, str) else json.dumps(changed)})


def _without(content: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != field}


def _deeper(content: dict[str, Any], part: str, **changes: object) -> dict[str, Any]:
    config = content["config"]
    return {**content, "config": {**config, part: {**config[part], **changes}}}


def _with_hiera(path: Path, **changes: object) -> None:
    _rewritten(path, lambda content: _deeper(content, "hiera", **changes))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_text("words"), ("can't be read as a head", "give a head.safetensors")),
        (truncate, ("can't be read as a head", "give a head.safetensors")),
        (lambda path: path.write_bytes(b""), ("can't be read as a head",)),
        (lambda path: save_file({"a": torch.zeros(1)}, path), ("no dsu head", "give a head.safetensors")),
        (
            lambda path: _rewritten(path, lambda c: {**c, "format": 99, "version": "9.9"}),
            ("newer dsu, 9.9", "update dsu"),
        ),
        (lambda path: _rewritten(path, lambda c: {**c, "format": "new"}), ("settings",)),
        (
            lambda path: _rewritten(path, lambda c: {**c, "feature_dtype": "int8"}),
            ("feature_dtype", "'float16' or 'float32'"),
        ),
        (lambda path: _rewritten(path, lambda c: _without(c, "config")), ("config is missing",)),
        (lambda path: _rewritten(path, lambda c: "{ not JSON"), ("damaged settings",)),
        (lambda path: _rewritten(path, lambda c: "[1]"), ("settings",)),
        (lambda path: _rewritten(path, lambda c: "[" * 100_000), ("damaged settings",)),
        (lambda path: _rewritten(path, lambda c: "9" * 5000), ("damaged settings",)),
        (lambda path: _with_hiera(path, num_heads=0), ("num_heads must be at least 1, not 0", "train it again")),
        (lambda path: _with_hiera(path, embed_dim=2**40), ("embed_dim must be at most 8192",)),
        (lambda path: _with_hiera(path, embed_dim=16.5), ("embed_dim must be a whole number, not 16.5",)),
        (lambda path: _with_hiera(path, num_heads=3), ("embed_dim 16 must be a multiple of num_heads, 3",)),
        (lambda path: _with_hiera(path, stages=[1, 2, 3]), ("stages.3 is missing",)),
        (lambda path: _with_hiera(path, stages=[1, 0, 3, 1]), ("stages.1 must be at least 1, not 0",)),
        (lambda path: _with_hiera(path, global_att_blocks=[3]), ("must not name block 3, the first of a Hiera stage",)),
        (lambda path: _with_hiera(path, global_att_blocks=[70]), ("names block 70", "from 0 to 6")),
        (lambda path: _with_hiera(path, window_spec=[8, 3, 16, 8]), ("window_spec must be even",)),
        (lambda path: _with_hiera(path, window_spec=[6, 4, 16, 8]), ("a multiple of four of its first windows, 24",)),
        (lambda path: _with_hiera(path, name="../../x"), ("name must be a name of letters",)),
        (lambda path: _rewritten(path, lambda c: _deeper(c, "dino", patch_size=0)), ("patch_size must be at least 1",)),
        (lambda path: _rewritten(path, lambda c: _deeper(c, "dino", other=1)), ("dino.other is not a known field",)),
        (run_code, ("can't be read as a head",)),
    ],
)
def test_files_that_are_not_heads(
    refused: Refused, house: House, tmp_path: Path, spoil: Callable[[Path], Any], words: Sequence[str]
) -> None:
    head = tmp_path / "head.safetensors"
    shutil.copy(house.run / head.name, head)
    spoil(head)
    refused(["predict", house.data / "test" / "images", "--head", head, "--out", "out"], head, *words, status=1)


def test_a_head_whose_tensors_do_not_fit(refused: Refused, house: House, tmp_path: Path) -> None:
    head = tmp_path / "head.safetensors"
    shutil.copy(house.run / head.name, head)
    _rewritten(head, lambda c: {**c, "config": {**c["config"], "ablation": "C"}})
    refused(["predict", house.data / "test", "--head", head], "tensors do not fit", "train it again", status=1)


def test_a_head_trained_with_other_encoder_weights(refused: Refused, house: House, tmp_path: Path) -> None:
    head = tmp_path / "head.safetensors"
    shutil.copy(house.run / head.name, head)
    _rewritten(head, lambda c: {**c, "encoders": {"hiera": "a" * 64, "dino": "b" * 64}})
    command = ["predict", "--head", head, "--cache-root", house.features]
    refused([*command, house.data / "test" / "images"], "hiera", "aaaaaaaaaaaa", "--hiera-weights", status=1)
    refused(command, "V: weights is", "bbbb", status=1)


@pytest.mark.parametrize(
    "dataset",
    [
        {"reference": 5},
        {"reference": "x", "unknown": "y"},
        {"reference": ["x"], "split": "x", "dataset": "x", "kind": "test", "benchmark": False, "data_root": "."},
        {"reference": "x", "held_out": 5},
    ],
)
def test_a_head_with_an_invalid_data_set(
    refused: Refused, house: House, tmp_path: Path, dataset: dict[str, Any]
) -> None:
    head = tmp_path / "head.safetensors"
    shutil.copy(house.run / head.name, head)
    _rewritten(head, lambda c: {**c, "dataset": dataset})
    refused(["predict", "--head", head], "is invalid", "give the images to predict", status=1)


def test_a_head_whose_set_name_leads_out_of_the_output_folder(refused: Refused, house: House, tmp_path: Path) -> None:
    head = tmp_path / "deep" / "head.safetensors"
    head.parent.mkdir()
    shutil.copy(house.run / head.name, head)
    folder = str(house.data / "train")
    names = [path.stem for path in (house.data / "train" / "images").iterdir()]
    changes = {"reference": folder, "split": "../../evil", "dataset": "evil", "kind": "all", "held_out": names}
    _rewritten(head, lambda c: {**c, "dataset": {**c["dataset"], **changes}})
    refused(["predict", "--head", head, "--end-to-end"], "'../../evil-VAL'", "would be outside", status=1)


def test_a_head_with_outputs_that_are_not_finite(refused: Refused, house: House, tmp_path: Path) -> None:
    head = tmp_path / "head.safetensors"
    with safe_open(house.run / head.name, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(house.run / head.name)
    save_file({**state, "sides.2.bias": torch.full_like(state["sides.2.bias"], torch.nan)}, head, metadata)
    image = next((house.data / "test" / "images").iterdir())
    refused(["predict", image, "--head", head, "--out", "out"], image, "not finite", "train the head again", status=1)
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_head_without_a_data_set(refused: Refused, house: House, tmp_path: Path) -> None:
    head = tmp_path / "head.safetensors"
    shutil.copy(house.run / head.name, head)
    _rewritten(head, lambda c: {**c, "dataset": {}})
    refused(["predict", "--head", head], head, "folder or image files")


@pytest.mark.parametrize("source", ["nowhere", "nowhere.jpg", "deep/nowhere.png", "ECSSD"])
def test_sources_that_do_not_exist(refused: Refused, house: House, source: str) -> None:
    error = refused(house.predict(source), source)
    assert ("--data-root" in error) != source.endswith(("jpg", "png"))


def test_a_source_that_is_not_an_image(refused: Refused, house: House, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    error = refused(house.predict("notes.txt", "--out", "out"), "notes.txt", "not in a known image format", status=1)
    assert "0 written" in error and "1 skipped" in error


def test_predictions_never_replace_their_inputs(refused: Refused, house: House, mine: Path, tmp_path: Path) -> None:
    image = mine / "images" / "one.png"
    Image.open(mine / "images" / "0000.jpg").save(image)
    before = image.read_bytes()
    refused(house.predict(image, "--out", image.parent), image, "overwrite an input", "--out")
    refused(house.predict(mine / "images", "--out", mine, "--overwrite"), "among the images", "--out")
    assert image.read_bytes() == before


def test_existing_masks_are_replaced_only_with_overwrite(
    dsu: Dsu, refused: Refused, house: House, mine: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "out" / "0000.png"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    command = house.predict(mine / "images" / "0000.jpg", "--out", "out")
    refused(command, "out/0000.png", "--overwrite", "--out", status=1)
    assert foreign.read_text() == "mine"
    dsu(*command, "--overwrite")
    Image.open(foreign).verify()


def test_predictions_of_another_head(dsu: Dsu, refused: Refused, house: House, mine: Path, tmp_path: Path) -> None:
    command = house.predict(mine / "images", "--out", "out")
    dsu(*command)
    other = tmp_path / "head.safetensors"
    state, info = load_head(house.run / other.name)
    save_head(other, {name: tensor.flip(0) if tensor.ndim else tensor for name, tensor in state.items()}, info)
    table = Path("out", "table.csv").read_bytes()
    refused([*command, "--head", other], "out", "another head", "--overwrite", "--out", status=1)
    refused([*command, "--threshold", "0.5"], "out", "other settings", "--overwrite", status=1)
    assert Path("out", "table.csv").read_bytes() == table
    dsu(*command, "--head", other, "--overwrite")


def test_a_folder_for_predictions_that_cannot_be_written(refused: Refused, house: House, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(house.predict("--out", "file"), "file", status=1)


# ---- evaluation ----


def test_no_predictions(refused: Refused, tmp_path: Path) -> None:
    refused(["eval"], "no predictions below runs/", "dsu predict", "--predictions")
    refused(["eval", "--predictions", "nowhere"], "nowhere", "--predictions")
    (tmp_path / "empty").mkdir()
    refused(["eval", "--predictions", "empty"], "empty", "--truth")


@pytest.fixture
def evaluated(house: House, tmp_path: Path) -> Path:
    """A copy of the predictions, which tests damage."""
    shutil.copytree(house.predictions, tmp_path / "evaluated")
    return tmp_path / "evaluated"


def test_missing_and_extra_predictions_are_named_and_the_rest_is_evaluated(refused: Refused, evaluated: Path) -> None:
    (evaluated / "shapes-TE" / "0000.png").rename(evaluated / "shapes-TE" / "stranger.png")
    said = refused(["eval", "--predictions", evaluated], "shapes-TE: 0000 has no prediction", status=1)
    assert "shapes-TE: stranger has no ground truth" in said and "MAE" in said
    for path in (evaluated / "shapes-TE").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    refused(["eval", "--predictions", evaluated], "No prediction of shapes-TE", "same name")


def test_predictions_of_another_size(dsu: Dsu, refused: Refused, evaluated: Path) -> None:
    path = evaluated / "shapes-TE" / "0001.png"
    Image.open(path).resize((20, 30)).save(path)
    refused(["eval", "--predictions", evaluated], path, "20x30", "0001.png", "--resize", status=1)
    dsu("eval", "--predictions", evaluated, "--resize")


@pytest.mark.parametrize("spoil", [truncate, lambda path: path.write_bytes(b""), lambda path: path.write_text("x")])
def test_predictions_that_cannot_be_read(refused: Refused, evaluated: Path, spoil: Callable[[Path], Any]) -> None:
    path = evaluated / "shapes-TE" / "0001.png"
    spoil(path)
    refused(["eval", "--predictions", evaluated], path, "cannot be read as an image", status=1)


def test_folders_named_like_images_are_not_predictions(refused: Refused, evaluated: Path) -> None:
    (evaluated / "shapes-TE" / "0001.png").unlink()
    (evaluated / "shapes-TE" / "0001.png").mkdir()
    refused(["eval", "--predictions", evaluated], "0001 has no prediction", status=1)


def test_ground_truth_that_is_empty_or_missing(refused: Refused, house: House, evaluated: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(["eval", "--predictions", evaluated / "shapes-TE", "--truth", "empty"], "empty", "no images")
    record = json.loads((evaluated / "predictions.json").read_text())
    record["sets"]["shapes-TE"]["source"]["reference"] = str(tmp_path / "gone")
    (evaluated / "predictions.json").write_text(json.dumps(record))
    refused(["eval", "--predictions", evaluated], "shapes-TE", tmp_path / "gone", "--truth", status=1)


@pytest.mark.parametrize(
    "text", ["{ not JSON", "[]", '{"sets": ["a"]}', '{"sets": {"shapes-TE": {"source": {"a": 1}}}}']
)
def test_a_damaged_record_of_predictions(refused: Refused, house: House, evaluated: Path, text: str) -> None:
    (evaluated / "predictions.json").write_text(text)
    refused(["eval", "--predictions", evaluated], "predictions.json", "predict again", "--truth", status=1)
    refused(house.predict("--out", evaluated), "evaluated", "--overwrite", status=1)


def test_a_table_that_cannot_be_written(refused: Refused, evaluated: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(["eval", "--predictions", evaluated, "--json", "file/x.json"], "folder file can't be created", status=1)
