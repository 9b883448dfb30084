"""Writing what stage one has computed: by several threads, while it computes on."""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from dsu.data.views import view_index
from dsu.errors import DsuError
from dsu_cache import Store

__all__ = ["WRITERS", "Writer", "writing"]

WRITERS: Final = 4
"""Threads that write: while some wait for the disk, others encode."""
PENDING_BYTES: Final = 512 << 20
"""What may be computed and not yet written: more than the arrays of one view, little beside the encoders."""


class Writer:
    """Hands shards over to threads that write them; made by `writing`.

    Args:
        store: where they go.
        pool: the threads.
    """

    def __init__(self, store: Store, pool: ThreadPoolExecutor) -> None:
        self._store = store
        self._pool = pool
        self._pending: dict[Future[None], int] = {}

    def put(self, name: str, view: int, shard: int, samples: Sequence[str], parts: list[Tensor]) -> None:
        """Let a shard of array `name` be written, and wait while too much is pending.

        Args:
            samples: names of the shard's samples, one a row.
            parts: (rows, *item) of some of them each, in order; may still be being computed by a GPU. Emptied.

        Raises `DsuError` for this or an earlier shard: see `Writer.wait`.
        """
        nbytes = sum(part.nbytes for part in parts)
        device = parts[0].device
        computed = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self._pending[self._pool.submit(self._write, name, view, shard, samples, parts, computed)] = nbytes
        self.wait(PENDING_BYTES)

    def wait(self, pending_bytes: int = 0) -> None:
        """Wait until no more than that is pending.

        Raises `DsuError` naming the sample when a value is not finite or does not fit the stored type, or the folder
        when it can't be written to.
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
        values = torch.cat(parts) if computed is None else _fetched(parts, computed)
        parts.clear()  # The future keeps its arguments until it is done.
        _check_finite(name, values, samples)
        try:
            self._store.write_shard(
                name, view_index(name, view), shard, self._store.rows_in_shard(shard), values.numpy()
            )
        except OSError as error:
            raise DsuError(
                f"The features can't be written to {self._store.path} ({error.strerror or error}): free some space "
                f"or mend the folder and run the same command again; what is finished stays finished."
            ) from error


@contextmanager
def writing(store: Store) -> Iterator[Writer]:
    """A `Writer` inside a `with`; leaving it waits until all is written, or drops what is not begun after an error."""
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="write") as pool:
        writer = Writer(store, pool)
        try:
            yield writer
            writer.wait()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetched(parts: Sequence[Tensor], computed: torch.cuda.Event) -> Tensor:
    """All parts in memory, copied from a GPU on a stream of their own, while it computes what comes next."""
    first, filled = parts[0], 0
    values = torch.empty((sum(map(len, parts)), *first.shape[1:]), dtype=first.dtype, pin_memory=True)
    stream = torch.cuda.Stream(first.device)  # type: ignore[no-untyped-call]
    stream.wait_event(computed)
    with torch.cuda.stream(stream):
        for part in parts:
            values[filled : filled + len(part)].copy_(part, non_blocking=True)
            filled += len(part)
    # Only then may their memory be used again.
    stream.synchronize()
    return values


def _check_finite(name: str, tensor: Tensor, samples: Sequence[str]) -> None:
    # Both extremes are NaN where any value is: twenty times as fast as to ask of every value.
    if not tensor.is_floating_point() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
        return
    sample = samples[int((~tensor.isfinite().flatten(1).all(1)).nonzero()[0])]
    raise DsuError(
        f"{name} of {sample} has values that are not finite as {str(tensor.dtype).removeprefix('torch.')}: store "
        f"float32 (--feature-dtype float32), or check the image and the encoder's weights."
    )
