"""Prepare a training run: data, settings, network, trainer and folder."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from dsu.config import DSUNetConfig
from dsu.data.datasets import Paths, SourceFolder
from dsu.distributed import ALONE, World, connect
from dsu.encoders.sources import check_given
from dsu.errors import DsuError, UsageError
from dsu.features.stores import FeatureStore
from dsu.files import atomic_write
from dsu.heads.head_file import HeadInfo, head_sha256, image_digits, resolve_head, stopped_runs
from dsu.network.resume import ResumePoint
from dsu.progress import SILENT, Progress, counted, few
from dsu.runtime import Runtime, computing_threads, torch_type
from dsu.settings import EncoderWeights, TrainingSettings
from dsu.training.compiling import compile_pays
from dsu.training.resolving import check_consistent, choose_point, frozen_point, resolve
from dsu.training.run_folders import (
    PREVIOUS,
    SETTINGS_FILE,
    RunRecord,
    check_same_run,
    has_state,
    lock_new_run,
    lock_old_run,
    run_mark,
    settings_of_run,
    unfinished_run,
)
from dsu.training.training_data import TrainingData, find_training_data

if TYPE_CHECKING:
    from sam2.modeling.backbones.hieradet import Hiera
    from timm.models.vision_transformer import VisionTransformer

    from dsu.network.network import DSUNet
    from dsu.training.callbacks import Callback
    from dsu.training.trainer import Trainer, TrainingPhase


@dataclass(frozen=True)
class Run:
    """A prepared run.

    Attributes:
        trainer: the run's trainer; it has a folder once the run is open.
        name: the default folder name, from data set and encoders.
        source: the training split.
        record: the record of its training data.
        notes: lines `label: text` for the user.
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
    """Prepare a run and lock its folder inside a `with`: no other process can train there.

    If torchrun or Slurm started several processes, they train together; only the first locks the folder and prints.

    Args:
        settings: the requested settings.
        paths: the folders of data sets and stores; image and mask subfolders are for `end_to_end`.
        weights: where the encoders' weights come from.
        out: the run's folder; None creates one below `runs/`.
        resume: continue from the checkpoint in `out` (None: the newest interrupted run below `runs/`); the run's own
            settings apply unless others are given.
        overwrite: replace a run in `out`; its files are set aside until the new run has finished.
        part: whether this process uses only part of the processor's threads, since others run in parallel.
        progress: receives messages.

    Raises `DsuError` or `UsageError` if settings, data and folder don't fit together, before any training, and
    `BusyError` if another process is training the run.
    """
    before: RunRecord | None = None
    with ExitStack() as held:
        world = held.enter_context(connect())
        progress = progress if world.is_main else SILENT
        holds: Callable[[], bool] | None = None
        if resume:
            if world.is_main:
                out = out or unfinished_run()
                holds = held.enter_context(lock_old_run(out))
            out = world.broadcast_object(lambda: out)
            assert out is not None
            settings, before = settings_of_run(out, settings), RunRecord.read(out)
        elif out is None and (stopped := stopped_runs()):
            progress.say(
                f"A run in {stopped[0]} was interrupted; this starts a new one. Use `dsu train-head --resume` to "
                "continue the old one."
            )
        run = prepare_run(
            settings,
            paths=paths,
            weights=weights,
            before=before,
            begun=resume and out is not None and has_state(out),
            progress=progress,
            world=world,
            part=part or world.connected,
        )
        trainer = run.trainer
        trainer.mark = run_mark(trainer.settings, run.record)
        _check_processes_agree(world, trainer.mark)
        if resume and out is not None:
            trainer.out = out
            check_same_run(out, trainer.settings, run.record)
            trainer.holds = holds or trainer.holds
            if has_state(out):  # otherwise it stopped before its first checkpoint
                trainer.resume()
        else:
            _check_initial_head(settings, out)
            _check_folder_of_images(run.source, out)
            if world.is_main:
                out, trainer.holds = held.enter_context(lock_new_run(out, run.name, overwrite=overwrite))
                run.record.write(out)
            trainer.out = world.broadcast_object(lambda: out) or trainer.out
        if world.is_main:
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
    """Resolve all open settings and build the trainer, without a folder.

    Arguments and errors are those of `open_run`. All processes of a `world` must call it with the same arguments.

    Args:
        before: the record of a resumed run; its split is used again.
        begun: whether the resumed run has a checkpoint: its weights replace the initial head's, which is not needed.
        world: the processes that train together.
    """
    data = find_training_data(settings, paths, progress)
    config, store, live = data.config, data.store, settings.end_to_end
    check_consistent(settings, data)
    if settings.init_from is not None and not begun:
        resolve_head(settings.init_from)
    if before is None and settings.group is not None:  # a resumed run's record has its groups
        data.groups(settings, {"train": 1.0}, SILENT)
    point = choose_point(settings, config, store)
    needed = {"hiera": live or point.block < config.hiera.depth, "dino": live and bool(point.guides)}
    check_given(config, weights, **needed)
    # Loading torch takes seconds: import it only after checking names and settings.
    from dsu.encoders.weights import load_encoders
    from dsu.training.run_notes import run_notes

    if settings.track is not None:
        from dsu.training.tracking import check_tracker

        check_tracker(settings.track)
    resolved, runtime = resolve(settings, data, point, world)
    frozen = frozen_point(resolved, data) if resolved.freeze_adapter_epochs else None
    # Launchers may set one thread per process, and the number of threads may change the last bits of a feature.
    threads = store.threads if store is not None and part and runtime.device.type == "cpu" else None
    hiera, dino, digests = load_encoders(config, weights, **needed)
    warnings: list[str] = []
    if store is not None and not live:
        digests, warnings = _check_store(store, [point, frozen], digests, runtime, resolved, threads)
    assignment = _assign(resolved, data, before, paths, settings.model_fields_set, world, progress)
    compiled, compiling = compile_pays(config, resolved, len(assignment.of("train")), runtime, world.size)
    resolved = resolved.model_copy(update={"compile": compiled})
    network = _new_network(config, resolved, hiera, dino)
    network.encoder_threads = threads
    start = before.start if before is not None and begun else None
    if resolved.init_from is not None and not begun:
        start, said = _start_from(resolve_head(resolved.init_from), network, digests, assignment, data)
        warnings += said
    if frozen is not None:
        network.head.init_adapters_identity()
    info = _head_info(config, resolved, data, assignment, digests, weights)
    trainer = _trainer(network, resolved, data, assignment, (point, frozen), info, runtime, world)
    trainer.callbacks += _callbacks(trainer, data) if world.is_main else []
    facts = {name: (assignment.shares[name], f.image_sha256, f.mask_sha256) for name, f in sorted(data.facts.items())}
    record = RunRecord(digests, data.mask_format.to_json(), start, facts, assignment.groups)
    said = [*run_notes(trainer, store, runtime), *([compiling] if compiling else []), *warnings]
    notes = (*data.describe_shares(assignment.shares, assignment.groups), *said)
    return Run(trainer, f"{data.source.split}-{config.encoders_name}", data.source, record, notes)


@dataclass
class _Assignment:
    """Each sample's share, by name, and the groups of samples that stay in one share."""

    shares: dict[str, str]
    groups: list[list[str]]

    def of(self, share: str) -> list[str]:
        """The samples of a split."""
        return [name for name, own in self.shares.items() if own == share]


def _check_store(
    store: FeatureStore,
    points: Sequence[ResumePoint | None],
    digests: dict[str, str],
    runtime: Runtime,
    settings: TrainingSettings,
    threads: int | None,
) -> tuple[dict[str, str], list[str]]:
    """Check the stored features; returns the digests of their encoders, and warnings about other library versions."""
    drift: tuple[str, ...] = ()
    with computing_threads(threads):
        for point in points:
            if point is not None:
                digests, drift = store.check_arrays(point, digests, runtime, settings.feature_dtype or "float16")
    return digests, [f"other version: {item}" for item in drift]


def _assign(
    settings: TrainingSettings,
    data: TrainingData,
    before: RunRecord | None,
    paths: Paths,
    given: Collection[str],
    world: World,
    progress: Progress,
) -> _Assignment:
    """Split the samples, as the resumed run did if there is one. Raises `UsageError` if nothing can be balanced.

    `given` are the names of the settings that the user gave.
    """
    if before is None:  # one process computes the split, and records it next to the store
        assignment = _Assignment(
            *world.broadcast_object(lambda: data.shares(settings, paths.cache_root, progress, given))
        )
    else:  # `check_same_run` refuses new samples
        shares = {name: before.samples.get(name, ("train",))[0] for name in sorted(data.facts)}
        assignment = _Assignment(shares, [list(group) for group in before.groups])
    train = assignment.of("train")
    empty = data.empty & set(train)
    if settings.balance and len(empty) in (0, len(train)):
        raise UsageError(
            f"All training images of {data.source.split} are {'without' if empty else 'with'} an object, so nothing "
            "can be balanced: omit --balance."
        )
    return assignment


def _new_network(
    config: DSUNetConfig, settings: TrainingSettings, hiera: "Hiera | None", dino: "VisionTransformer | None"
) -> "DSUNet":
    """The network with a new head, drawn from the settings' seed."""
    import torch

    from dsu.network.network import DSUNet

    torch.manual_seed(settings.seed)
    kind = torch_type(settings.feature_dtype or "float16")
    return DSUNet(config, hiera, dino, feature_dtype=kind, encoder_batch_size=settings.encoder_batch_size)


def _start_from(
    head: Path, network: "DSUNet", digests: dict[str, str], assignment: _Assignment, data: TrainingData
) -> tuple[str, list[str]]:
    """Load a trained head, and exclude its training images from the held-out ones; returns its digest and notes."""
    from dsu.network.pretrained import start_from

    trained, notes = start_from(network.head, head, network.config, digests)
    return head_sha256(head), [*notes, *_exclude_known(assignment, trained, data)]


def _head_info(
    config: DSUNetConfig,
    settings: TrainingSettings,
    data: TrainingData,
    assignment: _Assignment,
    digests: dict[str, str],
    weights: EncoderWeights,
) -> HeadInfo:
    """The head's metadata, including the origin of its encoders' weights."""
    return HeadInfo(
        config=config,
        feature_dtype=settings.feature_dtype,
        encoders=digests,
        dataset={**vars(data.source), "held_out": assignment.of("val")},
        test=assignment.of("test"),
        trained_on=image_digits(data.facts[name].image_sha256 for name in assignment.of("train")),
        trained_on_pixels=image_digits(data.facts[name].pixels_sha256 for name in assignment.of("train")),
        training={
            **settings.model_dump(mode="json"),
            "random_weights": weights.random,
            "known_encoders": sorted(
                {*digests} - weights.from_files - (data.store.from_files if data.store else set())
            ),
        },
    )


def _trainer(
    network: "DSUNet",
    settings: TrainingSettings,
    data: TrainingData,
    assignment: _Assignment,
    points: tuple[ResumePoint, ResumePoint | None],
    info: HeadInfo,
    runtime: Runtime,
    world: World,
) -> "Trainer":
    """The trainer; `points` are the resume points of all epochs, and of those with frozen adapters."""
    from dsu.training.trainer import Trainer, TrainingPhase

    train, held_out = assignment.of("train"), assignment.of("val")

    def phase(at: ResumePoint) -> "TrainingPhase":
        held = data.samples(held_out, at, live=settings.end_to_end) if held_out else None
        return TrainingPhase(at, data.samples(train, at, live=settings.end_to_end), held)

    main, frozen = points
    return Trainer(
        network=network,
        main=phase(main),
        frozen_adapters=phase(frozen) if frozen else None,
        empty=data.empty & set(train) if settings.balance else None,
        settings=settings,
        info=info,
        runtime=runtime,
        keep_best=settings.keep == "best",
        world=world,
    )


def _check_processes_agree(world: World, mark: str) -> None:
    """Raise `DsuError` if other processes have a different run than the first."""
    marks = world.all_gather(mark)
    others = [str(rank) for rank, other in enumerate(marks) if other != marks[0]]
    if others:
        raise DsuError(
            f"The processes {few(others)} have other samples, settings or weights than the first: start all with the "
            "same command, and give all machines the same store and data."
        )


def _check_initial_head(settings: TrainingSettings, out: Path | None) -> None:
    """Raise `UsageError` if a run would replace its initial head."""
    if out is None or settings.init_from is None:
        return
    if resolve_head(settings.init_from).resolve().parent in (out.resolve(), out.resolve() / PREVIOUS):
        raise UsageError(
            f"--init-from {settings.init_from} is in {out}, where the new run would replace it: give another --out."
        )


def _check_folder_of_images(source: SourceFolder, out: Path | None) -> None:
    """Raise `UsageError` if a run's folder contains the images: the run's own figures would look like images."""
    split = source.find()
    if out is None or split is None:
        return
    folders = {os.path.realpath(pair.image.parent) for pair in split.pairs}
    if any(Path(folder).is_relative_to(os.path.realpath(out)) for folder in folders):
        raise UsageError(f"{out} contains images of {source.split}: give the run its own folder with --out.")


def _exclude_known(assignment: _Assignment, trained: HeadInfo, data: TrainingData) -> list[str]:
    """Exclude images that the initial head was trained on from the held-out shares; returns notes.

    Raises `UsageError` if a share becomes empty.
    """
    known = {name for name, fact in data.facts.items() if trained.was_trained_on(fact.image_sha256, fact.pixels_sha256)}
    notes = []
    for share, called in (("val", "validation"), ("test", "test")):
        names = assignment.of(share)
        lost = [name for name in names if name in known]
        if lost and len(lost) == len(names):
            raise UsageError(
                f"The initial head was trained on all held-out images of {data.source.split} ({few(lost)}), so "
                "nothing could be evaluated: hold out images that it was trained without, or start with a new head."
            )
        if lost:
            assignment.shares |= dict.fromkeys(lost, "left out")
            notes.append(
                f"left out: {counted(len(lost), f'{called} images')} that the initial head was trained on ({few(lost)})"
            )
    return notes


def _callbacks(trainer: "Trainer", data: TrainingData) -> "list[Callback]":
    """The run's callbacks, according to its settings: curves, sheets and a tracker."""
    from dsu.training.callbacks import Callback, Curves, Sheets, sheet_names
    from dsu.training.tracking import Tracking

    settings, callbacks = trainer.settings, list[Callback]([Curves()])
    if settings.sheet_every:
        names = sheet_names((trainer.main.validation or trainer.main.train).names, settings.seed)
        samples = data.samples(names, ResumePoint("pixels", 0, (), ()), live=settings.end_to_end)
        sizes = [data.facts[name].size for name in samples.names]
        callbacks.append(Sheets(samples, sizes, settings.sheet_every))
    if settings.track is not None:
        callbacks.append(Tracking(settings.track))
    return callbacks
