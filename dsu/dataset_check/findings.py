"""What a check finds: one line each, how bad it is, how many, which, and what to do about it."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from dsu.data.images import printable
from dsu.dataset_check.samples import Sample

__all__ = ["SEVERITIES", "Case", "Finding", "Severity", "case_of", "file_case", "found"]

Severity = Literal["will stop", "will hurt", "good to know"]
SEVERITIES: Final[tuple[Severity, ...]] = ("will stop", "will hurt", "good to know")
"""From worst to mildest. `dsu` does not train on what will stop it, and trains on the rest, for better or worse."""

_NAMES_SHOWN: Final = 3


@dataclass(frozen=True)
class Case:
    """One sample, file or group that a finding concerns: its name, what is remarkable, and what can be shown of it."""

    name: str
    remark: str = ""
    samples: tuple[Sample, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.remark}" if self.remark else self.name


@dataclass(frozen=True)
class Finding:
    """One thing that will bite, in one split or, where `split` is empty, in the data set.

    Attributes:
        key: Its kind, for programs: "unreadable", "vanishing".
        severity: What it does.
        split: The split's name.
        what: The thing that is counted, for people: "images without a mask".
        remedy: What follows from it and what to do, in whole sentences.
        cases: All that are concerned; none where the thing is the split itself.
    """

    key: str
    severity: Severity
    split: str
    what: str
    remedy: str
    cases: tuple[Case, ...] = ()

    @property
    def count(self) -> int:
        """How many are concerned; 0 where the thing is the split itself."""
        return len(self.cases)

    def sentence(self) -> str:
        """All of it but severity and split, with the first names."""
        if not self.cases:
            return f"{self.what}. {self.remedy}"
        separator = "; " if any(case.remark for case in self.cases) else ", "
        names = separator.join(map(str, self.cases[:_NAMES_SHOWN]))
        more = f" and {self.count - _NAMES_SHOWN:,} more" if self.count > _NAMES_SHOWN else ""
        return f"{self.what}: {self.count:,} ({names}{more}). {self.remedy}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with all names."""
        fields = {name: value for name, value in vars(self).items() if name != "cases"}
        return {**fields, "count": self.count, "names": [str(case) for case in self.cases]}


def found(key: str, severity: Severity, split: str, what: str, cases: Iterable[Case], remedy: str) -> Iterator[Finding]:
    """The finding about these cases, if there are any."""
    concerned = tuple(cases)
    if concerned:
        yield Finding(key, severity, split, what, remedy, concerned)


def case_of(sample: Sample, remark: str = "") -> Case:
    """A sample, with what is remarkable about it."""
    return Case(_clean(sample.name), remark, (sample,))


def file_case(path: Path, folder: Path, remark: str = "") -> Case:
    """A file that is no sample, by its path below a folder."""
    return Case(_clean(printable(Path(os.path.relpath(path, folder)))), _clean(remark))


def _clean(name: str) -> str:
    """A name may hold line feeds and a terminal's escapes."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)
