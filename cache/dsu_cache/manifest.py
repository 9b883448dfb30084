"""The manifest: which sample lies in which row, keyed by content."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsu_cache.files import JSON, BusyError, CacheError, CorruptError, read_record, write_record


@dataclass(frozen=True)
class Entry:
    """A sample: `key` stands for its content (a hash, say), `info` is whatever else is known about it."""

    key: str
    info: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The samples of a store and their rows; never altered, `assign` gives the next one.

    Args:
        entries: the samples by name.
        rows: the row of each content key, those of content that is gone for now included: orphans.
        next_row: the number of rows ever given out: all rows lie below it.

    Raises:
        ValueError: keys and rows do not fit each other.
    """

    entries: Mapping[str, Entry] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    next_row: int = 0

    def __post_init__(self) -> None:
        if not {entry.key for entry in self.entries.values()} <= set(self.rows):
            raise ValueError("a manifest needs a row for each content key in use")
        if len(set(self.rows.values())) < len(self.rows):
            raise ValueError("a manifest gives two content keys the same row")
        if self.rows and not 0 <= min(self.rows.values()) <= max(self.rows.values()) < self.next_row:
            raise ValueError(f"a manifest's rows must lie between 0 and next_row, {self.next_row}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The samples' names, sorted."""
        return tuple(sorted(self.entries))

    @cached_property
    def rows_in_use(self) -> npt.NDArray[np.int64]:
        """The rows that hold a sample, ascending, int64 (n,)."""
        keys = {entry.key for entry in self.entries.values()}
        return np.sort(np.fromiter((self.rows[key] for key in keys), np.int64, len(keys)))

    def row(self, name: str) -> int:
        """Return the row of the sample called `name`.

        Raises:
            CacheError: there is none of that name.
        """
        if name not in self.entries:
            raise CacheError(f"sample {name!r} is not in the manifest: add it to the store first")
        return self.rows[self.entries[name].key]

    def names_at(self, *rows: int) -> tuple[str, ...]:
        """Return the names of the samples in `rows`, sorted: several a row where files are equal, none of an orphan."""
        return tuple(sorted(name for row in rows for name in self._names_by_row.get(row, ())))

    @cached_property
    def _names_by_row(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for name, entry in self.entries.items():
            found.setdefault(self.rows[entry.key], []).append(name)
        return found

    def assign(self, entries: Mapping[str, Entry], rows_per_shard: int) -> "Manifest":
        """Return the manifest of `entries`.

        Known content keeps its row under any name, and equal samples share one. New content gets new rows, in the
        order of the names, beginning on a fresh shard, so that no shard that is already written is touched. Content
        that is gone keeps its row, and has it again when it comes back.
        """
        rows = dict(self.rows)
        fresh = list(dict.fromkeys(entries[name].key for name in sorted(entries) if entries[name].key not in rows))
        next_row = self.next_row
        if fresh:
            first = -(-next_row // rows_per_shard) * rows_per_shard
            rows |= {key: first + i for i, key in enumerate(fresh)}
            next_row = first + len(fresh)
        return Manifest(dict(entries), rows, next_row)


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` as the newest generation in `folder`, then delete the older ones.

    Raises:
        BusyError: another process wrote a generation at the same time.
    """
    older = generations(folder)
    number = 1 + (int(older[0].stem) if older else 0)
    entries = {name: vars(entry) for name, entry in manifest.entries.items()}
    try:
        write_record(
            folder / f"{number:08d}.json", {"entries": entries, "rows": manifest.rows, "next_row": manifest.next_row}
        )
    except FileExistsError:
        raise BusyError(f"{folder} is being written by another process: take the store's lock first") from None
    for path in older:
        path.unlink(missing_ok=True)


def load_manifest(folder: Path) -> Manifest:
    """Return the newest generation in `folder` that is whole.

    Raises:
        CorruptError: there is none.
    """
    seen: list[Path] | None = None
    while (paths := generations(folder)) != seen:
        for path in paths:
            record = read_record(path)
            if record is not None:
                entries = {name: Entry(**entry) for name, entry in record["entries"].items()}
                return Manifest(entries, record["rows"], record["next_row"])
        seen = paths  # A writer may have replaced them while they were read: look once more.
    raise CorruptError(
        f"{folder} holds no whole manifest, so it is not known which sample lies where: make the store again"
    )


def remove_superseded(folder: Path) -> None:
    """Remove what interrupted writers left in `folder`: torn generations, and older ones than the newest whole."""
    paths = generations(folder)
    newest = next((path for path in paths if read_record(path) is not None), None)
    for path in paths:
        if newest not in (None, path):
            path.unlink(missing_ok=True)


def generations(folder: Path) -> list[Path]:
    """Return the manifests in `folder`, the newest first, torn ones too."""
    return sorted(folder.glob("[0-9]" * 8 + ".json"), reverse=True)
