"""Copying a store: between a folder and S3, either way, and only what is missing there."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

from dsu_cache.arrays import ShardId
from dsu_cache.store import Store

TRANSFERS: Final = 8
"""Shards that are copied at a time."""


def missing_shards(source: Store, target: Store) -> list[tuple[str, ShardId, int]]:
    """The whole shards of `source` that `target`, which has its arrays, lacks: array, shard and bytes."""
    found = []
    for name in source.arrays:
        stored, there = source.stored(name), target.stored(name)
        there.refresh()
        for shard in sorted(stored.shards()):
            commit = stored.commit(shard)
            if commit is not None and shard.view < stored.info.views and not there.holds(shard, np.array(commit.rows)):
                found.append((name, shard, commit.nbytes))
    return found


def copy_store(source: Store, folder: Path, before: Callable[[int, int], Callable[[int], None]]) -> Store:
    """Bring what a store holds to a folder, or to what a folder is the mirror of; return the store there.

    What is there already stays, and is not copied again: an interrupted copy goes on where it was. Metadata goes
    first, byte for byte; each shard's bytes are compared with their sha256 before they are written. Of samples, the
    source's are the copy's.

    Args:
        source: as opened.
        folder: where the copy is, or is going to be.
        before: told how many shards and bytes are going to be copied; what it returns is told the bytes of each.

    Raises:
        CacheError: what is there is another store, or has newer samples, or arrays that were made otherwise.
        CorruptError: a shard of the source is damaged; all others have been copied.
        BusyError: another process writes to either.
    """
    source.check_readable()
    if Store.exists(folder):
        target = Store.open(folder)
    else:
        target = Store.create(folder, source.attributes, source.rows_per_shard, source.compressor)
    with source.kept(), target.lock():
        target.take_metadata(source)
        todo = missing_shards(source, target)
        advance = before(len(todo), sum(nbytes for _, _, nbytes in todo))

        def copy(name: str, shard: ShardId, nbytes: int) -> None:
            commit = source.stored(name).commit(shard)
            if commit is not None:
                target.stored(name).restore(shard, commit, source.stored(name).content(shard))
                advance(nbytes)

        with ThreadPoolExecutor(TRANSFERS, thread_name_prefix="copy") as pool:
            futures = [pool.submit(copy, *one) for one in todo]
            try:
                errors = [error for future in futures if (error := future.exception()) is not None]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    if errors:
        raise errors[0]
    return target
