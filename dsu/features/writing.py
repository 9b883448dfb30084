"""Write the results of stage one with several threads, while it continues to compute."""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from dsu.data.views import view_index
from dsu.errors import DsuError
from dsu_cache import Store

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
        computed = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
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
    values = torch.empty((sum(map(len, parts)), *first.shape[1:]), dtype=first.dtype, pin_memory=True)
    stream = torch.cuda.Stream(first.device)  # type: ignore[no-untyped-call]
    stream.wait_event(computed)
    with torch.cuda.stream(stream):
        for part in parts:
            values[filled : filled + len(part)].copy_(part, non_blocking=True)
            filled += len(part)
    # Their memory may be reused only after the copy.
    stream.synchronize()
    return values


def _check_finite(name: str, tensor: Tensor, samples: Sequence[str]) -> None:
    # Minimum and maximum are NaN if any value is: twenty times as fast as testing every value.
    if not tensor.is_floating_point() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
        return
    sample = samples[int((~tensor.isfinite().flatten(1).all(1)).nonzero()[0])]
    raise DsuError(
        f"{name} of {sample} has values that are not finite as {str(tensor.dtype).removeprefix('torch.')}: store "
        f"float32 (--feature-dtype float32), or check the image and the encoder's weights."
    )
