"""From settings to a run: which samples, which store or images, which resume point, which folder."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from dsu.config import DSUNetConfig
from dsu.data.datasets import Paths, SourceFolder
from dsu.distributed import ALONE, World, joined
from dsu.encoders.sources import check_given
from dsu.errors import DsuError, UsageError
from dsu.features.stores import FeatureStore
from dsu.files import atomic_write
from dsu.heads.head_file import HeadInfo, head_sha256, image_digits, resolve_head, stopped_runs
from dsu.network.resume import ResumePoint, feature_block, resume_point
from dsu.progress import SILENT, Progress, counted, few
from dsu.runtime import Runtime, choose_runtime, computing_threads, torch_type
from dsu.settings import EncoderWeights, TrainingSettings
from dsu.training.compiling import compile_pays
from dsu.training.run_folders import (
    PREVIOUS,
    SETTINGS_FILE,
    RunRecord,
    check_same_run,
    has_state,
    hold_new_run,
    hold_old_run,
    run_mark,
    settings_of_run,
    unfinished_run,
)
from dsu.training.training_data import TrainingData, find_training_data

if TYPE_CHECKING:
    from dsu.training.callbacks import Callback
    from dsu.training.trainer import Trainer, TrainingPhase

__all__ = ["Run", "open_run", "prepare_run"]


@dataclass(frozen=True)
class Run:
    """A prepared run and what its user should know before it starts.

    Attributes:
        trainer: of the run; it has a folder of its own once the run is open.
        name: of its data set and encoders, after which a new folder is called.
        source: the training split.
        record: what is trained on.
        notes: `label: text`.
    """

    trainer: "Trainer"
    name: str
    source: SourceFolder
    record: RunRecord
    notes: tuple[str, ...]


@contextmanager
def open_run(
    settings: TrainingSettings,
    *,
    paths: Paths,
    weights: EncoderWeights,
    out: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    part: bool = False,
    progress: Progress = SILENT,
) -> Iterator[Run]:
    """Prepare a run and hold its folder inside a `with`, so that no other process trains there.

    Processes that torchrun or Slurm started together train it together: the first alone holds the folder and speaks.

    Args:
        settings: what was asked for.
        paths: where data sets and stores lie; subfolders of one's own folder are for `end_to_end`.
        weights: where the encoders' weights come from.
        out: the run's folder; None makes one below `runs/`.
        resume: go on from the checkpoint in `out` (None: the newest run below `runs/` that was stopped), with the run's
            own settings where none are given.
        part: whether this process computes with a part of the processor's threads, since others run beside it.
        overwrite: start anew in an `out` that holds a run, which is set aside until the new one has finished.
        progress: who is told.

    Raises `DsuError` naming what does not fit, before any work is done, and `BusyError` where the run is being trained.
    """
    before: RunRecord | None = None
    with ExitStack() as held:
        world = held.enter_context(joined())
        progress = progress if world.leads else SILENT
        holds: Callable[[], bool] | None = None
        if resume:
            if world.leads:
                out = out or unfinished_run()
                holds = held.enter_context(hold_old_run(out))
            out = world.told(lambda: out)
            assert out is not None
            settings, before = settings_of_run(out, settings), RunRecord.read(out)
        elif out is None and (stopped := stopped_runs()):
            progress.say(
                f"A run in {stopped[0]} was stopped and is left as it is: `dsu train-head --resume` would go on with "
                f"it."
            )
        run = prepare_run(
            settings,
            paths=paths,
            weights=weights,
            before=before,
            begun=resume and out is not None and has_state(out),
            progress=progress,
            world=world,
            part=part or world.together,
        )
        trainer = run.trainer
        trainer.mark = run_mark(trainer.settings, run.record)
        _check_same(world, trainer.mark)
        if resume and out is not None:
            trainer.out = out
            check_same_run(out, trainer.settings, run.record)
            trainer.holds = holds or trainer.holds
            if has_state(out):  # else it was stopped before its first epoch was kept
                trainer.resume()
        else:
            _check_start(settings, out)
            _check_place(run.source, out)
            if world.leads:
                out, trainer.holds = held.enter_context(hold_new_run(out, run.name, overwrite=overwrite))
                run.record.write(out)
            trainer.out = world.told(lambda: out) or trainer.out
        if world.leads:
            resolved = yaml.safe_dump(trainer.settings.model_dump(mode="json"), sort_keys=False)
            atomic_write(trainer.out / SETTINGS_FILE, resolved.encode())
        yield run


def prepare_run(
    settings: TrainingSettings,
    *,
    paths: Paths,
    weights: EncoderWeights,
    before: RunRecord | None = None,
    begun: bool = False,
    progress: Progress = SILENT,
    world: World = ALONE,
    part: bool = False,
) -> Run:
    """Resolve everything that `settings` leave open and build the trainer, which has no folder yet.

    Takes and raises what `open_run` does; `before` is the record of the run that is resumed, whose split holds.
    Where that has `begun`, its checkpoint has the weights, and the head that it started from is not needed. The
    processes of a `world` prepare it alike.
    """
    data = find_training_data(settings, paths, progress)
    config, store, live = data.config, data.store, settings.end_to_end
    _check_sense(settings, data)
    if settings.init_from is not None and not begun:
        resolve_head(settings.init_from)
    if before is None and settings.group is not None:  # else the record has them
        data.groups(settings, {"train": 1.0}, SILENT)
    point = _choose_point(settings, config, store)
    wanted = {"hiera": live or point.block < config.hiera.depth, "dino": live and bool(point.guides)}
    check_given(config, weights, **wanted)
    # Only now, since torch takes seconds: what is wrong with names and settings has been said.
    import torch

    from dsu.encoders.weights import load_encoders
    from dsu.network.network import DSUNet
    from dsu.network.pretrained import start_from
    from dsu.training.run_notes import run_notes
    from dsu.training.tracking import check_tracker
    from dsu.training.trainer import Trainer, TrainingPhase

    if settings.track is not None:
        check_tracker(settings.track)
    resolved, runtime = _resolve(settings, data, point, world)
    # What starts the processes may give each one thread, and their number may decide the last bits of a feature.
    threads = store.threads if store is not None and part and runtime.device.type == "cpu" else None
    frozen_point = _frozen_point(resolved, data) if resolved.freeze_adapter_epochs else None
    hiera, dino, digests = load_encoders(config, weights, **wanted)
    drift: tuple[str, ...] = ()
    if store is not None and not live:
        with computing_threads(threads):
            for read in (point, *([frozen_point] if frozen_point else [])):
                digests, drift = store.check_arrays(read, digests, runtime, resolved.feature_dtype or "float16")
    if before is None:  # noted beside the store, by one process
        shares, groups = world.told(
            lambda: data.shares(resolved, paths.cache_root, progress, settings.model_fields_set)
        )
    else:  # what is new is refused by `check_same_run`
        shares = {name: before.samples.get(name, ("train",))[0] for name in sorted(data.facts)}
        groups = [list(group) for group in before.groups]
    names = {share: [name for name in shares if shares[name] == share] for share in ("train", "val", "test")}
    train_names = names["train"]
    empty = data.empty & set(train_names) if resolved.balance else None
    if empty is not None and len(empty) in (0, len(train_names)):
        raise UsageError(
            f"Every image of {data.source.split} that is trained on has {'no' if empty else 'an'} object, so nothing "
            f"can be balanced: no --balance."
        )
    compiled, compiling = compile_pays(config, resolved, len(train_names), runtime, world.size)
    resolved = resolved.model_copy(update={"compile": compiled})
    torch.manual_seed(settings.seed)
    network = DSUNet(
        config,
        hiera,
        dino,
        feature_dtype=torch_type(resolved.feature_dtype or "float16"),
        encoder_batch_size=resolved.encoder_batch_size,
    )
    network.encoder_threads = threads
    warnings = [f"other version: {item}" for item in drift]
    start = before.start if before is not None and begun else None
    if resolved.init_from is not None and not begun:
        head = resolve_head(resolved.init_from)
        trained, said = start_from(network.head, head, config, digests)
        start = head_sha256(head)
        warnings += [*said, *_leave_out(names, trained, data)]
        shares |= dict.fromkeys(shares.keys() - {name for share in names.values() for name in share}, "left out")
    if frozen_point is not None:
        network.head.init_adapters_identity()

    def phase(at: ResumePoint) -> "TrainingPhase":
        held = data.samples(names["val"], at, live=live) if names["val"] else None
        return TrainingPhase(at, data.samples(train_names, at, live=live), held)

    trainer = Trainer(
        network=network,
        main=phase(point),
        frozen_adapters=phase(frozen_point) if frozen_point else None,
        empty=empty,
        settings=resolved,
        info=HeadInfo(
            config=config,
            feature_dtype=resolved.feature_dtype,
            encoders=digests,
            dataset={**vars(data.source), "held_out": names["val"]},
            test=names["test"],
            trained_on=image_digits(data.facts[name].image_sha256 for name in train_names),
            trained_on_pixels=image_digits(data.facts[name].pixels_sha256 for name in train_names),
            training={**resolved.model_dump(mode="json"), "random_weights": weights.random},
        ),
        runtime=runtime,
        keep_best=resolved.keep == "best",
        world=world,
    )
    trainer.callbacks += _callbacks(trainer, data) if world.leads else []
    record = RunRecord(
        digests,
        data.mask_format.to_json(),
        start,
        {name: (shares[name], fact.image_sha256, fact.mask_sha256) for name, fact in sorted(data.facts.items())},
        groups,
    )
    said = [*run_notes(trainer, data.store, runtime), *([compiling] if compiling else []), *warnings]
    notes = (*data.describe_shares(shares, groups), *said)
    return Run(trainer, f"{data.source.split}-{config.encoders_name}", data.source, record, notes)


def _check_same(world: World, mark: str) -> None:
    """Raise `DsuError` where processes would train something else than the first."""
    marks = world.gathered(mark)
    others = [str(rank) for rank, its in enumerate(marks) if its != marks[0]]
    if others:
        raise DsuError(
            f"The processes {few(others)} see other samples, settings or weights than the first: start all with the "
            f"same command, and give all machines the same store and data."
        )


def _check_start(settings: TrainingSettings, out: Path | None) -> None:
    """Raise `UsageError` where a run would replace the head that it starts from."""
    if out is None or settings.init_from is None:
        return
    if resolve_head(settings.init_from).resolve().parent in (out.resolve(), out.resolve() / PREVIOUS):
        raise UsageError(
            f"--init-from {settings.init_from} lies in {out}, where the new run would replace it: give another --out."
        )


def _check_place(source: SourceFolder, out: Path | None) -> None:
    """Raise `UsageError` where a run would lie around the images: its pictures would pass for some, or it hide them."""
    split = source.find()
    if out is None or split is None:
        return
    folders = {os.path.realpath(pair.image.parent) for pair in split.pairs}
    if any(Path(folder).is_relative_to(os.path.realpath(out)) for folder in folders):
        raise UsageError(f"{out} holds images of {source.split}: give the run a folder of its own with --out.")


def _leave_out(names: dict[str, list[str]], trained: HeadInfo, data: TrainingData) -> list[str]:
    """Take images that the head to start from was trained on out of what is held out, and say so.

    Raises `UsageError` where that leaves nothing of a share.
    """
    known = {name for name, fact in data.facts.items() if trained.was_trained_on(fact.image_sha256, fact.pixels_sha256)}
    said = []
    for share in ("val", "test"):
        lost = [name for name in names[share] if name in known]
        if lost and len(lost) == len(names[share]):
            raise UsageError(
                f"The head to start from was trained on all that is held out of {data.source.split} ({few(lost)}), so "
                f"nothing could be judged: hold out the share that it was trained without, or start a new head."
            )
        if lost:
            names[share] = [name for name in names[share] if name not in known]
            said.append(f"left out: {counted(len(lost), 'held-out images')} that the head was trained on ({few(lost)})")
    return said


def _resolve(
    settings: TrainingSettings, data: TrainingData, point: ResumePoint, world: World
) -> tuple[TrainingSettings, Runtime]:
    """What was left open, decided: by the store where there is one, else by the paper and the kind of data."""
    config, store = data.config, data.store
    if settings.precision == "auto" and store is not None:
        precision, because = store.precision, "of the stored features"
    else:
        precision, because = settings.precision, "asked for"
    runtime = choose_runtime(world.device(settings.device), precision, because, deterministic=settings.deterministic)
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
    """The store's: what runs live beside it must compute as it was computed."""
    from dsu.network.network import default_encoder_batch_size

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
    if settings.fold is not None and settings.test_fraction:
        raise UsageError("--fold and --test-fraction both set a share apart: give one of them.")
    if (settings.val_fraction or 0) + settings.test_fraction >= 1:
        raise UsageError("--val-fraction and --test-fraction leave nothing to train on: hold out less.")
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


def _callbacks(trainer: "Trainer", data: TrainingData) -> "list[Callback]":
    """Whoever follows this run: curves, sheets and a tracker, as its settings say."""
    from dsu.training.callbacks import Callback, Curves, Sheets, sheet_names
    from dsu.training.tracking import Tracking

    settings, callbacks = trainer.settings, list[Callback]([Curves()])
    if settings.sheet_every:
        names = sheet_names((trainer.main.validation or trainer.main.train).names, settings.seed)
        pictures = data.samples(names, ResumePoint("pixels", 0, (), ()), live=settings.end_to_end)
        sizes = [data.facts[name].size for name in pictures.names]
        callbacks.append(Sheets(pictures, sizes, settings.sheet_every))
    if settings.track is not None:
        callbacks.append(Tracking(settings.track))
    return callbacks
