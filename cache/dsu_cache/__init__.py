"""A store of per-sample tensors: Zarr v3 arrays with commits, a manifest and fingerprints."""

from dsu_cache.arrays import ArrayInfo, Compressor
from dsu_cache.commits import ShardId
from dsu_cache.errors import BusyError, CacheError, CorruptError, StaleError
from dsu_cache.fingerprints import FieldDifference, Fingerprint
from dsu_cache.manifest import Changes, Entry, Manifest
from dsu_cache.reader import Reader
from dsu_cache.records import JSON
from dsu_cache.store import Store

__all__ = [
    "JSON",
    "ArrayInfo",
    "BusyError",
    "CacheError",
    "Changes",
    "Compressor",
    "CorruptError",
    "Entry",
    "FieldDifference",
    "Fingerprint",
    "Manifest",
    "Reader",
    "ShardId",
    "StaleError",
    "Store",
]
