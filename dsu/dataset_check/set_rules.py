"""What will bite of a data set as a whole: copies, splits that do not go together, files that nobody reads."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from dsu.data.images import IMAGE_SUFFIXES
from dsu.data.overlaps import Overlap, copies
from dsu.data.pairing import list_files
from dsu.dataset_check.reading import Sample, SplitCheck
from dsu.dataset_check.rules import Case, Finding, case_of, if_any

__all__ = ["findings_of_set", "other_files"]

PICTURES: Final = frozenset(
    {".heic", ".heif", ".avif", ".jxl", ".dcm", ".dicom", ".nii", ".npy", ".npz", ".mat", ".psd", ".svg", ".pdf"}
    | {".tga", ".exr", ".hdr", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".svs", ".ndpi", ".mha"}
    | {".czi", ".nd2", ".lif", ".jp2k", ".j2k", ".eps", ".ico", ".xcf", ".mp4", ".avi", ".mov", ".mkv"}
)
"""Endings of pictures that `dsu` does not read."""

_EQUALS_SHOWN: Final = 4
"""Names of one group of copies; all images of a set may be the same."""


def findings_of_set(
    checks: Sequence[SplitCheck], overlaps: tuple[Sequence[Overlap], Sequence[Overlap]], files: Counter[str]
) -> list[Finding]:
    """What concerns no single split.

    Args:
        checks: Of its splits.
        overlaps: Images in both training and test: the same, and nearly the same (`dsu.data.overlaps.compare`).
        files: How many there are of which ending that no image has (`other_files`).
    """
    return [*_of_copies(checks, *overlaps), *_no_training_split(checks), *_of_files(files), *_of_formats(checks)]


def _of_copies(checks: Sequence[SplitCheck], exact: Sequence[Overlap], near: Sequence[Overlap]) -> list[Finding]:
    samples = {(check.name, sample.name): sample for check in checks for sample in check.samples}
    masks = {(check.name, one.sample.name): one.foreground.sha256 for check in checks for one in check.masked}

    def equations(keys: Iterable[Sequence[tuple[str, str]]]) -> list[Case]:
        return [_equation([samples[key] for key in group]) for group in keys]

    def copied(*among: SplitCheck) -> list[list[tuple[str, str]]]:
        signatures = (sample.signature for check in among for sample in check.samples)
        return [[(one.split, one.name) for one in group] for group in copies(signatures)]

    leaks, near_leaks = (
        equations([(one.split, one.name) for one in (pair.test, pair.train)] for pair in pairs)
        for pairs in (exact, near)
    )
    contradictions = (group for group in copied(*checks) if len({masks[key] for key in group if key in masks}) > 1)
    flatter = "Figures on them flatter: take them out of one of the two."
    return if_any(
        Finding("leaks", "will hurt", "test images whose every pixel is in training, too", flatter, leaks),
        Finding(
            "near-leaks",
            "will hurt",
            "test images that are in training almost alike (saved anew, resized)",
            flatter,
            near_leaks,
        ),
        Finding(
            "contradictions",
            "will hurt",
            "images that are there with different masks",
            "They teach contradictions: keep the right mask, or join the masks if each shows one object.",
            equations(contradictions),
        ),
        *(
            Finding(
                "copies",
                "good to know",
                "images that are there more than once, pixel by pixel",
                "They count so many times: remove all but one of each.",
                equations(copied(check)),
                check.name,
            )
            for check in checks
        ),
    )


def _equation(group: Sequence[Sample]) -> Case:
    within = len({sample.signature.split for sample in group}) == 1
    names = [case_of(sample).name if within else f"{sample.signature.split} {case_of(sample).name}" for sample in group]
    shown = names if len(names) <= _EQUALS_SHOWN else [*names[:_EQUALS_SHOWN], f"... ({len(names):,} in all)"]
    return Case(" = ".join(shown), samples=tuple(group))


def _no_training_split(checks: Sequence[SplitCheck]) -> list[Finding]:
    if any(check.trains for check in checks):
        return []
    what = "There is no split to train on"
    if all(check.split.benchmark for check in checks):
        remedy = "A set for judging alone: train on another one."
        return [Finding("no-training-split", "good to know", what, remedy)]
    remedy = "Call the folder of what is to be learnt from train/, or give a folder without such parts."
    return [Finding("no-training-split", "will stop", what, remedy)]


def _of_files(files: Counter[str]) -> list[Finding]:
    return if_any(
        Finding(
            "other-pictures",
            "will hurt",
            "kinds of files that are not read",
            f"Save what should count as PNG, JPEG or TIFF ({', '.join(sorted(IMAGE_SUFFIXES))} are read).",
            [Case(f"{count:,} {ending}") for ending, count in files.most_common() if ending in PICTURES],
        ),
        Finding(
            "other-files",
            "good to know",
            "kinds of files that are passed over",
            "Annotations as text (JSON, XML, TXT) are not read: masks are pictures.",
            [
                Case(f"{count:,} {ending or 'without ending'}")
                for ending, count in files.most_common()
                if ending not in PICTURES
            ],
        ),
    )


def other_files(folder: Path) -> Counter[str]:
    """How many files below a folder have which other ending than an image's; hidden ones are passed over."""
    endings = Counter(file.suffix.lower() for file in list_files(folder))
    return Counter({ending: count for ending, count in endings.items() if ending not in IMAGE_SUFFIXES})


def _of_formats(checks: Sequence[SplitCheck]) -> list[Finding]:
    """Labels in one split and grey levels in another may be right, but are seldom meant."""
    labels = {check.name: check.mask_format.labels for check in checks if check.mask_format}
    if len(set(labels.values())) < 2:
        return []
    ways = ", ".join(f"{name} {'labels' if is_labels else 'grey levels'}" for name, is_labels in labels.items())
    what = f"Masks are read in different ways ({ways})"
    remedy = "If that is not so, name what is foreground with --foreground VALUE, once for each value."
    return [Finding("readings-differ", "good to know", what, remedy)]
