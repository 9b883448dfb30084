"""Which predictions are judged against which ground truth."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsu.datasets import Split, find_dataset, is_benchmark
from dsu.errors import DsuError, UsageError
from dsu.evaluation import Case, match, match_folders
from dsu.folders import unwrapped
from dsu.pairing import image_and_mask_folders
from dsu.prediction import RECORD_FILE
from dsu.stores import SourceFolder

__all__ = ["JudgedSet", "find_judged_sets", "newest_predictions"]


@dataclass(frozen=True)
class JudgedSet:
    """One set of predictions and their ground truth.

    Attributes:
        name: of the set.
        cases: what is judged.
        missing: names of ground truths without a prediction.
        extra: names of predictions without a ground truth.
        minmax: whether maps are stretched to their full range first.
    """

    name: str
    cases: tuple[Case, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    minmax: bool


def newest_predictions(runs: Path = Path("runs")) -> Path:
    """The folder that was predicted into last. Raises `UsageError` where there is none."""
    found = sorted(runs.glob(f"*/predictions/{RECORD_FILE}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UsageError(f"There are no predictions below {runs}/: run `dsu predict`, or give --predictions DIR.")
    return found[-1].parent


def find_judged_sets(
    names: Sequence[str],
    predictions: Path,
    truth: Path | None,
    *,
    data_root: Path,
    minmax: bool | None = None,
) -> list[JudgedSet]:
    """Pair predictions with ground truths.

    Args:
        names: sets, each a folder of `predictions`; none: all that have a ground truth.
        predictions: the folder that `dsu predict` wrote into, or with `truth` any folder of maps.
        truth: a folder of masks that `predictions` are judged against.
        data_root: where benchmarks lie.
        minmax: None takes what the maps were predicted with, and min-max (the benchmarks' convention and
            pysodmetrics' default) where that is not known.

    Raises `UsageError` for a set without predictions or without ground truth.
    """
    if not predictions.is_dir():
        raise UsageError(f"There is no folder of predictions at {predictions}: give --predictions DIR.")
    record = _read_record(predictions)
    if truth is not None:
        if len(names) > 1:
            raise UsageError("Two folders make one set: give at most one name with --truth.")
        name = names[0] if names else predictions.resolve().name
        return [_set(name, *match_folders(unwrapped(predictions), _mask_folder(truth)), {}, minmax)]
    chosen = list(names) or _sets_in(predictions, record)
    if not chosen:
        raise UsageError(
            f"No folder in {predictions} is a set with known ground truth: give --truth DIR, or predict a data set."
        )
    splits = [item for name in chosen for item in _truths(name, predictions, record, data_root)]
    return [_set(name, *match(predictions / name, truths), record.get(name, {}), minmax) for name, truths in splits]


def _mask_folder(truth: Path) -> Path:
    """The masks in a folder of images and masks; any other folder is one of masks."""
    if not truth.is_dir():
        return truth
    try:
        return image_and_mask_folders(truth)[1] or truth
    except UsageError:
        return truth


def _set(
    name: str, cases: list[Case], missing: list[str], extra: list[str], how: dict[str, Any], minmax: bool | None
) -> JudgedSet:
    if not cases:
        raise UsageError(f"No prediction of {name} has a ground truth of the same name: check both folders.")
    stretched = how.get("normalization", "minmax") == "minmax" if minmax is None else minmax
    return JudgedSet(name, tuple(cases), tuple(missing), tuple(extra), stretched)


def _sets_in(predictions: Path, record: dict[str, Any]) -> list[str]:
    """Folders that hold predictions of a data set, by the record or by a benchmark's name."""
    folders = sorted(path.name for path in predictions.iterdir() if path.is_dir())
    return [name for name in folders if record.get(name, {}).get("source") or is_benchmark(name)]


def _truths(
    name: str, predictions: Path, record: dict[str, Any], data_root: Path
) -> list[tuple[str, list[tuple[str, Path]]]]:
    """Sets meant by `name`, each with the masks of its samples."""
    source = record.get(name, {}).get("source")
    if source is not None:
        origin = SourceFolder(**source)
        split = origin.find() or replace(origin, data_root=str(data_root)).find()
        if split is None:
            raise DsuError(f"The ground truth of {name} is not at {origin.place}: give --data-root or --truth.")
        # A set that is not a whole split is the share of it that the record names.
        only = None if split.name == name else set(record[name]["names"])
        return [(name, _masks(split, only))]
    same = [known for known, how in record.items() if how["source"] and how["source"]["dataset"] == name]
    if same:
        return [item for known in same for item in _truths(known, predictions, record, data_root)]
    if record and not is_benchmark(name):
        raise UsageError(f"{predictions} holds no set called {name!r}: it holds {', '.join(filter(None, record))}.")
    splits = find_dataset(name, data_root)
    tests = [split for split in splits if split.kind != "train"] or list(splits)
    present = [split for split in tests if (predictions / split.name).is_dir()]
    if not present:
        wanted = " or ".join(split.name for split in tests)
        raise UsageError(f"{predictions} has no folder {wanted}: run `dsu predict {name}` first.")
    return [(split.name, _masks(split, None)) for split in present]


def _masks(split: Split, only: set[str] | None) -> list[tuple[str, Path]]:
    return [
        (pair.name, pair.mask) for pair in split.pairs if pair.mask is not None and (only is None or pair.name in only)
    ]


def _read_record(predictions: Path) -> dict[str, Any]:
    """What `dsu predict` wrote of each set; nothing for other folders."""
    try:
        content = json.loads((predictions / RECORD_FILE).read_text())
        sets = dict(content["sets"])
        kind = content["kind"]
        for how in sets.values():
            if how["source"] is not None:
                SourceFolder(**how["source"])
                set(how["names"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DsuError(f"{predictions / RECORD_FILE} is damaged: predict again, or give --truth DIR.") from error
    if kind != "mask":
        raise UsageError(f"{predictions} holds {kind} pictures, not masks: predict without --kind into another --out.")
    return sets
