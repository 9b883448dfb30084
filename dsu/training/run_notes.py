"""Notes for the user before a training run starts."""

from dsu.features.stores import FeatureStore
from dsu.graphs import EAGER_CALLS
from dsu.network.resume import LEVEL_NAMES, item_bytes, resume_point
from dsu.runtime import Runtime
from dsu.training.trainer import Trainer


def run_notes(trainer: Trainer, store: FeatureStore | None, runtime: Runtime) -> list[str]:
    """Notes on device, parameters, resume point and cost, and on stored levels that would make the run faster.

    Args:
        trainer: the run's trainer.
        store: the store of its training split, if any.
        runtime: device and precision.
    """
    config, point = trainer.network.config, trainer.main.point
    depth, first = config.hiera.depth, config.first_adapted
    notes = [f"device: {runtime.describe()}"]
    adapted = f"adapters in front of the last {config.adapt_last} of {depth} blocks" if first < depth else "no adapters"
    notes.append(
        f"trains: {sum(p.numel() for p in trainer.network.head.parameters()) / 1e6:.3f} M parameters ({adapted})"
    )
    if runtime.device.type == "cuda":
        notes.append(f"steps: one CUDA graph each, after {EAGER_CALLS} eager ones")
    settings, world = trainer.settings, trainer.world
    if world.connected:
        exchanges = 2 * trainer.network.head.norm_groups + 1
        notes.append(
            f"processes: {world.size} divide batches of {settings.batch_size}; {exchanges} exchanges per step "
            "(norms, gradients)"
        )
    if settings.freeze_adapter_epochs:
        notes.append(
            f"frozen adapters: {settings.freeze_adapter_epochs} epochs without adapters, which then start as the "
            "identity"
        )
    if trainer.empty is not None:
        notes.append(f"balance: half of the draws come from {len(trainer.empty):,} images without an object")
    size = sum(
        item_bytes(config, name, trainer.settings.feature_dtype or "float16") for name in (*point.features, "mask")
    )
    if store is not None and not trainer.settings.end_to_end:
        runs = f"Hiera's blocks {point.block + 1} to {depth} run" if point.block < depth else "no encoder runs"
        notes.append(f"starts from: {' + '.join(point.features)} ({size / 1e6:.2f} MB per image); {runs}")
    else:
        notes.append(
            f"end to end: both encoders run; rounded at {' + '.join(n for n in point.features if n != 'pixels')}"
        )
    if point.block < first and store is not None:
        tokens = {f"B{first}"} if first < depth else set()
        better = resume_point(config, {*point.guides, *LEVEL_NAMES, "pixels", *tokens})
        levels = [name for name in better.features if name not in (*point.guides, "pixels")]
        command = store.command("--features", ",".join(levels), "--level-views", settings.views)
        notes.append(
            f"faster: with {' and '.join(levels)} stored in the views {settings.views}, {first - point.block} frozen "
            f"blocks could be skipped ({command})"
        )
    return notes
