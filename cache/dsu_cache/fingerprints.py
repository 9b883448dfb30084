"""Fingerprints: what an array was computed with, so that a stale one is refused and never read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from dsu_cache.records import JSON, canonical


@dataclass(frozen=True)
class FieldDifference:
    """One field of one array's fingerprint that is not as wanted; a field that is not there reads as None."""

    array: str
    field: str
    stored: JSON
    wanted: JSON

    def __str__(self) -> str:
        return f"{self.array}: {self.field} is {self.stored!r} in the store, {self.wanted!r} is wanted"


@dataclass(frozen=True)
class Fingerprint:
    """What an array's numbers depend on.

    Values are brought to the form in which JSON gives them back (a tuple becomes a list), so that a fingerprint
    made in the program equals the same one read from a store.

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

    def differences(self, wanted: Fingerprint, array: str) -> tuple[FieldDifference, ...]:
        """Return the fields that make an array with this fingerprint stale, by name."""
        return _compare(self.fields, wanted.fields, array)

    def drift(self, wanted: Fingerprint, array: str) -> tuple[FieldDifference, ...]:
        """Return the recorded fields that differ, by name: a reason to warn, not to refuse."""
        return _compare(self.recorded, wanted.recorded, array)

    def to_json(self) -> dict[str, JSON]:
        """Return the fingerprint as JSON."""
        return {"fields": self.fields, "recorded": self.recorded}

    @classmethod
    def from_json(cls, value: JSON) -> Fingerprint:
        """Return the fingerprint that `to_json` gave."""
        parts = cast("Mapping[str, Mapping[str, JSON]]", value)
        return cls(parts["fields"], parts["recorded"])


def _compare(stored: Mapping[str, JSON], wanted: Mapping[str, JSON], array: str) -> tuple[FieldDifference, ...]:
    # As JSON text, since in Python 1 == 1.0 == True.
    def text(fields: Mapping[str, JSON], name: str) -> str | None:
        return canonical(fields[name]) if name in fields else None

    return tuple(
        FieldDifference(array, name, stored.get(name), wanted.get(name))
        for name in sorted({*stored, *wanted})
        if text(stored, name) != text(wanted, name)
    )
