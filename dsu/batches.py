"""Batches, from the store or from the images: the same samples, the same views, the same order.

A `Batch` carries what the network needs beyond what it can compute: `points_of` completes it with the prefix
where the store did not give it, and after that nothing can know where a batch came from.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dsu.architecture import Architecture
from dsu.data.extra_views import extra_view
from dsu.data.images import mask_box, read_image, resize_image, resize_mask
from dsu.data.masks import MaskReading
from dsu.data.pairing import Pair
from dsu.data.tiles import KeptOpen
from dsu.data.views import extra_of, flip, place_of
from dsu.errors import DsuError
from dsu.network.network import DSUNet, normalize_pixels
from dsu.network.resume import ResumePoint
from dsu_cache import CorruptError, Store

__all__ = [
    "Batch",
    "Drawn",
    "ImageSamples",
    "Samples",
    "StoredSamples",
    "feed",
    "points_of",
    "prefetch",
    "prefix_of",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Some samples, each in one view.

    Attributes:
        names: of the samples.
        views: number of each sample's view.
        pixels: (B, S, S, 3) uint8 at Hiera's input size, in that view; None where no one reads them.
        mask: (B, S, S) uint8, likewise; None for samples without one.
        dino_pixels: (B, S', S', 3) uint8 at DINOv2's input size, likewise.
        points: (B, H, W, C) stored tensors by name, computed in that view.
    """

    names: tuple[str, ...]
    views: tuple[int, ...]
    pixels: Tensor | None
    mask: Tensor | None
    dino_pixels: Tensor | None
    points: Mapping[str, Tensor]

    def part(self, start: int, stop: int, view: int | None = None) -> "Batch":
        """Some of the samples of a batch of images; `view` puts all of them in another view."""
        names, views = self.names[start:stop], self.views[start:stop]
        cut = self._with(lambda tensor: tensor[start:stop])
        return replace(cut, names=names, views=views if view is None else (view,) * len(names))

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; from pinned memory without waiting for it."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same batch in memory from which a card copies by itself."""
        return self._with(lambda tensor: tensor.pin_memory())

    def flipped(self) -> "Batch":
        """Pixels and masks, read as identity, in the samples' views. Stored points are in them already."""
        if not any(self.views):
            return self
        images = (self.pixels, self.mask, self.dino_pixels)
        device = next(image.device for image in images if image is not None)
        views = torch.tensor(self.views)
        if device.type == "cuda":
            views = views.pin_memory().to(device, non_blocking=True)
        pixels, mask, dino_pixels = (None if image is None else flip(image, views) for image in images)
        return replace(self, pixels=pixels, mask=mask, dino_pixels=dino_pixels)

    def used_by(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of tensors made on another stream until `stream` has passed this point."""
        for tensor in (self.pixels, self.mask, self.dino_pixels, *self.points.values()):
            if tensor is not None:
                tensor.record_stream(stream)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Every tensor changed."""
        images = (self.pixels, self.mask, self.dino_pixels)
        pixels, mask, dino_pixels = (None if image is None else change(image) for image in images)
        points = {name: change(tensor) for name, tensor in self.points.items()}
        return replace(self, pixels=pixels, mask=mask, dino_pixels=dino_pixels, points=points)

    @property
    def soft_mask(self) -> Tensor:
        """(B, 1, S, S) float32 in [0, 1], soft edges kept."""
        if self.mask is None:
            raise RuntimeError("a loss was asked for of samples without masks")
        return self.mask.unsqueeze(1).float() / 255


Drawn = tuple[Sequence[str], Sequence[int]]
"""A batch that is still to be fetched: names, and the number of the view drawn for each."""


class Samples(Protocol):
    """Where batches come from."""

    @property
    def names(self) -> Sequence[str]:
        """Of all samples."""

    def fetch(self, names: Sequence[str], views: Sequence[int]) -> Batch:
        """The named samples; pixels and masks not flipped yet, everything on the CPU."""


class StoredSamples:
    """Samples out of a store.

    Args:
        store: an open store.
        names: samples of its manifest.
        reads: stored points that the run resumes from (`ResumePoint.reads`).
        masks: whether masks are read too.
    """

    def __init__(self, store: Store, names: Sequence[str], reads: Sequence[str], *, masks: bool = True) -> None:
        self.names = names
        self._manifest = store.manifest
        self._points = [name for name in reads if name != "pixels"]
        self._arrays = [*reads, *(["mask"] if masks else [])]
        self._reader = store.reader(self._arrays)

    def fetch(self, names: Sequence[str], views: Sequence[int]) -> Batch:
        """See `Samples.fetch`; every chunk's checksum is verified. Raises `DsuError` naming a damaged sample."""
        try:
            rows = [self._manifest.row(name) for name in names]
            found = self._reader.read(rows, {name: [place_of(name, view) for view in views] for name in self._arrays})
        except CorruptError as error:
            raise DsuError(
                f"{error}. Run `dsu cache verify`, then `dsu cache-features` again: it computes only what is damaged."
            ) from error
        tensors = {name: torch.from_numpy(array) for name, array in found.items()}
        points = {name: tensors[name] for name in self._points}
        return Batch(tuple(names), tuple(views), tensors.get("pixels"), tensors.get("mask"), None, points)


class ImageSamples:
    """Samples decoded from their files.

    Args:
        pairs: images or tiles, each with its mask (None for samples without one).
        architecture: gives both input sizes.
        reading: how masks are read; None without masks.
        contents: name to what the sample is (`SampleFacts.content`), which extra views follow from.
        dino: whether DINOv2's input is wanted.
        workers: threads that decode; None: as many as there are cores, 4 to 16.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        architecture: Architecture,
        reading: MaskReading | None,
        *,
        contents: Mapping[str, str],
        dino: bool = True,
        workers: int | None = None,
    ) -> None:
        self._pairs = {pair.name: pair for pair in pairs}
        self.names = sorted(self._pairs)
        self._sizes = (architecture.hiera_size, architecture.dino_size if dino else None)
        self._reading = reading
        self._contents = contents
        self._whole = KeptOpen(self._read)
        self._pool = ThreadPoolExecutor(workers or min(16, max(4, os.cpu_count() or 1)), thread_name_prefix="decode")

    def fetch(self, names: Sequence[str], views: Sequence[int]) -> Batch:
        """See `Samples.fetch`. Raises `UnreadableImage`."""
        decoded = list(self._pool.map(self._decode, names, views))
        pixels, dino_pixels, masks = zip(*decoded, strict=True)
        return Batch(tuple(names), tuple(views), _stack(pixels), _stack(masks), _stack(dino_pixels), {})

    def _decode(self, name: str, view: int) -> tuple[np.ndarray | None, ...]:
        """Both sizes of an image and its mask, in the extra view that `view` is a flip of."""
        image, mask = self._cut(self._pairs[name])
        if extra_of(view):
            image, mask = extra_view(self._contents[name], extra_of(view)).apply(image, mask)
        size, dino_size = self._sizes
        return (
            resize_image(image, size),
            None if dino_size is None else resize_image(image, dino_size),
            None if mask is None else resize_mask(mask, size),
        )

    def _cut(self, pair: Pair) -> tuple[Image.Image, np.ndarray | None]:
        if pair.box is None:
            return self._read((pair.image, pair.mask))
        image, mask = self._whole((pair.image, pair.mask))
        if mask is not None:
            left, top, right, bottom = mask_box(pair.box, image.size, (mask.shape[1], mask.shape[0]))
            mask = mask[top:bottom, left:right]
        return image.crop(pair.box), mask

    def _read(self, files: tuple[Path, Path | None]) -> tuple[Image.Image, np.ndarray | None]:
        image, mask = files
        reads = self._reading is not None and mask is not None
        return read_image(image), self._reading.read(mask) if reads else None  # type: ignore[union-attr, arg-type]


def points_of(network: DSUNet, batch: Batch, point: ResumePoint) -> dict[str, Tensor]:
    """What the suffix resumes from: what the batch carries, and the rest from the prefix."""
    lacking = [name for name in point.reads if name not in batch.points]
    points = {**batch.points, **(prefix_of(network, batch, lacking) if lacking else {})}
    return {name: points[name] for name in point.reads}


def prefix_of(network: DSUNet, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """The named tensors of the prefix, from a batch's pixels in its views."""
    if batch.pixels is None:
        raise RuntimeError(f"{', '.join(names)} were neither stored nor can they be computed without pixels")
    dino_pixels = None if batch.dino_pixels is None else normalize_pixels(batch.dino_pixels)
    return network.prefix(normalize_pixels(batch.pixels), dino_pixels, names)


def feed(samples: Samples, drawn: Iterable[Drawn], device: torch.device) -> Iterator[Batch]:
    """Batches in order on `device`, made in advance by a thread.

    To a card they are copied on a stream of their own, while the step before computes.
    """
    if device.type != "cuda":
        yield from prefetch(partial(samples.fetch, *wanted) for wanted in drawn)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(names: Sequence[str], views: Sequence[int]) -> tuple[Batch, torch.cuda.Event]:
        pinned = samples.fetch(names, views).pinned()
        with torch.cuda.stream(copying):
            return pinned.to(device), copying.record_event()

    for batch, copied in prefetch(partial(upload, *wanted) for wanted in drawn):
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copied)
        batch.used_by(computing)
        yield batch


def prefetch(work: Iterable[Callable[[], T]], ahead: int = 2) -> Iterator[T]:
    """Results of `work` in order, up to `ahead` of them made in advance by a thread."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
    stop = threading.Event()

    def put(item: tuple[T | None, BaseException | None]) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for task in work:
                if stop.is_set():
                    return
                put((task(), None))
            put((None, StopIteration()))
        except BaseException as error:  # handed to the consumer, which raises it
            put((None, error))

    thread = threading.Thread(target=run, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # an item without error is a result
    finally:
        stop.set()
        thread.join()


def _stack(arrays: Sequence[np.ndarray | None]) -> Tensor | None:
    present = [array for array in arrays if array is not None]
    if not present:
        return None
    if len(present) != len(arrays):
        raise DsuError("Some samples have a mask and some have none: complete the masks or leave them all away.")
    return torch.from_numpy(np.stack(present))
