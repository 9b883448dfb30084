"""Masks composed from tiles, and writing masks within a budget of pixels."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import toy_network
from torch import Tensor

from dsu.batches import Batch
from dsu.data.tiles import Tiling
from dsu.heads.head_file import HeadInfo
from dsu.network.resume import ResumePoint, earliest, resume_point
from dsu.prediction.inference import PixelBudget, Predictor, finish_mask, mask_of, segment_tiles, tiled_image
from dsu.prediction.predict import predict
from dsu.prediction.segmenter import Segmenter
from dsu.prediction.targets import Job, Target
from dsu.runtime import choose_runtime
from dsu.settings import EncoderWeights, PredictionSettings


def shaded(width: int, height: int) -> Image.Image:
    """An image with brightness increasing to the right, and redness increasing downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([y, x, x], axis=-1).astype(np.uint8))


def test_one_tile_is_the_image(tmp_path: Path) -> None:
    network, runtime = toy_network(feature_dtype=torch.float16).eval(), choose_runtime("cpu", "fp32")
    image = shaded(90, 70)
    point = earliest(network.config)
    tiles = tiled_image(network, image, Tiling(100, 20))
    assert len(tiles.boxes) == 1
    predictor = Predictor(network, runtime, point)
    whole = finish_mask(predictor(tiles.fetch(0, 1))[0], image.size, "none")
    assert np.array_equal(mask_of(segment_tiles(predictor, tiles, 8), "none"), whole)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_tiles_of_a_pixelwise_network_have_no_seams(size: int) -> None:
    """With a network whose logit is the pixel's own brightness, tiles give the same mask as the whole image."""

    def brightness(batch: Batch) -> Tensor:
        assert len(batch.names) <= size
        return batch.images["pixels"][..., 1].float().unsqueeze(1) / 64 - 2

    network, image = toy_network(), shaded(500, 300)
    tiles = tiled_image(network, image, Tiling(128, 32))  # the network's own size: nothing is resized
    assert len(tiles.boxes) == 5 * 3
    got = segment_tiles(brightness, tiles, size)
    np.testing.assert_allclose(got, np.asarray(image)[..., 1].astype(np.float32) / 64 - 2, atol=1e-5)


def test_large_masks_are_written_one_after_the_other() -> None:
    """Never more than the budget at once, except for a single larger image."""
    budget, lock, together = PixelBudget(100), threading.Lock(), list[int]()
    held: Counter[int] = Counter()

    def work(index: int, pixels: int) -> None:
        with budget.taken(pixels):
            with lock:
                held[index] = pixels
                together.append(held.total() if len(+held) > 1 else min(held.total(), 100))
            time.sleep(0.002)
            with lock:
                del held[index]

    sizes = [50, 50, 250, 60, 70, 30, 100, 1, 300, 99] * 4
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(len(sizes)), sizes))
    assert len(together) == len(sizes) and max(together) <= 100


def test_small_masks_are_written_in_parallel() -> None:
    budget, both = PixelBudget(100), threading.Barrier(2)

    def work(pixels: int) -> int:
        with budget.taken(pixels):
            return both.wait(timeout=10)

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(work, [50, 50])) == [0, 1]


def test_a_failed_image_releases_its_pixels() -> None:
    budget = PixelBudget(100)
    with pytest.raises(ValueError, match="broken"), budget.taken(90):
        raise ValueError("broken")
    with budget.taken(90):
        pass


def test_python_uses_the_tiling_of_the_head() -> None:
    network, runtime = toy_network(feature_dtype=torch.float16).eval(), choose_runtime("cpu", "fp32")
    image = shaded(200, 150)
    whole, cut = (Segmenter(network, runtime, tiling)(image) for tiling in (None, Tiling(100, 20)))
    assert whole.shape == cut.shape == (150, 200) and not np.allclose(whole, cut, atol=1e-3)
    point = earliest(network.config)
    tiles = tiled_image(network, image, Tiling(100, 20))
    assert np.array_equal(cut, mask_of(segment_tiles(Predictor(network, runtime, point), tiles, 8), "none"))


def test_one_network_predicts_all_unfinished_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is loaded for the set that needs most of it, and not at all if no mask is missing."""
    config, head, out = toy_network(3).config, tmp_path / "head.onnx", tmp_path / "masks"
    head.touch()

    def job(name: str, store: object, start: str) -> Job:
        image = tmp_path / f"{name}.png"
        shaded(8, 8).save(image)
        point = resume_point(config, {"pixels", "V", "S1", "S2", "S3", "S4"}, start)
        return Job(name, (Target(name, image, out / name / image.name),), "none", None, store, point)  # type: ignore[arg-type]

    facts = SimpleNamespace(metadata={"stored": SimpleNamespace(image_sha256="", pixels_sha256="")})
    stored, live = job("stored", facts, "S2"), job("live", None, "pixels")
    loaded: list[tuple[str, bool]] = []

    def load(*_: object, point: ResumePoint, from_images: bool) -> object:
        loaded.append((point.start, from_images))
        return toy_network()

    def predict_job(network: object, job: Job, todo: Sequence[Target], *_: object) -> None:
        for target in todo:
            Image.new("L", (8, 8)).save(target.output)

    monkeypatch.setattr("dsu.prediction.predict.load_head", lambda head: ({}, HeadInfo(config=config)))
    monkeypatch.setattr("dsu.prediction.predict.load_network", load)
    monkeypatch.setattr("dsu.prediction.predict.predict_job", predict_job)

    def load_for(*missing: Job) -> list[tuple[str, bool]]:
        loaded.clear()
        for one in missing:
            one.targets[0].output.unlink(missing_ok=True)
        runtime = choose_runtime("cpu", "fp32")
        outcome = predict([stored, live], head, out, PredictionSettings(), runtime, EncoderWeights())
        assert outcome.kept == 2 - len(missing)
        return loaded

    assert load_for(stored, live) == [("pixels", True)]
    assert load_for(stored) == [("S2", False)], "the images' set is complete"
    assert load_for(live) == [("pixels", True)]
    assert load_for() == []
