"""Images without an object: false alarms, misses and AUROC, compared with computations by hand and over all pairs."""

import pickle
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score

from dsu.evaluation.evaluate import Evaluation, PredictionPair, evaluate
from dsu.metrics.figures import METRICS
from dsu.metrics.image_level import ImageLevel, auroc
from dsu.metrics.meters import Meters, Totals

# Responses of 8-bit maps; few different values, so that ties are common.
RESPONSES = st.lists(st.sampled_from([0, 1, 100, 127, 128, 200, 255]), min_size=1, max_size=12)


def cases(folder: Path, peaks: dict[str, tuple[int, bool]]) -> list[PredictionPair]:
    """Maps (6, 8) of value 20 except for one pixel (`peaks`, by name), and masks with a box or without an object."""
    made = []
    for name, (peak, empty) in peaks.items():
        prediction, truth = np.full((6, 8), 20, np.uint8), np.zeros((6, 8), np.uint8)
        prediction[2, 3] = peak
        truth[1:4, 2:5] = 0 if empty else 255
        paths = [folder / f"{name}-{kind}.png" for kind in ("map", "mask")]
        for path, pixels in zip(paths, (prediction, truth), strict=True):
            Image.fromarray(pixels).save(path)
        made.append(PredictionPair(name, *paths))
    return made


PEAKS = {"a": (255, False), "b": (200, True), "c": (128, False), "d": (100, True), "e": (127, False)}


@pytest.fixture
def mixed(tmp_path: Path) -> list[PredictionPair]:
    return cases(tmp_path, PEAKS)


@pytest.mark.parametrize("normalize", [True, False])
def test_figures_of_a_set_computed_by_hand(mixed: list[PredictionPair], normalize: bool) -> None:
    """One of two empty images is above one half, and one of three objects is not; four of six pairs are in order."""
    found = evaluate(mixed, normalize=normalize, workers=1)
    assert found.image_level.without_object == 2 and found.image_level.with_object == 3
    assert found.image_level.figures() == {"false_alarms": 1 / 2, "misses": 1 / 3, "AUROC": 4 / 6}
    assert found.image_level.lacking == ""
    assert [(row["response"], row["empty"]) for row in found.per_image] == [(p / 255, e) for p, e in PEAKS.values()]
    assert "alarm from 0.5" in found.conventions["false_alarms, misses, AUROC"]


@pytest.mark.parametrize("normalize", [True, False])
def test_object_figures_use_only_images_with_an_object(mixed: list[PredictionPair], normalize: bool) -> None:
    found = evaluate(mixed, normalize=normalize, workers=1)
    alone = evaluate([mixed[0], mixed[2], mixed[4]], normalize=normalize, workers=1)
    assert found.object_metrics == alone.metrics == alone.object_metrics
    assert found.metrics["IoU"] == pytest.approx(found.object_metrics["IoU"] * 3 / 5)
    assert tuple(found.object_metrics) == METRICS


def test_without_empty_masks_there_are_no_image_level_figures(tmp_path: Path) -> None:
    found = evaluate(cases(tmp_path, {"a": (255, False), "b": (50, False)}), workers=1)
    assert found.object_metrics == found.metrics
    assert found.image_level.figures() == {"misses": 0.5} and found.image_level.lacking == "every image has an object"
    assert not any("AUROC" in what for what in found.conventions)


@pytest.mark.filterwarnings("error")
def test_sets_of_empty_masks_have_only_false_alarms(tmp_path: Path) -> None:
    found = evaluate(cases(tmp_path, {"a": (255, True), "b": (50, True), "c": (20, True)}), workers=1)
    assert found.image_level.figures() == {"false_alarms": 1 / 3} and found.object_metrics == {}
    assert found.image_level.lacking == "no image has an object"


def test_several_processes_give_the_same_figures(tmp_path: Path) -> None:
    peaks = {f"{index:02}": (13 * index % 256, index % 3 == 0) for index in range(20)}
    alone, together = (evaluate(cases(tmp_path, peaks), workers=workers) for workers in (1, 2))
    assert together.image_level == alone.image_level and together.object_metrics == alone.object_metrics


def test_the_response_is_that_of_the_evaluated_map(tmp_path: Path) -> None:
    """A bright pixel that fades when the map is resized to its mask is no false alarm."""
    [case] = cases(tmp_path, {"a": (0, True)})
    large = np.zeros((60, 80), np.uint8)
    large[30, 40] = 255
    Image.fromarray(large).save(case.prediction)
    [row] = evaluate([case], resize=True, workers=1).per_image
    assert 0 < float(row["response"]) < 0.1


def test_maps_normalised_before_are_detected(tmp_path: Path) -> None:
    def level(*peaks: int) -> ImageLevel:
        found: Evaluation = evaluate(cases(tmp_path, {str(peak): (peak, True) for peak in peaks}), workers=1)
        return found.image_level

    assert level(254, 255).stretched and not level(253, 255).stretched


@given(RESPONSES, RESPONSES)
def test_auroc_equals_a_count_of_all_pairs(positives: list[int], negatives: list[int]) -> None:
    won = [(p > n) + (p == n) / 2 for p, n in product(positives, negatives)]
    found = auroc([p / 255 for p in positives], [n / 255 for n in negatives])
    assert found == sum(won) / len(won)
    labels = [True] * len(positives) + [False] * len(negatives)
    assert found == pytest.approx(roc_auc_score(labels, positives + negatives), abs=1e-12)
    assert auroc(negatives, positives) == pytest.approx(1 - found, abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 200])
def test_totals_equal_the_librarys_averages_without_curves(chunk: int) -> None:
    rng = np.random.default_rng(0)
    pairs = []
    for index in range(200):
        truth = np.zeros((12, 10), np.uint8)
        truth[rng.integers(6) :, rng.integers(5) :] = 255 * (index % 5 > 0)
        pairs.append((rng.integers(0, 256, truth.shape, np.uint8), truth))
    library, of_objects, totals = Meters(), Meters(), Totals()
    for pair in pairs:
        library.step(*pair, normalize=True)
        if pair[1].any():
            of_objects.step(*pair, normalize=True)
    for start in range(0, len(pairs), chunk):
        some = Meters()
        for pair in pairs[start : start + chunk]:
            some.step(*pair, normalize=True)
        totals.add(some)
    assert totals.averages() == library.averages()
    assert totals.averages(with_object=True) == of_objects.averages()
    assert totals.curves()["E"].tolist() == library.e.get_results()["em"]["curve"].tolist()
    assert totals.curves()["recall"].tolist() == library.f.get_results()["recall"]["dynamic"].tolist()
    assert len(pickle.dumps(totals)) < 200 * 100 + 30_000, "some numbers an image, no curves"
