"""Fingerprints: what an array was computed from, so that a stale array is refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from dsu_cache.files import JSON, CacheError, canonical


@dataclass(frozen=True)
class FieldDifference:
    """A field of an array's fingerprint that differs from the expected value; a missing field is None."""

    array: str
    field: str
    stored: JSON
    wanted: JSON

    def __str__(self) -> str:
        return f"{self.array}: {self.field} is {self.stored!r} in the store, but {self.wanted!r} is needed"


class StaleError(CacheError):
    """Stored arrays were made with other settings than needed.

    Args:
        differences: every field that differs.
        advice: what the user can do; ends the message.
    """

    def __init__(self, differences: tuple[FieldDifference, ...], advice: str = "") -> None:
        # Both are passed to the base class unchanged: exceptions are pickled by their arguments.
        super().__init__(differences, advice)
        self.differences = differences
        self.advice = advice

    def __str__(self) -> str:
        listed = "; ".join(map(str, self.differences))
        return f"the store was made with other settings: {listed}" + (f". {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class Fingerprint:
    """What an array's values depend on.

    Values are converted as by a round trip through JSON (a tuple becomes a list), so that a fingerprint created in the
    program equals one read from a store. `vars` gives it as JSON.

    Args:
        fields: decide validity: if one differs, the array is stale.
        recorded: change values only slightly (such as library versions): if one differs, warn.

    Raises:
        TypeError, ValueError: a value that JSON does not support.

    Example:
        >>> stored = Fingerprint({"size": 518}, {"torch": "2.6"})
        >>> [str(difference) for difference in stored.differences(Fingerprint({"size": 448}), "V")]
        ['V: size is 518 in the store, but 448 is needed']
    """

    fields: Mapping[str, JSON]
    recorded: Mapping[str, JSON] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", json.loads(canonical(self.fields)))
        object.__setattr__(self, "recorded", json.loads(canonical(self.recorded)))

    def differences(self, wanted: "Fingerprint", array: str) -> tuple[FieldDifference, ...]:
        """Return the fields that make an array with this fingerprint stale, by name."""
        return _compare(self.fields, wanted.fields, array)

    def drift(self, wanted: "Fingerprint", array: str) -> tuple[FieldDifference, ...]:
        """Return the recorded fields that differ, by name: a reason to warn, not to refuse."""
        return _compare(self.recorded, wanted.recorded, array)


def _compare(stored: Mapping[str, JSON], wanted: Mapping[str, JSON], array: str) -> tuple[FieldDifference, ...]:
    # Compared as JSON text, since in Python 1 == 1.0 == True; as lists, since null differs from a missing field.
    return tuple(
        FieldDifference(array, name, stored.get(name), wanted.get(name))
        for name in sorted({*stored, *wanted})
        if canonical([stored[name]] if name in stored else []) != canonical([wanted[name]] if name in wanted else [])
    )
