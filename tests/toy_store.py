"""A program that writes a small store in three steps, and continues if it was interrupted; for `kills.Forks`.

toy_store.run with sys.argv: [program, folder]
"""

import sys
from pathlib import Path

import numpy as np

import dsu_cache.arrays
from dsu_cache import Entry, Fingerprint, Store

__all__ = ["run"]

NAMES = ("abcde", "aBcdef", "aBcdef")
"""The samples of each step: in the second step, one sample is changed and one is new."""


def run() -> None:
    """Do the remaining steps; markers are packed whenever the lock is released."""
    dsu_cache.arrays.PACKED_FROM = 1  # type: ignore[misc]
    folder = Path(sys.argv[1])
    store = Store.open(folder) if (folder / "zarr.json").exists() else Store.create(folder, {"step": 0}, 3)
    step = store.attributes["step"]
    assert isinstance(step, int)
    for number in range(step, len(NAMES)):
        with store.lock():
            manifest = store.manifest.assign({name.lower(): Entry(name) for name in NAMES[number]}, 3)
            if manifest != store.manifest:
                store.set_manifest(manifest)
            # In the last step y is replaced; its first shard has a gap at b's row.
            _want(store, "x", Fingerprint({"is": "x"}))
            _want(store, "y", Fingerprint({"is": "y" if number < 2 else "z"}))
            for array in ("x", "y"):
                for view, shard in store.missing(array, [0]):
                    rows = store.rows_in_shard(shard)
                    store.write_shard(
                        array, view, shard, rows, np.stack([np.full(4, row + 1, "int64") for row in rows])
                    )
            store.set_attributes({"step": number + 1})
    with store.lock():
        pass  # leaving the lock packs the last markers


def _want(store: Store, name: str, fingerprint: Fingerprint) -> None:
    if name in store.arrays and store.arrays[name].fingerprint != fingerprint:
        store.remove_array(name)
    if name not in store.arrays:
        store.add_array(name, (4,), "int64", 1, fingerprint)
