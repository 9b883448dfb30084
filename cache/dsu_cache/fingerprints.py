"""Fingerprints: what an array was computed with, so that a stale one is refused and never read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from dsu_cache.files import JSON, CacheError, canonical


@dataclass(frozen=True)
class FieldDifference:
    """One field of one array's fingerprint that is not as wanted; a field that is not there reads as None."""

    array: str
    field: str
    stored: JSON
    wanted: JSON

    def __str__(self) -> str:
        return f"{self.array}: {self.field} is {self.stored!r} in the store, {self.wanted!r} is wanted"


class StaleError(CacheError):
    """Stored arrays were made with other settings than the ones wanted.

    Args:
        differences: every field that differs.
        advice: the way out, as the caller's user would type it; ends the message.
    """

    def __init__(self, differences: tuple[FieldDifference, ...], advice: str = "") -> None:
        # Both go to the base class as they are: exceptions are pickled by their arguments.
        super().__init__(differences, advice)
        self.differences = differences
        self.advice = advice

    def __str__(self) -> str:
        listed = "; ".join(map(str, self.differences))
        return f"the store was made with other settings: {listed}" + (f". {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class Fingerprint:
    """What an array's numbers depend on.

    Values are brought to the form in which JSON gives them back (a tuple becomes a list), so that a fingerprint
    made in the program equals the same one read from a store. `vars` gives it as JSON.

    Args:
        fields: decide validity: when one differs, the array is stale.
        recorded: change numbers slightly at most (library versions, say): when one differs, warn.

    Raises:
        TypeError, ValueError: a value that JSON cannot hold.

    Example:
        >>> stored = Fingerprint({"size": 518}, {"torch": "2.6"})
        >>> [str(difference) for difference in stored.differences(Fingerprint({"size": 448}), "V")]
        ['V: size is 518 in the store, 448 is wanted']
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
    # As JSON text, since in Python 1 == 1.0 == True; as lists, since a null is not a field that is not there.
    return tuple(
        FieldDifference(array, name, stored.get(name), wanted.get(name))
        for name in sorted({*stored, *wanted})
        if canonical([stored[name]] if name in stored else []) != canonical([wanted[name]] if name in wanted else [])
    )
