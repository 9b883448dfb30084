"""Whether stored features may be used: fingerprints are tested by array and field, samples by row."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dsu.config import build_config
from dsu.data.datasets import Paths
from dsu.data.views import ALL_FLIPS
from dsu.errors import DsuError
from dsu.features.extraction import CachePlan, cache_features
from dsu.features.stores import FeatureStore
from dsu.settings import EncoderWeights, ExtractionSettings, TrainingSettings
from dsu.training.runs import Run, prepare_run
from dsu_cache import StaleError
from dsu_cache.files import read_metadata, write_metadata

CONFIG = build_config("toy", hiera_size=128, dino_size=126)


def cache(folder: Path, root: Path, **settings: Any) -> CachePlan:
    return cache_features(
        str(folder),
        CONFIG,
        ExtractionSettings(**{"features": ("V", "S1", "S2", "S3"), "level_views": ALL_FLIPS, **settings}),
        EncoderWeights(),
        paths=Paths(folder, root),
        device="cpu",
    )


@pytest.fixture(scope="module")
def cached(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A user's folder and the cache root of its features."""
    folder = tmp_path_factory.mktemp("own") / "tiles"
    shutil.copytree(drawn / "train", folder)
    root = tmp_path_factory.mktemp("features")
    cache(folder, root)
    return folder, root


def open_training(folder: Path, root: Path, **settings: Any) -> Run:
    return prepare_run(
        TrainingSettings(dataset=str(folder), device="cpu", **settings),
        paths=Paths(folder, root),
        weights=EncoderWeights(),
    )


FIELDS = [
    ("pixels", "size"),
    ("pixels", "resize"),
    ("pixels", "mode"),
    ("mask", "size"),
    ("mask", "resize"),
    *(("V", f) for f in ("encoder", "weights", "input size", "resize", "normalisation", "precision", "type", "grid")),
    *(
        ("S3", f)
        for f in (
            "encoder",
            "weights",
            "input size",
            "resize",
            "normalisation",
            "precision",
            "type",
            "feature",
            "encoder batch size",
        )
    ),
]


@pytest.mark.parametrize(("array", "field"), FIELDS)
def test_a_differing_field_makes_only_its_array_stale(
    cached: tuple[Path, Path], tmp_path: Path, array: str, field: str
) -> None:
    folder, root = cached
    shutil.copytree(root, tmp_path / "features")
    [store] = (tmp_path / "features").glob("*/*")
    document = read_metadata(store / array)
    fields = document["attributes"]["fingerprint"]["fields"]
    assert field in fields
    fields[field] = "something else"
    write_metadata(store / array, document)
    # A run that starts at S3 does not read pixels; with all blocks adapted, it does not read S3.
    mask_format = {"adapt_last": 7} if array in ("pixels", "V", "mask") else {"adapt_last": 1}
    with pytest.raises(StaleError) as caught:
        open_training(folder, tmp_path / "features", **mask_format)
    [difference] = caught.value.differences
    assert (difference.array, difference.field) == (array, field)
    assert "something else" in str(caught.value)
    if array in ("pixels", "S3"):
        without = {"adapt_last": 1} if array == "pixels" else {"adapt_last": 7}
        open_training(folder, tmp_path / "features", **without)


def test_another_library_version_only_warns(cached: tuple[Path, Path], tmp_path: Path) -> None:
    folder, root = cached
    shutil.copytree(root, tmp_path / "features")
    [store] = (tmp_path / "features").glob("*/*")
    document = read_metadata(store / "V")
    recorded = document["attributes"]["fingerprint"]["recorded"]
    assert "torch" in recorded
    recorded["torch"] = "1.0"
    write_metadata(store / "V", document)
    assert any("torch" in note for note in open_training(folder, tmp_path / "features").notes)
    [plan] = cache(folder, tmp_path / "features").splits
    assert any("torch" in warning and "1.0" in warning for warning in plan.drift)


def test_only_a_new_array_is_computed(cached: tuple[Path, Path], tmp_path: Path) -> None:
    folder, root = cached
    shutil.copytree(root, tmp_path / "features")
    [plan] = cache(folder, tmp_path / "features", features=("V", "S4")).splits
    assert set(plan.bytes_by_array) == {"S4"}


@pytest.mark.parametrize("what", ["image", "mask", "added", "renamed", "removed", "damaged"])
def test_a_changed_sample_is_reported_before_training_and_only_its_row_is_computed(
    cached: tuple[Path, Path], tmp_path: Path, what: str
) -> None:
    original, root = cached
    folder = tmp_path / "tiles"
    shutil.copytree(original, folder)
    shutil.copytree(root, tmp_path / "features")
    [path] = (tmp_path / "features").glob("*/*")
    store = FeatureStore.open(path)
    with store.lock():
        moved = {**vars(store.source), "reference": str(folder.resolve()), "data_root": str(folder.resolve())}
        store.set_attributes({**store.attributes, "source": moved})
    image, other = sorted((folder / "images").iterdir())[:2]
    mask = folder / "masks" / f"{image.stem}.png"
    computed = {"image": 1, "mask": 1, "added": 1, "renamed": 0, "removed": 0, "damaged": 0}[what]
    if what == "image":
        Image.open(image).rotate(5).save(image)
    elif what == "mask":
        Image.open(mask).rotate(5).save(mask)
    elif what == "added":
        Image.open(image).rotate(9).save(folder / "images" / "added.jpg")
        shutil.copy(mask, folder / "masks" / "added.png")
    elif what == "renamed":
        image.rename(folder / "images" / "renamed.jpg")
        mask.rename(folder / "masks" / "renamed.png")
    elif what == "damaged":
        image.write_bytes(image.read_bytes()[:300])
    else:
        image.unlink()
        mask.unlink()
    said = {
        "image": "changed",
        "mask": "changed",
        "added": "new (added)",
        "renamed": "new (renamed)",
        "removed": "gone or unreadable",
        "damaged": "gone or unreadable",
    }
    with pytest.raises(DsuError) as caught:
        FeatureStore.open(path).check_samples()
    assert said[what] in str(caught.value)
    assert "dsu cache-features" in str(caught.value)
    [plan] = cache(folder, tmp_path / "features").splits
    assert plan.images == computed
    FeatureStore.open(path).check_samples()
    assert other.stem in FeatureStore.open(path).manifest.names


def test_two_folders_with_the_same_name_can_not_share_a_store(
    cached: tuple[Path, Path], drawn: Path, tmp_path: Path
) -> None:
    _, root = cached
    shutil.copytree(drawn / "train", tmp_path / "tiles")
    with pytest.raises(DsuError, match="contains the features of"):
        cache(tmp_path / "tiles", root)
