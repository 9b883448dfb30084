"""A store of per-sample tensors: Zarr v3 arrays with commits, a manifest and fingerprints."""

from dsu_cache.arrays import ArrayInfo, Compressor, ShardId
from dsu_cache.audit import Damage, audit, audited_nbytes, discard_refuted, orphans
from dsu_cache.files import JSON, BusyError, CacheError, CorruptError, file_sizes
from dsu_cache.fingerprints import FieldDifference, Fingerprint, StaleError
from dsu_cache.locks import holder, locked
from dsu_cache.manifest import Entry, Manifest
from dsu_cache.reader import Reader
from dsu_cache.store import Store, is_store, remove_store, writer_of

__all__ = [
    "JSON",
    "ArrayInfo",
    "BusyError",
    "CacheError",
    "Compressor",
    "CorruptError",
    "Damage",
    "Entry",
    "FieldDifference",
    "Fingerprint",
    "Manifest",
    "Reader",
    "ShardId",
    "StaleError",
    "Store",
    "audit",
    "audited_nbytes",
    "discard_refuted",
    "file_sizes",
    "holder",
    "is_store",
    "locked",
    "orphans",
    "remove_store",
    "writer_of",
]
