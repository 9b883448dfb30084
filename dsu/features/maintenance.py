"""Looking after stores: what they hold, whether it is whole and still what the images are, removing and copying."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from dsu.data.datasets import Pair, SampleMetadata, Split
from dsu.data.images import UnreadableImage, file_sha256, or_unreadable, raw_mask, read_image
from dsu.data.splitting import SPLITS_FILE
from dsu.data.tiles import LastUsed
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
    orphaned_objects,
    orphans,
    place_of,
    remove_store,
    url_of,
    with_urls,
    writer_of,
)

__all__ = [
    "ArrayState",
    "Copy",
    "StoreState",
    "Verification",
    "describe_stores",
    "pull_stores",
    "push_stores",
    "remove_stores",
    "verify_store",
    "verify_stores",
]


@dataclass(frozen=True)
class ArrayState:
    """One array of a store.

    Attributes:
        name, item_shape, dtype: what it holds a sample and view.
        views: in which anything is stored, of `places`.
        shards, missing_shards: of these views.
        missing_samples: names of samples that lack any of these views.
        nbytes: on the disk.
        encoder, weights: what made it; None for pixels and masks.
        drift: library versions that are others now, as sentences.
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
    """A store as it is. Of one that cannot be opened only path, bytes, damage and last change are known.

    Attributes:
        path: its folder.
        nbytes: of all its files.
        changed: when any of it was last written.
        damage: why it, or which arrays of it, cannot be read.
        writer: who is writing to it now.
        split, kind, source: which images it is of; None where that cannot be read.
        source_there: whether these images are still there.
        encoders: what the pair of encoders is called.
        random: whether their weights are random; None where that was not noted.
        samples, orphaned_rows: in the manifest; written, but in use no more.
        orphaned_objects, orphaned_bytes: objects on S3 that nothing names any more, and their bytes.
        arrays: by name.
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
        """Whether every sample has every view that its arrays have begun, and nothing is known to be damaged."""
        whole = all(array.views and not array.missing_shards for array in self.arrays)
        return whole and bool(self.arrays) and not self.damage

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        changed = self.changed.isoformat(timespec="seconds")
        return {**asdict(self), "path": with_urls(str(self.path)), "changed": changed, "complete": self.complete}


@dataclass(frozen=True)
class Verification:
    """What came of verifying a store.

    Attributes:
        path, split, reference: its folder, and which images it is of.
        findings: files of the store that are not as they were written, or are missing.
        changed, new, gone: names of samples whose image or mask is not what its features were made of, of such as
            have no features, and of such as have no image any more.
        source_there: whether the images are there to be compared with.
        nbytes: how much was read.
        marked: how many shards have been made to count as missing.
        unmarked: why they have not been, where they could not be.
        unopenable: why the store cannot be opened, where it cannot.
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
        """Whether everything is there, as it was written, and of the images as they are."""
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


def _find(names: Sequence[str], cache_root: Path, progress: Progress = SILENT) -> list[Path]:
    """Stores' folders by name (none: all), in the order of `store_folders`, none twice.

    That there are none at all is said. Raises `UsageError` for a name without a store.
    """
    if not names:
        stored = store_folders(cache_root)
        if not stored:
            progress.say(f"There are no stores below {cache_root}: `dsu cache-features` makes them.")
        return stored
    found: dict[Path, None] = {}
    for name in names:
        mine = named_folders(cache_root, name) or [Path(name)]
        if not is_store(mine[0]):
            raise UsageError(f"There is no store of {name} below {cache_root}: `dsu cache list` shows what there is.")
        found |= dict.fromkeys(mine)
    return list(found)


# -- what there is -----------------------------------------------------------------------------------------------


def describe_stores(names: Sequence[str], cache_root: Path, progress: Progress = SILENT) -> list[StoreState]:
    """The state of the named stores (none: of all), the one written last first; damaged ones are among them.

    Args:
        names: data sets, splits, own folders, or stores' folders.
        cache_root: where stores lie.
        progress: who is told.

    Raises `UsageError` for a name without a store.
    """
    return [_describe(folder) for folder in _find(names, cache_root, progress)]


def _describe(folder: Path) -> StoreState:
    changed = _last_change(folder)
    try:
        store = FeatureStore.open(folder)
        source, config = store.source, store.config
    except RemoteError:
        raise
    except (DsuError, CacheError) as error:
        nbytes = 0 if url_of(folder) else sum(file_sizes(folder).values())  # a mirror says nothing of what there is
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
        source_there=source.uncut.find() is not None,
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
    """`sizes`: bytes of the store's files by path."""
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
            f"{library} was {fields.recorded[library]}, is {version}"
            for library, version in now.items()
            if library in fields.recorded and fields.recorded[library] != version
        ),
    )


def _last_change(folder: Path) -> datetime:
    """Of the folder and of what every writer touches: manifest and markers."""
    touched = [folder, *folder.glob("manifest/*.json"), *folder.glob("commits/*/")]
    return datetime.fromtimestamp(max(path.stat().st_mtime for path in touched)).astimezone()


# -- whether it is whole -----------------------------------------------------------------------------------------


def verify_stores(
    names: Sequence[str], cache_root: Path, *, mark: bool = True, workers: int = 4, progress: Progress = SILENT
) -> list[Verification]:
    """Compare every byte of the named stores (none: of all), and the images that they are of, with their checksums.

    Args:
        names: data sets, splits, own folders, or stores' folders.
        cache_root: where stores lie.
        mark: whether damaged shards are made to count as missing, and changed images to be looked at anew, so that
            the next `dsu cache-features` computes exactly these. Nothing is removed but the shards' markers, which
            say that they are whole, and are refuted.
        workers: files read at a time.
        progress: who is told.

    Raises `UsageError` for a name without a store.
    """
    return [
        verify_store(folder, mark=mark, workers=workers, progress=progress)
        for folder in _find(names, cache_root, progress)
    ]


def verify_store(path: Path, *, mark: bool = True, workers: int = 4, progress: Progress = SILENT) -> Verification:
    """Verify one store: see `verify_stores`. What is wrong is in the result, not raised."""
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
        advance = _in_megabytes(task)
        findings = tuple(audit(store, advance, workers))
        changed, new, gone = ((), (), ()) if split is None else _compare(store, split, advance, workers)
        advance(0)
    marked, unmarked = 0, None if mark else "--keep was given"
    if mark:
        try:
            _forget_times(store, changed)
            marked = len(discard_refuted(store, list(findings)))
        except (BusyError, OSError) as error:
            unmarked = str(error)
    return Verification(
        path,
        path.parent.name,
        source.asked,
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


def _compare(
    store: FeatureStore, split: Split, advance: Callable[[int], None], workers: int
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names of samples that are changed, new and gone."""
    stored = store.metadata
    pairs = {pair.name: pair for pair in split.pairs}
    hashed = LastUsed(file_sha256, most=2 * workers)  # once for all tiles of an image

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
    # Of the new ones stage one skips, and names, what it cannot read.
    new = [name for name in set(pairs) - set(stored) if not isinstance(_decode(pairs[name]), UnreadableImage)]
    return tuple(changed), tuple(sorted(new)), tuple(sorted(set(stored) - set(pairs)))


@or_unreadable
def _decode(pair: Pair) -> None:
    read_image(pair.image)
    if pair.mask is not None:
        raw_mask(pair.mask)


def _forget_times(store: FeatureStore, names: tuple[str, ...]) -> None:
    """Let changed files be hashed anew, even where they have kept size and time: by these they are known else."""
    if not names:
        return
    with store.lock():
        entries, stored = dict(store.manifest.samples()), store.metadata
        for name in set(names) & set(entries):
            facts = replace(stored[name], image_mtime_ns=-1)  # no file has it: who looks next hashes the file anew
            entries[name] = Entry(sample_key(facts), facts.to_json())
        store.set_manifest(Manifest(entries, store.manifest.rows, store.manifest.next_row))


def _in_megabytes(task: Task) -> Callable[[int], None]:
    """Count bytes, and tell the task of whole megabytes."""
    counted, told = 0, 0

    def advance(nbytes: int) -> None:
        nonlocal counted, told
        counted += nbytes
        if (due := round(counted / 1e6) - told) > 0:
            task.advance(due)
            told += due

    return advance


# -- removing it -------------------------------------------------------------------------------------------------


def remove_stores(name: str, cache_root: Path, before: Callable[[list[StoreState]], None]) -> list[StoreState]:
    """Remove the stores of a data set, a split or a folder, and nothing else.

    Args:
        name: a data set, a split, one's own folder, or a store's folder.
        cache_root: what lies outside of it is never removed, by whatever name or link it is reached.
        before: called with what is to be removed; raises in order to stop.

    Raises `UsageError` where there is no such store, it lies elsewhere or is none, `BusyError` while another
    process writes or reads it.
    """
    folders = _find([name], cache_root)
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
        raise UsageError(f"{folder} does not lie below {cache_root} as stores do: give the --cache-root that it is in.")
    # Not through a link, be it of the store or of its split's folder: what it leads to may be anyone's.
    if path.resolve() != root.resolve() / path.relative_to(root):
        raise UsageError(f"{folder} is a link to {path.resolve()}: remove the link, or give that store's --cache-root.")


# -- copies on S3 ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copy:
    """What came of copying a store.

    Attributes:
        source, target: their folders; one stands for a store on S3.
        shards, nbytes: how much was copied: what the copy did not have.
    """

    source: Path
    target: Path
    shards: int
    nbytes: int


def push_stores(names: Sequence[str], cache_root: Path, url: str, progress: Progress = SILENT) -> list[Copy]:
    """Copy named stores (none: all) from below a cache root to below `s3://bucket/path`: only what is missing there.

    Raises `UsageError` for a name without a store, and `CacheError` as `copy_store`.
    """
    return _copy_all(names, cache_root, place_of(_checked(url)), progress)


def pull_stores(url: str, names: Sequence[str], cache_root: Path, progress: Progress = SILENT) -> list[Copy]:
    """Copy named stores (none: all) from below `s3://bucket/path` to below a cache root: see `push_stores`."""
    return _copy_all(names, place_of(_checked(url)), cache_root, progress)


def _checked(url: str) -> str:
    if not url.startswith("s3://"):
        raise UsageError(f"{url} is no place on S3: write s3://BUCKET/PATH, and the stores' names after --cache-root.")
    return url


def _copy_all(names: Sequence[str], source_root: Path, target_root: Path, progress: Progress) -> list[Copy]:
    folders: dict[Path, None] = {}
    for name in names:
        found = named_folders(source_root, name)
        if not found:
            raise UsageError(f"There is no store of {name} below {source_root}: `dsu cache list` shows what there is.")
        folders |= dict.fromkeys(found)
    if not names:
        folders = dict.fromkeys(store_folders(source_root))
        if not folders:
            progress.say(f"There are no stores below {source_root}.")
    return [_copy(folder, target_root / folder.parent.name / folder.name, progress) for folder in folders]


def _copy(source: Path, target: Path, progress: Progress) -> Copy:
    counted = [0, 0]
    with ExitStack() as stack:

        def before(shards: int, nbytes: int) -> Callable[[int], None]:
            counted[:] = shards, nbytes
            if not shards:
                return lambda nbytes: None
            label = f"copying {source.parent.name}/{source.name}"
            return _in_megabytes(stack.enter_context(progress.task(label, max(1, round(nbytes / 1e6)), "MB")))

        copy_store(FeatureStore.open(source), target, before)
    _copy_splits(source.parent / SPLITS_FILE, target.parent / SPLITS_FILE, progress)
    return Copy(source, target, *counted)


def _copy_splits(source: Path, target: Path, progress: Progress) -> None:
    """What says which samples are held out goes along, unless there is another."""
    if not source.is_file():
        return
    content = source.read_bytes()
    if target.is_file() and target.read_bytes() != content:
        progress.say(f"{target} deals samples otherwise than {source}: it is left as it is.")
        return
    atomic_write(target, content)
    keep_beside(target)
