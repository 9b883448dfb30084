"""How time and memory for a store's manifest grow with the number of samples, from ten thousand to a million."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from dsu.config import build_config
from dsu.data.datasets import SourceFolder
from dsu.data.inspection import SampleMetadata
from dsu.data.masks import MaskFacts
from dsu.data.views import ALL_FLIPS, draw_samples, draw_view
from dsu.features.maintenance import describe_stores
from dsu.features.stores import FeatureStore, sample_key
from dsu.progress import SILENT, Progress
from dsu.runtime import PeakMemory
from dsu_cache import Entry, Fingerprint, file_sizes
from dsu_cache.arrays import Commit, ShardId, save_commits

COUNTS: Final = (10_000, 100_000, 1_000_000)
ADDED: Final = 1000
_VIEWS: Final = {"pixels": 1, "mask": 1, "V": 4}
"""The arrays of a simulated store, and their numbers of views."""
_SHARD_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class ScaleRow:
    """Seconds and bytes for one number of samples, each measured in a new process.

    Attributes:
        samples: number of samples.
        manifest: size of the manifest in bytes.
        begin: seconds from the end of the file scan until stage one decodes the first image.
        open, open_memory: seconds to open the store, and bytes in addition to a process that opens an empty one.
        add, added: seconds to add a thousand samples, and bytes written for this.
        epoch: seconds to draw one epoch's order and views.
        info: seconds of `dsu cache info` for a complete store.
    """

    samples: int
    manifest: int
    begin: float
    open: float
    open_memory: int
    add: float
    added: int
    epoch: float
    info: float


def measure_scale(below: Path, counts: Sequence[int] = COUNTS, progress: Progress = SILENT) -> tuple[ScaleRow, ...]:
    """Measure simulated stores in temporary folders below a folder, one after the other."""
    below.mkdir(parents=True, exist_ok=True)
    rows = []
    with progress.task("simulating stores", len(counts) * 4, "steps") as task:
        for count in counts:
            with TemporaryDirectory(prefix=".bench-", dir=below) as folder:
                root = Path(folder)
                begin = _in_new_process(_begin, root, count)
                task.advance()
                manifest = sum(file_sizes(_path(root) / "manifest").values())
                FeatureStore.create(root / "empty", {})
                _, empty = _in_new_process(_open, root / "empty")
                opened, memory = _in_new_process(_open, _path(root))
                task.advance()
                epoch, info = _in_new_process(_epoch, root), _in_new_process(_info, root, count)
                task.advance()
                add, added = _in_new_process(_add, root, count)
                task.advance()
            rows.append(ScaleRow(count, manifest, begin, opened, memory - empty, add, added, epoch, info))
    return tuple(rows)


def _in_new_process(measure: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a new process, to measure its memory separately; returns its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def _path(root: Path) -> Path:
    return root / "simulated-TR" / "toy"


def _simulated(count: int) -> Iterator[tuple[str, SampleMetadata]]:
    """Simulate the result of a file scan: images and masks as in DUTS, in a thousand folders."""

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    for i in range(count):
        mtime_ns = 1_700_000_000_000_000_000 + i * 1_234_567
        size, mask = (400, 300 + i % 50), MaskFacts("grey", None, 0, 255, i % 3001, i % 60_013)
        yield (
            f"part_{i % 1000:03}/image_{i:08}",
            SampleMetadata(
                image_sha256=digest(f"image {i}"),
                image_bytes=30_000 + i % 99_991,
                image_mtime_ns=mtime_ns,
                size=size,
                mask_sha256=digest(f"mask {i}"),
                mask_bytes=900 + i % 7001,
                mask_mtime_ns=mtime_ns,
                mask_size=size,
                mask=mask,
                pixels_sha256=digest(f"pixels {i}"),
            ),
        )


def _entries(found: dict[str, SampleMetadata]) -> dict[str, Entry]:
    return {name: Entry(sample_key(facts), facts.to_json()) for name, facts in found.items()}


def _begin(root: Path, count: int) -> float:
    found = dict(_simulated(count))
    source = SourceFolder("simulated-TR", "simulated", "train", False, str(root / "images"), str(root))
    started = time.perf_counter()
    store = FeatureStore.create(
        _path(root), {"source": vars(source), "config": build_config("toy").model_dump(mode="json"), "encoders": {}}
    )
    with store.lock():
        manifest = store.manifest.assign(_entries(found), store.rows_per_shard)
        if manifest != store.manifest:
            store.set_manifest(manifest)
        for name, views in _VIEWS.items():
            store.add_array(name, (1, 1), "uint8", views, Fingerprint({}))
    todo = [store.missing(name, range(views)) for name, views in _VIEWS.items()]
    [store.manifest.names_at(row) for row in store.rows_in_shard(todo[0][0].shard).tolist()]
    return time.perf_counter() - started


def _open(path: Path) -> tuple[float, int]:
    memory = PeakMemory(torch.device("cpu"))
    started = time.perf_counter()
    names = FeatureStore.open(path).manifest.names
    seconds = time.perf_counter() - started
    del names
    return seconds, memory.bytes()


def _epoch(root: Path) -> float:
    names = FeatureStore.open(_path(root)).manifest.names
    started = time.perf_counter()
    for name, turn in draw_samples(0, 3, names, None):
        draw_view(0, 3, name, ALL_FLIPS, turn)
    return time.perf_counter() - started


def _info(root: Path, count: int) -> float:
    store = FeatureStore.open(_path(root))
    for name, views in _VIEWS.items():
        _add_empty_shards(store, name, views)
    started = time.perf_counter()
    (state,) = describe_stores(["simulated-TR"], root)
    assert state.samples == count, state
    assert state.complete, state
    return time.perf_counter() - started


def _add_empty_shards(store: FeatureStore, name: str, views: int) -> None:
    """Complete an array with sparse files without data."""
    stored, commits = store.stored(name), {}
    for shard in store.missing(name, range(views)):
        file = stored.file(ShardId(*shard))
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as opened:
            opened.truncate(_SHARD_BYTES)
        rows = store.rows_in_shard(shard.shard).tolist()
        commits[shard] = Commit(rows, _SHARD_BYTES, hashlib.sha256(str(file).encode()).hexdigest())
    save_commits(stored.commits, commits, store.rows_per_shard)


def _add(root: Path, count: int) -> tuple[float, int]:
    store, found = FeatureStore.open(_path(root)), dict(_simulated(count + ADDED))
    manifest = _path(root) / "manifest"
    entries, known = _entries(found), set(manifest.iterdir())
    started = time.perf_counter()
    with store.lock():
        store.set_manifest(store.manifest.assign(entries, store.rows_per_shard))
    written = sum(path.stat().st_size for path in manifest.iterdir() if path not in known)
    return time.perf_counter() - started, written
