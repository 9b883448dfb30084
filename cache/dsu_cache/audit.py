"""Auditing a store: every byte of every file against the checksum that it was written with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dsu_cache.arrays import RESERVED
from dsu_cache.commits import Commit, ShardId, read_commit
from dsu_cache.errors import BusyError, CorruptError
from dsu_cache.locks import holder
from dsu_cache.manifest import torn
from dsu_cache.metadata import METADATA, read_metadata
from dsu_cache.store import Store


def check_readable(store: Store) -> None:
    """Check what chunks' checksums do not cover, before anything is read.

    Raises:
        BusyError: another process is writing to the store; names it.
        CorruptError: metadata is damaged or missing; names the file.
    """
    writer = holder(store.path / "manifest" / "lock")
    if writer is not None:
        raise BusyError(f"the store {store.path} is being written by {writer}: wait until it ends, or stop it")
    for folder in (store.path, *(store.path / name for name in RESERVED)):
        read_metadata(folder)
    for reason in store.damaged.values():
        raise CorruptError(reason)


@dataclass(frozen=True)
class Finding:
    """Something in a store that is not as it was written.

    Args:
        file: the file, below the store's folder.
        reason: what is wrong with it.
        array: the array that it belongs to, if to any.
        shard: the shard, where it is one's data or marker.
        samples: the samples in use that are lost with it, by name.
        unreadable: those among them whose own chunks are damaged, as far as that can be told.
        commit: the shard's marker as it was read, where there is a whole one: what finding this out refutes.
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


def audit(store: Store, advance: Callable[[int], None] = lambda count: None, workers: int = 4) -> list[Finding]:
    """Read all files of a store but its locks, and return what is not as it was written, or is missing.

    A view of an array counts as stored once it has any file, and has to be whole then.

    Args:
        store: as opened; its own metadata and newest manifest were checked by that.
        advance: told the bytes of each file read.
        workers: how many files are read at a time.
    """
    findings = [*_metadata(store)]
    shards = [(name, shard) for name in store.arrays for shard in _expected(store, name)]
    with ThreadPoolExecutor(workers, thread_name_prefix="audit") as pool:
        try:
            for name, shard, nbytes, reason, commit in pool.map(lambda which: _examine(store, *which), shards):
                advance(nbytes)
                if reason:
                    findings.append(_finding(store, name, shard, reason, commit))
        except BaseException:
            # So that who interrupts it does not wait for the rest.
            pool.shutdown(cancel_futures=True)
            raise
    return findings


def audited_nbytes(store: Store) -> int:
    """Return the bytes that `audit` reads of shards."""
    files = [store.stored(name).file(shard) for name in store.arrays for shard in store.stored(name).shards()]
    return sum(file.stat().st_size for file in files if file.is_file())


def discard_refuted(store: Store, findings: list[Finding]) -> list[Finding]:
    """Remove the markers of damaged shards, so that they count as missing; their data is left where it is.

    A shard that was written anew since it was examined keeps its marker.

    Returns:
        The findings that no longer have a marker.

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
                if read_commit(stored.commits, finding.shard) == finding.commit:
                    stored.discard(finding.shard)
                    discarded.append(finding)
    return discarded


def orphans(store: Store) -> int:
    """Return the number of rows that are written, in any array, and no longer in use."""
    written = set[int]().union(*(store.stored(name).written_rows() for name in store.arrays))
    return len(written.difference(store.manifest.rows_in_use.tolist()))


def _metadata(store: Store) -> Iterator[Finding]:
    for name in RESERVED:
        try:
            read_metadata(store.path / name)
        except CorruptError as error:
            yield Finding(Path(name) / METADATA, _without(store.path / name, str(error)))
    for name, reason in store.damaged.items():
        reason = _without(store.path / name, reason)
        yield Finding(Path(name) / METADATA, reason, name, samples=store.manifest.names)
    for path in torn(store.path / "manifest"):
        yield Finding(path.relative_to(store.path), "is torn or damaged, so an older manifest is in use")


def _expected(store: Store, name: str) -> list[ShardId]:
    """Shards with any file, and those that stored views lack."""
    found = store.stored(name).shards()
    views = sorted({shard.view for shard in found if shard.view < store.arrays[name].views})
    return sorted(found | set(store.missing(name, views)))


def _examine(store: Store, name: str, shard: ShardId) -> tuple[str, ShardId, int, str, Commit | None]:
    """What is wrong with a shard, if anything; the bytes read; its commit."""
    stored = store.stored(name)
    file, commit = stored.file(shard), read_commit(stored.commits, shard)
    nbytes = file.stat().st_size if file.is_file() else 0
    lost = bool(len(store.rows_in_shard(shard.shard)))
    if commit is None:
        # Without rows in use nothing will ever write it again, and nothing reads it.
        reason = _uncommitted(stored.commits / f"{shard.view}.{shard.shard}.json", file) if lost else ""
        return name, shard, 0, reason, None
    if not file.is_file():
        reason = "is missing"
    elif nbytes != commit.nbytes:
        reason = f"has {nbytes:,} bytes instead of {commit.nbytes:,}"
    elif not commit.matches(file):
        reason = "does not hold the bytes that were written"
    elif not set(commit.rows).issuperset(store.rows_in_shard(shard.shard).tolist()):
        return name, shard, nbytes, "lacks some of its rows", None
    else:
        reason = ""
    return name, shard, nbytes, reason, commit


def _uncommitted(marker: Path, file: Path) -> str:
    if marker.exists():
        return "has a damaged marker"
    return "was not finished, or its marker is missing" if file.is_file() else "is not written yet, or was deleted"


def _finding(store: Store, name: str, shard: ShardId, reason: str, commit: Commit | None) -> Finding:
    file = store.stored(name).file(shard)
    rows = store.rows_in_shard(shard.shard).tolist()
    samples = store.manifest.names_at(*rows)
    unreadable: tuple[str, ...] = ()
    if commit is not None and file.is_file():
        unreadable = store.manifest.names_at(*_unreadable(store, name, rows, shard.view))
    return Finding(file.relative_to(store.path), reason, name, shard, samples, unreadable, commit)


def _unreadable(store: Store, name: str, rows: list[int], view: int) -> list[int]:
    reader, found = store.reader([name], cache_bytes=0), []
    for row in rows:
        try:
            reader.read([row], [view])
        except CorruptError:
            found.append(row)
    reader.close()
    return found


def _without(folder: Path, reason: str) -> str:
    return reason.removeprefix(f"{folder / METADATA} ")
