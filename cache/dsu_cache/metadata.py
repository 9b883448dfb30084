"""Zarr's metadata files, each with a seal: the sha256 of its own other bytes, kept among its attributes.

Zarr checks chunks, but not the `zarr.json` that says what they are: a flipped bit there may be a valid shape, type or
fingerprint. Zarr readers know nothing of the seal and need not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from dsu_cache.errors import CorruptError
from dsu_cache.records import JSON, replacing

METADATA: Final = "zarr.json"
_SEAL: Final = b'"seal": "'
_DIGITS: Final = 64


def group(attributes: Mapping[str, JSON]) -> dict[str, JSON]:
    """Return the metadata of a Zarr v3 group."""
    return {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}


def write_metadata(folder: Path, document: Mapping[str, JSON]) -> None:
    """Make `document`, sealed, the metadata of a Zarr folder: at once, and on return it is on the disk."""
    path, content = folder / METADATA, _sealed(document)
    if path.is_file() and path.read_bytes() == content:
        return
    with replacing(path) as file:
        file.write(content)


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a Zarr folder as it was written, without the seal.

    Raises:
        CorruptError: it is missing, or its seal does not fit it.
    """
    path = folder / METADATA
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None
    before, key, after = content.rpartition(_SEAL)
    if after[:_DIGITS] != _digest(before + key + after[_DIGITS:]):
        raise CorruptError(f"{path} is damaged (its bytes do not match their checksum)")
    document = cast("dict[str, Any]", json.loads(content))
    del document["attributes"]["seal"]
    return document


def _sealed(document: Mapping[str, JSON]) -> bytes:
    # Last among the attributes, so that it is found from the end, whatever they hold.
    attributes = {**cast("Mapping[str, JSON]", document["attributes"]), "seal": ""}
    content = json.dumps({**document, "attributes": attributes}, indent=2, allow_nan=False).encode()
    before, key, after = content.rpartition(_SEAL)
    return before + key + _digest(content) + after


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
