"""Stage one: stored values compared with direct encoding, and refused requests."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_folder import boxed, photo, write
from PIL import Image

from dsu.config import build_config
from dsu.data.datasets import Paths
from dsu.data.images import read_image, resize_image, resize_mask
from dsu.data.masks import MaskFormat
from dsu.data.views import Views
from dsu.encoders.weights import load_dino, load_hiera
from dsu.errors import DsuError, UsageError
from dsu.features.extraction import cache_features
from dsu.network.network import DSUNet
from dsu.settings import EncoderWeights, ExtractionSettings
from dsu_cache import Store

CONFIG = build_config("toy", hiera_size=128, dino_size=126)
FEATURES = ("V", "V2", "S1", "S2", "S3", "S4", "B5")


def cache(folder: Path, root: Path, **settings: Any) -> Store:
    plan = cache_features(
        str(folder),
        CONFIG,
        ExtractionSettings(**{"features": FEATURES, "level_views": Views(2), **settings}),
        EncoderWeights(),
        paths=Paths(folder, root),
        device="cpu",
    )
    return plan.splits[0].store


def test_stored_features_equal_those_of_the_network_in_every_view(drawn: Path, tmp_path: Path) -> None:
    store = cache(drawn / "train", tmp_path, encoder_batch_size=5)
    name = store.manifest.names[7]
    image_path = drawn / "train" / "images" / f"{name}.jpg"
    image = read_image(image_path)
    pixels = resize_image(image, CONFIG.hiera_size)
    dino_pixels = resize_image(image, CONFIG.dino_size)
    mask = resize_mask(MaskFormat().read(drawn / "train" / "masks" / f"{name}.png"), CONFIG.hiera_size)
    row = [store.manifest.row(name)]
    kept = store.reader(["pixels", "mask"]).read(row, [0])
    assert np.array_equal(kept["pixels"][0], pixels)
    assert np.array_equal(kept["mask"][0], mask)
    weights = EncoderWeights()
    hiera, dino = load_hiera(CONFIG, weights)[0], load_dino(CONFIG, weights)[0]
    network = DSUNet(CONFIG, hiera, dino, feature_dtype=torch.float16).eval()
    for view, turn in enumerate((lambda x: x, np.fliplr, np.flipud, lambda x: np.flipud(np.fliplr(x)))):
        images = (torch.from_numpy(turn(image).copy())[None].permute(0, 3, 1, 2) for image in (pixels, dino_pixels))
        expected = network.encode(*images, FEATURES)
        for array in FEATURES if view < 2 else ("V", "V2"):
            stored = store.reader([array]).read(row, [view])[array]
            assert stored.dtype == np.float16
            assert np.array_equal(stored, expected[array].numpy()), (array, view)


def test_mirrored_features_are_not_the_features_of_the_mirrored_image(drawn: Path, tmp_path: Path) -> None:
    store = cache(drawn / "train", tmp_path, features=("V",))
    rows = store.manifest.rows_in_use
    reader = store.reader(["V"])
    identity, horizontal = (reader.read(rows, [view] * len(rows))["V"] for view in (0, 1))
    assert not np.allclose(identity[:, :, ::-1], horizontal, atol=1e-2)


def test_test_splits_are_stored_in_one_view(drawn: Path, tmp_path: Path) -> None:
    cache(drawn, tmp_path, features=("V", "S4"))
    stores = {path.parent.name: Store.open(path) for path in tmp_path.glob("*/*")}
    views = {name: [v for v in range(4) if not store.missing("V", [v])] for name, store in stores.items()}
    assert views == {"shapes-TR": [0, 1, 2, 3], "shapes-TE": [0]}


def test_values_that_are_not_finite_are_refused_with_the_samples_name(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DSUNet.encode

    def overflowing(self: DSUNet, *arguments: Any) -> dict[str, torch.Tensor]:
        found = real(self, *arguments)
        found["V"][len(found["V"]) - 1, 0, 0, 0] = float("inf")
        return found

    monkeypatch.setattr(DSUNet, "encode", overflowing)
    with pytest.raises(DsuError, match="float32") as caught:
        cache(drawn / "train", tmp_path, features=("V",))
    first = min(path.stem for path in (drawn / "train" / "images").iterdir())
    assert first in str(caught.value)


def test_too_little_disk_space_is_refused_before_anything_is_computed(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DsuError, match="--features V"):
        cache(drawn / "train", tmp_path / "features")
    assert not list((tmp_path / "features").rglob("c/**/*"))


def test_unknown_features_are_refused(drawn: Path, tmp_path: Path) -> None:
    for wrong in ("S5", "B7", "B0", "V9", "Q", ""):
        with pytest.raises(UsageError, match="is not a feature"):
            cache(drawn / "train", tmp_path, features=("V", wrong))


def test_a_broken_image_is_skipped_and_reported(drawn: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(drawn / "train", folder)
    first = sorted((folder / "images").iterdir())[0]
    first.write_bytes(first.read_bytes()[:300])
    plan = cache_features(
        str(folder),
        CONFIG,
        ExtractionSettings(features=("V",)),
        EncoderWeights(),
        paths=Paths(folder, tmp_path / "features"),
        device="cpu",
    )
    assert [path.name for path, _ in plan.skipped] == [first.name]
    assert first.stem not in plan.splits[0].store.manifest.names


def test_all_splits_share_one_scale_for_images_with_more_than_8_bits(tmp_path: Path) -> None:
    for split, factor in (("train", 64), ("test", 16)):
        image = Image.fromarray(np.asarray(photo(0).convert("L")).astype(np.uint16) * factor)
        write(tmp_path / "own" / split, {"a.png": (image, boxed(255)), "b.png": (image, boxed(255))})
    for dry_run in (True, False, False):  # the last one finds both stores
        plan = cache_features(
            str(tmp_path / "own"),
            CONFIG,
            ExtractionSettings(features=("V",)),
            EncoderWeights(),
            paths=Paths(tmp_path, tmp_path / "features"),
            device="cpu",
            dry_run=dry_run,
        )
        assert [split.split.kind for split in plan.splits] == ["train", "test"]
        assert [split.inspection.depth for split in plan.splits] == [(0, 16383)] * 2
        assert [split.store.source.parsed_depth for split in plan.splits] == [(0, 16383)] * 2


def test_a_black_image_is_stored(tmp_path: Path) -> None:
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / "own" / kind).mkdir(parents=True)
        for name in ("black", "white"):
            Image.new(mode, (40, 30), name).save(tmp_path / "own" / kind / f"{name}.png")
    store = cache(tmp_path / "own", tmp_path / "features", features=("V",))
    read = store.reader(["pixels", "mask"]).read([store.manifest.row("black")], [0])
    assert not read["pixels"].any()
    assert not read["mask"].any()
