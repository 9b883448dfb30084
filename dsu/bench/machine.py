"""Timing in turns, and the machine's rates: matrix products, plain files, and writing and reading a store.

The store's features are random, with real shapes and data types.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from dsu.batches import Batch, prefetch
from dsu.config import LEVELS, DSUNetConfig
from dsu.features.samples import WRITERS, FeatureDataset, writing
from dsu.features.stores import FeatureStore
from dsu.network.resume import feature_block, feature_shape
from dsu.progress import SILENT, Progress
from dsu.runtime import Runtime
from dsu_cache import Entry, Fingerprint, Store, file_sizes

CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class Timing:
    """Seconds of one case, one value per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.seconds)


def ratio(of: Timing, to: Timing) -> float:
    """The time of `to` divided by that of `of`: the median over rounds of each round's ratio."""
    return statistics.median(b / a for a, b in zip(of.seconds, to.seconds, strict=True))


def seconds_of(call: Callable[[], object], device: torch.device = CPU, repeat: int = 1) -> float:
    """Average seconds of `repeat` consecutive calls; a GPU is synchronised before the first and after the last."""
    _synchronise(device)
    started = time.perf_counter()
    for _ in range(repeat):
        call()
    _synchronise(device)
    return (time.perf_counter() - started) / repeat


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    runtime: Runtime,
    progress: Progress = SILENT,
    *,
    repeat: int = 1,
) -> dict[str, Timing]:
    """Time every case once per round; each value is the average of `repeat` calls."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    with progress.task("timing", rounds * len(cases), "measurements") as task:
        for _ in range(rounds):
            for name, call in cases.items():
                task.note(name)
                found[name].append(seconds_of(call, runtime.device, repeat))
                task.advance()
    return {name: Timing(tuple(values)) for name, values in found.items()}


@dataclass(frozen=True)
class GpuWork:
    """The work of a GPU in one call.

    Attributes:
        kernels: number of kernels launched, or replayed by a graph.
        busy: total seconds of these kernels.
        eager: seconds of the same call without a graph; None if it is never captured.
    """

    kernels: int
    busy: float
    eager: float | None


def gpu_work(call: Callable[[], object], eager: Callable[[], object] | None, device: torch.device) -> GpuWork | None:
    """Profile one call after its warm-up; None without a GPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        seconds_of(call, device)
    work = summed(profiled.key_averages())
    if eager is None:
        return work
    eager()
    return replace(work, eager=seconds_of(eager, device, repeat=3))


def summed(events: Iterable[Any]) -> GpuWork:
    """The kernels in a profile (which has times in microseconds)."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]

    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    return GpuWork(
        sum(event.count for event in on_device), sum(event.self_device_time_total for event in on_device) / 1e6, None
    )


def matrix_rate(runtime: Runtime, sides: Sequence[int] = ()) -> float:
    """The machine's peak FLOP/s at a precision: the fastest of several large square matrix products."""
    on_gpu = runtime.device.type == "cuda"
    dtype = torch.bfloat16 if runtime.precision == "bf16" else torch.float32
    best = 0.0
    for side in sides or ((4096, 8192) if on_gpu else (1024, 2048)):
        a, b = (torch.randn(side, side, device=runtime.device).to(dtype) for _ in range(2))
        fastest = min(seconds_of(partial(torch.matmul, a, b), runtime.device, 20 if on_gpu else 1) for _ in range(7))
        best = max(best, 2 * side**3 / fastest)
    return best


def images(config: DSUNetConfig, count: int, *, dino: bool) -> Batch:
    """Random images in all four views, in the format of decoded ones; `dino` adds DINOv2's input."""
    rng = np.random.default_rng(0)

    def draw(side: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8))

    side = config.hiera_size
    return Batch.of(
        tuple(f"image{index}" for index in range(count)),
        tuple(index % 4 for index in range(count)),
        pixels=draw(side),
        mask=torch.from_numpy(rng.choice(np.array([0, 255], np.uint8), (count, side, side))),
        dino_pixels=draw(config.dino_size) if dino else None,
    )


# ---- writing a store ----


@dataclass(frozen=True)
class RandomStore:
    """A store with one view, and the same arrays as plain files.

    Attributes:
        store: the store, with `pixels`, `mask`, `V`, S1..S4 and the tokens that the cases resume from.
        plain: for each array a `.npy` file of shape (samples, *item), in the order of `names`.
        names: the samples' names.
        written: bytes per second written by stage one's writer.
        disk: bytes per second when writing plain files of the same sizes: see `disk_rate`.
    """

    store: FeatureStore
    plain: dict[str, Path]
    names: Sequence[str]
    written: float
    disk: float


@contextmanager
def random_store(config: DSUNetConfig, below: Path, samples: int, progress: Progress = SILENT) -> Iterator[RandomStore]:
    """Write a temporary store of random features in a folder of stores; use inside a `with`."""
    below.mkdir(parents=True, exist_ok=True)
    rng, shapes = np.random.default_rng(0), _shapes(config)
    with TemporaryDirectory(prefix=".bench-", dir=below) as folder:
        store = FeatureStore.create(Path(folder) / "store", {})
        names = [f"sample{index:05}" for index in range(samples)]
        plain = {name: Path(folder) / f"{name}.npy" for name in shapes}
        seconds, total = 0.0, 0
        with store.lock(), progress.task("writing random features", len(shapes), "arrays") as task:
            store.set_manifest(store.manifest.assign({n: Entry(n, {}) for n in names}, store.rows_per_shard))
            for name, (shape, kind) in shapes.items():
                values = _draw(rng, (samples, *shape), kind)
                np.save(plain[name], values)
                store.add_array(name, shape, kind, 1, Fingerprint({}))
                seconds += seconds_of(partial(_write, store, name, values))
                total += values.nbytes
                task.advance()
        yield RandomStore(store, plain, names, total / seconds, disk_rate(data_sizes(store), below))


def _write(store: FeatureStore, name: str, values: NDArray[np.generic]) -> None:
    with writing(store) as writer:
        for _, shard in store.missing(name, [0]):
            rows = store.rows_in_shard(shard)
            some = store.manifest.names_at(*rows.tolist())
            writer.put(name, 0, shard, some, [torch.from_numpy(values[rows[0] : rows[-1] + 1])])


def _shapes(config: DSUNetConfig) -> dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]]:
    side, uint8, float16 = config.hiera_size, np.dtype(np.uint8), np.dtype(np.float16)
    levels = [f"S{level}" for level in LEVELS]
    firsts = {config.hiera.depth - depth for depth in config.usual_depths}
    tokens = [f"B{first}" for first in sorted(firsts - {feature_block(config, level) for level in levels} - {0})]
    features = {name: (feature_shape(config, name), float16) for name in ("V", *levels, *tokens)}
    return {"pixels": ((side, side, 3), uint8), "mask": ((side, side), uint8), **features}


def _draw(rng: np.random.Generator, shape: tuple[int, ...], kind: np.dtype[np.generic]) -> NDArray[np.generic]:
    """At most 16 random rows, repeated with cyclic shifts: faster than random numbers for all rows."""
    first = (min(shape[0], 16), *shape[1:])
    random = rng.integers(0, 256, first) if kind == np.uint8 else rng.standard_normal(first, np.float32)
    shifted = [np.roll(random.astype(kind), shift, axis=1) for shift in range(-(-shape[0] // len(random)))]
    values: NDArray[np.generic] = np.concatenate(shifted)
    return values[: shape[0]]


def disk_rate(sizes: Sequence[int], below: Path) -> float:
    """Bytes per second for plain files, each written and flushed once, by as many threads as stage one uses.

    The median of three rounds, in temporary folders below `below`.
    """
    content = memoryview(np.random.default_rng(0).bytes(max(sizes)))

    def write(path: Path, size: int) -> None:
        with path.open("wb") as file:
            file.write(content[:size])
            file.flush()
            os.fsync(file.fileno())

    rates = []
    for _ in range(3):
        with TemporaryDirectory(prefix=".bench-", dir=below) as folder, ThreadPoolExecutor(WRITERS) as pool:
            started = time.perf_counter()
            list(pool.map(write, [Path(folder) / str(number) for number in range(len(sizes))], sizes))
            rates.append(sum(sizes) / (time.perf_counter() - started))
    return statistics.median(rates)


def data_sizes(store: Store) -> list[int]:
    """The size of each of a store's data files, in bytes."""
    return [size for place, size in file_sizes(store.path).items() if "/c/" in place]


# ---- reading the store ----


@dataclass(frozen=True)
class ReadRow:
    """Reading rates of one set of arrays, for samples in random order.

    Attributes:
        what: the arrays.
        bytes_per_sample: bytes of one sample in these arrays.
        samples: samples per second as in training: hashes are verified, and files are in the page cache.
        against_plain: the reader's rate divided by that of numpy memory maps.
        cold: samples per second if the files are not in the page cache.
    """

    what: tuple[str, ...]
    bytes_per_sample: int
    samples: float
    against_plain: float
    cold: float


def measure_reading(
    stored: RandomStore, runtime: Runtime, rounds: int, progress: Progress = SILENT
) -> tuple[ReadRow, ...]:
    """Measure batches of 8 for the arrays of the paper's setting, and for those that resume from S3."""
    order = np.random.default_rng(1).permutation(len(stored.names))
    batches = [order[start : start + 8].tolist() for start in range(0, len(order), 8)]
    named = [[stored.names[index] for index in batch] for batch in batches]
    rows = []
    for arrays in (("pixels", "mask", "V"), ("mask", "V", "S1", "S2", "S3")):
        samples = FeatureDataset(stored.store, [name for name in arrays if name != "mask"], names=stored.names)
        maps = [np.load(stored.plain[name], mmap_mode="r") for name in arrays]
        read, plain = partial(_read_all, samples, named), partial(_index_all, maps, batches)
        read(), plain()
        timings = take_turns({"reader": read, "memory map": plain}, rounds, runtime, progress)
        _drop_page_cache(stored)
        cold = take_turns({"cold": read}, 1, runtime, progress)["cold"]
        rows.append(
            ReadRow(
                arrays,
                sum(stored.store.arrays[name].item_nbytes for name in arrays),
                len(order) / timings["reader"].median,
                ratio(timings["reader"], timings["memory map"]),
                len(order) / cold.median,
            )
        )
    return tuple(rows)


def _read_all(samples: FeatureDataset, batches: Sequence[Sequence[str]]) -> None:
    for batch in prefetch(partial(samples.read, names, [0] * len(names)) for names in batches):
        assert "mask" in batch.images


def _index_all(maps: Sequence[NDArray[np.generic]], batches: Sequence[Sequence[int]]) -> None:
    for rows in batches:
        for array in maps:
            array[rows]


def _drop_page_cache(stored: RandomStore) -> None:
    """Ask the kernel to drop the store's files from the page cache, on systems that support this."""
    if not hasattr(os, "posix_fadvise"):
        return
    os.sync()
    for path in stored.store.path.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
