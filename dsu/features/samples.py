"""Samples from a store, as a torch data set; and into one, by several threads, while stage one continues to compute."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dsu.batches import Batch, copying
from dsu.data.inspection import SampleMetadata
from dsu.data.views import FLIPPED_WHEN_READ, UNFLIPPED, Views, view_index
from dsu.datasets import PerProcess, SampleDataset
from dsu.errors import DsuError, UsageError
from dsu.features.stores import FeatureStore
from dsu.network.network import DSUNet
from dsu.network.resume import resume_point
from dsu_cache import CorruptError, Store, folder_of, is_store, url_of


class FeatureDataset(SampleDataset):
    """Stored features, pixels and masks of a split, in any order.

    Args:
        store: a store, its folder, or a split's folder that contains the store of the model's encoders.
        model: the network that will use the samples: it determines which features are read, and records the encoders
            for its head; or the names of the arrays to read.
        names: names of the samples to use; None uses all.
        masks: whether to read masks, if the store has any.
        views, seed: see `SampleDataset`.

    Raises `DsuError` if the store was made with other encoders, or lacks arrays in the views to draw.

    Example:
        >>> data = FeatureDataset("features/DUTS-TR", model, views="flips")
        >>> for epoch in range(50):
        ...     data.set_epoch(epoch)
        ...     for batch in DataLoader(data, batch_size=8, shuffle=True):
        ...         outputs = model(batch.get("pixel_values"), features=batch["features"])
    """

    def __init__(
        self,
        store: FeatureStore | Path | str,
        model: DSUNet | Collection[str],
        *,
        names: Sequence[str] | None = None,
        masks: bool = True,
        views: Views | str = UNFLIPPED,
        seed: int = 0,
    ) -> None:
        self.store = store if isinstance(store, FeatureStore) else _open_store(folder_of(store), model)
        super().__init__(self.store.manifest.entries, names, views, seed)
        reads = (
            _features_to_read(self.store, model, self.views)
            if isinstance(model, DSUNet)
            else _check_names(self.store, model)
        )
        self._arrays = [*reads, *(["mask"] if masks and "mask" in self.store.arrays else [])]
        # Opened at once: from here on, no process can remove the arrays.
        kept = {name: {view_index(name, view) for view in self.views.numbers} for name in self._arrays}
        self._reader = PerProcess(partial(self.store.reader, self._arrays, views=kept))

    @property
    def metadata(self) -> Mapping[str, SampleMetadata]:
        """Metadata of its samples, by name."""
        facts = self.store.metadata
        return {name: facts[name] for name in self.names}

    @property
    def described(self) -> dict[str, Any]:
        """Where its samples are from, and which of the store's are not among them."""
        return {**vars(self.store.source), "held_out": sorted(set(self.store.manifest.names).difference(self.names))}

    def read(self, names: Sequence[str], views: Sequence[int]) -> Batch:
        """See `SampleDataset.read`; every chunk's checksum is verified. Raises `DsuError` naming a damaged sample."""
        try:
            places = {name: [view_index(name, view) for view in views] for name in self._arrays}
            found = self._reader().read([self.store.manifest.row(name) for name in names], places)
        except CorruptError as error:
            raise DsuError(
                f"{error}. Run `dsu cache verify`, then {self.store.command()}: it recomputes only what is damaged."
            ) from error
        tensors = {name: torch.from_numpy(array) for name, array in found.items()}
        images = {name: tensors.pop(name) for name in FLIPPED_WHEN_READ if name in tensors}
        return Batch.of(names, views, features=tensors, **images)


def _exists(folder: Path) -> bool:
    return is_store(folder) if url_of(folder) is None else Store.exists(folder)


def _open_store(folder: Path, model: DSUNet | Collection[str]) -> FeatureStore:
    if not _exists(folder) and isinstance(model, DSUNet):
        folder /= model.config.encoders_name
    if not _exists(folder):
        raise UsageError(f"There is no store at {folder}: run `dsu cache-features` first, or give a store folder.")
    return FeatureStore.open(folder)


def _check_names(store: FeatureStore, names: Collection[str]) -> Collection[str]:
    if isinstance(names, str) or not isinstance(names, Collection):
        raise UsageError(f"A data set can't be read for {names!r}: give the model, or a list of arrays.")
    for name in names:
        store.stored(name)
    return names


def _features_to_read(store: FeatureStore, model: DSUNet, views: Views) -> tuple[str, ...]:
    """The model's resume point, given the store's features; records the store's encoders in the model."""
    stored = store.config
    if any(
        getattr(stored, part) != getattr(model.config, part) for part in ("hiera", "dino", "hiera_size", "dino_size")
    ):
        raise UsageError(
            f"The store {store.path} was made with {stored.encoders_name}, but the model has "
            f"{model.config.encoders_name}: create the model with the same encoders and sizes, or give another store."
        )
    differing = [name for name, digest in model.encoder_digests.items() if store.encoders.get(name, digest) != digest]
    if differing:
        raise UsageError(
            f"The features in {store.path} were made with other weights of {' and '.join(differing)} than the "
            "model's: give the model the same weights, or store its features in another --cache-root."
        )
    store.check_views(views)
    model.encoder_digests = {**store.encoders, **model.encoder_digests}
    model.encoder_batch_size = model.encoder_batch_size or store.encoder_batch_size
    return resume_point(model.config, store.available(views)).features


# ---- writing ----

WRITERS: Final = 4
"""Number of writing threads: while some wait for the disk, others encode."""
PENDING_BYTES: Final = 512 << 20
"""Bytes that may be computed but not yet written: more than the arrays of one view, little compared with the
encoders."""


class Writer:
    """Passes shards to writing threads; created by `writing`.

    Args:
        store: the target.
        pool: the threads.
    """

    def __init__(self, store: Store, pool: ThreadPoolExecutor) -> None:
        self._store = store
        self._pool = pool
        self._pending: dict[Future[None], int] = {}

    def put(self, name: str, view: int, shard: int, samples: Sequence[str], parts: list[Tensor]) -> None:
        """Queue a shard of array `name` for writing; wait while too much is pending.

        Args:
            samples: names of the shard's samples, one per row.
            parts: consecutive parts, (rows, *item) each; a GPU may still be computing them. The list is emptied.

        Raises `DsuError` for this or an earlier shard: see `Writer.wait`.
        """
        nbytes = sum(part.nbytes for part in parts)
        device = parts[0].device
        computed = _record_event(device) if device.type == "cuda" else None
        self._pending[self._pool.submit(self._write, name, view, shard, samples, parts, computed)] = nbytes
        self.wait(PENDING_BYTES)

    def wait(self, pending_bytes: int = 0) -> None:
        """Wait until at most this many bytes are pending.

        Raises `DsuError` naming the sample if a value is not finite or does not fit the stored type, or naming the
        folder if it can't be written.
        """
        while True:
            for future in [future for future in self._pending if future.done()]:
                del self._pending[future]
                future.result()
            if sum(self._pending.values()) <= pending_bytes:
                return
            wait(self._pending, return_when=FIRST_COMPLETED)

    def _write(
        self,
        name: str,
        view: int,
        shard: int,
        samples: Sequence[str],
        parts: list[Tensor],
        computed: torch.cuda.Event | None,
    ) -> None:
        values = torch.cat(parts) if computed is None else _fetch(parts, computed)
        parts.clear()  # The future keeps its arguments until it is done.
        _check_finite(name, values, samples)
        try:
            self._store.write_shard(
                name, view_index(name, view), shard, self._store.rows_in_shard(shard), values.numpy()
            )
        except OSError as error:
            raise DsuError(
                f"The features can't be written to {self._store.path} ({error.strerror or error}): free some space "
                "or fix the folder, and run the same command again; finished work is kept."
            ) from error


@contextmanager
def writing(store: Store) -> Iterator[Writer]:
    """Yield a `Writer`; on exit, wait until everything is written, or after an error drop what has not begun."""
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="write") as pool:
        writer = Writer(store, pool)
        try:
            yield writer
            writer.wait()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch(parts: Sequence[Tensor], computed: torch.cuda.Event) -> Tensor:
    """All parts in memory, copied from a GPU on a separate stream while it computes the next ones."""
    first, filled = parts[0], 0
    values = _host_memory((sum(map(len, parts)), *first.shape[1:]), first.dtype)
    computed.synchronize()  # on the host: a stream that waits would delay the copies of other threads too
    with copying(first.device):
        for part in parts:
            values[filled : filled + len(part)].copy_(part, non_blocking=True)
            filled += len(part)
        copied = _record_event(first.device)
    copied.synchronize()  # before the parts' memory is reused
    return values


def _host_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Pinned memory, to which a GPU copies asynchronously; ordinary memory if that is exhausted, as in WSL."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(shape, dtype=dtype)


def _record_event(device: torch.device) -> torch.cuda.Event:
    """An event on the current stream; threads that wait for it leave the processor to others."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _check_finite(name: str, tensor: Tensor, samples: Sequence[str]) -> None:
    # Minimum and maximum are NaN if any value is: twenty times as fast as testing every value.
    if not tensor.is_floating_point() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
        return
    sample = samples[int((~tensor.isfinite().flatten(1).all(1)).nonzero()[0])]
    raise DsuError(
        f"{name} of {sample} has values that are not finite as {str(tensor.dtype).removeprefix('torch.')}: store "
        f"float32 (--feature-dtype float32), or check the image and the encoder's weights."
    )
