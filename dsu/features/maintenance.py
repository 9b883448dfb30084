"""Upkeep of stores: describe, verify, remove and copy them."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from dsu.data.images import UnreadableImage, file_sha256, or_unreadable
from dsu.data.inspection import SampleMetadata, read_metadata
from dsu.data.pairing import Split
from dsu.data.splitting import SPLITS_FILE
from dsu.data.tiles import cached
from dsu.data.views import FLIPPED_WHEN_READ
from dsu.errors import DsuError, UsageError
from dsu.features.stores import FeatureStore, library_versions, named_folders, sample_key, store_folders
from dsu.files import atomic_write
from dsu.network.resume import guide_names
from dsu.progress import SILENT, Progress, Task
from dsu_cache import (
    BusyError,
    CacheError,
    Damage,
    Entry,
    Manifest,
    RemoteError,
    audit,
    audited_nbytes,
    copy_store,
    discard_refuted,
    file_sizes,
    is_store,
    keep_beside,
    mirror_folder,
    orphaned_objects,
    orphans,
    remove_store,
    url_of,
    with_urls,
    writer_of,
)


@dataclass(frozen=True)
class ArrayState:
    """One array of a store.

    Attributes:
        name, item_shape, dtype: shape and type per sample and view.
        views: number of views in which anything is stored, of `places`.
        shards, missing_shards: number of shards in these views.
        missing_samples: names of samples that lack any of these views.
        nbytes: size on disk.
        encoder, weights: the encoder and its weights' digest; None for pixels and masks.
        drift: library versions that have changed since, as sentences.
    """

    name: str
    item_shape: tuple[int, ...]
    dtype: str
    views: tuple[int, ...]
    places: int
    shards: int
    missing_shards: int
    missing_samples: tuple[str, ...]
    nbytes: int
    encoder: str | None
    weights: str | None
    drift: tuple[str, ...]


@dataclass(frozen=True)
class StoreState:
    """The state of a store. If it can't be opened, only path, size, damage and last change are known.

    Attributes:
        path: its folder.
        nbytes: size of all its files.
        changed: when it was last written.
        damage: why it can't be read, or which of its arrays.
        writer: who is writing to it now.
        split, kind, source: its images; None if unreadable.
        source_there: whether these images still exist.
        encoders: name of the pair of encoders.
        random: whether their weights are random; None if not recorded.
        samples, orphaned_rows: number in the manifest, and of written rows that are no longer in use.
        orphaned_objects, orphaned_bytes: number and size of unreferenced objects on S3.
        arrays: its arrays by name.
    """

    path: Path
    nbytes: int
    changed: datetime
    damage: tuple[str, ...] = ()
    writer: str | None = None
    split: str | None = None
    kind: str | None = None
    source: str | None = None
    source_there: bool = False
    encoders: str | None = None
    random: bool | None = None
    samples: int = 0
    orphaned_rows: int = 0
    orphaned_objects: int = 0
    orphaned_bytes: int = 0
    compressor: str | None = None
    arrays: tuple[ArrayState, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every sample has all views of its arrays, and nothing is known to be damaged."""
        whole = bool(self.arrays) and all(array.views and not array.missing_shards for array in self.arrays)
        return whole and not self.damage

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **asdict(self),
            "path": with_urls(str(self.path)),
            "changed": self.changed.isoformat(timespec="seconds"),
            "complete": self.complete,
        }


@dataclass(frozen=True)
class Verification:
    """The result of verifying a store.

    Attributes:
        path, split, reference: its folder and its images.
        findings: damaged or missing files of the store.
        changed, new, gone: names of samples whose image or mask has changed since its features were made, samples
            without features, and samples without an image.
        source_there: whether the images exist for the comparison.
        nbytes: number of bytes read.
        marked: number of shards that were marked as missing.
        unmarked: why none could be marked, if so.
        unopenable: why the store can't be opened, if so.
    """

    path: Path
    split: str = ""
    reference: str = ""
    findings: tuple[Damage, ...] = ()
    changed: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    source_there: bool = False
    nbytes: int = 0
    marked: int = 0
    unmarked: str | None = None
    unopenable: str | None = None

    @property
    def passed(self) -> bool:
        """Whether everything exists, is undamaged, and matches the images."""
        return not (self.unopenable or self.findings or self.changed or self.new or self.gone)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        findings = [
            {
                "file": str(one.file),
                "reason": one.reason,
                "array": one.array,
                "shard": one.shard and one.shard._asdict(),
                "samples": one.samples,
                "unreadable": one.unreadable,
            }
            for one in self.findings
        ]
        return {**asdict(self), "path": with_urls(str(self.path)), "findings": findings, "passed": self.passed}


def _find_folders(names: Sequence[str], cache_root: Path, progress: Progress = SILENT) -> list[Path]:
    """Store folders by name (empty: all), in the order of `store_folders`, without repeats.

    Prints a note if there are no stores at all. Raises `UsageError` for a name without a store.
    """
    if not names:
        stored = store_folders(cache_root)
        if not stored:
            progress.say(f"There are no stores below {cache_root}: create them with `dsu cache-features`.")
        return stored
    found: dict[Path, None] = {}
    for name in names:
        mine = named_folders(cache_root, name) or [Path(name)]
        if not is_store(mine[0]):
            raise UsageError(f"There is no store of {name} below {cache_root}: see `dsu cache list`.")
        found |= dict.fromkeys(mine)
    return list(found)


# -- listing -----------------------------------------------------------------------------------------------


def describe_stores(names: Sequence[str], cache_root: Path, progress: Progress = SILENT) -> list[StoreState]:
    """The state of the named stores (empty: all), newest first, including damaged ones.

    Args:
        names: data sets, splits, your own folders, or store folders.
        cache_root: the store folder.
        progress: receives progress.

    Raises `UsageError` for a name without a store.
    """
    return [_describe(folder) for folder in _find_folders(names, cache_root, progress)]


def _describe(folder: Path) -> StoreState:
    changed = _last_change(folder)
    try:
        store = FeatureStore.open(folder)
        source, config = store.source, store.config
    except RemoteError:
        raise
    except (DsuError, CacheError) as error:
        nbytes = (
            0 if url_of(folder) else sum(file_sizes(folder).values())
        )  # not of the mirror, whose size differs from the store's
        return StoreState(folder, nbytes, changed, (str(error),), writer=writer_of(folder))
    if store.remote is not None:
        sizes, changed = store.remote.sizes, store.remote.changed.astimezone()
    else:
        arrays = map(store.stored, store.arrays)
        sizes = file_sizes(folder, {place: file for array in arrays for place, file in array.data_files().items()})
    orphaned = orphaned_objects(store)
    noted = store.attributes.get("random")
    toy = {config.hiera.name, config.dino.name} == {"toy"}
    return StoreState(
        path=folder,
        nbytes=sum(sizes.values()),
        changed=changed,
        damage=tuple(reason.replace(f"{folder}/", "") for reason in store.damaged.values()),
        writer=writer_of(folder),
        split=folder.parent.name,
        kind=source.kind,
        source=source.place,
        source_there=source.untiled.find() is not None,
        encoders=folder.name,
        random=True if toy else noted if isinstance(noted, bool) else None,
        samples=len(store.manifest.entries),
        orphaned_rows=orphans(store),
        orphaned_objects=orphaned[0],
        orphaned_bytes=orphaned[1],
        compressor=store.compressor,
        arrays=tuple(_describe_array(store, name, sizes) for name in store.arrays),
    )


def _describe_array(store: FeatureStore, name: str, sizes: Mapping[str, int]) -> ArrayState:
    """`sizes`: size of the store's files by path."""
    info, below, stored = store.arrays[name], f"{name}/", store.stored(name)
    own = {path.removeprefix(below): nbytes for path, nbytes in sizes.items() if path.startswith(below)}
    data = stored.sizes(own)
    views = sorted({shard.view for shard in (*data, *stored.committed()) if shard.view < info.views})
    missing = store.missing(name, views, data)
    lost = {int(row) for shard in missing for row in store.rows_in_shard(shard.shard)}
    encoder = None if name in FLIPPED_WHEN_READ else "DINOv2" if name in guide_names(store.config) else "Hiera"
    now, fields = library_versions(), info.fingerprint
    in_use = store.manifest.rows_in_use // store.rows_per_shard
    return ArrayState(
        name=name,
        item_shape=info.item_shape,
        dtype=str(info.dtype),
        views=tuple(views),
        places=info.views,
        shards=len(set(in_use.tolist())) * len(views),
        missing_shards=len(missing),
        missing_samples=store.manifest.names_at(*lost),
        nbytes=sum(own.values()),
        encoder=encoder,
        weights=None if encoder is None else str(fields.fields.get("weights", "")),
        drift=tuple(
            f"{library} was {fields.recorded[library]}, is now {version}"
            for library, version in now.items()
            if library in fields.recorded and fields.recorded[library] != version
        ),
    )


def _last_change(folder: Path) -> datetime:
    """When the folder, and what every writer changes (manifest and markers), were last modified."""
    touched = [folder, *folder.glob("manifest/*.json"), *folder.glob("commits/*/")]
    return datetime.fromtimestamp(max(path.stat().st_mtime for path in touched)).astimezone()


# -- verifying -----------------------------------------------------------------------------------------


def verify_stores(
    names: Sequence[str], cache_root: Path, *, mark: bool = True, workers: int = 4, progress: Progress = SILENT
) -> list[Verification]:
    """Compare every byte of the named stores (empty: all), and their images, with the checksums.

    Args:
        names: data sets, splits, your own folders, or store folders.
        cache_root: the store folder.
        mark: whether to mark damaged shards as missing, and changed images for another scan, so that the next `dsu
            cache-features` recomputes exactly these. Only the damaged shards' commit markers are removed.
        workers: number of files read in parallel.
        progress: receives progress.

    Raises `UsageError` for a name without a store.
    """
    return [
        verify_store(folder, mark=mark, workers=workers, progress=progress)
        for folder in _find_folders(names, cache_root, progress)
    ]


def verify_store(path: Path, *, mark: bool = True, workers: int = 4, progress: Progress = SILENT) -> Verification:
    """Verify one store: see `verify_stores`. Problems are returned, not raised."""
    try:
        store = FeatureStore.open(path)
        source = store.source
    except RemoteError:
        raise
    except (DsuError, CacheError) as error:
        return Verification(path, unopenable=str(error))
    split = source.find()
    nbytes = audited_nbytes(store) + (0 if split is None else sum(map(_source_nbytes, store.metadata.values())))
    with progress.task(f"verifying {path.parent.name}", max(1, round(nbytes / 1e6)), "MB") as task:
        advance = _megabyte_counter(task)
        findings = tuple(audit(store, advance, workers))
        changed, new, gone = ((), (), ()) if split is None else _compare_files(store, split, advance, workers)
        advance(0)
    marked, unmarked = 0, None if mark else "--keep was given"
    if mark:
        try:
            _invalidate_times(store, changed)
            marked = len(discard_refuted(store, list(findings)))
        except (BusyError, OSError) as error:
            unmarked = str(error)
    return Verification(
        path,
        path.parent.name,
        source.arguments,
        findings,
        changed,
        new,
        gone,
        source_there=split is not None,
        nbytes=nbytes,
        marked=marked,
        unmarked=unmarked,
    )


def _source_nbytes(facts: SampleMetadata) -> int:
    return facts.image_bytes + (facts.mask_bytes or 0)


def _compare_files(
    store: FeatureStore, split: Split, advance: Callable[[int], None], workers: int
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names of changed, new and missing samples."""
    stored = store.metadata
    pairs = {pair.name: pair for pair in split.pairs}
    hashed = cached(file_sha256, most=2 * workers)  # once for all tiles of an image

    @or_unreadable
    def hashes(name: str) -> tuple[str, str | None]:
        mask = pairs[name].mask
        return hashed(pairs[name].image), None if mask is None else hashed(mask)

    known = [name for name in store.manifest.names if name in pairs]
    changed = []
    with ThreadPoolExecutor(workers, thread_name_prefix="hash") as pool:
        for name, found in zip(known, pool.map(hashes, known), strict=True):
            advance(_source_nbytes(stored[name]))
            if found != (stored[name].image_sha256, stored[name].mask_sha256):
                changed.append(name)
    # Unreadable new images are skipped and reported by stage one.
    examine = or_unreadable(partial(read_metadata, opaque=store.source.foreground is not None))
    new = [name for name in set(pairs) - set(stored) if not isinstance(examine([pairs[name]]), UnreadableImage)]
    return tuple(changed), tuple(sorted(new)), tuple(sorted(set(stored) - set(pairs)))


def _invalidate_times(store: FeatureStore, names: tuple[str, ...]) -> None:
    """Have changed files hashed again, even if size and time are unchanged, by which they are otherwise recognised."""
    if not names:
        return
    with store.lock():
        entries, stored = dict(store.manifest.samples()), store.metadata
        for name in set(names) & set(entries):
            facts = replace(
                stored[name], image_mtime_ns=-1
            )  # no file has this time, so the next scan hashes the file again
            entries[name] = Entry(sample_key(facts), facts.to_json())
        store.set_manifest(Manifest(entries, store.manifest.rows, store.manifest.next_row))


def _megabyte_counter(task: Task) -> Callable[[int], None]:
    """Count bytes, and report whole megabytes to the task."""
    counted, told = 0, 0

    def advance(nbytes: int) -> None:
        nonlocal counted, told
        counted += nbytes
        if (due := round(counted / 1e6) - told) > 0:
            task.advance(due)
            told += due

    return advance


# -- removing -------------------------------------------------------------------------------------------------


def remove_stores(name: str, cache_root: Path, before: Callable[[list[StoreState]], None]) -> list[StoreState]:
    """Remove the stores of a data set, a split or a folder, and nothing else.

    Args:
        name: a data set, a split, your own folder, or a store folder.
        cache_root: the store folder; nothing outside of it is ever removed, whatever name or link leads there.
        before: called with the stores to remove; may raise to cancel.

    Raises `UsageError` if there is no such store, or it is elsewhere, and `BusyError` while another process writes or
    reads it.
    """
    folders = _find_folders([name], cache_root)
    for folder in folders:
        _check_removable(folder, cache_root)
    states = [_describe(folder) for folder in folders]
    before(states)
    for folder in folders:
        remove_store(folder)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
    return states


def _check_removable(folder: Path, cache_root: Path) -> None:
    root, path = Path(os.path.abspath(cache_root)), Path(os.path.abspath(folder))
    if not path.is_relative_to(root) or len(path.relative_to(root).parts) != 2:
        raise UsageError(f"{folder} is not a store below {cache_root}: give the --cache-root that contains it.")
    # Not through a link of the store or of its split's folder: its target may belong to someone else.
    if path.resolve() != root.resolve() / path.relative_to(root):
        raise UsageError(f"{folder} is a link to {path.resolve()}: remove the link, or give that store's --cache-root.")


# -- copies on S3 ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copy:
    """The result of copying a store.

    Attributes:
        source, target: their folders; one is the mirror of a store on S3.
        shards, nbytes: number and size of copied shards.
    """

    source: Path
    target: Path
    shards: int
    nbytes: int


def push_stores(names: Sequence[str], cache_root: Path, url: str, progress: Progress = SILENT) -> list[Copy]:
    """Copy named stores (empty: all) from a cache root to `s3://bucket/path`; copies only what is missing there.

    Raises `UsageError` for a name without a store, and `CacheError` as `copy_store`.
    """
    root = mirror_folder(_check_url(url))
    return [_copy(folder, root, progress) for folder in _find_folders(names, cache_root, progress)]


def pull_stores(url: str, names: Sequence[str], cache_root: Path, progress: Progress = SILENT) -> list[Copy]:
    """Copy named stores (empty: all) from `s3://bucket/path` to a cache root: see `push_stores`."""
    root = mirror_folder(_check_url(url))
    folders = _find_folders(names, root, progress)
    for folder in folders:
        if root not in folder.parents:
            raise UsageError(f"{folder} is not a store below {url}: give its split, or SPLIT/ENCODERS.")
    return [_copy(folder, cache_root, progress) for folder in folders]


def _check_url(url: str) -> str:
    if not url.startswith("s3://"):
        raise UsageError(f"{url} is not an S3 URL: write s3://BUCKET/PATH.")
    return url


def _copy(source: Path, target_root: Path, progress: Progress) -> Copy:
    counted, target = [0, 0], target_root.joinpath(*Path(os.path.abspath(source)).parts[-2:])
    with ExitStack() as stack:

        def before(shards: int, nbytes: int) -> Callable[[int], None]:
            counted[:] = shards, nbytes
            if not shards:
                return lambda nbytes: None
            return _megabyte_counter(
                stack.enter_context(
                    progress.task(f"copying {source.parent.name}/{source.name}", max(1, round(nbytes / 1e6)), "MB")
                )
            )

        copy_store(FeatureStore.open(source), target, before)
    _copy_splits(source.parent / SPLITS_FILE, target.parent / SPLITS_FILE, progress)
    return Copy(source, target, *counted)


def _copy_splits(source: Path, target: Path, progress: Progress) -> None:
    """Also copy the record of held-out samples, unless there is another one."""
    if not source.is_file():
        return
    content = source.read_bytes()
    if target.is_file() and target.read_bytes() != content:
        progress.say(f"{target} splits samples differently than {source}: it is left unchanged.")
        return
    atomic_write(target, content)
    keep_beside(target)
