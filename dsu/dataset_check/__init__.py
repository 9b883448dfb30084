"""Check a data set before training: its content and its problems.

Reads each image and mask once (`reading`), applies rules (`rules` for a split, those for a whole set here), counts in
tables (`summary`, `file_counts`) and draws one sheet (`sheet`).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from dsu.data.datasets import Paths, find_dataset
from dsu.data.groups import Overlap, copies, find_similar, max_group_size, overlapping
from dsu.data.images import IMAGE_SUFFIXES, OTHER_PHOTOGRAPHS
from dsu.data.masks import MaskFacts, MaskFormat
from dsu.data.pairing import list_files
from dsu.dataset_check.reading import Sample, SplitCheck as SplitCheck, read_split
from dsu.dataset_check.rules import (
    SEVERITIES,
    Case,
    Finding as Finding,
    Severity as Severity,
    case_of,
    findings_of_split,
    if_any,
)
from dsu.progress import SILENT, Progress


@dataclass(frozen=True)
class DatasetCheck:
    """A data set's content and problems.

    Attributes:
        name: As requested.
        side: The network's input size in pixels, at which objects were searched for again.
        splits: Training first.
        findings: Worst first.
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
            "files": file_counts(self.splits),
            "findings": [finding.to_json() for finding in self.findings],
        }


def check_dataset(
    name_or_folder: str,
    paths: Paths,
    *,
    foreground: Sequence[int] | None = None,
    side: int = 352,
    progress: Progress = SILENT,
) -> DatasetCheck:
    """Read every image and mask of a data set and report what will cause problems; writes nothing.

    Memory use: one decoded image per thread, and about 10 kB for each image that was read.

    Args:
        name_or_folder, paths: As `dsu.data.datasets.find_dataset`.
        foreground: Raw mask values that are foreground.
        side: The network's input size in pixels (`hiera_size`).
        progress: Receives progress.

    Raises:
        UsageError: There is no such data set, or images and masks can't be told apart.
    """
    checks = list[SplitCheck]()
    for split in find_dataset(name_or_folder, paths):  # training first: its scale of deep images is that of all
        depth = checks[0].depth if checks else None
        checks.append(read_split(split, side, foreground, depth, progress))
    findings = [finding for check in checks for finding in findings_of_split(check, side)]
    train, test = (
        [sample.signature for check in checks if check.split.kind == kind for sample in check.samples]
        for kind in ("train", "test")
    )
    folder = paths.folder(name_or_folder)
    # Other files that come with a benchmark are known to be harmless.
    own = folder is not None and not any(check.split.benchmark for check in checks)
    files = other_files(folder) if folder and own else Counter[str]()
    own_training = [check for check in checks if check.trains and not check.split.benchmark]
    findings += [finding for check in own_training for finding in _similar_images(check, progress)]
    findings += findings_of_set(checks, overlapping(train, test), files)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return DatasetCheck(name_or_folder, side, tuple(checks), tuple(findings))


def file_counts(checks: Sequence[SplitCheck]) -> list[dict[str, Any]]:
    """File types of all splits, images before masks, most frequent first, as plain JSON values.

    `what` ("images", "masks"), `kind` ("JPEG, grey"), `read_as` (how they are read), and `count`, by split.
    """
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    for check in checks:
        for sample in check.samples:
            keys = [("images", sample.storage.kind, sample.storage.read_as(check.depth))]
            if sample.mask:
                keys.append(("masks", sample.mask.storage.kind, _read_as(sample.mask.facts, check.mask_format)))
            for key in keys:
                counts.setdefault(key, Counter())[check.name] += 1
    ordered = sorted(counts.items(), key=lambda item: (item[0][0], -item[1].total(), item[0]))
    return [
        {"what": what, "kind": kind, "read_as": read_as, "count": dict(count)}
        for (what, kind, read_as), count in ordered
    ]


def summary(check: SplitCheck) -> dict[str, Any]:
    """Plain JSON values of one split. Sizes are [width, height], fractions 0 to 1; None if nothing was measured."""
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
    """How `dsu.data.masks.MaskFormat.read` reads a mask."""
    if mask_format is None:
        return "not readable: see below"
    if mask_format.foreground is not None:
        return f"foreground where {' or '.join(map(str, mask_format.foreground))}"
    if facts.kind == "indices":
        return "palette: every index but 0 is foreground"
    if facts.kind == "colours":
        return "every colour but black is foreground"
    if mask_format.labels:
        return "labels: every value but 0 is foreground"
    return f"grey levels of 16 bits, {mask_format.white} is white" if facts.kind == "deep" else "grey levels"


# ---- findings across splits: copies, inconsistent splits, files that are not read ----

PICTURES: Final = OTHER_PHOTOGRAPHS | {
    *(".dcm", ".dicom", ".nii", ".npy", ".npz", ".mat", ".svg", ".pdf", ".svs", ".ndpi", ".mha", ".czi", ".nd2"),
    *(".lif", ".eps", ".ico", ".xcf", ".mp4", ".avi", ".mov", ".mkv"),
}
"""Extensions of image formats that `dsu` does not read."""


def findings_of_set(
    checks: Sequence[SplitCheck], overlaps: tuple[Sequence[Overlap], Sequence[Overlap]], files: Counter[str]
) -> list[Finding]:
    """Findings across splits.

    Args:
        checks: Those of its splits.
        overlaps: Exact and near-duplicates between training and test (`dsu.data.groups.overlapping`).
        files: Number of other files by extension (`other_files`).
    """
    return [
        *_find_copies(checks, *overlaps),
        *_find_no_training_split(checks),
        *_find_other_files(files),
        *_find_mixed_formats(checks),
    ]


def _find_copies(checks: Sequence[SplitCheck], exact: Sequence[Overlap], near: Sequence[Overlap]) -> list[Finding]:
    samples = {(check.name, sample.name): sample for check in checks for sample in check.samples}
    masks = {(check.name, one.sample.name): one.foreground.sha256 for check in checks for one in check.masked}

    def equations(keys: Iterable[Sequence[tuple[str, str]]]) -> list[Case]:
        return [_group_case([samples[key] for key in group]) for group in keys]

    def copied(*among: SplitCheck) -> list[list[tuple[str, str]]]:
        signatures = (sample.signature for check in among for sample in check.samples)
        return [[(one.split, one.name) for one in group] for group in copies(signatures)]

    leaks, near_leaks = (
        equations([(one.split, one.name) for one in (pair.test, pair.train)] for pair in pairs)
        for pairs in (exact, near)
    )
    contradictions = (group for group in copied(*checks) if len({masks[key] for key in group if key in masks}) > 1)
    flatter = "Scores on them are too good: remove them from one of the two."
    return if_any(
        Finding("leaks", "will hurt", "test images identical to training images", flatter, leaks),
        Finding(
            "near-leaks",
            "will hurt",
            "test images that are near-duplicates of training images (re-saved, resized)",
            flatter,
            near_leaks,
        ),
        Finding(
            "contradictions",
            "will hurt",
            "identical images with different masks",
            "They contradict each other: keep the right mask, or merge the masks if each shows one object.",
            equations(contradictions),
        ),
        *(
            Finding(
                "copies",
                "good to know",
                "identical images",
                "Each copy counts: remove all but one.",
                equations(copied(check)),
                check.name,
            )
            for check in checks
        ),
    )


def _similar_images(check: SplitCheck, progress: Progress) -> list[Finding]:
    """Findings about images of the same thing, counting exact copies once."""
    first = {sample.signature.sha256: sample for sample in reversed(check.samples)}
    thumbnails = {content: sample.signature.thumbnail for content, sample in first.items()}
    groups, chains = (
        [_group_case(sorted((first[content] for content in group), key=lambda one: one.name)) for group in found]
        for found in find_similar(thumbnails, max_group_size(len(thumbnails)), progress)
    )
    return if_any(
        Finding(
            "chains",
            "will hurt",
            "chains of similar images, too long to stay in one split",
            "Only the closest will: if they show the same thing, name the groups (dsu train-head --group "
            "REGEX|FILE.csv).",
            chains,
            check.name,
        ),
        Finding(
            "groups",
            "good to know",
            "things in several images (photographed again, cropped, re-saved)",
            "Training keeps the images of each in one split; --group REGEX|FILE.csv overrides this.",
            groups,
            check.name,
        ),
    )


def _group_case(group: Sequence[Sample]) -> Case:
    within = len({sample.signature.split for sample in group}) == 1
    names = [case_of(sample).name if within else f"{sample.signature.split} {case_of(sample).name}" for sample in group]
    # All images of a set may be identical.
    shown = names if len(names) <= 4 else [*names[:4], f"... ({len(names):,} in all)"]
    return Case(" = ".join(shown), samples=tuple(group))


def _find_no_training_split(checks: Sequence[SplitCheck]) -> list[Finding]:
    if any(check.trains for check in checks):
        return []
    key, what = "no-training-split", "There is no training split"
    if all(check.split.benchmark for check in checks):
        return [Finding(key, "good to know", what, "It is only for testing: train on another one.")]
    remedy = "Name the folder of training images train/, or give a folder without train/ and test/ parts."
    return [Finding(key, "will stop", what, remedy)]


def _find_other_files(files: Counter[str]) -> list[Finding]:
    return if_any(
        Finding(
            "other-pictures",
            "will hurt",
            "file types that are not read",
            f"Save needed images as PNG, JPEG or TIFF ({', '.join(sorted(IMAGE_SUFFIXES))} are read).",
            [Case(f"{count:,} {ending}") for ending, count in files.most_common() if ending in PICTURES],
        ),
        Finding(
            "other-files",
            "good to know",
            "file types that are ignored",
            "Text annotations (JSON, XML, TXT) are not read: masks must be images.",
            [
                Case(f"{count:,} {ending or 'without extension'}")
                for ending, count in files.most_common()
                if ending not in PICTURES
            ],
        ),
    )


def other_files(folder: Path) -> Counter[str]:
    """Number of files below a folder that are no images, by extension; hidden files are skipped."""
    endings = (file.suffix.lower() for file in list_files(folder))
    return Counter(ending for ending in endings if ending not in IMAGE_SUFFIXES)


def _find_mixed_formats(checks: Sequence[SplitCheck]) -> list[Finding]:
    """Labels in one split and grey levels in another may be right, but are usually a mistake."""
    labels = {check.name: check.mask_format.labels for check in checks if check.mask_format}
    if len(set(labels.values())) < 2:
        return []
    ways = ", ".join(f"{name} {'labels' if is_labels else 'grey levels'}" for name, is_labels in labels.items())
    remedy = "If that is wrong, give the foreground with --foreground VALUE, once for each value."
    return [Finding("readings-differ", "good to know", f"Masks are read in different ways ({ways})", remedy)]
