"""Samples as torch data sets: the base class, and data sets decoded from image files.

For data sets from a store, see `dsu.features.feature_dataset`.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch.utils.data import Dataset

from dsu.batches import Batch
from dsu.config import DSUNetConfig, config_of
from dsu.data.datasets import Paths, SampleMetadata, Split, find_dataset, inspect, unpaired, unreadable
from dsu.data.decoding import DECODERS, Decoded, ImageProcessor, SampleFiles, augmentation, open_sample
from dsu.data.images import Depth
from dsu.data.masks import MaskFormat
from dsu.data.tiles import LastUsed
from dsu.data.views import UNFLIPPED, Views, augmentation_of, draw_view
from dsu.errors import DsuError, UsageError
from dsu.progress import few

if TYPE_CHECKING:
    from dsu.network.network import DSUNet

__all__ = ["ImageDataset", "PerProcess", "SampleDataset"]

T = TypeVar("T")


class SampleDataset(Dataset[dict[str, Any]]):
    """Samples in the views that training draws, as a torch data set.

    An item is a dict of what the network's `forward` takes of it, with its mask and name:

    * `pixel_values`, `guide_values`: (3, S, S) uint8 at Hiera's and DINOv2's input size, where they are read;
    * `features`: stored features by name, (H, W, C) each;
    * `mask`: (1, S, S) float32 in [0, 1], soft edges kept, where there are masks;
    * `name`.

    All of it is in the sample's view: which one is a pure function of seed, epoch and name. A `DataLoader` takes data
    sets as they are, with workers however started: each opens for itself what it reads from.

    Args:
        known: all samples, by name.
        names: those that are taken; None takes all.
        views: those that are drawn from: `none`, `width`, `flips`, `flips+3`, as `dsu train-head --views` takes them.
        seed: of the draws.

    Attributes:
        names, views, seed: as given.

    Raises `UsageError` for a name that is none, and `DsuError` where there is no sample.
    """

    def __init__(
        self, known: Mapping[str, Any], names: Iterable[str] | None, views: Views | str = UNFLIPPED, seed: int = 0
    ) -> None:
        try:
            self.views = Views.parse(views)
        except ValueError as error:
            raise UsageError(f"The views {error}.") from error
        self.names: Sequence[str] = list(known if names is None else names)
        self.seed = seed
        unknown = [name for name in self.names if names is not None and name not in known]
        if isinstance(names, str) or unknown:
            what, example = names if isinstance(names, str) else few(unknown), next(iter(known), "none")
            raise UsageError(f"There is no sample {what}: give a list of names without extension, such as {example!r}.")
        # Shared, so that workers that live on see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Draw the views of `epoch` (from 0) from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several items, read at once."""
        names, epoch = [self.names[index] for index in indices], int(self._epoch)
        return self.read(names, [draw_view(self.seed, epoch, name, self.views) for name in names]).items()

    @property
    def metadata(self) -> Mapping[str, SampleMetadata]:
        """What its samples are, by name."""
        raise NotImplementedError

    @property
    def described(self) -> dict[str, Any]:
        """Where its samples are from, as a head that was trained on them notes it."""
        return {}

    def read(self, names: Sequence[str], views: Sequence[int]) -> Batch:
        """The named samples, each for a view by number; pixels and masks not flipped yet, everything on the CPU."""
        raise NotImplementedError


class ImageDataset(SampleDataset):
    """Samples decoded from their files.

    Args:
        images: a folder of images and masks, laid out as `dsu cache-features` takes it (of a training and a test part
            the former), or a split that was found.
        model: the network that is to take them, or its config.
        metadata, mask_format, depth: what every sample is, how masks are read, and what is black and white in images of
            more than 8 bits, where that is known; every file is read once to find out otherwise.
        names: of the samples; None takes all.
        guide: whether DINOv2's input is wanted; None: where the network fuses it.
        views, seed: see `SampleDataset`.

    Example:
        >>> data = ImageDataset("tiles", model, views="flips")
        >>> batch = next(iter(DataLoader(data, batch_size=8, num_workers=2)))
        >>> model(batch["pixel_values"], batch["guide_values"]).logits          # (8, 1, 352, 352)
    """

    def __init__(
        self,
        images: Split | Path | str,
        model: "DSUNet | DSUNetConfig",
        *,
        metadata: Mapping[str, SampleMetadata] | None = None,
        mask_format: MaskFormat | None = None,
        depth: Depth | None = None,
        names: Iterable[str] | None = None,
        guide: bool | None = None,
        views: Views | str = UNFLIPPED,
        seed: int = 0,
    ) -> None:
        split = images if isinstance(images, Split) else find_dataset(images, Paths(Path()))[0]
        if metadata is None or mask_format is None:
            found = inspect(split)
            metadata, mask_format, depth = found.facts, found.mask_format, depth or found.depth
            for line in (*unreadable(found), *unpaired(split)):
                warnings.warn(line, stacklevel=2)
        if not metadata:
            raise DsuError(f"{split.images} has no readable image: give another folder.")
        super().__init__(metadata, names, views, seed)
        self.names = sorted(self.names)
        config = config_of(model)
        wants_guide = bool(config.injections) if guide is None else guide
        self._processor = ImageProcessor(config, wants_guide)
        self._pairs = {pair.name: pair for pair in split.pairs}
        self._metadata = {name: metadata[name] for name in self.names}
        self._files = PerProcess(partial(_Files, mask_format, depth))

    @property
    def metadata(self) -> Mapping[str, SampleMetadata]:
        """What its samples are, by name."""
        return self._metadata

    def read(self, names: Sequence[str], views: Sequence[int]) -> Batch:
        """See `SampleDataset.read`. Raises `UnreadableImage`, and `DsuError` for a file that has changed."""
        return Batch.decoded(names, list(self._files().pool.map(self._decode, names, views)), views)

    def _decode(self, name: str, view: int) -> Decoded:
        """An image and its mask, in the cached augmentation that `view` is a flip of."""
        pair, known, index = self._pairs[name], self._metadata[name], augmentation_of(view)
        files = SampleFiles(pair.image, known.image_sha256, pair.mask, known.mask_sha256)
        image, mask = self._files().open(files) if pair.box is None else self._files().last_opened(files)
        return self._processor.fit(image, mask, pair.box, augmentation(known.content, index) if index else None)


class _Files:
    """Threads that decode files, and the whole images that tiles were last cut from."""

    def __init__(self, mask_format: MaskFormat, depth: Depth | None) -> None:
        self.pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self.open = partial(open_sample, mask_format=mask_format, depth=depth)
        self.last_opened = LastUsed(self.open)


class PerProcess(Generic[T]):
    """A value that every process creates for itself, since threads and locks can't move between processes.

    Args:
        make: makes it. Called at once, and in each other process that a copy of this gets into.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._process, self._made = os.getpid(), make()

    def __call__(self) -> T:
        """What this process has made."""
        if self._process != os.getpid():  # forked since
            self._process, self._made = os.getpid(), self._make()
        return self._made

    def __reduce__(self) -> tuple[type["PerProcess[T]"], tuple[Callable[[], T]]]:
        return type(self), (self._make,)
