"""Masks of images that are predicted tile by tile: memory is bounded by an image and one batch of its tiles."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from dsu.batches import Batch, prefetch
from dsu.data.decoding import ImageProcessor
from dsu.data.images import Box, UnreadableImage, or_unreadable, read_image
from dsu.data.inspection import SampleMetadata
from dsu.data.tiles import TileBlender, Tiling, image_name
from dsu.features.feature_dataset import FeatureDataset
from dsu.features.stores import FeatureStore
from dsu.network.network import DSUNet
from dsu.network.resume import ResumePoint, earliest
from dsu.prediction.inference import Predictor, resize_logits
from dsu.prediction.targets import Job, Target
from dsu.progress import Task

__all__ = ["TiledImage", "predict_tiled", "segment_tiles", "tiled_image"]


@dataclass(frozen=True)
class TiledImage:
    """An image in tiles.

    Attributes:
        boxes: where each tile lies.
        fetch: gives some of them, by their first and last place in `boxes`, as a batch.
    """

    boxes: Sequence[Box]
    fetch: Callable[[int, int], Batch]


def segment_tiles(predictor: Callable[[Batch], Tensor], image: TiledImage, size: int) -> Tensor:
    """Logits (height, width) float32 of a whole image on the CPU, from its tiles, `size` of them at a time."""
    blender = TileBlender(image.boxes)
    for start in range(0, len(image.boxes), size):
        boxes = image.boxes[start : start + size]
        logits = predictor(image.fetch(start, start + len(boxes)))
        for box, one in zip(boxes, logits, strict=True):
            left, top, right, bottom = box
            blender.add(box, resize_logits(one, (right - left, bottom - top)).cpu().numpy())
    return torch.from_numpy(blender.logits)


def tiled_image(network: DSUNet, image: Image.Image, tiling: Tiling) -> TiledImage:
    """An RGB image in tiles, cut out and resized when they are fetched."""
    boxes = tiling.boxes(*image.size)
    processor = ImageProcessor(network.config, bool(earliest(network.config).guides))

    def fetch(start: int, stop: int) -> Batch:
        names = [f"{left},{top}" for left, top, _, _ in boxes[start:stop]]
        return Batch.decoded(names, [processor.fit(image, box=box) for box in boxes[start:stop]])

    return TiledImage(boxes, fetch)


def predict_tiled(
    predictor: Predictor,
    job: Job,
    todo: Sequence[Target],
    batch_size: int,
    finish: Callable[[Tensor, Target], str | None],
    settle: Callable[[list[Future[str | None]]], None],
    task: Task,
) -> Iterator[str]:
    """Predict images one after the other, the next being decoded meanwhile; gives a sentence for each broken one.

    Args:
        predictor, job: as for whole images.
        todo: images of the job; it has a tiling.
        batch_size: tiles at once.
        finish: makes the mask of an image from its logits (height, width) and writes it.
        settle: counts what came of writing.
        task: told of every image.
    """
    assert job.tiling is not None
    opened: Iterator[Callable[[], TiledImage | UnreadableImage]]
    opened = _stored(job.store, job.point, todo) if job.store else _decoded(predictor.network, job.tiling, todo)
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        pending: list[Future[str | None]] = []
        for target, image in zip(todo, prefetch(opened, ahead=1), strict=True):
            if isinstance(image, UnreadableImage):
                yield str(image)
            else:
                logits = segment_tiles(predictor, image, batch_size)
                settle(pending)
                pending = [writer.submit(finish, logits, target)]
            task.advance()
        settle(pending)


def _decoded(
    network: DSUNet, tiling: Tiling, todo: Sequence[Target]
) -> Iterator[Callable[[], TiledImage | UnreadableImage]]:
    @or_unreadable
    def open_image(target: Target) -> TiledImage:
        return tiled_image(network, read_image(target.image), tiling)

    return (partial(open_image, target) for target in todo)


def _stored(store: FeatureStore, point: ResumePoint, todo: Sequence[Target]) -> Iterator[Callable[[], TiledImage]]:
    samples = FeatureDataset(store, point.features, masks=False)
    tiles: dict[str, list[str]] = {}
    for name in store.manifest.names:
        tiles.setdefault(image_name(name), []).append(name)

    def open_image(target: Target) -> TiledImage:
        names = tiles[target.name]
        facts = [SampleMetadata.from_json(store.manifest.entries[name].info) for name in names]
        boxes: list[Box] = [one.box or (0, 0, *one.size) for one in facts]

        def fetch(start: int, stop: int) -> Batch:
            chosen = names[start:stop]
            return samples.read(chosen, [0] * len(chosen))

        return TiledImage(boxes, fetch)

    return (partial(open_image, target) for target in todo)
