"""The manifest: the row of each sample, keyed by content.

On disk it is a numbered record (generation) that lists segments: immutable files of columns, named by their SHA-256.
The first segment contains all samples of an earlier state, each further one the changes since. Small segments are
merged, so that there are few, and adding samples writes only about their own size.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dsu_cache.columns import (
    ABSENT,
    COLUMNS,
    Column,
    Table,
    equal,
    joined,
    length,
    load_tables,
    save_tables,
    take,
)
from dsu_cache.files import (
    JSON,
    BusyError,
    CacheError,
    CorruptError,
    read_record,
    write_record,
)

_MERGE_RATIO: Final = 2
"""A segment is merged with the previous one unless that is this many times larger."""
_INFO_PREFIX: Final = "info "
"""Prefix of the columns that contain fields of `info`."""


@dataclass(frozen=True)
class Entry:
    """A sample: `key` identifies its content (such as a hash), `info` contains further facts."""

    key: str
    info: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Segment:
    """Samples in the order of their names, contents in the order of their rows, and names of samples that are gone."""

    samples: Table
    contents: Table
    gone: Table = field(default_factory=lambda: {"name": Column.of([])})

    def followed_by(self, later: "Segment") -> "Segment":
        """Both merged; the later entry of a sample wins."""
        names, changed, gone = (one["name"].values() for one in (self.samples, later.samples, later.gone))
        kept = np.ones(len(names) + len(changed), bool)
        for name in (*changed, *gone):
            at = bisect_left(names, name)
            if at < len(names) and names[at] == name:
                kept[at] = False
        places = [bisect_left(names, name) for name in changed]
        order = np.insert(np.arange(len(names)), places, np.arange(len(names), len(kept)))
        still_gone = {*self.gone["name"].values(), *gone}.difference(changed)
        return Segment(
            joined(self.samples, later.samples, order[kept[order]]),
            joined(self.contents, later.contents),
            {"name": Column.of(sorted(still_gone))},
        )

    @property
    def weight(self) -> int:
        """Number of records."""
        return length(self.samples) + length(self.contents) + length(self.gone)


class Manifest:
    """The samples of a store and their rows. Immutable; `assign` returns the next manifest.

    Args:
        entries: the samples by name.
        rows: the row of each content key, including orphans (content not in use).
        next_row: the number of rows ever assigned; all rows are below it.

    Raises:
        ValueError: keys and rows are inconsistent.
    """

    def __init__(
        self, entries: Mapping[str, Entry] | None = None, rows: Mapping[str, int] | None = None, next_row: int = 0
    ) -> None:
        entries, rows = entries or {}, rows or {}
        if not {entry.key for entry in entries.values()} <= rows.keys():
            raise ValueError("a manifest needs a row for each content key in use")
        if len(set(rows.values())) < len(rows):
            raise ValueError("a manifest gives two content keys the same row")
        if rows and not 0 <= min(rows.values()) <= max(rows.values()) < next_row:
            raise ValueError(f"a manifest's rows must lie between 0 and next_row, {next_row}")
        names = sorted(entries)
        infos = [entries[name].info for name in names]
        notes = dict.fromkeys(note for info in infos for note in info)
        samples = {
            "name": Column.of(names),
            "row": Column.of([rows[entries[name].key] for name in names]),
            **{_INFO_PREFIX + note: Column.of([info.get(note, ABSENT) for info in infos]) for note in notes},
        }
        keys = sorted(rows, key=rows.__getitem__)
        contents = {"key": Column.of(keys), "row": Column.of([rows[key] for key in keys])}
        self._segment = Segment(samples, contents)
        self.next_row: Final = next_row

    @classmethod
    def _from_segment(cls, everything: Segment, next_row: int) -> "Manifest":
        made = cls(next_row=next_row)
        made._segment = Segment(everything.samples, everything.contents)
        return made

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Manifest) or self.next_row != other.next_row:
            return False
        return keeps_contents(self, other) and not _changes(self, other).weight

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The samples' names, sorted."""
        return tuple(self._segment.samples["name"].values())

    @cached_property
    def entries(self) -> "_Entries":
        """The samples by name, sorted; each is created on access."""
        return _Entries(self)

    def samples(self) -> Iterator[tuple[str, Entry]]:
        """Yield all names and entries in order: much faster than single accesses to `entries`."""
        contents = self._segment.contents
        keys = contents["key"].take(np.searchsorted(contents["row"].data, self._rows)).values()
        notes = [(note, column.values()) for note, column in self.entries.notes]
        for index, (name, key) in enumerate(zip(self.names, keys, strict=True)):
            yield name, Entry(key, {n: values[index] for n, values in notes if values[index] is not ABSENT})

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """The row of each content key, orphans included."""
        contents = self._segment.contents
        return dict(zip(contents["key"].values(), contents["row"].values(), strict=True))

    @cached_property
    def rows_in_use(self) -> npt.NDArray[np.int64]:
        """The rows in use, ascending, int64 (n,)."""
        return np.unique(self._rows)

    def row(self, name: str) -> int:
        """Return the row of the sample called `name`.

        Raises:
            CacheError: there is no such sample.
        """
        index = self._index(name)
        if index is None:
            raise CacheError(f"sample {name!r} is not in the manifest: add it to the store first")
        return int(self._rows[index])

    def names_at(self, *rows: int) -> tuple[str, ...]:
        """Return the names of the samples in `rows`, sorted: several per row if files are equal, none for an orphan."""
        order, ordered = self._by_row
        begins, ends = np.searchsorted(ordered, rows, "left"), np.searchsorted(ordered, rows, "right")
        spans = zip(begins.tolist(), ends.tolist(), strict=True)
        return tuple(sorted(self.names[i] for begin, end in spans for i in order[begin:end].tolist()))

    @cached_property
    def _rows(self) -> npt.NDArray[np.int64]:
        """Each sample's row, int64 (n,)."""
        return self._segment.samples["row"].data.astype(np.int64)

    @cached_property
    def _by_row(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The samples in the order of their rows, and those rows."""
        order = np.argsort(self._rows, kind="stable")
        return order, self._rows[order]

    def _index(self, name: str) -> int | None:
        at = bisect_left(self.names, name)
        return at if at < len(self.names) and self.names[at] == name else None

    def assign(self, entries: Mapping[str, Entry], rows_per_shard: int) -> "Manifest":
        """Return the manifest of `entries`.

        Known content keeps its row under any name, and equal samples share a row. New content gets new rows in the
        order of the names, starting with a new shard, so that no written shard changes. Content that is gone keeps its
        row in case it returns.
        """
        rows = {**self.rows}
        fresh = list(dict.fromkeys(entries[name].key for name in sorted(entries) if entries[name].key not in rows))
        next_row = self.next_row
        if fresh:
            first = -(-next_row // rows_per_shard) * rows_per_shard
            rows |= {key: first + i for i, key in enumerate(fresh)}
            next_row = first + len(fresh)
        return Manifest(entries, rows, next_row)


class _Entries(Mapping[str, Entry]):
    """A manifest's samples by name."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        samples, contents = manifest._segment.samples, manifest._segment.contents
        self.notes = [
            (name.removeprefix(_INFO_PREFIX), column) for name, column in samples.items() if _INFO_PREFIX in name
        ]
        self._keys, self._key_rows = contents["key"], contents["row"].data

    def __len__(self) -> int:
        return len(self._manifest.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._manifest.names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._manifest._index(name) is not None

    def __getitem__(self, name: str) -> Entry:
        index = self._manifest._index(name)
        if index is None:
            raise KeyError(name)
        key = self._keys.value(int(np.searchsorted(self._key_rows, self._manifest._rows[index])))
        info = {note: column.value(index) for note, column in self.notes}
        return Entry(key, {note: value for note, value in info.items() if value is not ABSENT})


def keeps_contents(before: Manifest, after: Manifest) -> bool:
    """Whether the next manifest contains all contents of this one in the same rows, and new ones in higher rows."""
    known = length(before._segment.contents)
    if known > length(after._segment.contents):
        return False
    return bool(equal(take(after._segment.contents, slice(known)), before._segment.contents).all())


def _changes(before: Manifest, after: Manifest) -> Segment:
    """The changes from one manifest to the next, which keeps its contents."""
    place = {name: index for index, name in enumerate(before.names)}
    at = np.fromiter((place.get(name, -1) for name in after.names), np.int64, len(after.names))
    known = at >= 0
    same = known.copy()
    same[known] = equal(take(after._segment.samples, known), take(before._segment.samples, at[known]))
    contents = take(after._segment.contents, slice(length(before._segment.contents), None))
    gone = sorted(place.keys() - set(after.names))
    return Segment(take(after._segment.samples, ~same), contents, {"name": Column.of(gone)})


# -- on the disk -------------------------------------------------------------------------------------------------


def save_manifest(folder: Path, manifest: Manifest, before: Manifest | None = None) -> None:
    """Write `manifest` as the newest generation in `folder`, then delete files that only older ones need.

    Args:
        folder: the manifest folder.
        manifest: the manifest to write.
        before: the manifest of the newest generation there; if given, only the changes are written.

    Raises:
        BusyError: another process wrote a generation at the same time.
    """
    older = generations(folder)
    number = 1 + (int(older[0].stem) if older else 0)
    record = read_record(older[0]) if older and before is not None and keeps_contents(before, manifest) else None
    listed: list[dict[str, Any]] = [] if record is None else record["segments"]
    segment = manifest._segment if record is None or before is None else _changes(before, manifest)
    while listed and listed[-1]["weight"] < _MERGE_RATIO * segment.weight:
        if len(listed) == 1:
            segment = manifest._segment
        else:
            segment = _load_segment(folder, listed[-1]["sha256"]).followed_by(segment)
        listed = listed[:-1]
    if segment.weight or not listed:
        listed = [*listed, {"sha256": _save_segment(folder, segment), "weight": segment.weight}]
    try:
        write_record(folder / f"{number:08d}.json", {"segments": listed, "next_row": manifest.next_row})
    except FileExistsError:
        raise BusyError(f"{folder} is being written by another process: take the store's lock first") from None
    for path in older:
        path.unlink(missing_ok=True)
    _remove_unlisted(folder, listed)


def load_manifest(folder: Path, *, tidy: bool = False) -> Manifest:
    """Return the newest intact generation in `folder`.

    `tidy` removes all other files, which interrupted writers left; only the exclusive writer may use it.

    Raises:
        CorruptError: there is none.
    """
    seen: list[Path] | None = None
    while (paths := generations(folder)) != seen:
        for path in paths:
            record = read_record(path)
            if record is None:
                continue
            try:
                segments = [_load_segment(folder, one["sha256"]) for one in record["segments"]]
            except CorruptError:
                continue
            if tidy:
                for other in paths:
                    if other != path:
                        other.unlink(missing_ok=True)
                _remove_unlisted(folder, record["segments"])
            # Newest first, since the newest are the smallest.
            everything = reduce(lambda later, earlier: earlier.followed_by(later), reversed(segments))
            return Manifest._from_segment(everything, record["next_row"])
        seen = paths  # A writer may have replaced them meanwhile: try once more.
    raise CorruptError(
        f"{folder} contains no intact manifest, so the samples' rows are unknown: create the store again"
    )


def generations(folder: Path) -> list[Path]:
    """Return the manifests in `folder`, newest first, including damaged ones."""
    return sorted(folder.glob("[0-9]" * 8 + ".json"), reverse=True)


def damage(generation: Path) -> str:
    """Describe the damage of a generation or one of its segments; empty if it is intact."""
    record = read_record(generation)
    if record is None:
        return "is incomplete or damaged"
    try:
        for one in record["segments"]:
            _load_segment(generation.parent, one["sha256"])
    except CorruptError as error:
        return f"lists a lost segment: {error}"
    return ""


def _save_segment(folder: Path, segment: Segment) -> str:
    return save_tables(folder, vars(segment)).stem


def _load_segment(folder: Path, sha256: str) -> Segment:
    return Segment(**load_tables(folder / f"{sha256}{COLUMNS}"))


def _remove_unlisted(folder: Path, listed: Sequence[Mapping[str, Any]]) -> None:
    kept = {one["sha256"] for one in listed}
    for path in folder.glob(f"*{COLUMNS}*"):
        if path.name.removesuffix(COLUMNS) not in kept:  # also files that an interrupted write left
            path.unlink(missing_ok=True)
