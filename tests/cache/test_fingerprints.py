from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given, strategies as st

from dsu_cache import JSON, CacheError, FieldDifference, Fingerprint, StaleError
from dsu_cache.files import canonical

FIELDS: dict[str, JSON] = {"weights": "1a2b", "size": [518, 518], "precision": "fp16", "grid": 11, "mean": 0.5}

# Texts are from a list, since the first `st.text()` on a machine builds a Unicode table, too slow for Hypothesis'
# limit.
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "1", "é"]),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
fields = st.dictionaries(st.sampled_from("abc"), json_values, max_size=3)


@pytest.mark.parametrize("name", FIELDS)
def test_a_difference_in_any_field_counts(name: str) -> None:
    stored, wanted = Fingerprint(FIELDS), Fingerprint(FIELDS | {name: "other"})
    assert stored.differences(wanted, "V") == (FieldDifference("V", name, FIELDS[name], "other"),)


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_a_difference_in_both_directions(name: str) -> None:
    without = Fingerprint({key: value for key, value in FIELDS.items() if key != name})
    assert Fingerprint(FIELDS).differences(without, "V") == (FieldDifference("V", name, FIELDS[name], None),)
    assert without.differences(Fingerprint(FIELDS), "V") == (FieldDifference("V", name, None, FIELDS[name]),)


def test_recorded_fields_drift_and_make_nothing_stale() -> None:
    stored, wanted = Fingerprint(FIELDS, {"torch": "2.6"}), Fingerprint(FIELDS, {"torch": "2.7"})
    assert stored.differences(wanted, "V") == ()
    assert stored.drift(wanted, "V") == (FieldDifference("V", "torch", "2.6", "2.7"),)


def test_tuples_and_lists_are_equal() -> None:
    assert Fingerprint({"size": (518, 518)}) == Fingerprint({"size": [518, 518]})


@given(fields, fields)
def test_nothing_differs_if_and_only_if_the_fields_are_equal_as_json(a: dict[str, Any], b: dict[str, Any]) -> None:
    stored, wanted = Fingerprint(a), Fingerprint(b)
    assert (canonical(stored.fields) == canonical(wanted.fields)) == (stored.differences(wanted, "V") == ())


@given(fields, fields)
def test_a_fingerprint_is_restored_from_json(a: dict[str, Any], b: dict[str, Any]) -> None:
    fingerprint = Fingerprint(a, b)
    assert Fingerprint(**json.loads(json.dumps(vars(fingerprint)))) == fingerprint


def test_a_stale_error_names_differences_and_remedy_also_after_pickling() -> None:
    difference = FieldDifference("V", "grid", 37, 11)
    error = StaleError((difference,), "Cache again.")
    assert isinstance(error, CacheError)
    copy = pickle.loads(pickle.dumps(error))
    assert copy.differences == error.differences == (difference,)
    assert str(copy) == str(error)
    assert str(error).endswith(": V: grid is 37 in the store, but 11 is needed. Cache again.")
