"""Torch data sets: a plain `DataLoader` gives the same samples as training, flipped."""

import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support import toy_network
from torch.utils.data import DataLoader, Dataset

from dsu.batches import feed, prefetch
from dsu.config import build_config
from dsu.data.datasets import Paths
from dsu.data.views import draw_view, flip, view_index
from dsu.datasets import ImageDataset, SampleDataset
from dsu.errors import DsuError, UsageError
from dsu.features.extraction import cache_features
from dsu.features.samples import FeatureDataset
from dsu.features.stores import FeatureStore
from dsu.settings import EncoderWeights, ExtractionSettings
from dsu_cache import Compressor

SEED = 7


def store_of(drawn: Path, root: Path, compressor: Compressor = None) -> Path:
    """A store of `drawn`'s training images with V in all four views."""
    cache_features(
        str(drawn / "train"),
        build_config("toy", hiera_size=128, dino_size=126),
        ExtractionSettings(features=("V",), compressor=compressor),
        EncoderWeights(),
        paths=Paths(drawn, root),
        device="cpu",
    )
    [folder] = root.glob("*/*")
    return folder


@pytest.fixture(scope="module")
def store(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_of(drawn, tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def both(drawn: Path, store: Path) -> tuple[FeatureDataset, ImageDataset]:
    network = toy_network()
    return (
        FeatureDataset(store, network, views="flips", seed=SEED),
        ImageDataset(drawn / "train", network, views="flips", seed=SEED),
    )


def same(first: dict[str, object], second: dict[str, object]) -> None:
    """Assert that two items, or two batches, are bit-identical."""
    assert first.keys() == second.keys()
    for key, value in first.items():
        other = second[key]
        if isinstance(value, dict) and isinstance(other, dict):
            same(value, other)
        elif isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
            assert value.dtype == other.dtype and torch.equal(value, other)
        else:
            assert value == other


def test_items_equal_flipped_training_batches(both: tuple[FeatureDataset, ImageDataset], store: Path) -> None:
    stored, images = both
    opened = FeatureStore.open(store)
    stored.set_epoch(3)
    drawn = set()
    for index, name in enumerate(stored.names):
        view = draw_view(SEED, 3, name, stored.views)
        drawn.add(view)
        read, item = stored.read([name], [view]), stored[index]
        turned = torch.tensor([view])
        assert torch.equal(item["pixel_values"], flip(read.images["pixels"], turned)[0].permute(2, 0, 1))
        assert torch.equal(item["mask"][0], flip(read.images["mask"], turned)[0].float() / 255)
        kept = opened.reader(["V"]).read([opened.manifest.row(name)], [view_index("V", view)])["V"][0]
        assert np.array_equal(item["features"]["V"].numpy(), kept)
        assert (item["name"], item["pixel_values"].dtype, item["mask"].dtype) == (name, torch.uint8, torch.float32)
    assert drawn == {0, 1, 2, 3}
    stored.set_epoch(0)
    item, live = stored[2], images[2]
    assert live.pop("guide_values").shape == (3, 126, 126)
    same({**item, "features": {}}, live)


def test_the_network_takes_batches_from_stores_and_images(both: tuple[FeatureDataset, ImageDataset]) -> None:
    network = toy_network(feature_dtype=torch.float16).eval()
    batches = [next(iter(DataLoader(dataset, batch_size=3))) for dataset in both]
    with torch.no_grad():
        first, second = (
            network(batch["pixel_values"], batch.get("guide_values"), batch["features"]).logits for batch in batches
        )
    assert torch.equal(first, second)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", [0, 1], ids=["features", "images"])
def test_a_dataloader_gives_the_same_with_any_start_method(
    both: tuple[FeatureDataset, ImageDataset], kind: int, method: str
) -> None:
    dataset: SampleDataset = both[kind]
    assert isinstance(dataset, Dataset) and len(dataset) == len(dataset.names)
    dataset.set_epoch(1)
    expected = list(DataLoader(dataset, batch_size=5))
    workers = 2 if method == "fork" else 1  # starting a new process takes seconds
    found = list(DataLoader(dataset, batch_size=5, num_workers=workers, multiprocessing_context=method))
    assert [len(batch["name"]) for batch in expected] == [5, 5, 2]
    for one, other in zip(expected, found, strict=True):
        same(one, other)
    same(dataset[0], {**dataset[0]})  # this process still reads


def test_workers_read_compressed_stores(drawn: Path, tmp_path: Path) -> None:
    dataset = FeatureDataset(store_of(drawn, tmp_path, "zstd"), ("pixels", "V"))
    [expected] = DataLoader(dataset, batch_size=12)
    for method in ("spawn", "fork"):
        [found] = DataLoader(dataset, batch_size=12, num_workers=1, multiprocessing_context=method)
        same(expected, found)


def test_set_epoch_reaches_persistent_workers(store: Path) -> None:
    dataset = FeatureDataset(store, toy_network(), views="flips", seed=SEED)
    loader = DataLoader(dataset, batch_size=12, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    for epoch in (0, 1, 5):
        dataset.set_epoch(epoch)
        [batch] = loader
        views = [draw_view(SEED, epoch, name, dataset.views) for name in dataset.names]
        same(batch, next(iter(DataLoader(dataset, batch_size=12))))
        assert torch.equal(batch["features"]["V"], dataset.read(dataset.names, views).features["V"])


def test_names_arrays_and_masks_can_be_chosen(store: Path) -> None:
    opened = FeatureStore.open(store)
    chosen = opened.manifest.names[3:5]
    dataset = FeatureDataset(opened, ("V",), names=chosen, masks=False)
    assert [item["name"] for item in dataset] == list(chosen)  # iteration ends
    assert dataset[1].keys() == {"name", "features"}


def test_a_model_records_the_encoders_of_its_features(store: Path) -> None:
    network = toy_network()
    FeatureDataset(store, network)
    opened = FeatureStore.open(store)
    assert network.encoder_digests == opened.encoders and "dino" in opened.encoders
    assert network.encoder_batch_size == opened.encoder_batch_size == 1


def test_a_splits_folder_stands_for_its_store(store: Path) -> None:
    assert len(FeatureDataset(store.parent, toy_network())) == 12


def test_images_without_masks_are_items_without_masks(drawn: Path, tmp_path: Path) -> None:
    for image in sorted((drawn / "train" / "images").iterdir())[:2]:
        (tmp_path / image.name).write_bytes(image.read_bytes())
    dataset = ImageDataset(tmp_path, toy_network())
    assert dataset[0].keys() == {"name", "features", "pixel_values", "guide_values"}


def test_invalid_arguments_are_refused_in_one_sentence(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no store at .*: run `dsu cache-features` first"):
        FeatureDataset(tmp_path, toy_network())
    with pytest.raises(UsageError, match=r"The views must be none, width or flips, .* not 'sideways'\.$"):
        FeatureDataset(store, toy_network(), views="sideways")
    with pytest.raises(DsuError, match=r"lacks pixels and mask of some samples or views \(flips\+2\)"):
        FeatureDataset(store, toy_network(), views="flips+2")
    with pytest.raises(UsageError, match=r"V1, V2, V3, V4 is not stored"):
        FeatureDataset(store, toy_network(ablation="B"))
    strange = toy_network()
    strange.encoder_digests = {"dino": "0" * 64}
    with pytest.raises(UsageError, match=r"were made with other weights of dino than the model's: give"):
        FeatureDataset(store, strange)
    other = toy_network()
    other.config = build_config("toy")
    with pytest.raises(UsageError, match=r"was made with hiera-toy-128\+dino-toy-126, but the model has toy"):
        FeatureDataset(store, other)


def test_prefetched_results_and_errors_come_in_order() -> None:
    def slow(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        if number == 7:
            raise ValueError(number)
        return number

    for ahead, workers in ((0, 1), (2, 1), (50, 4)):
        made = prefetch((partial(slow, number) for number in range(10)), ahead, workers)
        assert [next(made) for _ in range(7)] == list(range(7))
        with pytest.raises(ValueError, match="7"):
            next(made)


def test_feed_gives_the_batches_that_were_read(store: Path) -> None:
    dataset = FeatureDataset(store, ("pixels", "V"))
    drawn = [
        (dataset.names[start : start + 5], [start % 4] * len(dataset.names[start : start + 5])) for start in (0, 5, 10)
    ]
    for batch, indices in zip(feed(dataset, drawn, torch.device("cpu")), drawn, strict=True):
        expected = dataset.read(*indices)
        assert batch.names == expected.names
        assert all(torch.equal(one, other) for one, other in zip(batch.tensors, expected.tensors, strict=True))
