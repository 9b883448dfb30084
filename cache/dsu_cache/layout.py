"""What makes a folder a store: its metadata, its own folders, and how it comes to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dsu_cache.arrays import RESERVED, Compressor, clear
from dsu_cache.commits import marked
from dsu_cache.errors import CacheError, CorruptError
from dsu_cache.locks import creating, locked
from dsu_cache.manifest import Manifest, remove_superseded, save_manifest
from dsu_cache.metadata import METADATA, group, read_metadata, write_metadata
from dsu_cache.records import JSON, remove_strays, sync

FORMAT: Final = 2


def lay_out(path: Path, attributes: Mapping[str, JSON], rows_per_shard: int, compressor: Compressor) -> None:
    """Make an empty store of a new or empty folder: see `Store.create`."""
    if rows_per_shard < 1 or compressor not in (None, "zstd", "blosc"):
        raise ValueError(
            f"a store cannot have {rows_per_shard} rows a shard and compressor {compressor!r}: "
            "use at least 1 row, and None, 'zstd' or 'blosc'"
        )
    if path.exists() and not path.is_dir():
        raise CacheError(f"{path} is there already and is no folder: choose a new or empty folder for the store")
    path.mkdir(parents=True, exist_ok=True)
    with creating(path):
        if (path / METADATA).is_file():
            raise CacheError(
                f"the store {path} is there already: if another process has just made it, run the same command again"
            )
        # An interrupted creation leaves no more than the store's own folders: the group's file comes last.
        if not all(_left_by_creation(entry) for entry in path.iterdir()):
            raise CacheError(f"{path} is there already: open it, or choose a new or empty folder for the store")
        clear(*(path / name for name in RESERVED if (path / name).exists()))
        write_groups(path)
        save_manifest(path / "manifest", Manifest())
        layout: JSON = {"format": FORMAT, "rows_per_shard": rows_per_shard, "compressor": compressor}
        write_metadata(path, group({"store": layout, "attributes": dict(attributes)}))


def read_layout(path: Path) -> dict[str, Any]:
    """Return a store's metadata: its layout as `store`, its owner's notes as `attributes`.

    Raises:
        CacheError: there is no store in `path`, or one of another format.
        CorruptError: its metadata is damaged or missing.
    """
    if not (path / METADATA).is_file() and not (path / "manifest").is_dir():
        raise CacheError(f"there is no store in {path}: create one, or correct the path")
    try:
        attributes: dict[str, Any] = read_metadata(path)["attributes"]
    except CorruptError:
        _refuse_other_formats(path)
        raise
    return attributes


def write_groups(path: Path) -> None:
    """Write the store's own folders: Zarr groups too, so that who lists the store finds nothing without a name."""
    for name in RESERVED:
        (path / name).mkdir(parents=True, exist_ok=True)
        write_metadata(path / name, group({}))


def named_arrays(path: Path) -> list[str]:
    """Return the arrays that have metadata or any marker: an interrupted removal leaves neither for long."""
    with_metadata = {file.parent.name for file in path.glob(f"*/{METADATA}")} - set(RESERVED)
    with_markers = {folder.name for folder in (path / "commits").glob("*/") if marked(folder)}
    return sorted(with_metadata | with_markers)


def tidy(path: Path) -> None:
    """Remove what interrupted writers left of metadata and manifests; wants the store's lock."""
    for folder in (path, *path.glob("*/")):
        remove_strays(folder / METADATA)
    write_groups(path)
    remove_superseded(path / "manifest")


def is_store(path: Path) -> bool:
    """Whether a folder is a store, perhaps a damaged or unfinished one: has two of what only stores have together."""
    return sum(((path / METADATA).is_file(), *((path / name).is_dir() for name in RESERVED))) >= 2


def remove_store(path: Path) -> None:
    """Remove a store with all its data, and the folder.

    Raises:
        CacheError: the folder is no store, or holds something else besides.
        BusyError: another process is writing to the store or reading it.
    """
    if not is_store(path):
        raise CacheError(f"{path} is no store, so it is not removed: check the name")
    arrays = {*RESERVED, *named_arrays(path), *(folder.parent.name for folder in path.glob("*/c/"))}
    foreign = sorted(e.name for e in path.iterdir() if e.name not in arrays and not e.name.startswith(METADATA))
    if foreign:
        raise CacheError(f"{path} holds {', '.join(foreign[:3])}, no part of a store: move it elsewhere first")
    (path / "manifest").mkdir(exist_ok=True)
    with (
        locked(path / "manifest" / "lock", f"the store {path} is being written"),
        locked(path / "manifest" / "readers", f"the store {path} is being read"),
    ):
        # First what makes it a store, last what tells that it was one: an interrupted removal can be done again.
        (path / METADATA).unlink(missing_ok=True)
        sync(path)
        clear(*(path / name for name in sorted(arrays - {"manifest"}) if (path / name).exists()), path / "manifest")
        remove_strays(path / METADATA)
    path.rmdir()


def _left_by_creation(entry: Path) -> bool:
    return entry.name in RESERVED or (entry.name.startswith(f"{METADATA}.") and entry.suffix == ".partial")


def _refuse_other_formats(path: Path) -> None:
    """Raise `CacheError` for what is whole but not of this format: it has no seal, or another one."""
    try:
        found = json.loads((path / METADATA).read_bytes())["attributes"].get("store", {}).get("format")
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return
    if found != FORMAT:
        raise CacheError(
            f"{path} is not a store of format {FORMAT} but {found}: "
            "use the version of the program that wrote it, or make the store again"
        )
