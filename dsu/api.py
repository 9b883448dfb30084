"""The commands `dsu train-head`, `dsu predict` and `dsu eval` as functions, with the same settings and files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dsu.choices import Normalization
from dsu.data.datasets import Paths, check_places
from dsu.distributed import ALONE, World
from dsu.errors import UsageError, did_you_mean
from dsu.files import atomic_write, make_folder
from dsu.heads.head_file import (
    HeadInfo,
    is_exported,
    precision_of,
    predictions_folder,
    read_head_info,
    resolve_head,
)
from dsu.hub import is_hub_name
from dsu.prediction.targets import prepare_jobs
from dsu.progress import SILENT, Progress
from dsu.settings import EncoderWeights, PredictionSettings, RuntimeSettings, Settings, TrainingSettings, WeightsOf
from dsu.settings_file import read_settings
from dsu_cache import mirror_folder

if TYPE_CHECKING:
    from dsu.evaluation.evaluate import Evaluation
    from dsu.prediction.writing import Outcome
    from dsu.runtime import Runtime
    from dsu.training.trainer import Trainer

# Modules that load torch are imported where needed: an exported model works without it.


def train(
    dataset: str | Path | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    encoder_weights: WeightsOf = "official",
    data_root: str | Path = "data",
    cache_root: str | Path = "features",
    images: str | None = None,
    masks: str | None = None,
    progress: Progress = SILENT,
    **settings: Any,
) -> "Trainer":
    """Train a head, as `dsu train-head` does.

    Args:
        dataset: a benchmark's name or a folder; None uses what was cached last.
        out: the run's folder; None creates one below `runs/`.
        resume, overwrite: whether to resume, or to replace, an existing run.
        encoder_weights: see `dsu.create_model`.
        data_root, cache_root: folders of benchmarks and stores.
        images, masks: subfolders of your own data set, if their names are unusual.
        progress: receives messages.
        settings: fields of `dsu.settings.TrainingSettings` (docs/settings.md), such as `epochs=20`.

    Returns:
        The trainer: `out` is the run's folder, `history` has one row per epoch, `best_epoch` the best validated one.

    Raises `DsuError` if the run can't be trained with these arguments, and `UsageError` for an unknown setting.
    """
    from dsu.training.runs import open_run

    given = {"dataset": None if dataset is None else str(dataset), **settings}
    with open_run(
        _read(given, TrainingSettings)[0],
        paths=Paths(Path(data_root), mirror_folder(cache_root), images, masks),
        weights=EncoderWeights.of(encoder_weights),
        out=None if out is None else Path(out),
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    ) as run:
        run.trainer.run(progress)
        return run.trainer


def predict(
    sources: str | Path | Sequence[str | Path] = (),
    head: str | Path | None = None,
    *,
    revision: str | None = None,
    out: str | Path | None = None,
    end_to_end: bool = False,
    encoder_weights: WeightsOf = "official",
    data_root: str | Path = "data",
    cache_root: str | Path = "features",
    images: str | None = None,
    masks: str | None = None,
    progress: Progress = SILENT,
    **settings: Any,
) -> "Outcome":
    """Write masks for benchmarks, folders and files, as `dsu predict` does.

    Args:
        sources: one or several; empty: the images of the head's own data set that it was not trained on.
        head: a run's or an exported folder, a head's file, an exported .onnx model, or OWNER/NAME on the hub; None
            takes the newest run.
        revision: branch, tag or commit of a head on the hub.
        out: a folder for the masks, or a .png file if the source is one image; None: `predictions/` in the run's
            folder.
        end_to_end: encode the images even if their features are stored.
        encoder_weights: see `dsu.create_model`; heads with random encoders always use those.
        data_root, cache_root, images, masks, progress: as in `train`.
        settings: fields of `PredictionSettings` and `RuntimeSettings`, such as `threshold=0.5` or `device="cpu"`.

    Returns:
        The numbers of new and kept masks, the unreadable images, the masks' folder, and `rows`: a verdict per file.

    Raises `DsuError` if prediction is impossible with these arguments, and `UsageError` for an unknown setting.
    """
    prediction_settings, runtime_settings = _read(settings, PredictionSettings, RuntimeSettings)
    return predict_with(
        [str(source) for source in ([sources] if isinstance(sources, str | Path) else sources)],
        head,
        prediction_settings,
        runtime_settings,
        EncoderWeights.of(encoder_weights),
        Paths(Path(data_root), mirror_folder(cache_root), images, masks),
        revision=revision,
        out=None if out is None else Path(out),
        end_to_end=end_to_end,
        progress=progress,
    )


def predict_with(
    sources: Sequence[str],
    head: str | Path | None,
    settings: PredictionSettings,
    runtime_settings: RuntimeSettings,
    weights: EncoderWeights,
    paths: Paths,
    *,
    revision: str | None = None,
    out: Path | None = None,
    end_to_end: bool = False,
    progress: Progress = SILENT,
    world: World = ALONE,
) -> "Outcome":
    """The same as `predict`, for validated arguments; the processes of a `world` divide the images of each set."""
    given = sources, head, settings, runtime_settings, weights, paths
    into = partial(_predict, *given, revision=revision, end_to_end=end_to_end, progress=progress, world=world)
    if not check_places(sources, out, overwrite=settings.overwrite):
        return into(out=out)
    if world.connected:
        raise UsageError("One image needs one process: start this command without torchrun or srun.")
    # Predict into a temporary folder, and keep its only file.
    with TemporaryDirectory() as scratch:
        outcome = into(out=Path(scratch))
        assert out is not None
        make_folder(out.parent)
        for mask in Path(scratch).glob("*.png"):
            atomic_write(out, mask.read_bytes())
        [row] = outcome.rows.values()
        return replace(outcome, folder=out, rows={out.name: replace(row, file=out.name)})


def _predict(
    sources: Sequence[str],
    head: str | Path | None,
    settings: PredictionSettings,
    runtime_settings: RuntimeSettings,
    weights: EncoderWeights,
    paths: Paths,
    *,
    revision: str | None,
    out: Path | None,
    end_to_end: bool,
    progress: Progress,
    world: World,
) -> "Outcome":
    """Predict into the folder `out` with a head or an exported model."""
    if head is not None and is_hub_name(head):
        progress.say(f"looking for {head} on the Hugging Face hub")
    head_file = resolve_head(head, revision=revision)
    if is_exported(head_file):
        from dsu.prediction.exported import predict_exported

        if world.connected:
            raise UsageError(
                f"{head_file} is an exported model, which runs in one process: start this command without torchrun "
                "or srun."
            )
        return predict_exported(sources, head_file, settings, runtime_settings, paths, out=out, progress=progress)
    info = read_head_info(head_file)
    folder = out or predictions_folder(head, head_file, settings.kind)
    runtime = cache(lambda: _runtime(runtime_settings, info, head_file, world))  # loads torch: only after all checks
    jobs = prepare_jobs(
        sources,
        head_file,
        info,
        folder,
        settings,
        runtime,
        paths=paths,
        end_to_end=end_to_end,
        validation=settings.kind == "mask",
        mirror=out is not None and len(sources) == 1,
        progress=progress,
    )
    weights = EncoderWeights(weights.hiera, weights.dino, info.random_weights)
    from dsu.prediction.predict import predict as predict_jobs

    progress.say(f"{head_file} on {runtime().describe()}")
    for job in jobs:
        progress.say(job.describe())
    return predict_jobs(jobs, head_file, folder, settings, runtime(), weights, progress, world)


def evaluate(
    names: str | Sequence[str] = (),
    predictions: str | Path | None = None,
    *,
    truth: str | Path | None = None,
    normalize: Normalization | None = None,
    resize: bool = False,
    foreground: Sequence[int] | None = None,
    training_images: bool = False,
    workers: int | None = None,
    data_root: str | Path = "data",
    progress: Progress = SILENT,
) -> "dict[str, Evaluation]":
    """Evaluate predictions, as `dsu eval` does, without writing files.

    Args:
        names: names of sets; empty: all.
        predictions: a folder of predictions, or a run's folder; None takes the newest run's predictions.
        truth: a folder of ground-truth masks.
        normalize: `minmax` normalises each map to its full range first, `none` does not; None: only benchmarks' maps.
        resize: resize predictions of another size to that of their ground truth, instead of refusing them.
        foreground: raw mask values that are foreground; None: as in training.
        training_images: also evaluate images that the head was trained on.
        workers: number of processes; None: one per core.
        data_root, progress: as in `train`.

    Returns:
        For each set's name an evaluation with `metrics`, `per_image`, `curves`, the `conventions` used, and `missing`,
        the number of ground-truth masks without a prediction.

    Raises `UsageError` for a set without predictions or ground truth, and `DsuError` for a file that can't be read.
    """
    from dsu.evaluation.ground_truth import find_evaluation_sets, named_predictions

    [folder] = named_predictions([] if predictions is None else [predictions]).values()
    evaluation_sets = find_evaluation_sets(
        [names] if isinstance(names, str) else list(names),
        folder,
        None if truth is None else Path(truth),
        Paths(Path(data_root)),
        minmax=None if normalize is None else normalize == "minmax",
        training_images=training_images,
    )
    return {
        evaluation_set.name: evaluation_set.evaluate(
            resize=resize, foreground=foreground, workers=workers, progress=progress
        )
        for evaluation_set in evaluation_sets
    }


def _runtime(runtime_settings: RuntimeSettings, info: HeadInfo, head: Path, world: World = ALONE) -> "Runtime":
    """The requested device, with the precision of training unless another is given."""
    from dsu.runtime import choose_runtime

    precision = precision_of(info, head, runtime_settings.precision)
    because = "as requested" if precision == runtime_settings.precision else "of training"
    return choose_runtime(world.device(runtime_settings.device), precision, because)


def _read(given: Mapping[str, Any], *kinds: type[Settings]) -> list[Any]:
    """Read the settings of each kind. Raises `UsageError` for an unknown field."""
    known = [name for kind in kinds for name in kind.model_fields]
    for name in given:
        if name not in known:
            raise UsageError(f"There is no setting {name!r}{did_you_mean(name, known) or ': see docs/settings.md.'}")
    return [read_settings(kind, given) for kind in kinds]
