"""From settings to a run: which samples, which store or images, which resume point, which folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from dsu.config import DSUNetConfig
from dsu.data.datasets import Paths, SourceFolder
from dsu.encoders.weights import EncoderWeights, load_encoders
from dsu.errors import UsageError
from dsu.features.stores import FeatureStore, encoder_settings, encoders_name
from dsu.files import atomic_write, make_folder
from dsu.heads.head_file import HeadInfo, resolve_head, stopped_runs
from dsu.network.network import DSUNet, default_encoder_batch_size
from dsu.network.resume import ResumePoint, feature_block, resume_point
from dsu.progress import SILENT, Progress
from dsu.runtime import Runtime, choose_runtime, torch_type
from dsu.settings import TrainingSettings
from dsu.training.callbacks import Callback, Curves, Sheets, sheet_names
from dsu.training.init_from import start_from
from dsu.training.run_folders import (
    SETTINGS_FILE,
    check_same_run,
    has_state,
    run_folder,
    settings_of_run,
    unfinished_run,
)
from dsu.training.run_notes import run_notes
from dsu.training.tracking import Tracking, check_tracker
from dsu.training.trainer import Trainer, TrainingPhase
from dsu.training.training_data import TrainingData, find_training_data

__all__ = ["Run", "open_run"]


@dataclass(frozen=True)
class Run:
    """A prepared run and what its user should know before it starts."""

    trainer: Trainer
    source: SourceFolder
    notes: tuple[str, ...]


def open_run(
    settings: TrainingSettings,
    *,
    paths: Paths,
    weights: EncoderWeights,
    out: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Run:
    """Resolve everything that `settings` leave open and build the trainer.

    Args:
        settings: what was asked for.
        paths: where data sets and stores lie; subfolders of one's own folder are for `end_to_end`.
        weights: where the encoders' weights come from.
        out: the run's folder; None makes one below `runs/`.
        resume: go on from the checkpoint in `out` (None: the newest run below `runs/` that has not finished), with
            the run's own settings where none are given.
        overwrite: start anew in an `out` that holds a run.
        progress: who is told.

    Raises `DsuError` naming what does not fit, before any work is done.
    """
    if resume:
        out = out or unfinished_run()
        settings = settings_of_run(out, settings)
    if settings.track is not None:
        check_tracker(settings.track)
    data = find_training_data(settings, paths, progress)
    config, store, live = data.config, data.store, settings.end_to_end
    resolved, runtime, point = _resolve(settings, data)
    frozen_point = _frozen_point(resolved, data) if resolved.freeze_adapter_epochs else None
    hiera, dino, digests = load_encoders(
        config,
        weights,
        hiera=live or point.block < config.hiera.depth,
        dino=live and bool(point.guides),
    )
    drift: tuple[str, ...] = ()
    if store is not None and not live:
        for read in (point, *([frozen_point] if frozen_point else [])):
            digests, drift = store.check_arrays(read, digests, runtime, resolved.feature_dtype or "float16")
    if out is None and (stopped := stopped_runs()):
        progress.say(
            f"A run in {stopped[0]} was stopped and is left as it is: `dsu train-head --resume` would go on with it."
        )
    train_names, held_out = data.divide(resolved)
    folder = run_folder(out, f"{data.source.split}-{encoders_name(config)}", resume=resume, overwrite=overwrite)
    torch.manual_seed(settings.seed)
    network = DSUNet(
        config,
        hiera,
        dino,
        feature_dtype=torch_type(resolved.feature_dtype or "float16"),
        encoder_batch_size=resolved.encoder_batch_size,
    )
    warnings = [f"other version: {item}" for item in drift]
    if resolved.init_from is not None:
        warnings += start_from(network.head, resolve_head(resolved.init_from), config, digests)
    if frozen_point is not None:
        network.head.init_adapters_identity()

    def phase(start: ResumePoint) -> TrainingPhase:
        held = data.samples(held_out, start, live=live) if held_out else None
        return TrainingPhase(start, data.samples(train_names, start, live=live), held)

    trainer = Trainer(
        network=network,
        main=phase(point),
        frozen_adapters=phase(frozen_point) if frozen_point else None,
        empty=data.empty & set(train_names) if resolved.balance else None,
        settings=resolved,
        info=HeadInfo(
            config=config,
            feature_dtype=resolved.feature_dtype,
            encoders=digests,
            dataset={**vars(data.source), "held_out": held_out},
            training={**resolved.model_dump(mode="json"), "random_weights": weights.random},
        ),
        runtime=runtime,
        out=folder,
        keep_best=resolved.keep == "best",
    )
    trainer.callbacks += _callbacks(trainer, data)
    if resume:
        check_same_run(folder, resolved)
        if has_state(folder):  # else it was stopped before its first epoch was kept
            trainer.resume()
    make_folder(folder)
    atomic_write(folder / SETTINGS_FILE, yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False).encode())
    return Run(trainer, data.source, (*run_notes(trainer, data.store, runtime), *warnings))


def _resolve(settings: TrainingSettings, data: TrainingData) -> tuple[TrainingSettings, Runtime, ResumePoint]:
    """What was left open, decided: by the store where there is one, else by the paper and the kind of data."""
    config, store = data.config, data.store
    if settings.precision == "auto" and store is not None:
        precision, because = store.precision, "of the stored features"
    else:
        precision, because = settings.precision, "asked for"
    runtime = choose_runtime(settings.device, precision, because, deterministic=settings.deterministic)
    point = _choose_point(settings, config, store)
    _check_sense(settings, data)
    fraction = settings.val_fraction
    if fraction is None and settings.fold is None:
        fraction = 0.0 if data.source.benchmark else 0.1
    held_out = bool(fraction) or settings.fold is not None
    keep = settings.keep or ("best" if held_out and not data.source.benchmark and not settings.fold else "last")
    if keep == "best" and not held_out:
        raise UsageError("keep: best needs samples to validate on: give a val_fraction above 0, such as 0.1.")
    resolved = settings.model_copy(
        update={
            "dataset": data.source.split,
            **encoder_settings(config),
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
    return resolved, runtime, point


def _encoder_batch_size(settings: TrainingSettings, store: FeatureStore | None, runtime: Runtime) -> int:
    """The store's: what runs live beside it must compute as it was computed."""
    recorded = store.encoder_batch_size if store else None
    asked = settings.encoder_batch_size
    if None not in (recorded, asked) and recorded != asked:
        raise UsageError(
            f"The stored features were computed {recorded} samples at a time, not {asked}: leave encoder_batch_size "
            f"away, or store them anew."
        )
    return recorded or asked or default_encoder_batch_size(runtime.device)


def _check_sense(settings: TrainingSettings, data: TrainingData) -> None:
    """Raise `UsageError` for settings that contradict each other, or the data."""
    if settings.fold is not None and settings.val_fraction is not None:
        raise UsageError("--fold and --val-fraction both say what is held out: give one of them.")
    if settings.freeze_adapter_epochs and settings.init_from is not None:
        raise UsageError("--freeze-adapter-epochs is for a new head, --init-from for a trained one: give one of them.")
    if settings.freeze_adapter_epochs >= settings.epochs:
        raise UsageError(
            f"--freeze-adapter-epochs {settings.freeze_adapter_epochs} leaves none of {settings.epochs} epochs to the "
            f"adapters: give fewer."
        )
    if settings.freeze_adapter_epochs and not data.config.adapt_last:
        raise UsageError("--freeze-adapter-epochs needs adapters, and --adapt-last 0 has none: leave it away.")
    if settings.balance and len(data.empty) in (0, len(data.facts)):
        what = "an object" if not data.empty else "no object"
        raise UsageError(f"Every image of {data.source.split} has {what}, so nothing can be balanced: no --balance.")


def _choose_point(settings: TrainingSettings, config: DSUNetConfig, store: FeatureStore | None) -> ResumePoint:
    """What the store can serve; without a store the live way rounds only DINOv2's maps, unless asked otherwise."""
    if store is not None:
        return resume_point(config, store.available(settings.views), settings.start_feature)
    everything = {"pixels", *config.injections.values()}
    if settings.start_feature is not None:
        feature_block(config, settings.start_feature)
        everything |= {settings.start_feature, "S1", "S2", "S3", "S4"}
    return resume_point(config, everything, settings.start_feature or "pixels")


def _frozen_point(settings: TrainingSettings, data: TrainingData) -> ResumePoint:
    """Behind all of Hiera, as if there were no adapters. Raises `UsageError` where the store lacks that."""
    without = data.config.model_copy(update={"adapt_last": 0})
    if data.store is not None:
        lacking = {"S1", "S2", "S3", "S4"} - data.store.available(settings.views)
        if lacking and not settings.end_to_end:
            raise UsageError(
                f"--freeze-adapter-epochs reads Hiera's levels, and {', '.join(sorted(lacking))} of the views "
                f"{settings.views} are not stored: run {data.store.again('--level-views', settings.views)}, or draw "
                f"fewer --views."
            )
    return resume_point(without, {"pixels", "S1", "S2", "S3", "S4", *without.injections.values()}, "S4")


def _callbacks(trainer: Trainer, data: TrainingData) -> list[Callback]:
    """Whoever follows this run: curves, sheets and a tracker, as its settings say."""
    settings, callbacks = trainer.settings, list[Callback]([Curves()])
    if settings.sheet_every:
        names = sheet_names((trainer.main.validation or trainer.main.train).names, settings.seed)
        pictures = data.samples(names, ResumePoint("pixels", 0, (), ()), live=settings.end_to_end)
        callbacks.append(Sheets(pictures, settings.sheet_every))
    if settings.track is not None:
        callbacks.append(Tracking(settings.track))
    return callbacks
