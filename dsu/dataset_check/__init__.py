"""A check of a data set before any work: what it holds, and what of it will bite.

Each image and mask is read once (`reading`), what is found is judged by rules (`rules` of a split, `set_rules` of all),
counted in a table (`summary`, `file_counts`) and shown on one sheet (`sheet`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dsu.data.datasets import Paths, find_dataset
from dsu.data.masks import MaskFacts, MaskFormat
from dsu.data.overlaps import ImageSignature, compare
from dsu.dataset_check.reading import SplitCheck, read_split
from dsu.dataset_check.rules import SEVERITIES, Finding, Severity, findings_of_split
from dsu.dataset_check.set_rules import findings_of_set, other_files
from dsu.progress import SILENT, Progress

__all__ = [
    "SEVERITIES",
    "DatasetCheck",
    "FileCount",
    "Finding",
    "Severity",
    "SplitCheck",
    "check_dataset",
    "file_counts",
    "summary",
]


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
            "files": [asdict(entry) for entry in file_counts(self.splits)],
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
    checks = [read_split(split, side, foreground, progress, workers) for split in find_dataset(name_or_folder, paths)]
    findings = [finding for check in checks for finding in findings_of_split(check, side)]
    signatures: dict[str, list[ImageSignature]] = {"train": [], "test": [], "all": []}
    for check in checks:
        signatures[check.split.kind] += [sample.signature for sample in check.samples]
    folder = paths.folder(name_or_folder)
    # What else comes with a benchmark is known to be no harm.
    own = folder is not None and not any(check.split.benchmark for check in checks)
    files = other_files(folder) if folder and own else Counter[str]()
    findings += findings_of_set(checks, compare(signatures["train"], signatures["test"]), files)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return DatasetCheck(name_or_folder, side, tuple(checks), tuple(findings))


@dataclass(frozen=True)
class FileCount:
    """How many files of one kind there are, by split: `kind` ("JPEG, grey"), and what is made of them."""

    what: str
    kind: str
    read_as: str
    count: dict[str, int]


def file_counts(checks: Sequence[SplitCheck]) -> list[FileCount]:
    """Kinds of files of all splits, images before masks, the most frequent first."""
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    for check in checks:
        for sample in check.samples:
            keys = [("images", sample.storage.kind, sample.storage.read_as)]
            if sample.mask:
                keys.append(("masks", sample.mask.storage.kind, _read_as(sample.mask.facts, check.mask_format)))
            for key in keys:
                counts.setdefault(key, Counter())[check.name] += 1
    ordered = sorted(counts.items(), key=lambda item: (item[0][0], -item[1].total(), item[0]))
    return [FileCount(*key, dict(count)) for key, count in ordered]


def summary(check: SplitCheck) -> dict[str, Any]:
    """Plain JSON values of one split. Sizes are [width, height], shares 0 to 1; None where nothing was measured."""
    split = check.split
    sizes = sorted((sample.size for sample in check.samples), key=lambda size: size[0] * size[1])
    marked = [one.foreground for one in check.masked]
    formats = dict.fromkeys(_read_as(facts, check.mask_format) for facts in check.masks)
    return {
        "split": split.name,
        "kind": split.kind,
        "images_folder": str(split.images),
        "masks_folder": str(split.masks) if split.masks else None,
        "images": len(split.pairs) + len(split.images_without_mask) + split.left_out,
        "pairs": len(split.pairs) if split.masks else 0,
        "official_pairs": split.official_count,
        "images_without_mask": len(split.images_without_mask) if split.masks else len(split.pairs),
        "masks_without_image": len(split.masks_without_image),
        "left_out": split.left_out,
        "unreadable": len(check.unreadable),
        "smallest": sizes[0] if sizes else None,
        "median": sizes[len(sizes) // 2] if sizes else None,
        "largest": sizes[-1] if sizes else None,
        "masks_of_another_size": sum(bool(one.mask and one.mask.size != one.size) for one in check.samples),
        "masks_read_as": ", ".join(formats) if check.mask_format else None,
        "mask_format": check.mask_format.to_json() if check.mask_format else None,
        "mask_values": {str(value): pixels for value, pixels in check.values.most_common()},
        "foreground_quartiles": np.quantile([one.share for one in marked], (0.25, 0.5, 0.75)).tolist()
        if marked
        else None,
        "empty_masks": sum(one.share == 0 for one in marked),
        "soft_masks": sum(one.soft > 0 for one in marked),
        "objects": sum(one.objects for one in marked),
        "vanishing_objects": sum(one.vanished for one in marked),
        "masks_that_become_empty": sum(one.objects > 0 and one.left == 0 for one in marked),
    }


def _read_as(facts: MaskFacts, mask_format: MaskFormat | None) -> str:
    """What `dsu.data.masks.MaskFormat.read` does with a mask."""
    if mask_format is None:
        return "nothing: see below"
    if mask_format.foreground is not None:
        return f"foreground where {' or '.join(map(str, mask_format.foreground))}"
    if facts.kind == "indices":
        return "palette: every index but 0 is foreground"
    if facts.kind == "colours":
        return "every colour but black is foreground"
    if mask_format.labels:
        return "labels: every value but 0 is foreground"
    if facts.kind == "deep":
        return f"grey levels of 16 bits, {mask_format.white} is white"
    return "grey levels"
