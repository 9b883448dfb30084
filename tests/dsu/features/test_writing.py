"""Writing by several threads: pending data is bounded, and a failure is raised at once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from dsu.errors import DsuError
from dsu.features import samples as module
from dsu.features.samples import WRITERS, writing
from dsu_cache import Entry, Fingerprint, Store

SHARDS = 12
ROWS = 4
SAMPLES = ("a", "b", "c", "d")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store with four rows per shard."""
    store = Store.create(tmp_path / "store", {}, ROWS)
    entries = {f"{index:03}": Entry(str(index)) for index in range(SHARDS * ROWS)}
    store.set_manifest(store.manifest.assign(entries, ROWS))
    store.add_array("V", (2,), "float16", 2, Fingerprint({}))
    return store


def parts(shard: int) -> list[torch.Tensor]:
    values = torch.arange(ROWS * 2).reshape(ROWS, 2).half() + shard
    return [values[:3], values[3:]]


def test_all_shards_are_written_when_the_context_is_left(store: Store) -> None:
    with writing(store) as writer:
        for shard in range(SHARDS):
            for view in range(2):
                writer.put("V", view, shard, SAMPLES, parts(shard))
    assert store.missing("V", [0, 1]) == []
    read = store.reader(["V"]).read(range(SHARDS * ROWS), [1] * SHARDS * ROWS)["V"]
    assert np.array_equal(read, torch.cat([torch.cat(parts(shard)) for shard in range(SHARDS)]).numpy())


class Slow:
    """Blocks all writing until `go` is set, or until the pool shuts down; `begun` counts the writes that have begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)
        real = Store.write_shard

        def write(*arguments: object) -> None:
            self.begun.release()
            assert self.go.wait(60)
            real(*arguments)  # type: ignore[arg-type]

        end = ThreadPoolExecutor.shutdown

        def shutdown(pool: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False) -> None:
            end(pool, wait=False, cancel_futures=cancel_futures)
            self.go.set()
            end(pool, wait=wait)

        monkeypatch.setattr(Store, "write_shard", write)
        monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)


def test_threads_write_in_parallel_and_put_waits_above_the_limit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    a_shard = sum(part.nbytes for part in parts(0))
    monkeypatch.setattr(module, "PENDING_BYTES", 6 * a_shard)
    handed_over = threading.Semaphore(0)

    def produce() -> None:
        with writing(store) as writer:
            for shard in range(SHARDS):
                handed_over.release()
                writer.put("V", 0, shard, SAMPLES, parts(shard))

    producer = threading.Thread(target=produce)
    producer.start()
    for _ in range(WRITERS):
        assert slow.begun.acquire(timeout=60)
    for _ in range(7):  # six pending, and one above the limit
        assert handed_over.acquire(timeout=60)
    assert not handed_over.acquire(timeout=0.2)
    slow.go.set()
    producer.join(60)
    assert store.missing("V", [0]) == []


def test_the_first_failure_ends_writing_after_shards_in_progress(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    broken = parts(1)
    broken[1][0, 0] = float("nan")

    def hand_over() -> None:
        with writing(store) as writer:
            writer.put("V", 0, 0, SAMPLES, parts(0))
            assert slow.begun.acquire(timeout=60)
            writer.put("V", 0, 1, SAMPLES, broken)

    with pytest.raises(DsuError, match="V of d has values that are not finite as float16"):
        hand_over()
    assert [shard for _, shard in store.missing("V", [0])] == list(range(1, SHARDS))


def test_an_interruption_drops_shards_that_have_not_begun(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)

    def hand_over() -> None:
        with writing(store) as writer:
            for shard in range(SHARDS):
                writer.put("V", 0, shard, SAMPLES, parts(shard))
            for _ in range(WRITERS):
                assert slow.begun.acquire(timeout=60)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hand_over()
    assert len(store.missing("V", [0])) == SHARDS - WRITERS


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_any_value_that_is_not_finite_is_found(value: float, kind: torch.dtype) -> None:
    for position in range(2 * ROWS):
        values = torch.zeros(ROWS, 2, dtype=kind)
        module._check_finite("V", values, SAMPLES)
        values.view(-1)[position] = value
        with pytest.raises(DsuError, match=f"V of {SAMPLES[position // 2]} has"):
            module._check_finite("V", values, SAMPLES)
