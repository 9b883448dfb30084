"""Findings of a check (severity, count, names, remedy), and the rules for a split.

A rule gives a `Finding` with all its cases; findings without cases are dropped.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

from dsu.data.images import printable
from dsu.data.masks import MaskFormat, typed_foreground
from dsu.dataset_check.reading import Masked, Sample, Size, SplitCheck
from dsu.progress import few

Severity = Literal["will stop", "will hurt", "good to know"]
SEVERITIES: Final[tuple[Severity, ...]] = ("will stop", "will hurt", "good to know")
"""From worst to mildest. `dsu` refuses to train with the first kind of problem, and trains with the others."""

FEW: Final = 50
"""Below this many training pairs, a head overfits."""

FLAT: Final = 3.0
"""Standard deviation, in grey levels, below which an image shows nothing: the minimum among 1,900 images of DUTS, CAMO
and MagneticTile is 6.5."""

LARGE: Final = 2048
"""Longer side, in pixels, from which an image loses most of its detail at any usual input size."""

SMALL: Final = 64
"""Shorter side, in pixels, below which an image has hardly any."""

LONG: Final = 4.0
"""Longer over shorter side from which squeezing into a square distorts too much."""

IGNORED: Final = 255
"""The label that marks pixels to ignore in label maps since Pascal VOC."""

FULL: Final = 0.999
"""Foreground fraction from which a mask has practically no background."""

TINY: Final = 64
"""Foreground pixels, at the network's input size, below which a mask covers only a few cells of the finest features."""


@dataclass(frozen=True)
class Case:
    """One sample, file or group with a finding: its name, a remark, and what can be drawn of it."""

    name: str
    remark: str = ""
    samples: tuple[Sample, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.remark}" if self.remark else self.name


@dataclass(frozen=True)
class Finding:
    """One kind of problem, in one split or, if `split` is empty, in the whole data set.

    Attributes:
        key: Its kind, for programs: "unreadable", "vanishing".
        severity: Its effect.
        what: What is counted, for people: "images without a mask".
        remedy: The consequence and what to do, in full sentences.
        cases: All cases; none if the finding is about the split itself.
        split: The split's name.
    """

    key: str
    severity: Severity
    what: str
    remedy: str
    cases: Sequence[Case] = ()
    split: str = ""

    @property
    def count(self) -> int:
        """Number of cases; 0 if the finding is about the split itself."""
        return len(self.cases)

    def sentence(self) -> str:
        """The finding as a sentence with the first names, without severity and split."""
        if not self.cases:
            return f"{self.what}. {self.remedy}"
        separator = "; " if any(case.remark for case in self.cases) else ", "
        names = few([*map(str, self.cases)], separator=separator)
        return f"{self.what}: {self.count:,} ({names}). {self.remedy}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with all names."""
        words = {name: getattr(self, name) for name in ("key", "severity", "split", "what", "remedy")}
        return {**words, "count": self.count, "names": [str(case) for case in self.cases]}


def case_of(sample: Sample, remark: str = "") -> Case:
    """A sample as a case, with a remark."""
    return Case(_clean(sample.name), remark, (sample,))


def _file_case(path: Path, folder: Path, remark: str = "") -> Case:
    """A file that is no sample, by its path below a folder."""
    return Case(_clean(printable(Path(os.path.relpath(path, folder)))), _clean(remark))


def _clean(name: str) -> str:
    """A name may contain line feeds and terminal escapes."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def if_any(*findings: Finding) -> list[Finding]:
    """Findings with at least one case."""
    return [finding for finding in findings if finding.cases]


# ---- one split ----


def findings_of_split(check: SplitCheck, side: int) -> list[Finding]:
    """Problems in a split's files, images and masks; `side` is the network's input size in pixels."""
    found = [*_check_pairing(check), *_check_images(check.samples, side), *_check_mask_files(check)]
    if check.mask_format:
        found += [
            *_check_values(check, check.mask_format),
            *_check_foreground(check.masked),
            *_check_object_size(check.masked, side),
        ]
        found += _check_edges(check)
    return [replace(finding, split=check.name) for finding in found]


def _check_pairing(check: SplitCheck) -> list[Finding]:
    split = check.split
    return _check_count(check) + if_any(
        Finding(
            "images-without-mask",
            "will hurt",
            "images without a mask",
            "They are skipped: name a mask like each image, or add an all-black mask for images without an object.",
            [_file_case(path, split.images) for path in split.images_without_mask],
        ),
        Finding(
            "masks-without-image",
            "will hurt" if split.images_without_mask else "good to know",
            "masks without an image",
            "They are skipped: name each like its image, or remove it.",
            [_file_case(path, split.masks or split.images) for path in split.masks_without_image],
        ),
        Finding(
            "unreadable",
            "will hurt",
            "files that cannot be read",
            "Their pairs are skipped, and dsu cache-features ends with status 1: repair or remove them.",
            [_file_case(path, split.images, reason) for path, reason in check.unreadable],
        ),
    )


def _check_count(check: SplitCheck) -> list[Finding]:
    pairs = len(check.masks)
    if check.split.masks is None and check.trains:
        return [
            Finding(
                "no-masks",
                "will stop",
                "No image has a mask",
                "Training needs pairs: put masks, named like the images, into masks/ next to images/, or name the "
                "subfolders with --images and --masks. Without masks you can only predict.",
            )
        ]
    if check.split.masks is None:
        return [Finding("no-masks", "good to know", "No image has a mask", "You can predict, but not evaluate.")]
    if pairs >= FEW or not check.trains:
        return []
    if not pairs:
        return [Finding("no-pairs", "will stop", "No pair can be read", "Repair the files, or give another folder.")]
    return [
        Finding(
            "few",
            "will hurt",
            f"Only {pairs} pairs to train on",
            "A head overfits so few: store cached augmentations (dsu cache-features --views flips+8), adapt fewer "
            "blocks (--adapt-last), and don't trust scores on a few held-out images.",
        )
    ]


def _check_images(samples: Sequence[Sample], side: int) -> list[Finding]:
    return if_any(
        Finding(
            "large",
            "good to know",
            f"images of {LARGE:,} pixels and more on a side",
            f"The network sees each at {side}x{side}: if details matter, cut tiles (dsu cache-features --tile SIZE "
            "--overlap PIXELS).",
            [
                case_of(sample, _format_size(sample.size))
                for sample in sorted(samples, key=lambda sample: -max(sample.size))
                if max(sample.size) >= LARGE
            ],
        ),
        Finding(
            "small",
            "good to know",
            f"images of less than {SMALL} pixels on a side",
            f"They are enlarged to {side}x{side}: check that they are not thumbnails.",
            [case_of(sample, _format_size(sample.size)) for sample in samples if min(sample.size) < SMALL],
        ),
        Finding(
            "long",
            "good to know",
            f"images with an aspect ratio above {LONG:g}",
            f"They are squeezed to {side}x{side}: crop them, or cut tiles (dsu cache-features --tile SIZE).",
            [
                case_of(sample, _format_size(sample.size))
                for sample in samples
                if max(sample.size) > LONG * min(sample.size)
            ],
        ),
        Finding(
            "flat",
            "will hurt",
            f"images with hardly any contrast (standard deviation below {FLAT:g} of 255 grey levels)",
            "They show nothing: check how they were exported, or remove them.",
            [
                case_of(sample, f"{sample.contrast:.1f}")
                for sample in samples
                if sample.contrast < FLAT and not _is_dim(sample)
            ],
        ),
        Finding(
            "dim",
            "will hurt",
            "images with more than 8 bits that use only the lowest eighth of the set's range",
            "All of them share one range, so these stay dark: check their export, or cache-features --range.",
            [case_of(sample, f"brightest {sample.brightest} of 255") for sample in samples if _is_dim(sample)],
        ),
        Finding(
            "alpha",
            "good to know",
            "images with transparency",
            "It is dropped, and the colours beneath show: flatten the images yourself if those colours are arbitrary.",
            [case_of(sample) for sample in samples if sample.storage.alpha],
        ),
        Finding(
            "turned",
            "good to know",
            "images that EXIF rotates",
            "They are rotated upright first, and masks with them if their sizes fit only then: check (--sheet) that "
            "masks fit.",
            [case_of(sample) for sample in samples if sample.storage.turned],
        ),
        Finding(
            "frames",
            "good to know",
            "files with several frames",
            "Only the first is read: save the others as separate files.",
            [case_of(sample) for sample in samples if sample.storage.frames],
        ),
    )


def _format_size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _is_dim(sample: Sample) -> bool:
    """Whether stretching an image with more than 8 bits would reveal something."""
    # A 12-bit image among 16-bit ones reaches grey level 16.
    dark = sample.storage.deep and 0 < sample.brightest < 32
    return dark and sample.contrast * 255 / sample.brightest >= FLAT


def _check_mask_files(check: SplitCheck) -> list[Finding]:
    found = if_any(
        Finding(
            "mask-scaled",
            "good to know",
            "masks of another size than their images",
            "Both are resized for the network, and dsu eval resizes maps to their masks: nothing to do.",
            [
                case_of(sample, f"{_format_size(sample.size)}, mask {_format_size(sample.mask.size)}")
                for sample in check.samples
                if sample.mask and sample.mask.size != sample.size
            ],
        ),
    )
    if not check.refusal:
        return found
    reason, severity = check.refusal[0].upper() + check.refusal[1:], SEVERITIES[0 if check.trains else 1]
    return [Finding("unclear-masks", severity, "Masks that cannot be read as foreground", reason), *found]


def _check_values(check: SplitCheck, mask_format: MaskFormat) -> list[Finding]:
    """Findings about ambiguous raw values; none if the user gave the foreground."""
    if mask_format.foreground is not None:
        return []
    greys = [facts for facts in check.masks if not facts.is_coloured]
    labels = [facts for facts in check.masks if facts.is_coloured or mask_format.labels]
    found = if_any(
        Finding(
            "faint-masks",
            "will hurt",
            "masks that are not black but never reach half of white",
            f"They are read as almost black: if they are labels, give the object's with "
            f"{typed_foreground(check.masks)}; otherwise brighten them.",
            [
                case_of(one.sample, f"brightest {one.facts.maximum}")
                for one in check.masked
                if not (one.facts.is_coloured or mask_format.labels) and one.facts.maximum > 0 and one.facts.bright == 0
            ],
        )
    )
    if not mask_format.labels and sum(facts.dark for facts in greys) > sum(facts.bright for facts in greys):
        found.append(
            Finding(
                "dark-masks",
                "will hurt",
                "Most nonblack pixels in the masks are darker than half",
                f"They are read as soft edges: if they are labels, give the object's with {typed_foreground(greys)}.",
            )
        )
    values = sorted({value for facts in labels for value in facts.values or ()} - {0})
    coloured = any(facts.kind == "colours" for facts in labels)
    if IGNORED in values and len(values) > 1 and not coloured:
        others = " ".join(f"--foreground {value}" for value in values if value != IGNORED)
        found.append(
            Finding(
                "ignored-label",
                "will hurt",
                f"Label {IGNORED}, which usually marks pixels to ignore, is read as foreground",
                f"Name the others: {others}.",
            )
        )
    elif len(values) > 1:
        shown = ", ".join(f"{value} (#{value:06X})" if coloured else str(value) for value in values[:10])
        found.append(
            Finding(
                "several-labels",
                "good to know",
                f"Label maps with several values ({shown}{', ...' if len(values) > 10 else ''})",
                f"Every value but 0 is foreground: to choose, give any of {typed_foreground(labels)}.",
            )
        )
    return found


def _check_foreground(masked: Sequence[Masked]) -> list[Finding]:
    empty = [case_of(one.sample) for one in masked if one.foreground.share == 0]
    most = 2 * len(empty) > len(masked)
    found = if_any(
        Finding(
            "empty-masks",
            "will hurt" if most else "good to know",
            "masks without foreground",
            "Most images have no object: check that the right values are foreground (--foreground), or remove some."
            if most
            else "They are kept, as images without an object.",
            empty,
        ),
        Finding(
            "full-masks",
            "will hurt",
            "masks that are entirely foreground",
            "They have no background: check how they were exported, or remove them.",
            [case_of(one.sample) for one in masked if one.foreground.share >= FULL],
        ),
    )
    marked = [one.foreground for one in masked if 0 < one.foreground.share < FULL]
    if marked and median(one.border for one in marked) > 0.9 and median(one.share for one in marked) > 0.5:
        found.append(
            Finding(
                "inverted-masks",
                "will hurt",
                "Most masks are white along their border, as if black and white were swapped",
                "White is the object: invert the masks if it is the background.",
            )
        )
    return found


def _check_object_size(masked: Sequence[Masked], side: int) -> list[Finding]:
    """Findings about objects that become tiny or vanish at the network's input size."""
    objects = sum(one.foreground.objects for one in masked)
    lost = sum(one.foreground.vanished for one in masked)
    emptied = sum(one.foreground.objects > 0 and not one.foreground.left for one in masked)
    many = emptied or lost > 0.05 * objects  # not only specks
    tiles = f"cut tiles (dsu cache-features --tile SIZE; {side} keeps every pixel) or give a larger --hiera-size"
    return if_any(
        Finding(
            "vanishing",
            "will hurt" if many else "good to know",
            f"{lost:,} of {objects:,} objects leave no pixel at {side}x{side}; masks with such objects",
            f"Masks that become empty: {emptied:,}; training then treats their images as empty: {tiles}."
            if many
            else f"If they matter, {tiles}.",
            [
                case_of(one.sample)
                for one in sorted(masked, key=lambda one: one.foreground.left > 0)
                if one.foreground.vanished
            ],
        ),
        Finding(
            "tiny",
            "good to know",
            f"masks with less than {TINY} foreground pixels at {side}x{side}",
            f"The network's finest features have one cell per 4x4 pixels: {tiles}.",
            [case_of(one.sample, f"{one.foreground.left}") for one in masked if 0 < one.foreground.left < TINY],
        ),
    )


def _check_edges(check: SplitCheck) -> list[Finding]:
    return if_any(
        Finding(
            "jpeg-masks",
            "good to know",
            "masks saved as JPEG",
            "Its noise blurs their edges: keep masks as PNG.",
            [
                case_of(sample)
                for sample in check.samples
                if sample.mask and sample.mask.storage.format in ("JPEG", "MPO")
            ],
        ),
        Finding(
            "grey-masks",
            "good to know",
            "masks with more grey than foreground",
            "Training uses grey as an uncertain target; evaluation binarises at half of white.",
            [case_of(one.sample) for one in check.masked if one.foreground.soft > one.foreground.share > 0],
        ),
    )
