"""Which samples are trained on, validated on and tested on: dealt once by their content, and kept in a file.

A sample keeps its share when others come or go: what was dealt before stands in `splits.json` beside the data set's
stores, and only new content is dealt. Copies of an image, and its tiles, are one content, so they stay together.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

from dsu.data.views import hashed_share
from dsu.errors import DsuError
from dsu.files import atomic_write, make_folder
from dsu.progress import SILENT, Progress
from dsu_cache import locked

__all__ = ["SPLITS_FILE", "deal", "fold_weights", "recorded_deal", "share_weights"]

SPLITS_FILE: Final = "splits.json"


def share_weights(val: float, test: float) -> dict[str, float]:
    """The shares `train`, `val` and `test` by the fractions that are held out; without those that are empty."""
    weights = {"train": 1 - val - test, "val": val, "test": test}
    return {share: weight for share, weight in weights.items() if weight > 0}


def fold_weights(parts: int) -> dict[str, float]:
    """The shares `1` to `K` of a cross-validation, all of one size."""
    return {str(part): 1 / parts for part in range(1, parts + 1)}


def deal(
    strata: Sequence[Collection[str]], weights: Mapping[str, float], before: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Give every content a share, each stratum apart, so that every share has its part of all strata.

    Args:
        strata: contents in groups, such as those with an object and those without.
        weights: of each share, positive, with a sum of 1.
        before: shares of contents that were dealt already; they never move.

    Returns:
        The share of each content. The order is that of the contents' hashes, so the same contents are always dealt
        alike. Sizes differ from the weights by less than two contents a stratum; where a stratum, or all
        together, have as many new contents as there are shares, none is left without one.
    """
    dealt: dict[str, str] = {}
    for stratum in strata:
        known = {content: before[content] for content in stratum if before and before.get(content) in weights}
        new = sorted(set(stratum) - known.keys(), key=lambda content: (hashed_share(content), content))
        counts = Counter(dict.fromkeys(weights, 0))
        counts.update(known.values())
        for content in new:
            total = counts.total() + 1
            share = max(weights, key=lambda share: weights[share] * total - counts[share])
            dealt[content] = share
            counts[share] += 1
        if len(new) >= len(weights):
            largest = max(weights, key=lambda share: weights[share])
            for share in (share for share in weights if not counts[share]):
                content = next(content for content in reversed(new) if dealt[content] == largest)
                dealt[content] = share
        dealt |= known
    _fill(dealt, weights, set(dealt) - set(before or {}))
    return dealt


def _fill(dealt: dict[str, str], weights: Mapping[str, float], new: Collection[str]) -> None:
    """Give shares that have nothing of any stratum a content each, new ones of the shares that have most."""
    for share in (share for share in weights if share not in dealt.values()):
        counts = Counter(dealt.values())
        movable = sorted(content for content in new if counts[dealt[content]] > 1)
        if movable:
            dealt[max(movable, key=lambda content: (counts[dealt[content]], hashed_share(content)))] = share


def recorded_deal(
    folder: Path, strata: Sequence[Collection[str]], weights: Mapping[str, float], progress: Progress = SILENT
) -> dict[str, str]:
    """As `deal`, going on from `splits.json` in `folder` and noting there what is new.

    Where the folder can't be written, that is said, and what is dealt holds for this run.

    Raises:
        DsuError: The file is damaged.
    """
    path = folder / SPLITS_FILE
    key = ", ".join(f"{share} {weight:g}" for share, weight in weights.items())
    before = _read(path).get(key, {})
    odd = sorted(set(before.values()) - weights.keys())
    if odd:
        raise DsuError(f"{path} has a share {odd[0]!r} under {key!r}: write one of {', '.join(weights)}.")
    dealt = deal(strata, weights, before)
    if dealt.items() <= before.items():
        return dealt
    try:
        make_folder(folder)
        with locked(folder / f".{SPLITS_FILE}.lock", f"{path} is being written"):
            known = _read(path)
            before = known.get(key, {})
            dealt = deal(strata, weights, before)
            content = {**known, key: {**before, **dealt}}
            atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())
    except (OSError, DsuError) as error:
        progress.say(f"The split can't be noted in {path} ({error}): it is kept in the run alone.")
    return dealt


def _read(path: Path) -> dict[str, dict[str, str]]:
    try:
        content = json.loads(path.read_text())
        splits = {key: dict(shares) for key, shares in content.items()}
        if not all(isinstance(share, str) for shares in splits.values() for share in shares.values()):
            raise TypeError("a share is no name")
        return splits
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DsuError(
            f"{path}, which says what is held out, can't be read ({error}): restore it, or remove it to have samples "
            f"dealt anew."
        ) from error
