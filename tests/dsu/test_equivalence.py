"""Training from the store equals end-to-end training at every depth and from every point; the check detects faults."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsu.config import build_config
from dsu.data.datasets import Paths
from dsu.data.views import ALL_FLIPS
from dsu.equivalence import Report, check_equivalence
from dsu.features.extraction import cache_features
from dsu.settings import EncoderWeights, ExtractionSettings, TrainingSettings
from dsu_cache import ShardId, Store

CONFIG = build_config("toy", hiera_size=128, dino_size=126)
POINTS = ("V", "V1", "V2", "V3", "V4", "S1", "S2", "S3", "S4", "B4", "B5")
Rewrite = Callable[[np.ndarray, int], np.ndarray]


@pytest.fixture(scope="module")
def features(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with every kind of resume point in all four views."""
    root = tmp_path_factory.mktemp("features")
    cache_features(
        str(drawn / "train"),
        CONFIG,
        ExtractionSettings(features=POINTS, views=ALL_FLIPS, level_views=ALL_FLIPS),
        EncoderWeights(),
        paths=Paths(drawn, root),
        device="cpu",
    )
    return root


def check(root: Path, data: Path, steps: int = 2, **settings: object) -> Report:
    given = {"dataset": str(data / "train"), "batch_size": 5, "device": "cpu", **settings}
    return check_equivalence(TrainingSettings(**given), paths=Paths(data, root), weights=EncoderWeights(), steps=steps)


@pytest.mark.parametrize("adapt_last", range(8))
def test_every_depth_of_adaptation_is_exact(features: Path, drawn: Path, adapt_last: int) -> None:
    report = check(features, drawn, adapt_last=adapt_last)
    assert report.passed
    assert {row.allowance for row in report.rows} == {0.0}, "a CPU needs no allowance"
    stages = {row.stage for row in report.rows}
    assert stages == {"stored", "logits", "masks", "loss", "gradient", "weight"}


@pytest.mark.parametrize("point", ["pixels", "S1", "S2", "B4", "B5", "S3"])
def test_every_resume_point_is_exact(features: Path, drawn: Path, point: str) -> None:
    report = check(features, drawn, adapt_last=1, start_feature=point)
    assert report.passed
    assert point in report.features


@pytest.mark.parametrize("ablation", ["A", "B", "C"])
def test_the_ablations_are_exact(features: Path, drawn: Path, ablation: str) -> None:
    report = check(features, drawn, ablation=ablation)
    assert report.passed
    maps = {"A": set(), "B": {"V1", "V2", "V3", "V4"}, "C": {"V4"}}[ablation]
    assert {name for name in report.features if name.startswith("V")} == maps


def rewritten(features: Path, to: Path, array: str, change: Rewrite) -> Path:
    """A copy of the store with an array's values replaced by `change(values, view)`, and valid hashes."""
    shutil.copytree(features, to)
    [folder] = to.glob("*/*")
    store = Store.open(folder)
    with store.lock():
        for view in [view for view in range(store.arrays[array].views) if not store.missing(array, [view])]:
            rows = store.rows_in_shard(0)
            values = store.reader([array]).read(rows, [view] * len(rows))[array]
            store.stored(array).discard(ShardId(view, 0))
            store.write_shard(array, view, 0, rows, change(values, view))
    return to


def failed(report: Report) -> set[str]:
    return {row.what for row in report.rows if row.stage == "stored" and not row.passed}


def test_one_changed_feature_is_detected_and_named(features: Path, drawn: Path, tmp_path: Path) -> None:
    store = Store.open(next(features.glob("*/*")))
    name = store.manifest.names[3]

    def nudge(values: np.ndarray, view: int) -> np.ndarray:
        row = list(store.rows_in_shard(0)).index(store.manifest.row(name))
        values[row, 1, 1, 5] += np.float16(0.01)
        return values

    report = check(rewritten(features, tmp_path / "f", "V", nudge), drawn, steps=3)
    assert not report.passed
    assert failed(report) == {"V"}
    [row] = [row for row in report.rows if row.what == "V"]
    assert name in row.where


def test_mirrored_features_instead_of_a_views_own_are_detected(features: Path, drawn: Path, tmp_path: Path) -> None:
    identity = Store.open(next(features.glob("*/*")))
    rows = identity.rows_in_shard(0)
    own = identity.reader(["V"]).read(rows, [0] * len(rows))["V"]
    turns = {0: own, 1: own[:, :, ::-1], 2: own[:, ::-1], 3: own[:, ::-1, ::-1]}
    report = check(
        rewritten(features, tmp_path / "f", "V", lambda values, view: np.ascontiguousarray(turns[view])), drawn
    )
    assert failed(report) == {"V"}
    [row] = [row for row in report.rows if row.what == "V"]
    assert "view" in row.where
    assert "identity" not in row.where, "the unflipped view is right"


def test_a_resume_point_off_by_one_block_is_detected(features: Path, drawn: Path, tmp_path: Path) -> None:
    store = Store.open(next(features.glob("*/*")))
    rows = store.rows_in_shard(0)
    later = {view: store.reader(["B5"]).read(rows, [view] * len(rows))["B5"] for view in range(4)}
    changed = rewritten(features, tmp_path / "f", "B4", lambda values, view: later[view])
    assert failed(check(changed, drawn, adapt_last=2, start_feature="B4")) == {"B4"}


def test_features_from_other_weights_are_detected(
    features: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the store's fingerprints name the right weights."""
    from dsu.encoders import weights

    real = weights._random_module
    monkeypatch.setattr(weights, "_random_module", lambda build, seed: real(build, seed + 100))
    digest = {"hiera": "0", "dino": "0"}
    right = Store.open(next(features.glob("*/*"))).attributes["encoders"]
    digest.update(right)  # type: ignore[arg-type]
    monkeypatch.setattr("dsu.encoders.weights.load_encoders", _with_digests(digest))
    assert {"V", "S1", "S2", "S3"} <= failed(check(features, drawn, adapt_last=1))


def _with_digests(digests: dict[str, str]) -> Callable[..., object]:
    from dsu.encoders.weights import load_dino, load_hiera

    def load(config: object, weights: object, *, hiera: bool, dino: bool) -> object:
        return (
            load_hiera(config, weights)[0] if hiera else None,  # type: ignore[arg-type]
            load_dino(config, weights)[0] if dino else None,  # type: ignore[arg-type]
            digests,
        )

    return load


def test_nan_in_one_step_is_not_hidden_by_the_next(features: Path, drawn: Path, tmp_path: Path) -> None:
    """The NaN is in the first batch, and all later batches are equal."""
    store = Store.open(next(features.glob("*/*")))

    def spoil(values: np.ndarray, view: int) -> np.ndarray:
        values[list(store.rows_in_shard(0)).index(store.manifest.row(store.manifest.names[0])), 0, 0, 0] = np.nan
        return values

    report = check(rewritten(features, tmp_path / "f", "V", spoil), drawn, steps=6)
    assert failed(report) == {"V"}
    [row] = [row for row in report.rows if row.what == "V"]
    assert np.isnan(row.absolute) and store.manifest.names[0] in row.where


def test_rounding_is_reported_separately(features: Path, drawn: Path) -> None:
    report = check(features, drawn, steps=1)
    assert 0 < report.rounding.logits < 1e-3
    assert report.to_json()["rounding"]["grey_levels"] >= 0
