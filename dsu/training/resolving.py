"""Resolve open settings from the store, the data and the paper, and check for contradictions."""

from dsu.config import DSUNetConfig
from dsu.distributed import World
from dsu.errors import UsageError
from dsu.features.stores import FeatureStore
from dsu.network.resume import ResumePoint, feature_block, resume_point
from dsu.runtime import Runtime, choose_runtime
from dsu.settings import TrainingSettings
from dsu.training.training_data import TrainingData


def resolve(
    settings: TrainingSettings, data: TrainingData, point: ResumePoint, world: World
) -> tuple[TrainingSettings, Runtime]:
    """Resolve open settings from the store if there is one, or else from the paper and the kind of data.

    Raises `UsageError` if a setting contradicts the data, the store or the device.
    """
    config, store = data.config, data.store
    if settings.precision == "auto" and store is not None:
        precision, because = store.precision, "of the stored features"
    else:
        precision, because = settings.precision, "as requested"
    runtime = choose_runtime(world.device(settings.device), precision, because, deterministic=settings.deterministic)
    fraction = settings.val_fraction
    if fraction is None and settings.fold is None:
        fraction = 0.0 if data.source.benchmark else 0.1
    held_out = bool(fraction) or settings.fold is not None
    keep = settings.keep or ("best" if held_out and not data.source.benchmark and not settings.fold else "last")
    if keep == "best" and not held_out:
        raise UsageError("keep: best needs validation samples: give a val_fraction above 0, such as 0.1.")
    resolved = settings.model_copy(
        update={
            "dataset": data.source.split,
            **config.encoder_settings,
            "adapt_last": config.adapt_last,
            "tile": data.source.tile,
            "overlap": data.source.overlap,
            "val_fraction": fraction,
            "keep": keep,
            "feature_dtype": settings.feature_dtype or (store.feature_dtype if store else "float16"),
            "start_feature": point.start,
            "encoder_batch_size": _encoder_batch_size(settings, store, runtime),
            "precision": runtime.precision,
        }
    )
    return resolved, runtime


def _encoder_batch_size(settings: TrainingSettings, store: FeatureStore | None, runtime: Runtime) -> int:
    """The store's batch size, which makes live features equal stored ones; without a store the given or default one."""
    from dsu.network.network import default_encoder_batch_size

    recorded = store.encoder_batch_size if store else None
    requested = settings.encoder_batch_size
    if None not in (recorded, requested) and recorded != requested:
        raise UsageError(
            f"The stored features were computed {recorded} samples at a time, not {requested}: omit "
            "encoder_batch_size, or store them again."
        )
    return recorded or requested or default_encoder_batch_size(runtime.device)


def check_consistent(settings: TrainingSettings, data: TrainingData) -> None:
    """Raise `UsageError` for settings that contradict each other or the data."""
    if settings.fold is not None and settings.test_fraction:
        raise UsageError("--fold and --test-fraction both set test images apart: give one of them.")
    if (settings.val_fraction or 0) + settings.test_fraction >= 1:
        raise UsageError("--val-fraction and --test-fraction leave nothing for training: hold out less.")
    if settings.fold is not None and settings.val_fraction is not None:
        raise UsageError("--fold and --val-fraction both define the held-out images: give one of them.")
    if settings.freeze_adapter_epochs and settings.init_from is not None:
        raise UsageError("--freeze-adapter-epochs is for a new head, --init-from for a trained one: give one of them.")
    if settings.freeze_adapter_epochs >= settings.epochs:
        raise UsageError(
            f"--freeze-adapter-epochs {settings.freeze_adapter_epochs} leaves no epoch of {settings.epochs} for the "
            "adapters: give fewer."
        )
    if settings.freeze_adapter_epochs and not data.config.adapt_last:
        raise UsageError("--freeze-adapter-epochs needs adapters, and --adapt-last 0 has none: omit it.")


def choose_point(settings: TrainingSettings, config: DSUNetConfig, store: FeatureStore | None) -> ResumePoint:
    """The resume point in the store. Without a store, a step starts from pixels, and only DINOv2's maps are rounded,
    unless settings request another point."""
    if store is not None:
        return resume_point(config, store.available(settings.views), settings.start_feature)
    everything = {"pixels", *config.injections.values()}
    if settings.start_feature is not None:
        feature_block(config, settings.start_feature)
        everything |= {settings.start_feature, "S1", "S2", "S3", "S4"}
    return resume_point(config, everything, settings.start_feature or "pixels")


def frozen_point(settings: TrainingSettings, data: TrainingData) -> ResumePoint:
    """The point after all of Hiera, as if there were no adapters. Raises `UsageError` if the store lacks it."""
    without = data.config.model_copy(update={"adapt_last": 0})
    if data.store is not None:
        missing = {"S1", "S2", "S3", "S4"} - data.store.available(settings.views)
        if missing and not settings.end_to_end:
            raise UsageError(
                f"--freeze-adapter-epochs needs Hiera's levels, but {', '.join(sorted(missing))} are not stored in "
                f"the views {settings.views}: run {data.store.command('--level-views', settings.views)}, or draw "
                f"fewer --views."
            )
    return resume_point(without, {"pixels", "S1", "S2", "S3", "S4", *without.injections.values()}, "S4")
