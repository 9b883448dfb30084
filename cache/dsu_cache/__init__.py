"""A store of per-sample tensors: Zarr v3 arrays with commits, a manifest and fingerprints, in a folder or on S3."""

from dsu_cache.arrays import ArrayInfo, Compressor, ShardId
from dsu_cache.audit import Damage, audit, audited_nbytes, discard_refuted, orphaned_objects, orphans
from dsu_cache.copying import copy_store
from dsu_cache.files import JSON, BusyError, CacheError, CorruptError, file_sizes
from dsu_cache.fingerprints import FieldDifference, Fingerprint, StaleError
from dsu_cache.locks import holder, locked
from dsu_cache.manifest import Entry, Manifest
from dsu_cache.reader import Reader
from dsu_cache.remote import folder_of, keep_beside, mirror_folder, url_of, with_urls
from dsu_cache.storage import RemoteError
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
    "RemoteError",
    "ShardId",
    "StaleError",
    "Store",
    "audit",
    "audited_nbytes",
    "copy_store",
    "discard_refuted",
    "file_sizes",
    "folder_of",
    "holder",
    "is_store",
    "keep_beside",
    "locked",
    "mirror_folder",
    "orphaned_objects",
    "orphans",
    "remove_store",
    "url_of",
    "with_urls",
    "writer_of",
]
