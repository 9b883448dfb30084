"""Toy trainings in float64 by several processes: `start` runs this file in each of them, and `main` is their work."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from support import toy_network

from dsu.batches import Batch, feed
from dsu.datasets import SampleDataset
from dsu.distributed import ALONE, LostError, World, connect
from dsu.heads.head_file import HeadInfo
from dsu.network.network import DSUNet
from dsu.network.resume import ResumePoint, resume_at, resume_point
from dsu.runtime import choose_runtime
from dsu.settings import TrainingSettings
from dsu.training.trainer import Trainer, TrainingPhase

__all__ = ["Drawn", "first_step", "start", "trained", "trainer"]

HOUSE: Final = Path(__file__).parents[1]


class Drawn(SampleDataset):
    """Random images and masks, each seeded by its name; every fourth mask is empty."""

    def read(self, names: Sequence[str], views: Sequence[int]) -> Batch:
        def draw(name: str, side: int, *more: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {side} {more}".encode()))
            return torch.randint(0, 256, (side, side, *more), dtype=torch.uint8, generator=generator)

        return Batch.of(
            names,
            views,
            pixels=torch.stack([draw(name, 128, 3) for name in names]),
            mask=torch.stack([draw(name, 128) * (int(name) % 4 > 0) for name in names]),
            dino_pixels=torch.stack([draw(name, 126, 3) for name in names]),
        )


@cache
def _network() -> DSUNet:
    return toy_network(adapt_last=3).double()


def trainer(world: World, folder: Path, count: int = 3, **settings: Any) -> Trainer:
    """A trainer with two batches per epoch, of two samples and of one; the adapters train from the third epoch on."""
    given = {"batch_size": 2, "freeze_adapter_epochs": 2, "val_every": 5, "sheet_every": 0, "device": "cpu"}
    resolved = TrainingSettings(**{**given, **settings})
    network = deepcopy(_network())
    train, validation = (Drawn({str(n): None for n in numbers}, None) for numbers in (range(count), range(100, 103)))

    def phase(point: ResumePoint) -> TrainingPhase:
        return TrainingPhase(point, train, validation)

    return Trainer(
        network,
        phase(resume_point(network.config, {"pixels", "V"})),
        resolved,
        HeadInfo(config=network.config),
        choose_runtime("cpu", "fp32"),
        keep_best=True,
        out=folder,
        frozen_adapters=phase(resume_at(network.config, "S4")),
        world=world,
    )


def first_step(world: World, folder: Path, count: int) -> dict[str, Any]:
    """Losses, gradients and buffers after one step on a batch of `count` samples, and the number of exchanges."""
    one = trainer(world, folder, count, freeze_adapter_epochs=0)
    one.network.train()
    exchanges = 0
    all_reduce = World.all_reduce

    def counted(self: World, tensor: torch.Tensor) -> None:
        nonlocal exchanges
        exchanges += 1
        all_reduce(self, tensor)

    World.all_reduce = counted  # type: ignore[method-assign]
    [batch] = feed(one.phase.train, one.epoch_batches(0), one.runtime.device, world)
    losses = one.step(batch)
    World.all_reduce = all_reduce  # type: ignore[method-assign]
    head = one.network.head
    return {
        "losses": losses,
        "gradients": {name: p.grad for name, p in head.named_parameters() if p.grad is not None},
        "buffers": dict(head.named_buffers()),
        "exchanges": exchanges,
    }


def trained(world: World, folder: Path, **settings: Any) -> dict[str, Any]:
    """A complete run, or the rest of one: its history, weights and buffers."""
    one = trainer(world, folder, **settings)
    before = one.validate(one.main.validation)  # type: ignore[arg-type]
    if (folder / "checkpoint.pt").exists():
        one.resume()
    one.run()
    return {"before": before, "history": one.history, "state": one.network.head.state_dict()}


def stopped(world: World, folder: Path, **settings: Any) -> dict[str, Any]:
    """Stop a run within its third epoch, after a checkpoint; returns its position."""
    one = trainer(world, folder, checkpoint_steps=1, **settings)

    class Stop(Exception):
        pass

    step, done = one.step, 0

    def counted(batch: Batch) -> torch.Tensor:
        nonlocal done
        done += 1
        if done == 6:
            raise Stop
        return step(batch)

    one.step = counted  # type: ignore[method-assign]
    try:
        one.run()
    except Stop:
        return {"epoch": one.epoch, "step": one.step_in_epoch}
    raise AssertionError("the run was not stopped")


def killed(world: World, folder: Path, victim: int, **settings: Any) -> dict[str, Any]:
    """Run until process `victim` dies in its second step; returns the error of the others."""
    one = trainer(world, folder, **settings)
    step, done = one.step, 0

    def counted(batch: Batch) -> torch.Tensor:
        nonlocal done
        done += 1
        if done == 2 and world.rank == victim:
            os._exit(9)
        return step(batch)

    one.step = counted  # type: ignore[method-assign]
    try:
        one.run()
    except LostError as error:
        return {"said": str(error), "epoch": one.epoch}
    raise AssertionError("the loss was not noticed")


def terminated(world: World, folder: Path) -> dict[str, Any]:
    """The first process waits for the second, which does nothing, and gets SIGTERM; the second lives until it is
    gone."""
    first, _ = world.all_gather(os.getpid())
    if world.is_main:
        threading.Timer(1, os.kill, (first, signal.SIGTERM)).start()
        world.all_reduce(torch.zeros(1))
    while psutil.pid_exists(first):
        time.sleep(0.1)
    return {}


def start(folder: Path, size: int, *steps: tuple[str, dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Run steps (a function of this file, and its settings) in `size` processes; returns each process's results.

    A step's folder is its number below `folder`, unless it names one. A process that has died lacks further results.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.save(steps, folder / "steps.pt")
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join(map(str, (HOUSE, HOUSE / "cache", HOUSE / "tests")))
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
        )
        for rank in range(size)
    ]
    try:
        for process in processes:
            process.wait(300)
    finally:
        for process in processes:
            process.kill()
    files = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(file, weights_only=False) if file.exists() else [] for file in files]


def main(folder: Path) -> None:
    """Run the steps as one of the processes."""
    found = []
    with connect() as world:
        for number, (name, settings) in enumerate(torch.load(folder / "steps.pt", weights_only=False)):
            out = folder / settings.pop("folder", str(number))
            out.mkdir(exist_ok=True)
            found.append(globals()[name](world, out, **settings))
            torch.save(found, folder / f"{world.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert ALONE.is_main
    main(Path(sys.argv[1]))
