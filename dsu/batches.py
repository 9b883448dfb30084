"""Batches, from the store or from the images: the same samples, the same views, the same order.

A `Batch` carries what the network's `forward` takes: images, or the features that a store keeps in their place.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dsu.config import DSUNetConfig
from dsu.data.augmentation import augmentation
from dsu.data.images import mask_box, read_image, resize_image, resize_mask
from dsu.data.masks import MaskFormat
from dsu.data.pairing import Pair
from dsu.data.tiles import LastUsed
from dsu.data.views import augmentation_of, flip, view_index
from dsu.errors import DsuError
from dsu_cache import CorruptError, Store

__all__ = [
    "Batch",
    "BatchIndices",
    "ImageSamples",
    "Samples",
    "StoredSamples",
    "feed",
    "prefetch",
]

T = TypeVar("T")

FETCHERS: Final = 4
"""Threads that fetch batches for a GPU, whose steps may be shorter than one fetch takes."""


@dataclass(frozen=True)
class Batch:
    """Some samples, each in one view.

    Attributes:
        names: of the samples.
        views: number of each sample's view.
        pixels: (B, S, S, 3) uint8 at Hiera's input size; None where no one reads them.
        mask: (B, S, S) uint8, likewise; None for samples without one.
        dino_pixels: (B, S', S', 3) uint8 at DINOv2's input size, likewise.
        features: (B, H, W, C) stored features by name, computed in that view.
        turns: (B,) int64, `views` once more: on the device, where pixels and masks are flipped.
    """

    names: tuple[str, ...]
    views: tuple[int, ...]
    pixels: Tensor | None
    mask: Tensor | None
    dino_pixels: Tensor | None
    features: Mapping[str, Tensor]
    turns: Tensor

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        views: Sequence[int],
        *,
        pixels: Tensor | None = None,
        mask: Tensor | None = None,
        dino_pixels: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
    ) -> "Batch":
        """A batch on the CPU, not flipped yet."""
        return cls(tuple(names), tuple(views), pixels, mask, dino_pixels, features or {}, torch.tensor(views))

    @property
    def inputs(self) -> dict[str, Any]:
        """What the network's `forward` takes."""

        def values(pixels: Tensor | None) -> Tensor | None:
            return None if pixels is None else pixels.permute(0, 3, 1, 2)

        return {
            "pixel_values": values(self.pixels),
            "guide_values": values(self.dino_pixels),
            "features": self.features,
        }

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor, in a fixed order."""
        given = (self.pixels, self.mask, self.dino_pixels, *self.features.values(), self.turns)
        return [tensor for tensor in given if tensor is not None]

    def part(self, start: int, stop: int, view: int | None = None) -> "Batch":
        """Some of the samples of a batch of images; `view` puts all of them in another view."""
        names, views = self.names[start:stop], self.views[start:stop]
        cut = replace(self.mapped(lambda tensor: tensor[start:stop]), names=names, views=views)
        if view is None:
            return cut
        return replace(cut, views=(view,) * len(names), turns=torch.full_like(cut.turns, view))

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; from pinned memory without waiting for it."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same batch in memory from which a GPU copies by itself."""
        return self.mapped(lambda tensor: tensor.pin_memory())

    def flipped(self) -> "Batch":
        """Pixels and masks, read as identity, in the samples' views. Stored features are in them already.

        The flips always run, whatever the views: a captured GPU graph repeats what ran when it was captured.
        """
        images = (self.pixels, self.mask, self.dino_pixels)
        pixels, mask, dino_pixels = (None if image is None else flip(image, self.turns) for image in images)
        return replace(self, pixels=pixels, mask=mask, dino_pixels=dino_pixels)

    def used_by(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of tensors made on another stream until `stream` has passed this point."""
        for tensor in self.tensors:
            tensor.record_stream(stream)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor changed."""
        images = (self.pixels, self.mask, self.dino_pixels)
        pixels, mask, dino_pixels = (None if image is None else change(image) for image in images)
        return replace(
            self,
            pixels=pixels,
            mask=mask,
            dino_pixels=dino_pixels,
            features={name: change(tensor) for name, tensor in self.features.items()},
            turns=change(self.turns),
        )

    @property
    def soft_mask(self) -> Tensor:
        """(B, 1, S, S) float32 in [0, 1], soft edges kept."""
        if self.mask is None:
            raise RuntimeError("a loss was asked for of samples without masks")
        return self.mask.unsqueeze(1).float() / 255


BatchIndices = tuple[Sequence[str], Sequence[int]]
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
        reads: stored features that the run starts from (`ResumePoint.features`).
        masks: whether masks are read too.
    """

    def __init__(self, store: Store, names: Sequence[str], reads: Sequence[str], *, masks: bool = True) -> None:
        self.names = names
        self._manifest = store.manifest
        self._features = [name for name in reads if name != "pixels"]
        self._arrays = [*reads, *(["mask"] if masks else [])]
        self._reader = store.reader(self._arrays)

    def fetch(self, names: Sequence[str], views: Sequence[int]) -> Batch:
        """See `Samples.fetch`; every chunk's checksum is verified. Raises `DsuError` naming a damaged sample."""
        try:
            rows = [self._manifest.row(name) for name in names]
            found = self._reader.read(rows, {name: [view_index(name, view) for view in views] for name in self._arrays})
        except CorruptError as error:
            raise DsuError(
                f"{error}. Run `dsu cache verify`, then `dsu cache-features` again: it computes only what is damaged."
            ) from error
        tensors = {name: torch.from_numpy(array) for name, array in found.items()}
        features = {name: tensors[name] for name in self._features}
        return Batch.of(names, views, pixels=tensors.get("pixels"), mask=tensors.get("mask"), features=features)


class ImageSamples:
    """Samples decoded from their files.

    Args:
        pairs: images or tiles, each with its mask (None for samples without one).
        config: gives both input sizes.
        mask_format: how masks are read; None without masks.
        contents: name to what the sample is (`SampleMetadata.content`), which cached augmentations follow from.
        dino: whether DINOv2's input is wanted.
        workers: threads that decode; None: as many as there are cores, 4 to 16.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        config: DSUNetConfig,
        mask_format: MaskFormat | None,
        *,
        contents: Mapping[str, str],
        dino: bool = True,
        workers: int | None = None,
    ) -> None:
        self._pairs = {pair.name: pair for pair in pairs}
        self.names = sorted(self._pairs)
        self._sizes = (config.hiera_size, config.dino_size if dino else None)
        self._mask_format = mask_format
        self._contents = contents
        self._whole = LastUsed(self._read)
        self._pool = ThreadPoolExecutor(workers or min(16, max(4, os.cpu_count() or 1)), thread_name_prefix="decode")

    def fetch(self, names: Sequence[str], views: Sequence[int]) -> Batch:
        """See `Samples.fetch`. Raises `UnreadableImage`."""
        decoded = list(self._pool.map(self._decode, names, views))
        pixels, dino_pixels, masks = zip(*decoded, strict=True)
        return Batch.of(names, views, pixels=_stack(pixels), mask=_stack(masks), dino_pixels=_stack(dino_pixels))

    def _decode(self, name: str, view: int) -> tuple[np.ndarray | None, ...]:
        """Both sizes of an image and its mask, in the cached augmentation that `view` is a flip of."""
        image, mask = self._cut(self._pairs[name])
        if augmentation_of(view):
            image, mask = augmentation(self._contents[name], augmentation_of(view)).apply(image, mask)
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
        reads = self._mask_format is not None and mask is not None
        return read_image(image), self._mask_format.read(mask) if reads else None  # type: ignore[union-attr, arg-type]


def feed(samples: Samples, drawn: Iterable[BatchIndices], device: torch.device) -> Iterator[Batch]:
    """Batches in order on `device`, made in advance.

    For a GPU several threads fetch them into pinned memory, from which they are copied on a stream of their own while
    the step before computes.
    """
    if device.type != "cuda":
        yield from prefetch(partial(samples.fetch, *wanted) for wanted in drawn)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(names: Sequence[str], views: Sequence[int]) -> tuple[Batch, torch.cuda.Event]:
        pinned = samples.fetch(names, views).pinned()
        with torch.cuda.stream(copying):
            return pinned.to(device), copying.record_event()

    for batch, copied in prefetch((partial(upload, *wanted) for wanted in drawn), ahead=FETCHERS, workers=FETCHERS):
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copied)
        batch.used_by(computing)
        yield batch


def prefetch(work: Iterable[Callable[[], T]], ahead: int = 2, workers: int = 1) -> Iterator[T]:
    """Results of `work` in order, up to `ahead` of them made in advance by threads."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
    pending: deque[Future[T]] = deque()
    try:
        for task in work:
            pending.append(pool.submit(task))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _stack(arrays: Sequence[np.ndarray | None]) -> Tensor | None:
    present = [array for array in arrays if array is not None]
    if not present:
        return None
    if len(present) != len(arrays):
        raise DsuError("Some samples have a mask and some have none: complete the masks or leave them all away.")
    return torch.from_numpy(np.stack(present))
