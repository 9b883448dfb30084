"""Figures equal those of pysodmetrics with any number of processes; differences from MATLAB's toolboxes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import py_sod_metrics as sod
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat

from dsu.data.datasets import Paths
from dsu.data.masks import MaskFormat
from dsu.data.pairing import Pair
from dsu.errors import DsuError, UsageError
from dsu.evaluation.evaluate import Evaluation, PredictionPair, evaluate, match, truths_in
from dsu.metrics.figures import METRICS

Grey = NDArray[np.uint8]


def save(path: Path, pixels: Grey) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def pair(seed: int, height: int = 40, width: int = 56) -> tuple[Grey, Grey]:
    """A noisy map and a mask with a box, both (H, W)."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((height, width), np.uint8)
    top, left = rng.integers(2, height // 2), rng.integers(2, width // 2)
    truth[top : top + 15, left : left + 20] = 255
    noisy = 0.6 * truth + 80 * rng.random(truth.shape) + 10
    return noisy.astype(np.uint8), truth


def one(folder: Path, prediction: Grey, truth: Grey, **options: bool) -> Evaluation:
    case = PredictionPair("one", save(folder / "map.png", prediction), save(folder / "mask.png", truth))
    return evaluate([case], workers=1, **options)


@pytest.fixture
def cases(tmp_path: Path) -> list[PredictionPair]:
    made = []
    for index in range(20):
        prediction, truth = pair(index, 40 + index)
        made.append(
            PredictionPair(
                f"{index:02}",
                save(tmp_path / "maps" / f"{index:02}.png", prediction),
                save(tmp_path / "masks" / f"{index:02}.png", truth),
            )
        )
    return made


@pytest.fixture
def data() -> Path:
    root = os.environ.get("DSU_TEST_DATA")
    if not root:
        pytest.skip("DSU_TEST_DATA is not set")
    return Path(root) / "metrics"


def by_the_library(cases: list[PredictionPair], normalize: bool) -> tuple[dict[str, float], NDArray[np.float64]]:
    """The figures of pysodmetrics' own classes, used as in its examples, and the averaged E curve."""
    s, weighted, e, mae = sod.Smeasure(), sod.WeightedFmeasure(), sod.Emeasure(), sod.MAE()
    f = sod.FmeasureV2(
        {
            "fm": sod.FmeasureHandler(with_dynamic=True, with_adaptive=True, beta=0.3),
            "iou": sod.IOUHandler(with_dynamic=False, with_adaptive=False, with_binary=True),
            "dice": sod.DICEHandler(with_dynamic=False, with_adaptive=False, with_binary=True),
        }
    )
    for case in cases:
        prediction = np.asarray(Image.open(case.prediction))
        truth = np.asarray(Image.open(case.truth))
        for metric in (s, weighted, e, mae, f):
            if normalize:
                metric.step(prediction, truth)
            else:
                metric.step(prediction / 255, truth > 128, normalize=False)
    # Perfect maps score slightly more than 1 in the library.
    e.adaptive_ems = [min(value, 1.0) for value in e.adaptive_ems]
    e.changeable_ems = [np.minimum(curve, 1.0) for curve in e.changeable_ems]
    fm, em = f.get_results(), e.get_results()["em"]
    figures = (
        s.get_results()["sm"],
        fm["fm"]["adaptive"],
        fm["fm"]["dynamic"].mean(),
        fm["fm"]["dynamic"].max(),
        weighted.get_results()["wfm"],
        em["adp"],
        em["curve"].mean(),
        em["curve"].max(),
        mae.get_results()["mae"],
        fm["iou"]["binary"],
        fm["dice"]["binary"],
    )
    return dict(zip(METRICS, map(float, figures), strict=True)), em["curve"]


@pytest.mark.parametrize("normalize", [True, False])
def test_figures_are_bit_identical_to_the_librarys(cases: list[PredictionPair], normalize: bool) -> None:
    found = evaluate(cases, normalize=normalize, workers=1)
    figures, e_curve = by_the_library(cases, normalize)
    assert found.metrics == figures
    assert tuple(found.metrics) == METRICS
    assert found.images == len(cases)
    assert np.array_equal(found.curves["E"], e_curve)
    assert all(curve.shape == (256,) for curve in found.curves.values())


def test_two_processes_give_the_same_bits(cases: list[PredictionPair]) -> None:
    alone, together = evaluate(cases, workers=1), evaluate(cases, workers=2)
    assert together.metrics == alone.metrics
    assert together.per_image == alone.per_image
    assert all(np.array_equal(together.curves[name], curve) for name, curve in alone.curves.items())


def test_per_image_rows_keep_the_order_of_images(cases: list[PredictionPair]) -> None:
    backwards = evaluate(cases[::-1], workers=1)
    assert [row["name"] for row in backwards.per_image] == [case.name for case in cases[::-1]]
    assert backwards.metrics["MAE"] == pytest.approx(
        np.mean([float(row["MAE"]) for row in backwards.per_image]), abs=1e-15
    )


def test_normalisation_is_optional_and_recorded(tmp_path: Path) -> None:
    truth = np.zeros((20, 20), np.uint8)
    noise = truth.copy()
    noise[3, 4] = 1
    stretched, plain = (one(tmp_path, noise, truth, normalize=switch) for switch in (True, False))
    assert stretched.metrics["MAE"] == 1 / 400
    assert plain.metrics["MAE"] == 1 / 255 / 400
    assert "min-max" in stretched.conventions["map"]
    assert "not normalised" in plain.conventions["map"]


def test_thresholds_are_strict_on_both_sides(tmp_path: Path) -> None:
    """Ground truth is foreground from 129; for IoU and Dice, maps are foreground from 128."""
    levels = np.array([[0, 127, 128, 129, 255]], np.uint8)
    whole = one(tmp_path, levels, np.array([[0, 0, 128, 129, 255]], np.uint8), normalize=False)
    assert whole.metrics["IoU"] == 2 / 3
    assert whole.metrics["Dice"] == 4 / 5


def test_label_maps_are_not_mistaken_for_empty_masks(cases: list[PredictionPair]) -> None:
    grey = evaluate(cases, workers=1)
    for case in cases:
        Image.fromarray(np.asarray(Image.open(case.truth)) // 255 * 2).save(case.truth)
    labels = evaluate(cases, workers=1)
    named = evaluate(cases, mask_format=MaskFormat(foreground=(2,)), workers=1)
    assert labels.metrics == named.metrics == grey.metrics
    stated = [found.conventions["ground truth"] for found in (grey, labels, named)]
    assert stated == [
        "foreground above 128, in colours all but black",
        "foreground: labels other than 0",
        "foreground: values 2",
    ]


def test_an_empty_ground_truth_is_legal(tmp_path: Path) -> None:
    empty = np.zeros((20, 20), np.uint8)
    black = one(tmp_path, empty, empty).metrics
    assert {key: black[key] for key in ("S", "MAE", "E_adaptive")} == {"S": 1, "MAE": 0, "E_adaptive": 0}
    grey = empty.copy()
    grey[:10] = 255
    half = one(tmp_path, grey, empty).metrics
    assert (half["S"], half["MAE"], half["E_adaptive"]) == (0.5, 0.5, pytest.approx(200 / 399))
    for metric in ("F_adaptive", "F_mean", "F_max", "F_weighted", "IoU", "Dice"):
        assert black[metric] == half[metric] == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("along", [0, 1])
def test_an_object_within_the_last_line_has_a_structure_measure(tmp_path: Path, along: int) -> None:
    """pysodmetrics gives NaN here, and therefore for the whole set."""
    truth = np.zeros((30, 30), np.uint8)
    truth[(slice(None), -1) if along else -1] = 255
    assert one(tmp_path, truth, truth).metrics["S"] == pytest.approx(1)


def test_different_sizes_are_refused_or_resized(tmp_path: Path) -> None:
    prediction, truth = pair(0)
    with pytest.raises(DsuError, match=r"map\.png has 28x20 pixels .*mask\.png 56x40.*--resize"):
        one(tmp_path, prediction[::2, ::2], truth)
    resized = one(tmp_path, np.full((5, 5), 51, np.uint8), truth, resize=True, normalize=False)
    assert resized.metrics["MAE"] == pytest.approx(0.2 + 0.6 * (truth > 0).mean())
    assert "resized" in resized.conventions["other sizes"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_cannot_be_read_is_named(cases: list[PredictionPair], workers: int) -> None:
    cases[11].prediction.write_text("no image")
    with pytest.raises(DsuError, match=r"11\.png"):
        evaluate(cases, workers=workers)


def test_no_images_are_an_error(cases: list[PredictionPair]) -> None:
    with pytest.raises(UsageError, match="nothing to evaluate"):
        evaluate([])
    with pytest.raises(UsageError, match="0 workers"):
        evaluate(cases, workers=0)


def test_folders_pair_by_path_without_suffix(tmp_path: Path) -> None:
    prediction, truth = pair(0)
    for name in ("a.png", "deep/b.c.png", "deep/lost.png", "a2/a.png"):
        save(tmp_path / "masks" / name, truth)
    for name in ("a.JPG", "deep/b.c.png", "a2/a.png", "new/d.png", ".thumbs/a.png"):
        save(tmp_path / "maps" / name, prediction)
    (tmp_path / "maps" / "notes.txt").write_text("no image")
    cases, missing, extra = match(tmp_path / "maps", truths_in(tmp_path / "masks", Paths()))
    assert [case.name for case in cases] == ["a", "a2/a", "deep/b.c"]
    assert cases[0] == PredictionPair("a", tmp_path / "maps/a.JPG", tmp_path / "masks/a.png")
    assert missing == ["deep/lost"]
    assert extra == ["new/d"]


def test_named_masks_keep_their_order(cases: list[PredictionPair], tmp_path: Path) -> None:
    named = [Pair(case.name, case.truth, None) for case in cases[::-1]]
    found, missing, extra = match(tmp_path / "maps", [*named[:-1], Pair("gone", tmp_path / "gone.png", None)])
    assert found == cases[:0:-1]
    assert (missing, extra) == (["gone"], ["00"])


def test_a_folder_that_cannot_be_paired_is_refused(tmp_path: Path) -> None:
    _, truth = pair(0)
    save(tmp_path / "masks" / "a.png", truth)
    with pytest.raises(UsageError, match="absent is not a folder"):
        match(tmp_path / "absent", truths_in(tmp_path / "masks", Paths()))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty contains no images"):
        match(tmp_path / "empty", truths_in(tmp_path / "masks", Paths()))
    shutil.copytree(tmp_path / "masks", tmp_path / "maps")
    save(tmp_path / "maps" / "a.bmp", truth)
    with pytest.raises(DsuError, match=r"a\.bmp and .*a\.png"):
        match(tmp_path / "maps", truths_in(tmp_path / "masks", Paths()))


def test_workers_start_without_torch() -> None:
    check = "import sys, dsu.evaluation.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


# The following tests compare with published reference figures on real maps.


def folders(predictions: Path, truth: Path, workers: int = 1) -> Evaluation:
    cases, missing, extra = match(predictions, truths_in(truth, Paths()))
    assert not missing
    assert not extra
    return evaluate(cases, workers=workers)


@pytest.mark.data
def test_pysodmetrics_published_figures(data: Path) -> None:
    golden: dict[str, float] = {}
    for figures in json.loads((data / "PySODMetrics/version_performance.json").read_text()).values():
        golden |= figures  # each version lists only its changes: the newest figure of each name counts
    names = {
        "S": "Smeasure",
        "F_adaptive": "adpFm",
        "F_mean": "meanFm",
        "F_max": "maxFm",
        "F_weighted": "wFmeasure",
        "E_adaptive": "adpEm",
        "E_mean": "meanEm",
        "E_max": "maxEm",
        "MAE": "MAE",
        "IoU": "sample_biiou",
        "Dice": "sample_bidice",
    }
    found = folders(data / "PySODMetrics/preds", data / "PySODMetrics/masks").metrics
    assert found == pytest.approx({ours: golden[theirs] for ours, theirs in names.items()}, abs=1e-15)


@pytest.fixture
def cod(data: Path) -> tuple[Evaluation, dict[str, NDArray[np.float64]]]:
    found = folders(data / "CODToolbox/preds_SINet", data / "CODToolbox/GT")
    matlab = loadmat(data / "CODToolbox/ref/2020-CVPR-SINet.mat")
    return found, {name: value.ravel() for name, value in matlab.items() if not name.startswith("_")}


@pytest.mark.data
@pytest.mark.parametrize(
    ("ours", "theirs", "within"),
    [
        ("S", "Sm", 1e-12),
        ("F_adaptive", "adpFm", 1e-12),
        ("F_mean", "meanFm", 1e-6),
        ("F_max", "maxFm", 1.1e-5),
        ("F_weighted", "wFm", 2e-10),
        ("E_adaptive", "adpEm", 1e-12),
        ("E_mean", "meanEm", 1.2e-5),
        ("E_max", "maxEm", 1e-12),
        ("MAE", "mae", 1e-12),
    ],
)
def test_cod_toolbox(cod: tuple[Evaluation, dict[str, Any]], ours: str, theirs: str, within: float) -> None:
    found, matlab = cod
    assert found.metrics[ours] == pytest.approx(matlab[theirs][0], abs=within)


@pytest.mark.data
def test_cod_toolbox_curves_differ_where_its_thresholds_are_rounded(
    cod: tuple[Evaluation, dict[str, Any]],
) -> None:
    """MATLAB builds `1:-1/255:0` from both ends; with the same thresholds, the curves are equal."""
    found, matlab = cod
    step = np.arange(256)
    thresholds = np.where(step < 128, 1 - step * (1 / 255), (255 - step) * (1 / 255))
    levels = (255 - step) / 255
    for ours, theirs in (("precision", "column_Pr"), ("recall", "column_Rec"), ("F", "column_F")):
        differ = np.abs(found.curves[ours] - matlab[theirs]) > 1e-12
        assert differ.sum() == 14
        assert np.array_equal(differ, thresholds > levels)
    begun_with_the_empty_map = np.abs(matlab["column_E"][1:] - found.curves["E"][:-1])
    assert begun_with_the_empty_map.max() < 5e-4


@pytest.mark.data
def test_sod_toolbox(data: Path) -> None:
    found = folders(data / "SOD300/PiCANet", data / "SOD300/GT", workers=2)
    matlab = {name: value for name, value in loadmat(data / "SOD300/PiCANet.mat").items() if not name.startswith("_")}
    per_image = {key: np.array([row[key] for row in found.per_image]) for key in ("S", "MAE", "F_adaptive")}
    assert per_image["MAE"] == pytest.approx(matlab["MAE_image"].ravel(), abs=1e-12)
    assert per_image["S"] == pytest.approx(matlab["S_measure_image"].ravel(), abs=1e-12)
    assert per_image["F_adaptive"] == pytest.approx(matlab["mean_Fmeasure_image"][:, 2], abs=1e-12)
    precision, recall = matlab["Pre"].ravel(), matlab["Recall"].ravel()
    assert found.curves["precision"] == pytest.approx(precision, abs=1e-12)
    assert found.curves["recall"] == pytest.approx(recall, abs=1e-12)
    of_the_averages = 1.3 * precision * recall / (0.3 * precision + recall)
    assert matlab["Fmeasure_Curve"].ravel() == pytest.approx(of_the_averages, abs=1e-12)
    assert matlab["MaxFmeasure"][0, 0] == pytest.approx(0.8534, abs=5e-5)
    assert found.metrics["F_max"] == pytest.approx(0.8112, abs=5e-5)
