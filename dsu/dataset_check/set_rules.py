"""What will bite of a data set as a whole: copies, splits that do not go together, files that nobody reads."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from dsu.data.images import IMAGE_SUFFIXES
from dsu.data.overlaps import Overlap, copies
from dsu.data.pairing import list_files
from dsu.dataset_check.findings import Case, Finding, case_of, found
from dsu.dataset_check.samples import Sample
from dsu.dataset_check.splits import SplitCheck

__all__ = ["findings_of_copies", "findings_of_set", "other_files"]

_PICTURES: Final = frozenset(
    {".heic", ".heif", ".avif", ".jxl", ".dcm", ".dicom", ".nii", ".npy", ".npz", ".mat", ".psd", ".svg", ".pdf"}
    | {".tga", ".exr", ".hdr", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".svs", ".ndpi", ".mha"}
    | {".czi", ".nd2", ".lif", ".jp2k", ".j2k", ".eps", ".ico", ".xcf", ".mp4", ".avi", ".mov", ".mkv"}
)
"""Endings of pictures that `dsu` does not read."""

_EQUALS_SHOWN: Final = 4
"""Names of one group of copies; all images of a set may be the same."""


def findings_of_set(checks: Sequence[SplitCheck], files: Counter[str]) -> Iterator[Finding]:
    """What concerns no single split; `files` counts those of other endings (`other_files`)."""
    if not any(check.trains for check in checks):
        benchmark = all(check.split.benchmark for check in checks)
        yield Finding(
            "no-training-split",
            "good to know" if benchmark else "will stop",
            "",
            "There is no split to train on",
            "A set for judging alone: train on another one."
            if benchmark
            else "Call the folder of what is to be learnt from train/, or give a folder without such parts.",
        )
    yield from found(
        "other-pictures",
        "will hurt",
        "",
        "kinds of files that are not read",
        (Case(f"{count:,} {ending}") for ending, count in files.most_common() if ending in _PICTURES),
        f"Save what should count as PNG, JPEG or TIFF ({', '.join(sorted(IMAGE_SUFFIXES))} are read).",
    )
    yield from found(
        "other-files",
        "good to know",
        "",
        "kinds of files that are passed over",
        (
            Case(f"{count:,} {ending or 'without ending'}")
            for ending, count in files.most_common()
            if ending not in _PICTURES
        ),
        "Annotations as text (JSON, XML, TXT) are not read: masks are pictures.",
    )
    yield from _readings(checks)


def findings_of_copies(
    checks: Sequence[SplitCheck], exact: Sequence[Overlap], near: Sequence[Overlap]
) -> Iterator[Finding]:
    """Images that are there twice; `exact` and `near` are those in both training and test (`dsu.data.overlaps`)."""
    by_name = {(check.name, sample.name): sample for check in checks for sample in check.samples}
    for key, what, pairs in (
        ("leaks", "test images whose every pixel is in training, too", exact),
        ("near-leaks", "test images that are in training almost alike (saved anew, resized)", near),
    ):
        yield from found(
            key,
            "will hurt",
            "",
            what,
            (_equation([by_name[pair.test, pair.test_name], by_name[pair.train, pair.train_name]]) for pair in pairs),
            "Figures on them flatter: take them out of one of the two.",
        )
    yield from found(
        "contradictions",
        "will hurt",
        "",
        "images that are there with different masks",
        (_equation(group) for group in _copied(checks) if _contradict(group, checks)),
        "They teach contradictions: keep the right mask, or join the masks if each shows one object.",
    )
    for check in checks:
        yield from found(
            "copies",
            "good to know",
            check.name,
            "images that are there more than once, pixel by pixel",
            map(_equation, _copied([check])),
            "They count so many times: remove all but one of each.",
        )


def other_files(folder: Path) -> Counter[str]:
    """How many files below a folder have which other ending than an image's; hidden ones are passed over."""
    endings = Counter(file.suffix.lower() for file in list_files(folder))
    return Counter({ending: count for ending, count in endings.items() if ending not in IMAGE_SUFFIXES})


def _readings(checks: Sequence[SplitCheck]) -> Iterator[Finding]:
    """Labels in one split and grey levels in another may be right, but are seldom meant."""
    read = {check.name: check.mask_format for check in checks if check.mask_format}
    if len({mask_format.labels for mask_format in read.values()}) > 1:
        ways = ", ".join(
            f"{name} {'labels' if mask_format.labels else 'grey levels'}" for name, mask_format in read.items()
        )
        yield Finding(
            "readings-differ",
            "good to know",
            "",
            f"Masks are read in different ways ({ways})",
            "If that is not so, name what is foreground with --foreground VALUE, once for each value.",
        )


def _copied(checks: Sequence[SplitCheck]) -> list[list[Sample]]:
    by_name = {(check.name, sample.name): sample for check in checks for sample in check.samples}
    groups = copies(sample.signature for sample in by_name.values())
    return [[by_name[one.split, one.name] for one in group] for group in groups]


def _contradict(group: Sequence[Sample], checks: Sequence[SplitCheck]) -> bool:
    marked = {check.name: check.foreground for check in checks}
    masks = (marked[sample.signature.split].get(sample.name) for sample in group)
    return len({mask.sha256 for mask in masks if mask}) > 1


def _equation(group: Sequence[Sample]) -> Case:
    within = len({sample.signature.split for sample in group}) == 1
    names = [case_of(sample).name if within else f"{sample.signature.split} {case_of(sample).name}" for sample in group]
    shown = names if len(names) <= _EQUALS_SHOWN else [*names[:_EQUALS_SHOWN], f"... ({len(names):,} in all)"]
    return Case(" = ".join(shown), samples=tuple(group))
