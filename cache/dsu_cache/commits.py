"""Commits: the markers that make shards count, each written after its shard's data is on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from dsu_cache.records import JSON, read_record, sync, write_record


class ShardId(NamedTuple):
    """One shard of an array: rows [shard * rows_per_shard, (shard + 1) * rows_per_shard) of one view."""

    view: int
    shard: int


@dataclass(frozen=True)
class Commit:
    """What a marker says of a shard's data file."""

    rows: tuple[int, ...]
    nbytes: int
    sha256: str

    def fits(self, file: Path) -> bool:
        """Whether `file` is there and has its size: instant, finds what an interrupted copy cuts off."""
        return file.is_file() and file.stat().st_size == self.nbytes

    def matches(self, file: Path) -> bool:
        """Whether `file` holds the very bytes that were committed: reads them all."""
        return self.fits(file) and _sha256(file) == self.sha256


def write_commit(folder: Path, shard: ShardId, commit: Commit) -> None:
    """Commit `shard`: on return the marker is on the disk.

    Raises:
        FileExistsError: it has a marker already.
    """
    write_record(_marker(folder, shard), cast("dict[str, JSON]", asdict(commit)))


def read_commit(folder: Path, shard: ShardId) -> Commit | None:
    """Return the commit of `shard`, or None where there is none or its marker is torn."""
    record = cast("dict[str, Any] | None", read_record(_marker(folder, shard)))
    if record is None:
        return None
    return Commit(tuple(record["rows"]), record["nbytes"], record["sha256"])


def read_commits(folder: Path) -> Iterator[tuple[ShardId, Commit]]:
    """Yield every commit in an array's folder, by view and shard."""
    for shard in sorted(marked(folder)):
        commit = read_commit(folder, shard)
        if commit is not None:
            yield shard, commit


def marked(folder: Path) -> set[ShardId]:
    """Return the shards that have a marker, torn or whole."""
    names = [path.name.split(".") for path in folder.glob("*.json")]
    return {ShardId(int(n[0]), int(n[1])) for n in names if len(n) == 3 and n[0].isdecimal() and n[1].isdecimal()}


def remove_commit(folder: Path, shard: ShardId) -> None:
    """Remove the marker of `shard`, if it has one, torn or whole."""
    _marker(folder, shard).unlink(missing_ok=True)
    sync(folder)


def _marker(folder: Path, shard: ShardId) -> Path:
    return folder / f"{shard.view}.{shard.shard}.json"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
