"""Arrays of per-sample tensors: rows, shards, commits, a manifest and fingerprints, on Zarr v3."""
