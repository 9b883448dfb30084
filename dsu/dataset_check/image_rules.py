"""What of a split's files and images will bite."""

from collections.abc import Iterator
from typing import Final

from dsu.dataset_check.findings import Case, Finding, Severity, case_of, file_case, found
from dsu.dataset_check.samples import Sample
from dsu.dataset_check.splits import SplitCheck

__all__ = ["FEW", "FLAT", "LARGE", "LONG", "SMALL", "findings_of_images"]

FEW: Final = 50
"""Training pairs below which a head learns them by heart."""

FLAT: Final = 3.0
"""Standard deviation, in grey levels, below which an image shows nothing: the dullest of 1,900 images of DUTS, CAMO
and MagneticTile has 6.5."""

LARGE: Final = 2048
"""Longer side, in pixels, from which an image loses most of its detail at any usual input size."""

SMALL: Final = 64
"""Shorter side, in pixels, below which an image has hardly any."""

LONG: Final = 4.0
"""Longer over shorter side from which squeezing into a square distorts too much."""

_DIM: Final = 32
"""Grey level (of 255) that images of more than 8 bits should pass: 12 bits in a file of 16 reach 16."""


def findings_of_images(check: SplitCheck, side: int) -> Iterator[Finding]:
    """What will bite, whatever the masks hold; `side` is the network's input in pixels."""
    yield from _pairing(check)
    yield from _reading(check)
    yield from _sizes(check, side)
    yield from _contents(check)
    yield from _kinds(check)


def _pairing(check: SplitCheck) -> Iterator[Finding]:
    split = check.split
    yield from _too_few(check)
    yield from found(
        "images-without-mask",
        "will hurt",
        check.name,
        "images without a mask",
        (file_case(path, split.images) for path in split.images_without_mask),
        "They are passed over: name a mask like each image, or give those without an object an all black one.",
    )
    unmatched: Severity = "will hurt" if split.images_without_mask else "good to know"
    yield from found(
        "masks-without-image",
        unmatched,
        check.name,
        "masks without an image",
        (file_case(path, split.masks or split.images) for path in split.masks_without_image),
        "They are passed over: name each like its image, or remove it.",
    )


def _too_few(check: SplitCheck) -> Iterator[Finding]:
    pairs = sum(sample.mask is not None for sample in check.samples)
    if not check.trains:
        if check.split.masks is None:
            yield Finding(
                "no-masks", "good to know", check.name, "No image has a mask", "There is predicting, but no judging."
            )
    elif check.split.masks is None:
        yield Finding(
            "no-masks",
            "will stop",
            check.name,
            "No image has a mask",
            "Training wants pairs: put masks, named like the images, into masks/ beside images/, or name the "
            "subfolders with --images and --masks. Without masks there is only predicting.",
        )
    elif not pairs:
        yield Finding(
            "no-pairs", "will stop", check.name, "No pair can be read", "Mend the files, or give another folder."
        )
    elif pairs < FEW:
        yield Finding(
            "few",
            "will hurt",
            check.name,
            f"Only {pairs} pairs to train on",
            "A head learns so few by heart: store extra augmented views (dsu cache-features --views flips+8), "
            "adapt fewer blocks (--adapt-last), and trust no figure of a few held-out images.",
        )


def _reading(check: SplitCheck) -> Iterator[Finding]:
    folder = check.split.images
    yield from found(
        "unreadable",
        "will hurt",
        check.name,
        "files that cannot be read",
        (file_case(path, folder, reason) for path, reason in check.unreadable),
        "Their pairs are left out, and dsu cache-features ends with status 1: save them anew as PNG or JPEG, or remove "
        "them.",
    )


def _sizes(check: SplitCheck, side: int) -> Iterator[Finding]:
    large = [sample for sample in check.samples if max(sample.size) >= LARGE]
    yield from found(
        "large",
        "good to know",
        check.name,
        f"images of {LARGE:,} pixels and more on a side",
        map(_sized, sorted(large, key=lambda sample: -max(sample.size))),
        f"The network sees each at {side}x{side}: where detail matters, cut tiles (dsu cache-features --tile SIZE "
        "--overlap PIXELS).",
    )
    yield from found(
        "small",
        "good to know",
        check.name,
        f"images of less than {SMALL} pixels on a side",
        (_sized(sample) for sample in check.samples if min(sample.size) < SMALL),
        f"They are blown up to {side}x{side}: see that they are no thumbnails.",
    )
    yield from found(
        "long",
        "good to know",
        check.name,
        f"images more than {LONG:g} times as long as wide",
        (_sized(sample) for sample in check.samples if max(sample.size) > LONG * min(sample.size)),
        f"They are squeezed to {side}x{side}: crop them, or cut tiles (dsu cache-features --tile SIZE).",
    )


def _contents(check: SplitCheck) -> Iterator[Finding]:
    yield from found(
        "flat",
        "will hurt",
        check.name,
        f"images of hardly any contrast (standard deviation below {FLAT:g} of 255 grey levels)",
        (case_of(sample, f"{sample.contrast:.1f}") for sample in check.samples if _is_flat(sample)),
        "Nothing can be seen in them: check how they were exported, or remove them.",
    )
    yield from found(
        "dim",
        "will hurt",
        check.name,
        "images of 16 bits that use only the lowest eighth of them",
        (case_of(sample, f"brightest {sample.brightest} of 255") for sample in check.samples if _is_dim(sample)),
        "White is 65535, so they are almost black: stretch 10- and 12-bit values to the full range.",
    )


def _kinds(check: SplitCheck) -> Iterator[Finding]:
    yield from found(
        "alpha",
        "good to know",
        check.name,
        "images with transparency",
        (case_of(sample) for sample in check.samples if sample.storage.alpha),
        "It is dropped, and the colours beneath show: lay them over a ground of your choice if those are arbitrary.",
    )
    yield from found(
        "turned",
        "good to know",
        check.name,
        "images that EXIF turns",
        (case_of(sample) for sample in check.samples if sample.storage.turned),
        "They are turned upright before anything else: see (--sheet) that their masks were drawn on upright ones.",
    )
    yield from found(
        "frames",
        "good to know",
        check.name,
        "files of several pictures",
        (case_of(sample) for sample in check.samples if sample.storage.frames),
        "Only the first is read: save the others as files of their own.",
    )


def _is_flat(sample: Sample) -> bool:
    return sample.contrast < FLAT and not _is_dim(sample)


def _is_dim(sample: Sample) -> bool:
    """Whether stretching an image of more than 8 bits would show something in it."""
    dark = sample.storage.deep and 0 < sample.brightest < _DIM
    return dark and sample.contrast * 255 / sample.brightest >= FLAT


def _sized(sample: Sample) -> Case:
    return case_of(sample, f"{sample.size[0]}x{sample.size[1]}")
