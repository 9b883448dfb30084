"""Devices and precisions."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from support import toy_network

from dsu.runtime import Runtime, choose_runtime


def at(precision: str) -> Runtime:
    return choose_runtime("cpu", precision)  # type: ignore[arg-type]


def test_weights_stored_in_bf16_give_the_same_results_as_autocast() -> None:
    """Bit-identical outputs and gradients of all trained parameters."""
    generator = torch.Generator().manual_seed(5)
    pixels, dino_pixels = (torch.randn(2, 3, side, side, generator=generator) for side in (128, 126))
    found = []
    for place in (False, True):
        network = toy_network().train()
        if place:
            at("bf16").place(network)
            assert network.hiera is not None and network.hiera.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
            assert network.head.adapters["0"].down.weight.dtype == torch.float32
        with at("bf16").autocast():
            outputs = network(pixels, dino_pixels).side_logits
        sum(output.float().square().mean() for output in outputs).backward()
        found.append([*outputs, *(parameter.grad for parameter in network.head.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_at_fp32_nothing_is_rounded() -> None:
    network = at("fp32").place(toy_network())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_bf16_depends_on_the_chosen_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fake GPUs: the current one, cuda:0, does not support bf16."""
    current = [0]

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen.index or 0)
        yield
        current.pop()

    monkeypatch.setattr(torch, "empty", lambda *sizes, device: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: current[-1] == 1)
    assert [choose_runtime(f"cuda:{index}").precision for index in range(2)] == ["fp32", "bf16"]


PEAK = """
import torch
from dsu.runtime import PeakMemory
blocks = [torch.ones(200 * 2**20, dtype=torch.uint8) for _ in range(2)]
del blocks
memory = PeakMemory(torch.device("cpu"))
before = memory.bytes()
block = torch.ones(64 * 2**20, dtype=torch.uint8)
del block
print((memory.bytes() - before) / 2**20)
"""


def test_peak_memory_includes_freed_memory() -> None:
    """In a new process, since other tests allocate memory in this one."""
    found = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 48 < float(found.stdout) < 80


@pytest.mark.gpu
def test_feed_on_a_gpu_gives_the_same_batches() -> None:
    from dsu.batches import Batch, feed

    class Counting:
        names = ("a", "b", "c")

        def read(self, names: list[str], views: list[int]) -> Batch:
            pixels = torch.full((len(names), 64, 64, 3), ord(names[0]), dtype=torch.uint8)
            return Batch.of(names, views, pixels=pixels)

    drawn = [([name], [1]) for name in "abc" * 50]
    for (names, _), batch in zip(drawn, feed(Counting(), drawn, torch.device("cuda")), strict=True):
        assert batch.images["pixels"].is_cuda
        assert (batch.flipped().images["pixels"] == ord(names[0])).all()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_do_not_synchronise_with_the_gpu(precision: str) -> None:
    from dsu.bench.machine import images
    from dsu.heads.head_file import HeadInfo
    from dsu.network.resume import earliest
    from dsu.settings import TrainingSettings
    from dsu.training.trainer import Trainer, TrainingPhase

    network = toy_network(feature_dtype=torch.float16)
    config, runtime = network.config, choose_runtime("cuda", precision)  # type: ignore[arg-type]
    batch = images(config, 4, dino=True).pinned_for(runtime.device)
    trainer = Trainer(
        network.train(),
        TrainingPhase(earliest(config), None, None),  # type: ignore[arg-type]  # batches are given
        TrainingSettings(),
        HeadInfo(config=config),
        runtime,
        keep_best=False,
    )
    trainer.step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
