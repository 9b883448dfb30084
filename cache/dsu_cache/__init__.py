"""A store of per-sample tensors: Zarr v3 arrays with commits, a manifest and fingerprints."""

from dsu_cache.arrays import ArrayInfo, Compressor, folder_nbytes
from dsu_cache.audit import Finding, audit, audited_nbytes, check_readable, discard_refuted, orphans
from dsu_cache.commits import ShardId
from dsu_cache.errors import BusyError, CacheError, CorruptError, StaleError
from dsu_cache.fingerprints import FieldDifference, Fingerprint
from dsu_cache.layout import is_store, remove_store
from dsu_cache.locks import holder
from dsu_cache.manifest import Entry, Manifest
from dsu_cache.reader import Reader
from dsu_cache.records import JSON
from dsu_cache.store import Store

__all__ = [
    "JSON",
    "ArrayInfo",
    "BusyError",
    "CacheError",
    "Compressor",
    "CorruptError",
    "Entry",
    "FieldDifference",
    "Finding",
    "Fingerprint",
    "Manifest",
    "Reader",
    "ShardId",
    "StaleError",
    "Store",
    "audit",
    "audited_nbytes",
    "check_readable",
    "discard_refuted",
    "folder_nbytes",
    "holder",
    "is_store",
    "orphans",
    "remove_store",
]
