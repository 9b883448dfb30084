"""What can go wrong with a store, as one family of exceptions; `StaleError` is in `fingerprints`."""


class CacheError(Exception):
    """Something about a store that its user can act on; the message says what and how."""


class CorruptError(CacheError):
    """Stored bytes are missing or are not the bytes that were written."""


class BusyError(CacheError):
    """Another process is writing to the store."""
