"""Profile a training step on a GPU: the kernels and their shares of time, eagerly and as one graph.

Usage, in the project's root: python tests/gpu/profile_step.py PRESET CASE...

A case is DEPTH[xBATCH][e][c]: the number of blocks with adapters (or `all`), the batch size (default: 8), `e` for end
to end, `c` for compiled; for example `all`, `12x32`, `allx8e`, `allc`. Without a GPU, each case runs a single step, as
a test.
"""

import re
import sys

import torch

from dsu.batches import Batch
from dsu.bench.machine import images, seconds_of, summed
from dsu.config import DSUNetConfig, build_config
from dsu.encoders.weights import load_encoders
from dsu.graphs import EAGER_CALLS
from dsu.heads.head_file import HeadInfo
from dsu.network.network import DSUNet
from dsu.network.resume import earliest, feature_shape, resume_point
from dsu.runtime import choose_runtime
from dsu.settings import EncoderWeights, TrainingSettings
from dsu.training.trainer import Trainer, TrainingPhase

SHOWN = 20
LEVELS = ("S1", "S2", "S3", "S4")


def build(
    config: DSUNetConfig, encoders: tuple, size: int, *, end_to_end: bool, compiled: bool
) -> tuple[Trainer, Batch]:
    """A trainer and a batch of random numbers for it, on the device."""
    first = config.first_adapted
    stored = (
        {"pixels", "V"}
        if first == 0
        else {"pixels", "V", *LEVELS, *([f"B{first}"] if 0 < first < config.hiera.depth else [])}
    )
    point = earliest(config) if end_to_end else resume_point(config, stored)
    hiera, dino = encoders
    network = DSUNet(config, hiera, dino if end_to_end else None, feature_dtype=torch.float16).train()
    trainer = Trainer(
        network,
        TrainingPhase(point, None, None),  # type: ignore[arg-type]  # batches are given
        TrainingSettings(batch_size=size, compile=compiled),
        HeadInfo(config=config),
        choose_runtime(),
        keep_best=False,
    )
    drawn = images(config, size, dino=end_to_end)
    features = {
        name: torch.randn(size, *feature_shape(config, name)).half() for name in point.features if name != "pixels"
    }
    batch = Batch.of(
        drawn.names,
        drawn.views,
        features={} if end_to_end else features,
        **{
            name: image
            for name, image in drawn.images.items()
            if name != "pixels" or end_to_end or name in point.features
        },
    )
    return trainer, batch.to(trainer.runtime.device)


def run(name: str, config: DSUNetConfig, encoders: tuple) -> None:
    found = re.fullmatch(r"(all|\d+)(?:x(\d+))?(e?)(c?)", name)
    if found is None:
        raise SystemExit(f"{name!r} is no case: give DEPTH[xBATCH][e][c], such as all, 12x32 or allx8e.")
    depth = config.hiera.depth if found[1] == "all" else int(found[1])
    size = int(found[2] or 8)
    adapted = config.model_copy(update={"adapt_last": depth})
    trainer, batch = build(adapted, encoders, size, end_to_end=bool(found[3]), compiled=bool(found[4]))
    device = trainer.runtime.device
    if device.type != "cuda":
        trainer.step(batch)
        print(f"{name}: one step taken on a CPU", flush=True)
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    ready = seconds_of(lambda: [trainer.step(batch) for _ in range(EAGER_CALLS + 2)], device)
    graph = seconds_of(lambda: trainer.step(batch), device, 20) * 1e3
    reserved = torch.cuda.max_memory_reserved(device) / 1e9
    eager = seconds_of(lambda: trainer._eager_step(batch), device, 5) * 1e3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        seconds_of(lambda: trainer.step(batch), device)
    events = [event for event in profiled.key_averages() if event.self_device_time_total]
    work = summed(events)
    print(
        f"{name}: eager {eager:.1f} ms, {'graph' if trainer._steps.captured else 'NOT CAPTURED'} {graph:.1f} ms "
        f"({size / graph * 1e3:.0f} images/s), {work.kernels:,} kernels busy {work.busy * 1e3:.1f} ms, "
        f"{reserved:.1f} GB reserved, ready after {ready:.0f} s {trainer._steps.refusal or ''}",
        flush=True,
    )
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:SHOWN]:
        print(f"  {event.self_device_time_total / 1e3:8.2f} ms x{event.count:5d}  {event.key[:110]}", flush=True)


def main(preset: str, *cases: str) -> None:
    config = build_config(preset)
    runtime = choose_runtime()
    with runtime.device:  # drawing weights on the device is ten times as fast
        hiera, dino, _ = load_encoders(config, EncoderWeights(random=True), hiera=True, dino=True)
    runtime.place(hiera)
    runtime.place(dino)
    print(runtime.describe(), flush=True)
    for name in cases:
        run(name, config, (hiera, dino))


if __name__ == "__main__":
    main(*sys.argv[1:])
