"""Audit a store: verify every byte of every file against its checksum."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dsu_cache.arrays import RESERVED, Commit, ShardId, StoredArray, packed
from dsu_cache.columns import load_tables
from dsu_cache.files import METADATA, CorruptError, read_metadata, read_record
from dsu_cache.manifest import damage, generations
from dsu_cache.remote import RemoteArray
from dsu_cache.store import Store


@dataclass(frozen=True)
class Damage:
    """Damage found in a store: something that differs from what was written.

    Args:
        file: the file, below the store's folder.
        reason: what is wrong with it.
        array: the array that it belongs to, if any.
        shard: the shard, if the file is its data or marker.
        samples: names of the samples in use that are lost with it.
        unreadable: those among them whose own chunks are damaged, as far as known.
        commit: the shard's marker as read, if it is intact; the finding refutes it.
    """

    file: Path
    reason: str
    array: str | None = None
    shard: ShardId | None = None
    samples: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    commit: Commit | None = None

    def __str__(self) -> str:
        return f"{self.file} {self.reason}"


def audit(store: Store, advance: Callable[[int], None] = lambda count: None, workers: int = 4) -> list[Damage]:
    """Read all files of a store except its locks; return what is damaged or missing.

    A view of an array counts as stored if it has any file, and must then be complete.

    Args:
        store: an open store; opening it has checked its metadata and newest manifest.
        advance: called with the size of each file read.
        workers: number of files read in parallel.
    """
    findings = [*_audit_metadata(store)]
    shards = [(name, shard) for name in store.arrays for shard in _expected_shards(store, name)]
    with ThreadPoolExecutor(workers, thread_name_prefix="audit") as pool:
        try:
            for nbytes, finding in pool.map(lambda which: _audit_shard(store, *which), shards):
                advance(nbytes)
                if finding is not None:
                    findings.append(finding)
        except BaseException:
            # So that an interrupted user does not wait for the rest.
            pool.shutdown(cancel_futures=True)
            raise
    return findings


def audited_nbytes(store: Store) -> int:
    """Return the number of bytes of shards that `audit` reads."""
    return sum(store.stored(name).nbytes(shard) or 0 for name in store.arrays for shard in store.stored(name).shards())


def discard_refuted(store: Store, findings: list[Damage]) -> list[Damage]:
    """Remove the markers of damaged shards, so that they count as missing. Their data stays on disk.

    A shard that was rewritten since it was examined keeps its marker.

    Returns:
        The findings whose shard no longer has a marker.

    Raises:
        BusyError: another process is writing to the store.
    """
    refuted = [finding for finding in findings if finding.commit is not None]
    discarded = []
    if refuted:
        with store.lock():
            for finding in refuted:
                assert finding.array is not None
                assert finding.shard is not None
                stored = store.stored(finding.array)
                if stored.commit(finding.shard) == finding.commit:
                    stored.discard(finding.shard)
                    discarded.append(finding)
    return discarded


def orphans(store: Store) -> int:
    """Return the number of rows that are written in any array but no longer in use."""
    shards, counts = np.unique(store.manifest.rows_in_use // store.rows_per_shard, return_counts=True)
    full = set(shards[counts == store.rows_per_shard].tolist())
    commits = (item for name in store.arrays for item in store.stored(name).committed().items())
    others = ((shard.shard, commit.rows) for shard, commit in commits if shard.shard not in full)
    return len({row for shard, rows in others for row in set(rows).difference(store.rows_in_shard(shard).tolist())})


def _audit_metadata(store: Store) -> Iterator[Damage]:
    if store.remote is not None:
        yield from (Damage(Path(key), reason) for key, reason in store.remote.damage())
    for name in RESERVED:
        try:
            read_metadata(store.path / name)
        except CorruptError as error:
            yield _metadata_damage(store, name, str(error))
    for name, reason in store.damaged.items():
        yield replace(_metadata_damage(store, name, reason), array=name, samples=store.manifest.names)
    for path in (path for name in store.arrays for path in packed(store.stored(name).commits)):
        try:
            load_tables(path)
        except CorruptError:
            yield Damage(path.relative_to(store.path), "is damaged, so the shards that it marks count as missing")
    for path in generations(store.path / "manifest"):
        reason = damage(path)
        if reason:
            yield Damage(path.relative_to(store.path), f"{reason}, so an older manifest is used")


def _metadata_damage(store: Store, folder: str, reason: str) -> Damage:
    return Damage(Path(folder) / METADATA, reason.removeprefix(f"{store.path / folder / METADATA} "))


def _expected_shards(store: Store, name: str) -> list[ShardId]:
    """Shards with any file, and those missing in stored views."""
    found = store.stored(name).shards()
    views = sorted({shard.view for shard in found if shard.view < store.arrays[name].views})
    return sorted(found | set(store.missing(name, views)))


def _audit_shard(store: Store, name: str, shard: ShardId) -> tuple[int, Damage | None]:
    """The number of bytes read of a shard, and the damage found, if any."""
    stored, rows = store.stored(name), store.rows_in_shard(shard.shard).tolist()
    file, commit, unreadable = stored.file(shard), stored.commit(shard), []
    size = stored.nbytes(shard)
    nbytes = size or 0 if commit is not None else 0
    if commit is None:
        # Without rows in use, it is never read or written again.
        reason = _reason_uncommitted(stored, shard) if rows else ""
    elif size is None:
        reason = "is missing"
    elif not stored.is_intact(shard, commit):
        differs = f"has {nbytes:,} bytes instead of {commit.nbytes:,}"
        reason = differs if nbytes != commit.nbytes else "does not contain the bytes that were written"
        unreadable = _unreadable_rows(store, name, rows, shard.view)
    elif not set(commit.rows).issuperset(rows):
        reason, commit = "lacks some of its rows", None
    else:
        reason = ""
    if not reason:
        return nbytes, None
    samples, unread = store.manifest.names_at(*rows), store.manifest.names_at(*unreadable)
    return nbytes, Damage(file.relative_to(store.path), reason, name, shard, samples, unread, commit)


def _reason_uncommitted(stored: StoredArray, shard: ShardId) -> str:
    if stored.marker(shard).exists() and read_record(stored.marker(shard)) is None:
        return "has a damaged marker"
    is_there = stored.file(shard).is_file()
    return "was not finished, or its marker is missing" if is_there else "is not written yet, or was deleted"


def _unreadable_rows(store: Store, name: str, rows: list[int], view: int) -> list[int]:
    reader, found = store.reader([name], keep_open=False), []
    for row in rows:
        try:
            reader.read([row], [view])
        except CorruptError:
            found.append(row)
    reader.close()
    return found


def orphaned_objects(store: Store) -> tuple[int, int]:
    """Return the number and total size of unreferenced objects of a store on S3; zero for a store in a folder."""
    if store.remote is None:
        return 0, 0
    arrays = [array for name in store.arrays if isinstance(array := store.stored(name), RemoteArray)]
    return store.remote.orphans(arrays)
