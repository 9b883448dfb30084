"""Split samples into training, validation and test: once, by content, and recorded in a file.

A sample keeps its split when others are added or removed: `splits.json` next to the data set's stores records earlier
assignments, and only new content is assigned. Copies and tiles of an image have the same content, so they stay
together, and so do images of one group (`dsu.data.groups`).
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Final

from dsu.data.views import hashed_share
from dsu.errors import DsuError
from dsu.files import make_folder, write_json
from dsu.progress import SILENT, Progress
from dsu_cache import keep_beside, locked

SPLITS_FILE: Final = "splits.json"


def share_weights(val: float, test: float) -> dict[str, float]:
    """The weights of `train`, `val` and `test` from the held-out fractions, without empty ones."""
    weights = (("train", 1 - val - test), ("val", val), ("test", test))
    return {share: weight for share, weight in weights if weight > 0}


def fold_weights(parts: int) -> dict[str, float]:
    """The weights of folds `1` to `K` of a cross-validation, all equal."""
    return {str(part): 1 / parts for part in range(1, parts + 1)}


def assign_shares(
    strata: Sequence[Mapping[str, float]],
    weights: Mapping[str, float],
    before: Mapping[str, str] | None = None,
    groups: Iterable[Collection[str]] = (),
) -> dict[str, str]:
    """Assign every content to a split, stratified: each stratum is divided separately.

    Args:
        strata: contents, such as those with and without an object, each with its foreground fraction, by which they are
            mixed within a stratum.
        weights: fraction of each split, positive, with a sum of 1.
        before: splits of contents that were assigned earlier; they never change.
        groups: contents that stay together; a group counts for the first stratum of its contents. If some were assigned
            earlier, the others join the split of most of them.

    Returns:
        The split of each content. Contents are ordered by hash within each quarter of a stratum by foreground, so the
        same contents are always assigned alike. Sizes differ from the weights by less than two contents (or groups) per
        stratum. If a stratum, or all together, has at least as many new contents as there are splits, no split is
        empty. A group larger than the intended size of a split goes to the largest one.
    """
    before = {content: share for content, share in (before or {}).items() if share in weights}
    whole = len({content for stratum in strata for content in stratum})
    largest = max(weights, key=lambda share: weights[share])
    assigned: dict[str, str] = {}
    new: list[tuple[str, ...]] = []
    for units in _units(strata, groups):
        counts = Counter(dict.fromkeys(weights, 0))
        unassigned: dict[tuple[str, ...], float] = {}
        for unit, foreground in units.items():
            known = Counter(before[content] for content in unit if content in before)
            counts.update(known)
            if known:
                assigned |= {content: before.get(content, known.most_common(1)[0][0]) for content in unit}
            else:
                unassigned[unit] = foreground
        order = _order_by_foreground(unassigned)
        for unit in order:
            total = counts.total() + len(unit)
            fitting = [share for share in weights if len(unit) <= max(1, weights[share] * whole)] or [largest]
            share = max(fitting, key=lambda share: weights[share] * total - counts[share])
            assigned |= dict.fromkeys(unit, share)
            counts[share] += len(unit)
        if len(order) >= len(weights):
            for share in (share for share in weights if not counts[share]):
                movable = [unit for unit in reversed(order) if counts[assigned[unit[0]]] > len(unit)]
                if movable:
                    unit = min(movable, key=lambda unit: (assigned[unit[0]] != largest, len(unit)))
                    counts[assigned[unit[0]]] -= len(unit)
                    counts[share] += len(unit)
                    assigned |= dict.fromkeys(unit, share)
        new += order
    _fill_empty_splits(assigned, weights, new)
    return assigned


def _units(
    strata: Sequence[Mapping[str, float]], groups: Iterable[Collection[str]]
) -> list[dict[tuple[str, ...], float]]:
    """The contents of each stratum, each group as one unit, with their mean foreground."""
    foreground = {content: value for stratum in strata for content, value in stratum.items()}
    unit_of: dict[str, tuple[str, ...]] = {content: (content,) for content in foreground}
    for group in groups:
        members = sorted({other for content in group if content in unit_of for other in unit_of[content]})
        unit_of |= dict.fromkeys(members, tuple(members))
    found: list[dict[tuple[str, ...], float]] = []
    for stratum in strata:
        units = {unit_of[content] for content in stratum} - {unit for units in found for unit in units}
        found.append({unit: fmean(foreground[content] for content in unit) for unit in units})
    return found


def _order_by_foreground(units: Mapping[tuple[str, ...], float]) -> list[tuple[str, ...]]:
    """Units by quarter of their foreground fraction, each quarter ordered by hash."""
    hashes = {unit: (hashed_share(unit[0]), unit) for unit in units}
    ranked = sorted(units, key=lambda unit: (units[unit], hashes[unit]))
    quarter = {unit: 4 * rank // len(ranked) for rank, unit in enumerate(ranked)}
    return sorted(units, key=lambda unit: (quarter[unit], hashes[unit]))


def _fill_empty_splits(
    assigned: dict[str, str], weights: Mapping[str, float], new: Collection[tuple[str, ...]]
) -> None:
    """Give each empty split one unit: the smallest new one from the largest split."""
    for share in (share for share in weights if share not in assigned.values()):
        counts = Counter(assigned.values())
        movable = [unit for unit in new if counts[assigned[unit[0]]] > len(unit)]
        if movable:
            unit = min(movable, key=lambda unit: (len(unit), -counts[assigned[unit[0]]], -hashed_share(unit[0])))
            assigned |= dict.fromkeys(unit, share)


def assign_recorded_shares(
    folder: Path,
    strata: Sequence[Mapping[str, float]],
    weights: Mapping[str, float],
    groups: Collection[Collection[str]] = (),
    named: str | None = None,
    progress: Progress = SILENT,
) -> dict[str, str]:
    """Like `assign_shares`, but continues `splits.json` in `folder` and records new assignments there.

    If the folder can't be written, warns, and the split is valid for this run only. Splits with `named` groups are
    recorded separately.

    Raises:
        DsuError: The file is damaged.
        CacheError: The folder mirrors one on S3, where another run assigned samples at the same time.
    """
    path = folder / SPLITS_FILE
    key = ", ".join(f"{share} {weight:g}" for share, weight in weights.items()) + (f"; group {named}" if named else "")
    before = _read_record(path).get(key, {})
    odd = sorted(set(before.values()) - weights.keys())
    if odd:
        raise DsuError(f"{path} has an unknown split {odd[0]!r} under {key!r}: write one of {', '.join(weights)}.")
    assigned = assign_shares(strata, weights, before, groups)
    if assigned.items() <= before.items():
        return assigned
    try:
        make_folder(folder)
        # Runs that start together wait for each other.
        with locked(folder / f".{SPLITS_FILE}.lock", f"{path} is being written", patience=20):
            known = _read_record(path)
            before = known.get(key, {})
            assigned = assign_shares(strata, weights, before, groups)
            write_json(path, {**known, key: {**before, **assigned}})
            keep_beside(path)
    except (OSError, DsuError) as error:
        progress.say(f"The split can't be recorded in {path} ({error}): it is valid for this run only.")
    return assigned


def _read_record(path: Path) -> dict[str, dict[str, str]]:
    try:
        splits = {key: dict(shares) for key, shares in json.loads(path.read_text()).items()}
        if not all(isinstance(share, str) for shares in splits.values() for share in shares.values()):
            raise TypeError("a share is not a name")
        return splits
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DsuError(
            f"{path}, which records the held-out samples, can't be read ({error}): restore it, or remove it to split "
            "the samples again."
        ) from error
