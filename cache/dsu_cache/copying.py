"""Copy a store between a folder and S3, in either direction; copies only what is missing."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

from dsu_cache.arrays import ShardId
from dsu_cache.store import Store

TRANSFERS: Final = 8
"""Number of shards copied in parallel."""


def missing_shards(source: Store, target: Store) -> list[tuple[str, ShardId, int]]:
    """The intact shards of `source` that `target`, with the same arrays, lacks: array, shard and size in bytes."""
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
    """Copy a store's content to a folder, or to the S3 store that the folder mirrors; return the copy.

    Existing shards are not copied again, so an interrupted copy can be continued. Metadata is copied first, byte for
    byte; each shard is verified against its SHA-256 before it is written. The copy has the source's samples.

    Args:
        source: an open store.
        folder: the copy's folder, existing or not.
        before: called with the number of shards and bytes to copy; returns a function that is called with the size of
            each copied shard.

    Raises:
        CacheError: the folder contains another store, newer samples, or arrays made with other settings.
        CorruptError: a shard of the source is damaged; all others have been copied.
        BusyError: another process is writing to either store.
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
