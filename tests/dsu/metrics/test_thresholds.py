"""Thresholds: conversion to 8-bit values, proposals for small maps, and results at a threshold."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from dsu.metrics.image_level import ImageLevel
from dsu.metrics.meters import Meters, Totals
from dsu.metrics.thresholds import calibration, evaluate_threshold, propose_thresholds, threshold_at
from dsu.thresholds import level_of


def test_thresholds_with_few_decimals_identify_8_bit_values() -> None:
    for level in range(1, 256):
        threshold = threshold_at(level)
        assert level_of(threshold) == level and len(f"{threshold}") <= 5
        assert level / 255 >= threshold > (level - 1) / 255
    assert level_of(0.5) == 128 and threshold_at(128) == 0.5 and level_of(1.0) == 255


def measured(*maps: tuple[Sequence[int], Sequence[int]]) -> tuple[ImageLevel, NDArray[np.int64]]:
    """Measure images given as pairs of pixel rows: the map's values and the ground truth's."""
    meters, totals = Meters(), Totals()
    for prediction, truth in maps:
        pair = [np.array([row, row], np.uint8) for row in (prediction, [255 * on for on in truth])]
        meters.step(*pair, normalize=False)
    totals.add(meters)
    return totals.image_level, totals.levels


DEFECT, GOOD = [0, 0, 1, 1], [0, 0, 0, 0]
SHARE = (
    ([10, 20, 90, 100], DEFECT),  # found at thresholds up to 100
    ([10, 60, 40, 50], DEFECT),  # found up to 60, with its object's pixels up to 50
    ([5, 5, 10, 20], GOOD),  # silent from 21
    ([5, 5, 5, 70], GOOD),  # silent from 71
)


def test_results_at_a_threshold_are_counted_by_image_and_by_pixel() -> None:
    at = evaluate_threshold(threshold_at(55), *measured(*SHARE))
    assert (at.found, at.missed, at.false_alarms, at.silent) == (2, 0, 1, 1)
    # Above the threshold: 90 and 100 on objects, 60 and 70 outside, in each of two rows.
    assert at.precision == 0.5 and at.recall == 0.5 and at.dice == 0.5
    silent = evaluate_threshold(1.0, *measured(*SHARE))
    assert (silent.found, silent.missed, silent.dice) == (0, 2, 0)


def test_each_rule_takes_the_middle_of_equally_good_thresholds() -> None:
    rules = dict(propose_thresholds(*measured(*SHARE), false_alarms=0.0))
    assert {rule: level_of(at) for rule, at in rules.items()} == {
        "best pixels": 30,  # from 21 to 40, all four object pixels and two others are above
        "no misses": 40,  # from 21 to 60, both objects are found, with one false alarm
        "balanced": 40,  # the same, or from 71 to 100, which is a shorter range
        "false alarms up to 0 %": 85,  # from 71 to 100
    }
    few = dict(propose_thresholds(*measured(*SHARE), false_alarms=0.5))
    assert level_of(few["false alarms up to 50 %"]) == 40


def test_a_rule_without_a_solution_is_left_out() -> None:
    defects = measured(*SHARE[:2])
    assert set(dict(propose_thresholds(*defects))) == {"best pixels", "no misses"}
    assert calibration(defects[0]) == []
    black = measured(([0, 0, 0, 0], DEFECT), ([0, 0, 0, 255], GOOD))
    assert set(dict(propose_thresholds(*black))) == {"best pixels", "balanced"}
    assert dict(propose_thresholds(*measured(*SHARE[2:]))) == {}


def test_calibration_counts_every_image_once() -> None:
    rng = np.random.default_rng(0)
    responses = rng.integers(0, 256, 40) / 255
    empty = rng.random(40) > responses
    found = calibration(ImageLevel(tuple(responses), tuple(empty)))
    assert 2 <= len(found) <= 10 and sum(images for _, _, images, _ in found) == 40
    assert sum(some for *_, some in found) == int((~empty).sum())
    assert all(high < later for (_, high, *_), (later, *_) in pairwise(found))
    ties = calibration(ImageLevel((0.2,) * 9 + (0.9,), (True,) * 9 + (False,)))
    assert ties == [(pytest.approx(0.2), pytest.approx(0.2), 9, 0), (pytest.approx(0.9), pytest.approx(0.9), 1, 1)]
