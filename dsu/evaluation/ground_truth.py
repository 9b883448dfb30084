"""Pair folders of predictions with their ground truth."""

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dsu.data.datasets import Paths, SourceFolder, find_dataset, is_benchmark, test_splits
from dsu.data.images import (
    IMAGE_SUFFIXES,
    UnreadableImage,
    file_bytes_and_time,
    file_sha256,
    or_unreadable,
    printable,
)
from dsu.data.masks import MaskFormat
from dsu.data.pairing import PREDICTIONS_FILE, Pair, named_images, pair_files, subfolders, unwrapped
from dsu.distributed import ALONE, World
from dsu.errors import DsuError, UsageError
from dsu.evaluation.evaluate import Evaluation, PredictionPair, evaluate, match, truths_in
from dsu.heads.head_file import HEAD_FILE, RUNS, head_sha256, runs_with
from dsu.metrics.figures import RANDOM
from dsu.prediction.record import FIGURE_FILES, PREDICTIONS_LOCK, check_noted, unreadable_record
from dsu.prediction.targets import VALIDATION
from dsu.progress import SILENT, Progress, counted, few
from dsu_cache import holder

_ALMOST_BLACK: Final = 1 / 255
"""The largest response of maps saved as 0 and 1, in 8 bits or in 16 bits of which only 8 are used."""


class NoKnownTruth(UsageError):  # noqa: N818 - named after the folder's state
    """No ground truth is known for the predictions."""


@dataclass(frozen=True)
class EvaluationSet:
    """One set of predictions and their ground truth.

    Attributes:
        name: of the set.
        pairs: predictions with their ground truths.
        missing: names of ground truths without a prediction.
        extra: names of predictions without a ground truth.
        minmax: whether each map is min-max normalised first.
        mask_format: how to read the masks, if the whole data set has shown it.
        random: whether random encoders made the predictions.
        share: which part of the head's own training split it is, in words; empty for other sets.
        trained_on: names of images that the head was trained on.
        changed: names of images that have changed since they were predicted, and are not evaluated.
        predicted: how prediction changed the maps in ways that evaluation can't undo, in words.
        recorded: whether `dsu predict` wrote the maps.
        predicted_otherwise: whether prediction normalised or binarised the maps.
    """

    name: str
    pairs: tuple[PredictionPair, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    minmax: bool
    mask_format: MaskFormat | None = None
    random: bool = False
    share: str = ""
    trained_on: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    predicted: str = ""
    recorded: bool = False
    predicted_otherwise: bool = False

    @property
    def is_validation(self) -> bool:
        """Whether it is the validation split, on which thresholds are chosen."""
        return is_validation({"share": self.share})

    def evaluate(
        self,
        *,
        resize: bool = False,
        foreground: Sequence[int] | None = None,
        workers: int | None = None,
        progress: Progress = SILENT,
        world: World = ALONE,
    ) -> Evaluation:
        """Score the set; arguments and errors are those of `dsu.evaluation.evaluate.evaluate`."""
        found = evaluate(
            self.pairs,
            normalize=self.minmax,
            resize=resize,
            mask_format=None if foreground else self.mask_format,
            foreground=foreground,
            workers=workers,
            progress=progress,
            world=world,
        )
        brightest = max(found.image_level.responses)
        if not (self.minmax or self.recorded) and 0 < brightest <= _ALMOST_BLACK:
            raise DsuError(
                f"The predictions of {self.name} have no value above 1 of 255, so they are probably 0/1 maps: save "
                "them with 255 for the object, or stretch them with --normalize minmax."
            )
        said = {"encoders": RANDOM} if self.random else {}
        said |= {"predicted": self.predicted} if self.predicted else {}
        sizes = "; at the images' own sizes, unlike the scores of train-head" if self.is_validation else ""
        said |= {"share": self.share + sizes} if self.share else {}
        if self.trained_on:
            known = f"{len(self.trained_on):,} of {counted(found.images, 'images')}"
            said["trained on"] = f"{known}, so the scores are too good"
        return replace(
            found,
            missing=len(self.missing) + len(self.changed),
            trained_on=len(self.trained_on),
            conventions=found.conventions | said,
        )


def is_validation(how: Mapping[str, Any]) -> bool:
    """Whether a set is a validation share, according to its entry in a record."""
    return str(how.get("share", "")).startswith(VALIDATION)


def named_predictions(given: Sequence[str | Path], *, with_truth: bool = True) -> dict[str, Path]:
    """Folders of predictions by name, each given as NAME=FOLDER or FOLDER.

    The name of a FOLDER is its run's, else its own; if two folders share a name, their paths are their names. For a
    run's folder, its predictions are taken; for nothing, those of the newest run below runs/. `with_truth` says whether
    the newest predictions must have a known ground truth.

    Raises `UsageError` if a name or a folder is given twice, or if the newest run has no suitable predictions.
    """
    asked = [_name_and_folder(str(text)) for text in given] or [("", _newest_predictions(with_truth))]
    found = [_predictions_of(folder) for _, folder in asked]
    # realpath, since Path.resolve fails on circular links.
    for place, count in Counter(map(os.path.realpath, found)).items():
        if count > 1:
            raise UsageError(f"--predictions contains {place} {count} times: give each folder once.")
    own_names = [_run_name(folder) for folder in found]
    named: dict[str, Path] = {}
    for (name, folder), own_name, predictions in zip(asked, own_names, found, strict=True):
        name = name or (printable(folder) if own_names.count(own_name) > 1 else own_name)
        if name in named:
            raise UsageError(f"--predictions contains the name {name} twice: give NAME=FOLDER with different names.")
        named[name] = predictions
    return named


def _name_and_folder(text: str) -> tuple[str, Path]:
    """Split `NAME=FOLDER`; the name is empty for a folder alone, whose path may contain `=`."""
    if "=" not in text or Path(text).exists():
        return "", Path(text)
    name, _, folder = text.partition("=")
    if not name.strip() or not folder:
        raise UsageError(f"--predictions can't be {text!r}: give FOLDER or NAME=FOLDER.")
    return name.strip(), Path(folder)


def _predictions_of(folder: Path) -> Path:
    inner = folder / "predictions"
    return inner if inner.is_dir() and not (folder / PREDICTIONS_FILE).exists() else folder


def _run_name(predictions: Path) -> str:
    folder = Path(os.path.realpath(predictions))
    return printable(Path((folder.parent if folder.name == "predictions" else folder).name))


def _newest_predictions(with_truth: bool) -> Path:
    """The most recently written folder of predictions.

    Raises `UsageError` if there is none, if another run was trained since, or if only older predictions have a known
    ground truth: an older run's scores must not pass for those of the newest.
    """
    found = [run / "predictions" for run in runs_with(f"predictions/{PREDICTIONS_FILE}")]
    if not found:
        raise UsageError(f"There are no predictions below {RUNS}/: run `dsu predict`, or give --predictions DIR.")
    newest, made = found[0], (found[0] / PREDICTIONS_FILE).stat().st_mtime
    run = next(iter(runs_with(HEAD_FILE)), newest.parent)
    if run != newest.parent and (run / HEAD_FILE).stat().st_mtime > made:
        raise UsageError(
            f"The newest run, {run}, has no predictions yet: run `dsu predict`, or give --predictions "
            f"{newest.parent} for the newest existing ones."
        )
    fit = next(filter(_has_truth, found), newest) if with_truth else newest
    if fit != newest:
        raise UsageError(
            f"The newest predictions, {newest}, have no known ground truth: predict a data set, or give --truth DIR, "
            f"or --predictions {fit.parent} for the newest that have."
        )
    return newest


def _has_truth(predictions: Path) -> bool:
    try:
        return bool(_sets_in(predictions, read_record(predictions)))
    except DsuError:  # damaged, or not masks: evaluating it will say so
        return False


def without_truth(predictions: Path) -> list[str]:
    """Sets and single files that `dsu predict` wrote without a known ground truth, in words."""
    return [
        f"{name or 'files given one by one'} ({counted(len(how['names']), 'images')})"
        for name, how in read_record(predictions).items()
        if how["source"] is None and not is_benchmark(name)
    ]


def not_recorded(predictions: Path) -> list[str]:
    """Folders with masks among a head's predictions that this head did not make."""
    record = read_record(predictions)
    others = [path for path in predictions.iterdir() if path.is_dir() and path.name not in record] if record else []
    return sorted(path.name for path in others if next(path.rglob("*.png"), None))


def kept_figures(predictions: Path) -> dict[str, Any]:
    """Scores written earlier next to predictions, for sets still in their record."""
    try:
        found = dict(json.loads((predictions / FIGURE_FILES[0]).read_text()))
    except (OSError, ValueError, TypeError):  # missing or damaged
        return {}
    record = read_record(predictions)
    return {name: figures for name, figures in found.items() if name in record and isinstance(figures, dict)}


def find_evaluation_sets(
    names: Sequence[str],
    predictions: Path,
    truth: Path | None,
    paths: Paths,
    *,
    minmax: bool | None = None,
    images: Path | None = None,
    training_images: bool = False,
    called: str = "",
    validation: bool = False,
    beside: Iterable[Path] = (),
) -> list[EvaluationSet]:
    """Pair predictions with ground truths.

    Args:
        names: sets, each a folder of `predictions`; if empty, all sets with a ground truth.
        predictions: a folder that `dsu predict` wrote, or with `truth` any folder of maps.
        truth: a folder of masks, or of images and masks.
        paths: where benchmarks are.
        minmax: whether to min-max normalise each map; None: only those of benchmarks, as the paper does.
        images: a folder of the images; None: those next to `truth` or in the data set. They are only shown in reports.
        training_images: whether to accept images that the head was trained on.
        called: the set's name if `truth` but no name is given; by default its folder's name.
        validation: whether to include the validation share, which thresholds are chosen on, if there are other sets.
        beside: folders of other predictions whose records may name sets of `predictions`, such as shares of one's own
            data. If they record one set only, it needs no name.

    Raises `UsageError` for a set without predictions or ground truth, for predictions of another head than the run's,
    and for images that the head was trained on.
    """
    if not predictions.is_dir():
        raise UsageError(f"There is no folder of predictions at {predictions}: give --predictions DIR.")
    for folder in (predictions, predictions.parent):
        if by := holder(folder / PREDICTIONS_LOCK):
            raise UsageError(f"{by} is predicting into {folder}: wait until it ends.")
    record = read_record(predictions)
    if truth is not None:
        found = [_against(truth, names, predictions, record, paths, minmax, images, called)]
    else:
        known = {name: how for folder in beside for name, how in read_record(folder).items() if how["source"]}
        found = _recorded_sets(names, predictions, record, known, paths, minmax, images, validation)
    for one in found:
        if one.trained_on and not training_images:
            raise UsageError(
                f"{len(one.trained_on):,} of {counted(len(one.pairs), 'images')} of {one.name} were used to train "
                f"the head of {predictions} ({one.trained_on[0]}, ...), so scores would be too good: name another "
                "set; `dsu eval --common` leaves these images out, and `--all` includes them."
            )
    return found


def in_common(runs: Sequence[Sequence[EvaluationSet]]) -> list[list[EvaluationSet]]:
    """The sets of all runs, each with only the images that all have predicted and no head was trained on.

    Raises `UsageError` if there are none.
    """
    by_name = [{one.name: one for one in sets} for sets in runs]
    fair = {
        name: set.intersection(*({pair.name for pair in one[name].pairs} - {*one[name].trained_on} for one in by_name))
        for name in by_name[0]
        if all(name in one for one in by_name)
    }
    if not any(fair.values()):
        raise UsageError(
            "The runs have no images in common that none of the heads was trained on: predict the same new images "
            "with each (`dsu predict FOLDER --head RUN --out DIR`), and give their masks with --truth."
        )
    return [
        [
            replace(
                one, pairs=tuple(pair for pair in one.pairs if pair.name in kept), missing=(), extra=(), trained_on=()
            )
            for name, kept in fair.items()
            if kept and (one := sets[name])
        ]
        for sets in by_name
    ]


def _against(
    truth: Path,
    names: Sequence[str],
    predictions: Path,
    record: dict[str, Any],
    paths: Paths,
    minmax: bool | None,
    images: Path | None,
    called: str,
) -> EvaluationSet:
    """The set of a folder of maps, with masks from a folder that the user gave."""
    if len(names) > 1:
        raise UsageError("--truth evaluates one set: give at most one name.")
    folders = [name for name in record if (predictions / name).is_dir()]
    # The validation share is only for choosing thresholds if there is another set.
    sets = [name for name in folders if names or not is_validation(record[name])] or folders
    if sets and (len(sets) > 1 if not names else names[0] not in sets):
        raise UsageError(
            f"{predictions} contains {', '.join(name or 'single files' for name in sets)}: name the one that --truth "
            f"{truth} belongs to."
        )
    inner = predictions / names[0] if names and (predictions / names[0]).is_dir() else predictions
    if not names and len(folders) > 1:
        inner = predictions / sets[0]
    folder = inner if "" in sets and inner == predictions else unwrapped(inner)
    # `predictions` may be the recorded folder itself, or the folder of one of its sets.
    home = predictions if record else folder.parent
    how = record.get("" if folder == predictions else folder.name) or read_record(home).get(folder.name)
    _check_head(home)
    name = names[0] if names else called or predictions.resolve().name
    return _evaluation_set(name, folder, truths_in(truth, paths), how or {}, minmax, images, own_truth=False)


def _recorded_sets(
    names: Sequence[str],
    predictions: Path,
    record: dict[str, Any],
    known: dict[str, Any],
    paths: Paths,
    minmax: bool | None,
    images: Path | None,
    validation: bool,
) -> list[EvaluationSet]:
    """The named sets of a folder, or all: recorded by `dsu predict`, benchmarks, or sets `known` from other folders.

    Another method's maps of a `known` set may include more images.
    """
    chosen = list(names) or _sets_in(predictions, record)
    fair = [name for name, how in known.items() if not is_validation(how)]
    chosen = chosen or (fair if len(fair) == 1 and not record else [])
    if not (names or validation):
        chosen = [name for name in chosen if not is_validation(record.get(name, {}))] or chosen
    if not chosen:
        raise NoKnownTruth(
            f"No folder in {predictions} is a set with known ground truth: give --truth DIR, or predict a data set."
        )
    _check_head(predictions)
    found = [
        _evaluation_set(name, _folder_of(name, predictions), samples, record.get(name, {}), minmax, images)
        for asked in chosen
        for name, samples in _truths(asked, predictions, known | record, paths)
    ]
    return [one if one.recorded or one.name not in known else replace(one, extra=()) for one in found]


def predict_again(predictions: Path) -> str:
    """The command that updates a folder of predictions."""
    of_run = (predictions.parent / HEAD_FILE).is_file() and predictions.name == "predictions"
    words = ["--head", predictions.parent] if of_run else ["SOURCE", "--out", predictions]
    return f"`{shlex.join(['dsu', 'predict', *map(str, words)])}`"


def _folder_of(name: str, predictions: Path) -> Path:
    """The folder with a set's maps: the subfolder of its name, or for another method's maps the folder itself."""
    return inner if (inner := predictions / name).is_dir() else predictions


def _check_head(predictions: Path) -> None:
    """Raise `UsageError` if a run's predictions are from an earlier head."""
    head = predictions.parent / HEAD_FILE
    try:
        made_by = json.loads((predictions / PREDICTIONS_FILE).read_text())["head_sha256"]
    except (OSError, ValueError, KeyError, TypeError):  # another method's maps; `read_record` reports a damaged record
        return
    if head.is_file() and made_by != head_sha256(head):
        raise UsageError(
            f"{predictions} belongs to another head than {head}, which was trained since: run `dsu predict --head "
            f"{predictions.parent} --overwrite`."
        )


def _evaluation_set(
    name: str,
    predictions: Path,
    samples: Sequence[Pair],
    how: Mapping[str, Any],
    minmax: bool | None,
    images: Path | None,
    *,
    own_truth: bool = True,
) -> EvaluationSet:
    """A set from a folder of maps, its samples and its entry `how` in the record.

    `own_truth` says whether the samples are those of the record, whose mask format and time stamps then apply.
    """
    pairs, missing, extra = match(predictions, samples)
    if not pairs:
        raise UsageError(f"No prediction of {name} has a ground truth of the same name: check both folders.")
    images_of = _images_of_maps(how)
    made_of = {one.name: images_of.get(one.prediction.relative_to(predictions).as_posix(), "") for one in pairs}
    changed: list[str] = []
    if "names" in how:  # unrecorded maps are from another head, or unknown
        missing = missing + [one.name for one in pairs if not made_of[one.name]]
        pairs = [one for one in pairs if made_of[one.name]]
        stamps, contents = how.get("stamps", {}) if own_truth else {}, how.get("contents", {})
        noted = {one.name: (stamps.get(made_of[one.name]), contents.get(made_of[one.name])) for one in pairs}
        changed = [one.name for one in pairs if _has_changed(one, *noted[one.name])]
        pairs = [one for one in pairs if one.name not in changed]
        if not pairs:
            raise UsageError(
                f"No prediction of {name} is in its record for an unchanged image: run {predict_again(predictions)}, "
                "or copy the maps to evaluate into another folder."
            )
    if images is not None:
        shown = pair_files([one.name for one in pairs], named_images(images))
        pairs = [replace(one, image=image) for one, image in zip(pairs, shown, strict=True)]
    trained_on = set(how.get("trained_on", ()))
    minmax = is_benchmark(name) if minmax is None else minmax
    return EvaluationSet(
        name=name,
        pairs=tuple(pairs),
        missing=tuple(missing),
        extra=tuple(extra),
        minmax=minmax,
        mask_format=SourceFolder(**how["source"]).parsed_mask_format if how.get("source") and own_truth else None,
        random=bool(how.get("random", False)),
        share=str(how.get("share", "")),
        trained_on=tuple(one.name for one in pairs if made_of[one.name] in trained_on),
        changed=tuple(changed),
        predicted=_how_predicted(how, minmax=minmax),
        recorded="names" in how,
        predicted_otherwise=how.get("normalization") == "minmax" or how.get("threshold") is not None,
    )


def _images_of_maps(how: Mapping[str, Any]) -> dict[str, str]:
    """The recorded names of images by the file names that `dsu predict` gives their maps."""
    found: dict[str, str] = {}
    for name in how.get("names", ()):
        path = Path(name)
        stem = str(path.with_suffix("")) if path.suffix.lower() in IMAGE_SUFFIXES else name
        found |= {f"{form}.png": name for form in (name.replace(".", "_"), stem, name)}
    return found


def _has_changed(one: PredictionPair, stamp: Sequence[int] | None, digits: str | None) -> bool:
    """Whether an image has changed since it was predicted: by its size or, if only its time differs, its content."""
    if one.image is None or not stamp:
        return False
    found = or_unreadable(file_bytes_and_time)(one.image)
    if isinstance(found, UnreadableImage) or list(found) == list(stamp):
        return False
    if found[0] != stamp[0] or not digits:
        return found[0] != stamp[0]
    content = or_unreadable(file_sha256)(one.image)
    return not isinstance(content, UnreadableImage) and not content.startswith(digits)


def _how_predicted(how: Mapping[str, Any], *, minmax: bool) -> str:
    """How prediction changed the maps in ways that evaluation can't undo, in words."""
    stretched = how.get("normalization") == "minmax" and not minmax
    cut = how.get("threshold")
    done = (["stretched (min-max)"] if stretched else []) + ([] if cut is None else [f"binarised at {cut}"])
    return f"{' and '.join(done)} when predicted" if done else ""


def _sets_in(predictions: Path, record: dict[str, Any]) -> list[str]:
    """Folders with predictions of a data set, known from the record or by a benchmark's name."""
    folders = sorted(path.name for path in predictions.iterdir() if path.is_dir())
    return [
        name for name in folders if (record[name]["source"] if name in record else is_benchmark(name) and not record)
    ]


def _truths(name: str, predictions: Path, record: dict[str, Any], paths: Paths) -> list[tuple[str, list[Pair]]]:
    """The sets called `name`, each with its samples that have a mask."""
    source = record.get(name, {}).get("source")
    if source is not None:
        origin = SourceFolder(**source)
        split = origin.find() or replace(origin, data_root=str(paths.data_root)).find()
        if split is None:
            raise DsuError(f"The ground truth of {name} is not at {origin.place}: give --data-root or --truth.")
        # A set that is not a whole split is the share of it in the record.
        only = set(record[name]["names"])
        return [(name, [pair for pair in split.pairs if pair.mask and (split.name == name or pair.name in only)])]
    same = [known for known, how in record.items() if how["source"] and how["source"]["dataset"] == name]
    if same:
        return [item for known in same for item in _truths(known, predictions, record, paths)]
    if record:
        named = few(sorted(filter(None, record)))
        content = (
            f"it contains {named}" if named else "its maps have no known ground truth; evaluate them with --truth MASKS"
        )
        raise UsageError(f"{predictions} has no set {name!r} of this head: {content}.")
    splits = test_splits(find_dataset(name, paths))
    present = [split for split in splits if (predictions / split.name).is_dir()]
    if not present and len(splits) == 1 and not subfolders(predictions):  # another method's maps, only of this set
        present = list(splits)
    if not present:
        wanted = " or ".join(split.name for split in splits)
        raise UsageError(f"{predictions} has no folder {wanted}: run `dsu predict {name}` first.")
    return [(split.name, [pair for pair in split.pairs if pair.mask]) for split in present]


def read_record(predictions: Path) -> dict[str, Any]:
    """The entry of each set in the record of `dsu predict`; empty for other folders."""
    try:
        content = json.loads((predictions / PREDICTIONS_FILE).read_text())
        sets, kind = dict(content["sets"]), content["kind"]
        for how in sets.values():
            if how["source"] is not None:
                SourceFolder(**how["source"])
            check_noted(how)
            how["threshold"] = content.get("threshold")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DsuError(unreadable_record(predictions / PREDICTIONS_FILE, error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DsuError(f"{predictions / PREDICTIONS_FILE} is damaged: predict again, or give --truth DIR.") from error
    if kind != "mask":
        raise UsageError(f"{predictions} contains {kind} images, not masks: predict without --kind into another --out.")
    return sets
