"""Torch data sets of samples: the base class, and data sets decoded from image files.

For data sets from a store, see `dsu.features.samples`.
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
from dsu.data.datasets import Paths, find_dataset
from dsu.data.decoding import DECODERS, Decoded, ImageProcessor, SampleFiles, augmentation, open_sample
from dsu.data.images import Depth
from dsu.data.inspection import SampleMetadata, inspect, unpaired, unreadable
from dsu.data.masks import MaskFormat
from dsu.data.pairing import Split
from dsu.data.tiles import cached
from dsu.data.views import UNFLIPPED, Views, augmentation_of, draw_view
from dsu.errors import DsuError, UsageError
from dsu.progress import few

if TYPE_CHECKING:
    from dsu.network.network import DSUNet

T = TypeVar("T")


class SampleDataset(Dataset[dict[str, Any]]):
    """A torch data set of samples in randomly drawn views.

    An item is a dict with the arguments of the network's `forward`, the mask and the name:

    * `pixel_values`, `guide_values`: (3, S, S) uint8 at Hiera's and DINOv2's input size, if they are needed;
    * `features`: stored features by name, (H, W, C) each;
    * `mask`: (1, S, S) float32 in [0, 1] with soft edges, if there are masks;
    * `name`.

    All of them are in the same view, a pure function of seed, epoch and name. A `DataLoader` can use these data sets
    with any kind of worker processes: each process opens its own files.

    Args:
        known: all samples, by name.
        names: the samples to use; None: all.
        views: the views to draw from: `none`, `width`, `flips` or `flips+3`, as for `dsu train-head --views`.
        seed: seed of the draws.

    Attributes:
        names, views, seed: as given.

    Raises `UsageError` for an unknown name or invalid views.
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
        # In shared memory: persistent workers see changes.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Draw the views of `epoch` (from 0) from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several items, read as one batch."""
        names, epoch = [self.names[index] for index in indices], int(self._epoch)
        return self.read(names, [draw_view(self.seed, epoch, name, self.views) for name in names]).items()

    @property
    def metadata(self) -> Mapping[str, SampleMetadata]:
        """Metadata of its samples, by name."""
        raise NotImplementedError

    @property
    def described(self) -> dict[str, Any]:
        """The origin of its samples, in the format of a head's info."""
        return {}

    def read(self, names: Sequence[str], views: Sequence[int]) -> Batch:
        """Read named samples in numbered views, on the CPU; pixels and masks are not flipped yet."""
        raise NotImplementedError


class ImageDataset(SampleDataset):
    """Samples decoded from their files.

    Args:
        images: a folder of images and masks in a layout that `dsu cache-features` knows (if it has a training and a
            test split, the former is used), or a split.
        model: the network to decode for, or its config.
        metadata, mask_format, depth: if known: the samples' metadata, how to read masks, and the black and white values
            of images with more than 8 bits. Otherwise every file is read once to find them.
        names: the samples to use; None: all.
        guide: whether to include DINOv2's input; None: if the network uses DINOv2.
        views, seed: see `SampleDataset`.

    Raises `UsageError` as `SampleDataset`, and `DsuError` if there is no readable image.

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
        """Metadata of its samples, by name."""
        return self._metadata

    def read(self, names: Sequence[str], views: Sequence[int]) -> Batch:
        """See `SampleDataset.read`. Raises `UnreadableImage`, and `DsuError` for a file that has changed."""
        return Batch.decoded(names, list(self._files().pool.map(self._decode, names, views)), views)

    def _decode(self, name: str, view: int) -> Decoded:
        """Decode an image and its mask, with the cached augmentation of `view`, unflipped."""
        pair, known, index = self._pairs[name], self._metadata[name], augmentation_of(view)
        files = SampleFiles(pair.image, known.image_sha256, pair.mask, known.mask_sha256)
        image, mask = self._files().open(files) if pair.box is None else self._files().last_opened(files)
        return self._processor.fit(image, mask, pair.box, augmentation(known.content, index) if index else None)


class _Files:
    """A pool of decoding threads, and a cache of the last opened images, from which tiles are cut."""

    def __init__(self, mask_format: MaskFormat, depth: Depth | None) -> None:
        self.pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self.open = partial(open_sample, mask_format=mask_format, depth=depth)
        self.last_opened = cached(self.open)


class PerProcess(Generic[T]):
    """A value that each process creates for itself, since threads and locks can't move between processes.

    Args:
        make: creates the value. It is called immediately, and once in every other process that uses a copy.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._process, self._made = os.getpid(), make()

    def __call__(self) -> T:
        """This process's value."""
        if self._process != os.getpid():  # forked
            self._process, self._made = os.getpid(), self._make()
        return self._made

    def __reduce__(self) -> tuple[type["PerProcess[T]"], tuple[Callable[[], T]]]:
        return type(self), (self._make,)
