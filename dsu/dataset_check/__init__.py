"""A check of a data set before any work: what it holds, and what of it will bite.

Each image and mask is read once (`samples`, `splits`), what is found is judged by rules (`image_rules`, `mask_rules`,
`set_rules`), counted in a table (`summary`) and shown on one sheet (`sheet`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsu.data.datasets import Paths, find_dataset
from dsu.data.overlaps import ImageSignature, compare
from dsu.dataset_check.findings import SEVERITIES, Finding, Severity
from dsu.dataset_check.image_rules import findings_of_images
from dsu.dataset_check.mask_rules import findings_of_masks
from dsu.dataset_check.set_rules import findings_of_copies, findings_of_set, other_files
from dsu.dataset_check.splits import SplitCheck, read_split
from dsu.dataset_check.summary import file_counts, summary
from dsu.progress import SILENT, Progress

__all__ = ["SEVERITIES", "DatasetCheck", "Finding", "Severity", "SplitCheck", "check_dataset"]


@dataclass(frozen=True)
class DatasetCheck:
    """What a data set holds and what of it will bite.

    Attributes:
        name: As it was asked for.
        side: The network's input in pixels, at which objects were looked for again.
        splits: Training first.
        findings: The worst first.
    """

    name: str
    side: int
    splits: tuple[SplitCheck, ...]
    findings: tuple[Finding, ...]

    @property
    def stops(self) -> bool:
        """Whether something will stop `dsu` from training."""
        return any(finding.severity == "will stop" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "input_size": self.side,
            "stops": self.stops,
            "splits": [summary(check) for check in self.splits],
            "files": [entry.to_json() for entry in file_counts(self.splits)],
            "findings": [finding.to_json() for finding in self.findings],
        }


def check_dataset(
    name_or_folder: str,
    paths: Paths,
    *,
    foreground: Sequence[int] | None = None,
    side: int = 352,
    progress: Progress = SILENT,
    workers: int | None = None,
) -> DatasetCheck:
    """Read every image and mask of a data set and say what will bite; nothing is written.

    Memory holds one decoded image a thread, and some 5 kB for each that has been read.

    Args:
        name_or_folder, paths: As `dsu.data.datasets.find_dataset`.
        foreground: Raw mask values that are foreground.
        side: The network's input in pixels (`hiera_size`).
        progress: Who is told.
        workers: How many files are read at once; by default as many as there are processors, at most 16.

    Raises:
        UsageError: There is no such data set, or it cannot be told which files are images and which masks.
    """
    found = find_dataset(name_or_folder, paths)
    checks = [read_split(split, side, foreground, progress, workers) for split in found]
    findings: list[Finding] = []
    for check in checks:
        findings += findings_of_images(check, side)
        findings += findings_of_masks(check, side)
    findings += findings_of_copies(checks, *compare(_signatures(checks, "train"), _signatures(checks, "test")))
    findings += findings_of_set(checks, _other_files(paths.folder(name_or_folder), checks))
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return DatasetCheck(name_or_folder, side, tuple(checks), tuple(findings))


def _signatures(checks: Sequence[SplitCheck], kind: str) -> list[ImageSignature]:
    return [sample.signature for check in checks if check.split.kind == kind for sample in check.samples]


def _other_files(folder: Path | None, checks: Sequence[SplitCheck]) -> Counter[str]:
    """Of a folder of one's own; what else comes with a benchmark is known to be no harm."""
    if folder is None or any(check.split.benchmark for check in checks):
        return Counter()
    return other_files(folder)
