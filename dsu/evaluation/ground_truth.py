"""Which predictions are judged against which ground truth."""

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
from dsu.data.pairing import Pair, named_images, pair_files, subfolders, unwrapped
from dsu.errors import DsuError, UsageError
from dsu.evaluation.evaluate import Evaluation, JudgedImage, evaluate, match, truths_in
from dsu.heads.head_file import HEAD_FILE, head_sha256
from dsu.metrics.figures import RANDOM
from dsu.prediction.record import FIGURE_FILES, LOCK_FILE, check_noted, unreadable_record
from dsu.prediction.targets import RECORD_FILE, VALIDATION
from dsu.progress import SILENT, Progress, counted, few
from dsu_cache import holder

_ALMOST_BLACK: Final = 1 / 255
"""The largest response of 0/1 maps, read as 8-bit grey or as 16 bits with only 8 in use."""

__all__ = [
    "JudgedSet",
    "NoKnownTruth",
    "find_judged_sets",
    "kept_figures",
    "named_predictions",
    "not_recorded",
    "predict_again",
    "read_record",
    "unjudged",
]


class NoKnownTruth(UsageError):  # noqa: N818 - named after the folder's state
    """Predictions that no ground truth is known of."""


@dataclass(frozen=True)
class JudgedSet:
    """One set of predictions and their ground truth.

    Attributes:
        name: of the set.
        judged: What is.
        missing: names of ground truths without a prediction.
        extra: names of predictions without a ground truth.
        minmax: whether maps are stretched to their full range first.
        mask_format: how the masks are meant, where that was found out from the whole data set.
        random: whether random encoders made the predictions.
        share: which share of the head's own training split it is, in words; empty for other sets.
        trained_on: names of images that the head was trained on.
    """

    name: str
    judged: tuple[JudgedImage, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    minmax: bool
    mask_format: MaskFormat | None = None
    random: bool = False
    share: str = ""
    trained_on: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    """Names of images that are others than those that were predicted, and so are not judged."""
    predicted: str = ""
    """What prediction did to the maps that no figure of theirs shows, in words."""
    recorded: bool = False
    """Whether `dsu predict` wrote the maps."""
    predicted_otherwise: bool = False
    """Whether its maps were stretched or cut when they were predicted."""

    @property
    def is_validation(self) -> bool:
        """Whether it is the validation split, which thresholds are chosen on."""
        return is_validation({"share": self.share})

    def evaluate(
        self,
        *,
        resize: bool = False,
        foreground: Sequence[int] | None = None,
        workers: int | None = None,
        progress: Progress = SILENT,
    ) -> Evaluation:
        """What the set scores; arguments and errors are those of `dsu.evaluation.evaluate.evaluate`."""
        found = evaluate(
            self.judged,
            normalize=self.minmax,
            resize=resize,
            mask_format=None if foreground else self.mask_format,
            foreground=foreground,
            workers=workers,
            progress=progress,
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
    """Whether what a record notes of a set is that it is a validation share."""
    return str(how.get("share", "")).startswith(VALIDATION)


def named_predictions(given: Sequence[str | Path], *, judged: bool = True) -> dict[str, Path]:
    """Folders of predictions by name: each as NAME=FOLDER, or as FOLDER, which is called by what tells it apart.

    That is the run's folder where it is a run's, else its own name; where two share one, paths as given are the names.
    A run's folder stands for the predictions in it; without any, it is the newest run's below runs/. Where they are to
    be `judged`, these must be of a set with known ground truth.

    Raises `UsageError` for a name or a folder that is given twice, and where the newest run can't be meant.
    """
    asked = [_name_and_folder(str(text)) for text in given] or [("", _newest_predictions(Path("runs"), judged))]
    found = [_predictions_of(folder) for _, folder in asked]
    # realpath, since Path.resolve fails on links that lead round in a circle.
    for place, count in Counter(map(os.path.realpath, found)).items():
        if count > 1:
            raise UsageError(f"--predictions has {place} {count} times: give each folder once.")
    own_names = [_run_name(folder) for folder in found]
    named: dict[str, Path] = {}
    for (name, folder), own_name, predictions in zip(asked, own_names, found, strict=True):
        name = name or (printable(folder) if own_names.count(own_name) > 1 else own_name)
        if name in named:
            raise UsageError(f"--predictions has the name {name} twice: give NAME=FOLDER with different names.")
        named[name] = predictions
    return named


def _name_and_folder(text: str) -> tuple[str, Path]:
    """`NAME=FOLDER` taken apart; the name is empty for a folder alone, which may have a `=` in it."""
    if "=" not in text or Path(text).exists():
        return "", Path(text)
    name, _, folder = text.partition("=")
    if not name.strip() or not folder:
        raise UsageError(f"--predictions can't be {text!r}: give FOLDER or NAME=FOLDER.")
    return name.strip(), Path(folder)


def _predictions_of(folder: Path) -> Path:
    inner = folder / "predictions"
    return inner if inner.is_dir() and not (folder / RECORD_FILE).exists() else folder


def _run_name(predictions: Path) -> str:
    folder = Path(os.path.realpath(predictions))
    return printable(Path((folder.parent if folder.name == "predictions" else folder).name))


def _newest_predictions(runs: Path, judged: bool) -> Path:
    """The folder that was predicted into last.

    Raises `UsageError` if there is none, where another run was trained since, or where only older ones hold a set
    with known ground truth: what an older run scores must not be taken for what the newest does.
    """
    found = _newest_first(runs.glob(f"*/predictions/{RECORD_FILE}"))
    if not found:
        raise UsageError(f"There are no predictions below {runs}/: run `dsu predict`, or give --predictions DIR.")
    newest, *older = (record.parent for record in found)
    head = next(iter(_newest_first(runs.glob(f"*/{HEAD_FILE}"))), None)
    if head is not None and head.parent != newest.parent and head.stat().st_mtime > found[0].stat().st_mtime:
        raise UsageError(
            f"The newest run, {head.parent}, has no predictions yet: run `dsu predict`, or give --predictions "
            f"{newest.parent} for the newest existing ones."
        )
    fit = next(filter(_has_truth, [newest, *older]), newest) if judged else newest
    if fit != newest:
        raise UsageError(
            f"The newest predictions, {newest}, have no known ground truth: predict a data set, or give --truth DIR, "
            f"or --predictions {fit.parent} for the newest that have."
        )
    return newest


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def _has_truth(predictions: Path) -> bool:
    try:
        return bool(_sets_in(predictions, read_record(predictions)))
    except DsuError:  # damaged, or pictures: whoever judges it is told
        return False


def unjudged(predictions: Path) -> list[str]:
    """What `dsu predict` wrote into a folder without knowing a ground truth, in words: folders, and single files."""
    return [
        f"{name or 'files given one by one'} ({counted(len(how['names']), 'images')})"
        for name, how in read_record(predictions).items()
        if how["source"] is None and not is_benchmark(name)
    ]


def not_recorded(predictions: Path) -> list[str]:
    """Folders of pictures among the predictions of a head that are not its own."""
    record = read_record(predictions)
    others = [path for path in predictions.iterdir() if path.is_dir() and path.name not in record] if record else []
    return sorted(path.name for path in others if next(path.rglob("*.png"), None))


def kept_figures(predictions: Path) -> dict[str, Any]:
    """Scores written earlier next to predictions, for sets still in their record."""
    try:
        found = dict(json.loads((predictions / FIGURE_FILES[0]).read_text()))
    except (OSError, ValueError, TypeError):  # not there, or not as it was written
        return {}
    record = read_record(predictions)
    return {name: figures for name, figures in found.items() if name in record and isinstance(figures, dict)}


def find_judged_sets(
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
) -> list[JudgedSet]:
    """Pair predictions with ground truths.

    Args:
        names: sets, each a folder of `predictions`; none: all that have a ground truth.
        predictions: the folder that `dsu predict` wrote into, or with `truth` any folder of maps.
        truth: a folder of masks, or of images and masks, that `predictions` are judged against.
        paths: where benchmarks lie.
        minmax: None stretches the maps of benchmarks, as the paper does, and no others.
        images: a folder of the images; None: those that are found with `truth` or belong to the data set. They are
            shown in reports, and nothing is measured on them.
        training_images: whether images that the head was trained on may be judged.
        called: what the set is called that is judged against `truth`, where no name is given; else as its folder.
        validation: whether the validation share is among all sets where there are others: thresholds are chosen by it.
        beside: folders of other predictions, whose sets are known by their names here too: shares of one's own data
            are known by nothing else. Without a name it is the one that they are judged on.

    Raises `UsageError` for a set without predictions or without ground truth, for predictions of another head than the
    run's, and for images that the head was trained on.
    """
    if not predictions.is_dir():
        raise UsageError(f"There is no folder of predictions at {predictions}: give --predictions DIR.")
    for folder in (predictions, predictions.parent):
        if by := holder(folder / LOCK_FILE):
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
                f"{len(one.trained_on):,} of {counted(len(one.judged), 'images')} of {one.name} were used to train "
                f"this head ({one.trained_on[0]}, ...), so scores would be too good: evaluate other images, or these "
                "with --all."
            )
    return found


def _against(
    truth: Path,
    names: Sequence[str],
    predictions: Path,
    record: dict[str, Any],
    paths: Paths,
    minmax: bool | None,
    images: Path | None,
    called: str,
) -> JudgedSet:
    """The one set of a folder that is judged against masks that the user names."""
    if len(names) > 1:
        raise UsageError("--truth evaluates one set: give at most one name.")
    folders = [name for name in record if (predictions / name).is_dir()]
    # Validation images are for thresholds: next to another set they are never meant.
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
    # What is noted of the folder, which may be a set's own or the one that holds its alone.
    home = predictions if record else folder.parent
    how = record.get("" if folder == predictions else folder.name) or read_record(home).get(folder.name)
    _check_head(home)
    name = names[0] if names else called or predictions.resolve().name
    return _judged(name, folder, truths_in(truth, paths), how or {}, minmax, images, own_truth=False)


def _recorded_sets(
    names: Sequence[str],
    predictions: Path,
    record: dict[str, Any],
    known: dict[str, Any],
    paths: Paths,
    minmax: bool | None,
    images: Path | None,
    validation: bool,
) -> list[JudgedSet]:
    """The named sets of a folder that `dsu predict` wrote into, or all; benchmarks by their names in other folders.

    What is `known` of other folders' sets serves for another method's maps, which may be of more images.
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
        _judged(name, _folder_of(name, predictions), samples, record.get(name, {}), minmax, images)
        for asked in chosen
        for name, samples in _truths(asked, predictions, known | record, paths)
    ]
    return [one if one.recorded or one.name not in known else replace(one, extra=()) for one in found]


def predict_again(predictions: Path) -> str:
    """The command to type for what changed in a folder of predictions (of a run: its own sets)."""
    of_run = (predictions.parent / HEAD_FILE).is_file() and predictions.name == "predictions"
    words = ["--head", predictions.parent] if of_run else ["SOURCE", "--out", predictions]
    return f"`{shlex.join(['dsu', 'predict', *map(str, words)])}`"


def _folder_of(name: str, predictions: Path) -> Path:
    """Where the maps of a set lie: in a folder of its name, or right in that of another method."""
    return inner if (inner := predictions / name).is_dir() else predictions


def _check_head(predictions: Path) -> None:
    """Raise `UsageError` if a run's predictions are not those of the head that it has now."""
    head = predictions.parent / HEAD_FILE
    try:
        made_by = json.loads((predictions / RECORD_FILE).read_text())["head_sha256"]
    except (OSError, ValueError, KeyError, TypeError):  # no record: foreign maps; a damaged one is found by its readers
        return
    if head.is_file() and made_by != head_sha256(head):
        raise UsageError(
            f"{predictions} belongs to another head than {head}, which was trained since: run `dsu predict --head "
            f"{predictions.parent} --overwrite`."
        )


def _judged(
    name: str,
    predictions: Path,
    samples: Sequence[Pair],
    how: Mapping[str, Any],
    minmax: bool | None,
    images: Path | None,
    *,
    own_truth: bool = True,
) -> JudgedSet:
    """A set from a folder of maps; images of a folder, where one is given, go before those that were found.

    `own_truth` says whether the samples are those that the record names: else masks are read as they are found.
    """
    judged, missing, extra = match(predictions, samples)
    if not judged:
        raise UsageError(f"No prediction of {name} has a ground truth of the same name: check both folders.")
    images_of = _images_of_maps(how)
    made_of = {one.name: images_of.get(one.prediction.relative_to(predictions).as_posix(), "") for one in judged}
    changed: list[str] = []
    if "names" in how:  # what else lies there is of another head, or of nothing that is known
        missing = missing + [one.name for one in judged if not made_of[one.name]]
        judged = [one for one in judged if made_of[one.name]]
        stamps, contents = how.get("stamps", {}) if own_truth else {}, how.get("contents", {})
        noted = {one.name: (stamps.get(made_of[one.name]), contents.get(made_of[one.name])) for one in judged}
        changed = [one.name for one in judged if _has_changed(one, *noted[one.name])]
        judged = [one for one in judged if one.name not in changed]
        if not judged:
            raise UsageError(
                f"No prediction of {name} is in its record for an unchanged image: run {predict_again(predictions)}, "
                "or copy the maps to evaluate into another folder."
            )
    if images is not None:
        shown = pair_files([one.name for one in judged], named_images(images))
        judged = [replace(one, image=image) for one, image in zip(judged, shown, strict=True)]
    trained_on = set(how.get("trained_on", ()))
    minmax = is_benchmark(name) if minmax is None else minmax
    return JudgedSet(
        name=name,
        judged=tuple(judged),
        missing=tuple(missing),
        extra=tuple(extra),
        minmax=minmax,
        mask_format=SourceFolder(**how["source"]).parsed_mask_format if how.get("source") and own_truth else None,
        random=bool(how.get("random", False)),
        share=str(how.get("share", "")),
        trained_on=tuple(one.name for one in judged if made_of[one.name] in trained_on),
        changed=tuple(changed),
        predicted=_how_predicted(how, minmax=minmax),
        recorded="names" in how,
        predicted_otherwise=how.get("normalization") == "minmax" or how.get("threshold") is not None,
    )


def _images_of_maps(how: Mapping[str, Any]) -> dict[str, str]:
    """The names of a record's images by the files that were predicted of them, as `dsu predict` calls these."""
    found: dict[str, str] = {}
    for name in how.get("names", ()):
        path = Path(name)
        stem = str(path.with_suffix("")) if path.suffix.lower() in IMAGE_SUFFIXES else name
        found |= {f"{form}.png": name for form in (name.replace(".", "_"), stem, name)}
    return found


def _has_changed(one: JudgedImage, stamp: Sequence[int] | None, digits: str | None) -> bool:
    """Whether an image is another than was predicted, by size, then time, and by content where only the time differs.

    Copies have another time.
    """
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
    """What was done to maps when they were predicted, which judging can't undo."""
    stretched = how.get("normalization") == "minmax" and not minmax
    cut = how.get("threshold")
    done = (["stretched (min-max)"] if stretched else []) + ([] if cut is None else [f"cut at {cut}"])
    return f"{' and '.join(done)} when predicted" if done else ""


def _sets_in(predictions: Path, record: dict[str, Any]) -> list[str]:
    """Folders that hold predictions of a data set, by the record or by a benchmark's name."""
    folders = sorted(path.name for path in predictions.iterdir() if path.is_dir())
    return [
        name for name in folders if (record[name]["source"] if name in record else is_benchmark(name) and not record)
    ]


def _truths(name: str, predictions: Path, record: dict[str, Any], paths: Paths) -> list[tuple[str, list[Pair]]]:
    """Sets meant by `name`, each with its samples that have a mask."""
    source = record.get(name, {}).get("source")
    if source is not None:
        origin = SourceFolder(**source)
        split = origin.find() or replace(origin, data_root=str(paths.data_root)).find()
        if split is None:
            raise DsuError(f"The ground truth of {name} is not at {origin.place}: give --data-root or --truth.")
        # A set that is not a whole split is the share of it that the record names.
        only = set(record[name]["names"])
        return [(name, [pair for pair in split.pairs if pair.mask and (split.name == name or pair.name in only)])]
    same = [known for known, how in record.items() if how["source"] and how["source"]["dataset"] == name]
    if same:
        return [item for known in same for item in _truths(known, predictions, record, paths)]
    if record:
        named = few(sorted(filter(None, record)))
        holds = (
            f"it contains {named}" if named else "its maps have no known ground truth; evaluate them with --truth MASKS"
        )
        raise UsageError(f"{predictions} has no set {name!r} of this head: {holds}.")
    splits = test_splits(find_dataset(name, paths))
    present = [split for split in splits if (predictions / split.name).is_dir()]
    if not present and len(splits) == 1 and not subfolders(predictions):  # another method's maps, of this set alone
        present = list(splits)
    if not present:
        wanted = " or ".join(split.name for split in splits)
        raise UsageError(f"{predictions} has no folder {wanted}: run `dsu predict {name}` first.")
    return [(split.name, [pair for pair in split.pairs if pair.mask]) for split in present]


def read_record(predictions: Path) -> dict[str, Any]:
    """What `dsu predict` wrote of each set; nothing for other folders."""
    try:
        content = json.loads((predictions / RECORD_FILE).read_text())
        sets, kind = dict(content["sets"]), content["kind"]
        for how in sets.values():
            if how["source"] is not None:
                SourceFolder(**how["source"])
            check_noted(how)
            how["threshold"] = content.get("threshold")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DsuError(unreadable_record(predictions / RECORD_FILE, error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DsuError(f"{predictions / RECORD_FILE} is damaged: predict again, or give --truth DIR.") from error
    if kind != "mask":
        raise UsageError(
            f"{predictions} contains {kind} pictures, not masks: predict without --kind into another --out."
        )
    return sets
