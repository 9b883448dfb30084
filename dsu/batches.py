"""Batches, prefetched and moved to the device.

A `Batch` contains the input of the network's `forward`: images, or stored features instead. A `SampleDataset` reads
whole batches, `feed` moves them to the device, and flips run there. A `DataLoader` can use the same data sets, but it
reads single samples, flips them on the CPU and collates them, which costs more than reading. Measured on two busy cores
of an AMD EPYC with batches of 8 (pixels, mask and V, files in the page cache): `feed` gave 13,000 samples/s for the toy
and 5,700 for `large`; a `DataLoader` 1,500 and 590 without workers, 1,400 and 450 with two.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch import Tensor

from dsu.data.decoding import Decoded, stack
from dsu.data.views import flip, flip_one
from dsu.distributed import ALONE, World

if TYPE_CHECKING:
    from dsu.datasets import SampleDataset

T = TypeVar("T")

READERS: Final = 4
"""Threads that read batches for a GPU: its steps may be shorter than one read."""


@dataclass(frozen=True)
class Batch:
    """A batch of samples, each in one view.

    Attributes:
        names: the samples' names.
        views: (B,) int64, the number of each sample's view; a tensor, since images are flipped on the device.
        images: unflipped images by name, if they exist and are needed: `pixels` (B, S, S, 3) uint8 and `mask`
            (B, S, S) uint8 at Hiera's input size, `dino_pixels` (B, S', S', 3) uint8 at DINOv2's.
        features: stored features by name, (B, H, W, C), computed in the samples' views.
        share: (2,) float64 if processes divide the batch: the number of samples here that count (0 for a placeholder,
            see `_read_part`), and the number in the whole batch.
        whole: the number of samples in the whole batch if processes divide it.
    """

    names: tuple[str, ...]
    views: Tensor
    images: Mapping[str, Tensor]
    features: Mapping[str, Tensor]
    share: Tensor | None = None
    whole: int | None = None

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        views: Sequence[int] | Tensor,
        *,
        features: Mapping[str, Tensor] | None = None,
        **images: Tensor | None,
    ) -> "Batch":
        """A batch on the CPU with unflipped images; those that are None are left out."""
        given = {name: image for name, image in images.items() if image is not None}
        return cls(tuple(names), torch.as_tensor(views), given, features or {})

    @classmethod
    def decoded(cls, names: Sequence[str], images: Sequence[Decoded], views: Sequence[int] | None = None) -> "Batch":
        """A batch of decoded images; without `views`, all are in the unflipped view."""
        return cls.of(
            names,
            [0] * len(names) if views is None else views,
            pixels=stack([one.pixels for one in images]),
            mask=stack([one.mask for one in images]),
            dino_pixels=stack([one.guide_pixels for one in images]),
        )

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of the network's `forward`."""
        values = {name: image.permute(0, 3, 1, 2) for name, image in self.images.items() if name != "mask"}
        return {
            "pixel_values": values.get("pixels"),
            "guide_values": values.get("dino_pixels"),
            "features": self.features,
        }

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor, in a fixed order."""
        share = [] if self.share is None else [self.share]
        return [*self.images.values(), *self.features.values(), self.views, *share]

    def part(self, start: int, stop: int, view: int | None = None) -> "Batch":
        """Samples `start` to `stop` of an undivided batch; `view` replaces the view of all (for images only)."""
        cut = replace(self.mapped(lambda tensor: tensor[start:stop]), names=self.names[start:stop])
        return cut if view is None else replace(cut, views=torch.full_like(cut.views, view))

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; copies from pinned memory are asynchronous."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned_for(self, device: torch.device) -> "Batch":
        """The same batch; for a GPU in pinned memory, from which it copies asynchronously, unless that is exhausted."""
        if device.type != "cuda":
            return self
        try:
            return self.mapped(lambda tensor: tensor.pin_memory())
        except RuntimeError:  # WSL has little of it
            return self

    def padded(self, size: int) -> "Batch":
        """An undivided batch of at least `size` samples: the last one is repeated, without a name."""
        lacking = size - len(self.names)
        return self if lacking <= 0 else self.mapped(lambda t: torch.cat([t, t[-1:].expand(lacking, *t.shape[1:])]))

    def flipped(self) -> "Batch":
        """The batch with its images flipped to the samples' views; stored features already have them.

        The flips always run, for any views: a captured GPU graph repeats the operations of its capture.
        """
        return replace(self, images={name: flip(image, self.views) for name, image in self.images.items()})

    def used_by(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of tensors from another stream until `stream` has passed this point."""
        for tensor in self.tensors:
            tensor.record_stream(stream)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with `change` applied to every tensor."""
        images = {name: change(image) for name, image in self.images.items()}
        features = {name: change(feature) for name, feature in self.features.items()}
        share = None if self.share is None else change(self.share)
        return replace(self, views=change(self.views), images=images, features=features, share=share)

    @property
    def soft_mask(self) -> Tensor:
        """The masks, (B, 1, S, S) float32 in [0, 1], with soft edges."""
        if "mask" not in self.images:
            raise RuntimeError("a loss needs samples with masks")
        return self.images["mask"].unsqueeze(1).float() / 255

    def items(self) -> list[dict[str, Any]]:
        """The samples as single items, flipped to their views: see `SampleDataset`."""
        found: list[dict[str, Any]] = []
        for index, (name, view) in enumerate(zip(self.names, self.views.tolist(), strict=True)):
            images = {kind: flip_one(image[index], view) for kind, image in self.images.items()}
            item = {"name": name, "features": {feature: values[index] for feature, values in self.features.items()}}
            if "mask" in images:
                item["mask"] = images.pop("mask").unsqueeze(0).float() / 255
            keys = {"pixels": "pixel_values", "dino_pixels": "guide_values"}
            found.append(item | {keys[kind]: image.permute(2, 0, 1) for kind, image in images.items()})
        return found


BatchIndices = tuple[Sequence[str], Sequence[int]]
"""A batch that is not read yet: names, and the number of each sample's view."""


def feed(
    samples: "SampleDataset", batch_indices: Iterable[BatchIndices], device: torch.device, world: World = ALONE
) -> Iterator[Batch]:
    """Yield batches in order on `device`, read in advance; if processes divide batches, only this process's parts.

    For a GPU, several threads read into pinned memory, and a separate stream copies while the previous step computes.
    """
    read = partial(_read_part, samples, world) if world.connected else samples.read
    if device.type != "cuda":
        yield from prefetch(partial(read, *indices) for indices in batch_indices)
        return

    def upload(names: Sequence[str], views: Sequence[int]) -> tuple[Batch, torch.cuda.Event]:
        pinned = read(names, views).pinned_for(device)
        with copying(device) as stream:
            return pinned.to(device), stream.record_event()

    for batch, copied in prefetch(
        (partial(upload, *indices) for indices in batch_indices), ahead=READERS, workers=READERS
    ):
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copied)
        batch.used_by(computing)
        yield batch


@contextmanager
def copying(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Inside this context, the calling thread copies on a GPU's only stream for copies.

    Streams come from a small pool: creating further ones would soon return that of the computation.
    """
    if device.index is not None:
        torch.cuda.set_device(device)  # a new thread starts with the first GPU, and would use memory there
    with torch.cuda.stream(stream := _copy_stream(device)):
        yield stream


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _read_part(samples: "SampleDataset", world: World, names: Sequence[str], views: Sequence[int]) -> Batch:
    """A process's part of a batch. If it is empty, one placeholder sample without weight, since all processes must take
    part in the step's exchanges."""
    part = world.part(len(names))
    count = part.stop - part.start
    part = part if count else slice(0, 1)
    share = torch.tensor([count, len(names)], dtype=torch.float64)
    return replace(samples.read(names[part], views[part]), share=share, whole=len(names))


def prefetch(work: Iterable[Callable[[], T]], ahead: int = 2, workers: int = 1) -> Iterator[T]:
    """Yield the results of `work` in order; threads compute up to `ahead` of them in advance."""
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
