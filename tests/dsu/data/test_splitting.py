import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from dsu.data.splitting import SPLITS_FILE, assign_recorded_shares, assign_shares, fold_weights, share_weights
from dsu.errors import DsuError

SHARES = st.sampled_from([share_weights(0.1, 0.0), share_weights(0.1, 0.2), share_weights(0.5, 0.0), fold_weights(5)])


def contents(start: int, stop: int) -> dict[str, float]:
    """Contents with their foreground fractions, which are not correlated with any order of the contents."""
    return {hashlib.sha256(str(index).encode()).hexdigest(): 0.01 * (index * 37 % 100) for index in range(start, stop)}


@given(weights=SHARES, sizes=st.lists(st.integers(0, 60), min_size=1, max_size=3))
@settings(max_examples=60)
def test_every_share_has_its_fraction_of_every_stratum(weights: dict[str, float], sizes: list[int]) -> None:
    strata = [contents(100 * index, 100 * index + size) for index, size in enumerate(sizes)]
    assigned = assign_shares(strata, weights)
    assert assigned.keys() == {content for stratum in strata for content in stratum}
    for stratum in strata:
        counts = Counter(assigned[content] for content in stratum)
        for share, weight in weights.items():
            assert abs(counts[share] - weight * len(stratum)) < 2
            assert counts[share] or len(stratum) < len(weights)


@given(weights=SHARES, first=st.integers(0, 60), more=st.integers(0, 60))
@settings(max_examples=60)
def test_assigned_contents_never_change_their_share(weights: dict[str, float], first: int, more: int) -> None:
    before = assign_shares([contents(0, first)], weights)
    after = assign_shares([contents(0, first + more)], weights, before)
    assert before.items() <= after.items()
    without = assign_shares([contents(first // 2, first)], weights, before)
    assert without.items() <= before.items(), "removed contents do not move others"


def test_the_assignment_does_not_depend_on_the_order() -> None:
    names = contents(0, 50)
    assert assign_shares([names], fold_weights(3)) == assign_shares([dict(reversed(names.items()))], fold_weights(3))
    assert assign_shares([names], {"train": 1.0}) == dict.fromkeys(names, "train")


def test_a_single_image_is_for_training() -> None:
    assert assign_shares([contents(0, 1)], share_weights(0.1, 0.1)) == dict.fromkeys(contents(0, 1), "train")


@pytest.mark.parametrize("weights", [share_weights(0.1, 0.1), fold_weights(5)])
def test_large_and_small_objects_are_in_every_share(weights: dict[str, float]) -> None:
    names = contents(0, 100)
    assigned = assign_shares([names], weights)
    for share, weight in weights.items():
        quarters = Counter(int(names[content] * 4) for content in names if assigned[content] == share)
        assert all(abs(quarters[quarter] - 25 * weight) < 2 for quarter in range(4)), (share, quarters)


@given(weights=SHARES, sizes=st.lists(st.integers(1, 6), min_size=1, max_size=30), empty=st.integers(0, 20))
@settings(max_examples=60)
def test_groups_are_not_divided_and_shares_keep_their_size(
    weights: dict[str, float], sizes: list[int], empty: int
) -> None:
    names = list(contents(0, sum(sizes)))
    groups = [names[sum(sizes[:index]) : sum(sizes[: index + 1])] for index in range(len(sizes))]
    strata = [dict.fromkeys(names, 0.1), contents(1000, 1000 + empty)]
    assigned = assign_shares(strata, weights, groups=groups)
    assert assigned.keys() == {*names, *strata[1]}
    assert all(len({assigned[content] for content in group}) == 1 for group in groups)
    counts = Counter(assigned.values())
    units = len(groups) + empty
    for share, weight in weights.items():
        assert abs(counts[share] - weight * len(assigned)) < 3 * max(sizes)
        assert counts[share] or units < len(weights)


def test_a_new_member_follows_its_group_and_assigned_contents_do_not_move() -> None:
    first, weights = contents(0, 40), share_weights(0.2, 0.0)
    before = assign_shares([first], weights)
    held = next(content for content in first if before[content] == "val")
    [new] = contents(90, 91)
    after = assign_shares([first, {new: 0.0}], weights, before, groups=[[held, new]])
    assert after[new] == "val" and before.items() <= after.items()
    apart = [next(content for content in first if before[content] == "train"), held]
    assert assign_shares([first], weights, before, groups=[apart]) == before, "assigned contents never move"


def test_a_group_larger_than_a_share_is_for_training() -> None:
    names = contents(0, 40)
    group = list(names)[:12]
    assigned = assign_shares([names], share_weights(0.1, 0.1), groups=[group])
    assert {assigned[content] for content in group} == {"train"} and Counter(assigned.values())["val"] == 4


def test_named_groups_have_a_separate_record(tmp_path: Path) -> None:
    names, weights = contents(0, 20), share_weights(0.2, 0.0)
    plain = assign_recorded_shares(tmp_path, [names], weights)
    group = [content for share in ("train", "val") for content in names if plain[content] == share][-6:]
    named = assign_recorded_shares(tmp_path, [names], weights, [group], "part_(.)")
    assert len({named[content] for content in group}) == 1 < len({plain[content] for content in group})
    assert assign_recorded_shares(tmp_path, [names], weights) == plain


def test_shares_are_recorded_for_each_kind_of_split(tmp_path: Path) -> None:
    first, more = [contents(0, 20)], [contents(0, 40)]
    folds, shares = fold_weights(3), share_weights(0.2, 0.0)
    before = (
        assign_recorded_shares(tmp_path / "new", first, folds),
        assign_recorded_shares(tmp_path / "new", first, shares),
    )
    after = (
        assign_recorded_shares(tmp_path / "new", more, folds),
        assign_recorded_shares(tmp_path / "new", more, shares),
    )
    assert all(old.items() <= new.items() for old, new in zip(before, after, strict=True))
    assert assign_recorded_shares(tmp_path / "new", first, folds) == before[0]
    kept = json.loads((tmp_path / "new" / SPLITS_FILE).read_text())
    assert sorted(map(len, kept.values())) == [40, 40], "removed contents keep their share in case they return"


def test_a_damaged_record_is_named_and_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / SPLITS_FILE).write_text("{")
    with pytest.raises(DsuError, match=SPLITS_FILE):
        assign_recorded_shares(tmp_path, [contents(0, 20)], fold_weights(3))
    assert (tmp_path / SPLITS_FILE).read_text() == "{"
