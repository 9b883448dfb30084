"""Copies of stores on S3: pushing there, and pulling from there."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dsu.data.splitting import SPLITS_FILE
from dsu.errors import UsageError
from dsu.features.stores import FeatureStore, named_folders, store_folders
from dsu.features.upkeep import in_megabytes
from dsu.files import atomic_write
from dsu.progress import SILENT, Progress
from dsu_cache import copy_store, keep_beside, place_of

__all__ = ["Copy", "pull_stores", "push_stores"]


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
            return in_megabytes(stack.enter_context(progress.task(label, max(1, round(nbytes / 1e6)), "MB")))

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
