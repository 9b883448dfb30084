"""`dsu export` from a head to masks: correct models, refused ones, and running without torch."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_of import Export
from PIL import Image

from dsu import Segmenter
from dsu.api import predict
from dsu.data.tiles import Tiling
from dsu.errors import DsuError, UsageError
from dsu.export import exporting, graph
from dsu.export.exporting import export_model
from dsu.export.graph import BATCHES, TRACED, compare, images_to_check
from dsu.heads.head_file import HEAD_FILE, HeadInfo, load_head, save_head
from dsu.prediction.exported import ExportedSegmenter
from dsu.runner import Model, ModelError
from dsu.settings import EncoderWeights

pytestmark = pytest.mark.slow  # the first test of a process exports for all

WEIGHTS = EncoderWeights()

ALONE = """
import runpy, sys
class OnlyThese:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names | {allowed!r} and not top.startswith("_"):
            raise ImportError(f"{{name}} is not there")
sys.meta_path.insert(0, OnlyThese())
sys.argv = sys.argv[1:]
"""
"""Runs before a program: only the standard library and these packages can be imported."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes: one rotated by EXIF, one with 16 bits, one with alpha."""
    folder = tmp_path_factory.mktemp("photos")
    first, second, third = images_to_check(None, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    first.save(folder / "turned.jpg", exif=exif)
    Image.fromarray(np.asarray(second.convert("L")).astype(np.uint16) * 16).save(folder / "deep.png")
    third.putalpha(third.getchannel("R"))
    third.save(folder / "alpha.png")
    return folder


@pytest.fixture
def skip_tracing(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace tracing, which takes most of the time, by a copy of the session's model."""
    monkeypatch.setattr(exporting, "write_graph", lambda network, path: shutil.copy(exported.model, path))


def grey_levels(masks: Any, others: Any) -> float:
    return max(float(np.abs(a - b).max()) * 255 for a, b in zip(masks, others, strict=True))


# ---- the model ----


def test_the_model_is_correct_and_its_agreement_is_reported(exported: Export) -> None:
    agreement = exported.made.agreement
    assert TRACED not in BATCHES
    assert agreement.fault is None and agreement.logits < 1e-4 and agreement.grey_levels < 0.5
    assert agreement.seconds > 0 and agreement.torch_seconds > 0
    assert [file.name for file in exported.made.files] == ["model.onnx", "dsu_runner.py", "model.md"]
    assert {file.name for file in exported.model.parent.iterdir()} == {file.name for file in exported.made.files}
    assert onnx.load(exported.model).opset_import[0].version >= 23


def test_attention_is_fused(exported: Export) -> None:
    """Materialised, the decoder's largest attention matrix would have 60 million entries per image."""
    operators = [node.op_type for node in onnx.load(exported.model).graph.node]
    assert "Attention" in operators and "Softmax" not in operators


@pytest.mark.parametrize("batch", [1, 2, 4, TRACED])
def test_logits_do_not_depend_on_the_batch_size(exported: Export, batch: int) -> None:
    model = Model(exported.model, "cpu")
    given = model.inputs(images_to_check(None, batch))
    together = model.run(given)
    assert together.shape == (batch, 1, 128, 128)
    alone = [model.run({name: values[index : index + 1] for name, values in given.items()}) for index in range(batch)]
    assert np.abs(together - np.concatenate(alone)).max() < 1e-4 * together.std()


def test_metadata_is_complete_without_paths_or_sample_names(exported: Export) -> None:
    entries = {entry.key: entry.value for entry in onnx.load(exported.model).metadata_props}
    facts = json.loads(entries["dsu_export"])
    assert facts["sizes"] == {"pixels": 128, "dino_pixels": 126}
    assert facts["depth"] == [0, 4095] and facts["tiling"] is None and facts["threshold"] is None
    assert facts["precision"] == "fp32" and facts["licence"] == "apache-2.0"
    assert facts["encoders"]["hiera"]["name"] == "toy"
    assert len(facts["head_sha256"]) == 64
    assert facts["check"]["logits"] == exported.made.agreement.logits
    info = HeadInfo.model_validate_json(entries["dsu"])
    assert info.config == exported.network.config and info.depth == (0, 4095)
    assert not [word for word in ("/home", "secret", "held_out") if word in str(entries)]


def test_the_page_explains_how_to_run_the_model(exported: Export) -> None:
    page = exported.made.files[2].read_text()
    assert "python dsu_runner.py model.onnx" in page and "4095.0 white" in page
    assert "{" not in page


def test_the_snippets_of_the_page_and_the_docs_run(exported: Export, photos: Path, tmp_path: Path) -> None:
    for file in exported.made.files:
        shutil.copy(file, tmp_path)
    shutil.copy(photos / "turned.jpg", tmp_path / "photo.jpg")
    lines = [line[4:] for line in exported.made.files[2].read_text().splitlines() if line.startswith("    ")]
    document = (Path(__file__).parents[3] / "docs" / "deploy.md").read_text()
    for snippet in (
        "\n".join(line for line in lines if not line.startswith(("pip", "python"))),
        *re.findall(r"```python\n(.*?)```", document, flags=re.S),
    ):
        subprocess.run([sys.executable, "-c", f"{snippet}\nassert mask.ndim == 2"], check=True, cwd=tmp_path)


# ---- wrong models are not written ----


def test_a_model_with_other_weights_is_detected(exported: Export) -> None:
    with torch.no_grad():
        weight = exported.network.head.sides[-1].bias
        before = weight.clone()
        weight += 0.02
    try:
        model = Model(exported.model, "cpu")
        found = compare(exported.network, model, model.inputs(images_to_check(None)))
        assert found.fault is not None and "standard deviations" in found.fault
    finally:
        with torch.no_grad():
            weight.copy_(before)


@pytest.mark.usefixtures("skip_tracing")
def test_a_wrong_model_leaves_no_files(exported: Export, tmp_path: Path) -> None:
    state, info = load_head(exported.head)
    state["sides.2.bias"] = state["sides.2.bias"] + 0.5
    save_head(tmp_path / HEAD_FILE, state, info)
    with pytest.raises(DsuError, match="not written, since its logits differ"):
        export_model(tmp_path / HEAD_FILE, tmp_path / "out" / "model.onnx", WEIGHTS)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_frozen_batch_size_is_detected(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(exported.model, "cpu")
    run = model.run
    monkeypatch.setattr(
        model, "run", lambda given: np.repeat(run({n: v[:1] for n, v in given.items()}), len(given["pixels"]), 0)
    )
    found = compare(exported.network, model, model.inputs(images_to_check(None)))
    assert found.fault is not None


@pytest.mark.parametrize(
    ("options", "out", "said"),
    [
        ({"calibrate": Path("images")}, "model.onnx", "--calibrate is for --precision int8"),
        ({}, "model.bin", "must end in .onnx"),
        ({"check": Path("nowhere")}, "model.onnx", "nowhere does not exist"),
    ],
)
def test_invalid_requests_are_refused(exported: Export, tmp_path: Path, options: Any, out: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        export_model(exported.head, tmp_path / out, WEIGHTS, **options)


@pytest.mark.usefixtures("skip_tracing")
def test_files_are_overwritten_only_if_requested(exported: Export, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.md"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UsageError, match=f"{name} already exists"):
            export_model(exported.head, tmp_path / "model.onnx", WEIGHTS)
        (tmp_path / name).unlink()
    export_model(exported.head, tmp_path / "model.onnx", WEIGHTS)
    export_model(exported.head, tmp_path / "model.onnx", WEIGHTS, overwrite=True, threshold=0.25)
    assert Model(tmp_path / "model.onnx", "cpu").threshold == 0.25


@pytest.mark.usefixtures("skip_tracing")
def test_files_of_a_killed_export_are_removed_and_those_of_a_running_one_are_kept(
    exported: Export, tmp_path: Path
) -> None:
    dead, running = (tmp_path / f"{exporting.STRAY}{process}.x" for process in (2**22 + 1, os.getppid()))
    for folder in (dead, running):
        folder.mkdir()
    export_model(exported.head, tmp_path / "model.onnx", WEIGHTS)
    assert running.exists() and not dead.exists()


# ---- lower precision ----


@pytest.mark.usefixtures("skip_tracing")
def test_int8_is_smaller_and_its_loss_is_reported(exported: Export, tmp_path: Path) -> None:
    made = export_model(exported.head, tmp_path / "model.onnx", WEIGHTS, precision="int8")
    loss = made.loss
    assert loss is not None and 0 < loss.MAE <= exporting.LIMIT and loss.grey_levels > 0
    assert 0 < loss.S <= 1 and 0 < loss.S_before <= 1
    assert made.files[0].stat().st_size < 0.9 * exported.model.stat().st_size  # the toy consists mostly of convolutions
    operators = [node.op_type for node in onnx.load(made.files[0]).graph.node]
    assert "MatMulInteger" in operators and "QuantizeLinear" not in operators
    assert Model(made.files[0], "cpu").facts["precision"] == "int8"


@pytest.mark.usefixtures("skip_tracing")
def test_layers_with_a_large_loss_at_int8_stay_in_float(
    exported: Export, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "LIMIT", 1e-9)
    made = export_model(exported.head, tmp_path / "a.onnx", WEIGHTS, precision="int8", calibrate=photos)
    assert {"dino MatMul", "hiera MatMul", "head.decoders Conv"} <= set(made.kept)
    assert made.loss is not None and made.loss.MAE <= 1e-9


@pytest.mark.usefixtures("skip_tracing")
def test_fp16_is_close(exported: Export, tmp_path: Path) -> None:
    made = export_model(exported.head, tmp_path / "model.onnx", WEIGHTS, precision="fp16")
    assert made.loss is not None and made.loss.grey_levels < 8
    assert made.files[0].stat().st_size < 0.6 * exported.model.stat().st_size


# ---- running it ----


def test_the_runner_needs_three_packages(exported: Export, photos: Path, tmp_path: Path) -> None:
    program = ALONE.format(allowed={"numpy", "PIL", "onnxruntime"}) + "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-I", "-c", program, exported.made.files[1], exported.model, photos, "-o", tmp_path]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "CPUExecutionProvider" in done.stderr
    segmenter = Segmenter.load(exported.head, device="cpu")
    for photo in photos.iterdir():
        mask = np.asarray(Image.open(tmp_path / f"{photo.stem}.png"))
        assert grey_levels([mask / 255], [(segmenter(photo) * 255).astype(np.uint8) / 255]) <= 1


@pytest.mark.parametrize("normalization", ["none", "minmax"])
@pytest.mark.parametrize("tiling", [None, Tiling(100, 20)], ids=str)
def test_masks_equal_those_of_the_head(
    exported: Export, photos: Path, tiling: Tiling | None, normalization: Any
) -> None:
    own, other = Segmenter.load(exported.head, device="cpu"), Segmenter.load(exported.model)
    assert isinstance(other, ExportedSegmenter) and other.depth == own.depth == (0, 4095)
    own.tiling = other.tiling = tiling
    paths = sorted(photos.iterdir())
    assert grey_levels(own(paths, normalization), other(paths, normalization)) <= 1
    assert other(paths[0]).shape == own(paths[0]).shape


def test_predict_and_segmenter_do_not_load_torch(exported: Export, photos: Path, tmp_path: Path) -> None:
    block = ALONE.replace('not in sys.stdlib_module_names | {allowed!r} and not top.startswith("_")', "in {allowed!r}")
    program = block.format(allowed={"torch", "timm", "sam2", "onnx"}) + (
        "from dsu import Segmenter; print(Segmenter.load(sys.argv[3])(sys.argv[1]).shape)\n"
        "from dsu_cli.main import run; sys.argv[1:2] = ['predict', sys.argv[1].rpartition('/')[0]]; run()"
    )
    command = ["-c", program, "dsu", photos / "alpha.png", "--head", exported.model, "--out", tmp_path / "masks"]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 written" in done.stdout and "CPUExecutionProvider" in done.stderr


def test_served_masks_equal_those_of_predict(exported: Export, photos: Path, tmp_path: Path) -> None:
    """Masks binarised by the model's own threshold, in a process that does not load torch."""
    shutil.copy(exported.model, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx")
    for entry in graph.metadata_props:
        if entry.key == "dsu_export":
            entry.value = json.dumps(json.loads(entry.value) | {"threshold": 0.75})
    onnx.save(graph, tmp_path / "model.onnx")
    block = ALONE.replace('not in sys.stdlib_module_names | {allowed!r} and not top.startswith("_")', "in {allowed!r}")
    program = block.format(allowed={"torch", "timm", "sam2", "onnx"}) + (
        "from pathlib import Path\nfrom starlette.testclient import TestClient\n"
        "from dsu.serving.app import create_app\nfrom dsu.serving.heads import load_heads\n"
        "from dsu.settings import EncoderWeights, RuntimeSettings, ServingSettings\n"
        "heads = load_heads([sys.argv[1]], RuntimeSettings(), EncoderWeights())\n"
        "with TestClient(create_app(heads, ServingSettings())) as client:\n"
        "    for photo in Path(sys.argv[2]).iterdir():\n"
        "        answer = client.post('/predict', files={'image': (photo.name, photo.read_bytes())})\n"
        "        Path(sys.argv[3], photo.stem + '.png').write_bytes(answer.content)\n"
    )
    (tmp_path / "served").mkdir()
    words = [sys.executable, "-c", program, "dsu", tmp_path / "model.onnx", photos, tmp_path / "served"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    predict(photos, tmp_path / "model.onnx", out=tmp_path / "own", device="cpu")
    for photo in photos.iterdir():
        mask, own = (tmp_path / folder / f"{photo.stem}.png" for folder in ("served", "own"))
        assert mask.read_bytes() == own.read_bytes()


def test_masks_are_binarised_by_the_models_threshold(exported: Export, photos: Path) -> None:
    segmenter = ExportedSegmenter(exported.model)
    soft = segmenter(photos / "alpha.png")
    segmenter.model.threshold = float(np.median(soft))
    cut = segmenter(photos / "alpha.png")
    assert np.array_equal(cut, (soft >= segmenter.model.threshold).astype(np.float32))


@pytest.mark.parametrize("load", [Model, Segmenter.load], ids=["runner", "dsu"])
def test_models_that_can_not_be_loaded_are_named(
    load: Callable[..., Any], exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ModelError if load is Model else DsuError
    (tmp_path / "rubbish.onnx").write_bytes(b"rubbish" * 9)
    strange = onnx.load(exported.model)
    del strange.metadata_props[:]
    onnx.save(strange, tmp_path / "strange.onnx")
    onnx.helper.set_model_props(strange, {"dsu": "{}", "dsu_export": json.dumps({"format": 99, "version": "9.9"})})
    onnx.save(strange, tmp_path / "newer.onnx")
    for name, said in {
        "absent": "There is no (model|head) at",
        "rubbish": "can't be loaded",
        "strange": "not written by `dsu export`",
        "newer": "9.9",
    }.items():
        with pytest.raises(error, match=said):
            load(tmp_path / f"{name}.onnx")
    with pytest.raises(error, match="has no CUDA"):
        load(exported.model, device="cuda")
    with pytest.raises(error, match="can't be 'tpu'"):
        load(exported.model, device="tpu")


def test_a_precision_is_refused_for_an_exported_model(exported: Export) -> None:
    with pytest.raises(UsageError, match="has the precision that it was exported with"):
        Segmenter.load(exported.model, precision="bf16")


def test_the_runner_names_unreadable_images_and_continues(exported: Export, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    command = [exported.made.files[1], exported.model, tmp_path / "broken.png", photos / "alpha.png", "-o", tmp_path]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "broken.png can't be read" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "alpha.png").exists()


def test_a_large_model_has_its_weights_in_a_second_file(
    exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (graph, exporting):
        monkeypatch.setattr(module, "EXTERNAL_WEIGHTS_BYTES", 0)
    made = export_model(exported.head, tmp_path / "model.onnx", WEIGHTS)
    assert [file.name for file in made.files[:2]] == ["model.onnx", "model.onnx.data"]
    assert made.files[0].stat().st_size < made.files[1].stat().st_size
    assert Segmenter.load(made.files[0])(Image.new("RGB", (50, 40))).shape == (40, 50)
    monkeypatch.setattr(
        exporting, "write_graph", lambda _, path: [shutil.copy(file, path.parent) for file in made.files[:2]]
    )
    (tmp_path / "lower").mkdir()
    lower = export_model(exported.head, tmp_path / "lower" / "model.onnx", WEIGHTS, precision="int8")
    assert Segmenter.load(lower.files[0])(Image.new("RGB", (50, 40))).shape == (40, 50)


def test_it_runs_in_a_separate_environment(exported: Export, photos: Path, tmp_path: Path) -> None:
    """The environment contains only numpy, Pillow and onnxruntime."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    wanted = ["numpy", "pillow", "onnxruntime"]
    installed = subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=False)
    if installed.returncode:
        pytest.skip("the package registry is out of reach")
    command = [python, exported.made.files[1], exported.model, photos, "-o", tmp_path / "masks"]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path)
    assert len(list((tmp_path / "masks").iterdir())) == 3
