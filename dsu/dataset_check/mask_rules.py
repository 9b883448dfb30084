"""What of a split's masks will bite."""

from collections.abc import Iterator
from statistics import median
from typing import Final

from dsu.data.masks import typed_foreground
from dsu.dataset_check.findings import Case, Finding, Severity, case_of, found
from dsu.dataset_check.samples import Sample
from dsu.dataset_check.splits import Masked, SplitCheck

__all__ = ["IGNORED", "findings_of_masks", "is_faint"]

IGNORED: Final = 255
"""What label maps since Pascal VOC's mark pixels with that are to be ignored."""

_FULL: Final = 0.999
"""Share of foreground from which a mask has no background to speak of."""

_INVERTED: Final = 0.9
"""Share of the border that is foreground in most masks of a set that has black and white exchanged."""

_MANY: Final = 0.05
"""Share of all objects whose loss is more than specks."""

_TINY: Final = 64
"""Pixels of foreground, at the network's size, below which an object is a few cells of the finest features."""

_SAME_SHAPE: Final = 0.02
"""Relative difference of proportions that rounding explains."""

_MISMATCHES: Final[dict[str, tuple[Severity, str, str]]] = {
    "turned": (
        "will hurt",
        "masks that lie across their images",
        "Image or mask was turned by 90 degrees, often by EXIF: turn one of them.",
    ),
    "shape": (
        "will hurt",
        "masks of other proportions than their images",
        "Image and mask are squeezed into the same square, so they do not lie on each other: export them alike.",
    ),
    "scaled": (
        "good to know",
        "masks of another size than their images",
        "Both are brought to the network's size, so training is right; dsu eval wants --resize.",
    ),
}
"""How a mask's size may differ from its image's: how bad that is, what it is called, and what to do."""


def findings_of_masks(check: SplitCheck, side: int) -> Iterator[Finding]:
    """What will bite; `side` is the network's input in pixels."""
    yield from _refusal(check)
    yield from _sizes(check)
    if check.mask_format is not None:
        yield from _values(check)
        yield from _extent(check)
        yield from _vanishing(check, side)
        yield from _edges(check)


def is_faint(check: SplitCheck, masked: Masked) -> bool:
    """Whether a mask is not black, but its brightest pixel is no foreground, read as grey levels."""
    mask_format, facts = check.mask_format, masked.facts
    as_greys = (
        mask_format is not None and mask_format.foreground is None and not mask_format.labels and not facts.is_coloured
    )
    return as_greys and facts.maximum > 0 and facts.bright == 0


def _refusal(check: SplitCheck) -> Iterator[Finding]:
    if check.refusal:
        severity: Severity = "will stop" if check.trains else "will hurt"
        reason = check.refusal[0].upper() + check.refusal[1:]
        yield Finding("unclear-masks", severity, check.name, "Masks that cannot be read as foreground", reason)


def _sizes(check: SplitCheck) -> Iterator[Finding]:
    groups: dict[str, list[Case]] = {key: [] for key in _MISMATCHES}
    for sample in check.samples:
        if sample.mask and sample.mask.size != sample.size:
            (width, height), (mask_width, mask_height) = sample.size, sample.mask.size
            remark = f"{width}x{height}, mask {mask_width}x{mask_height}"
            groups[_mismatch(sample)].append(case_of(sample, remark))
    for key, (severity, what, remedy) in _MISMATCHES.items():
        yield from found(f"mask-{key}", severity, check.name, what, groups[key], remedy)


def _mismatch(sample: Sample) -> str:
    assert sample.mask is not None
    (width, height), (mask_width, mask_height) = sample.size, sample.mask.size
    if (width, height) == (mask_height, mask_width):
        return "turned"
    stretch = (mask_width * height) / (width * mask_height)
    # A pixel more or less on a small mask is rounding, too.
    rounding = _SAME_SHAPE + 1 / min(width, height, mask_width, mask_height)
    return "scaled" if abs(stretch - 1) <= rounding else "shape"


def _values(check: SplitCheck) -> Iterator[Finding]:
    mask_format, masks = check.mask_format, check.masks
    assert mask_format is not None
    yield from found(
        "faint-masks",
        "will hurt",
        check.name,
        "masks that are not black but never reach half of white",
        (
            case_of(masked.sample, f"brightest {masked.facts.maximum}")
            for masked in check.masked()
            if is_faint(check, masked)
        ),
        f"They are read as almost black: if they are labels, give those of the object, out of "
        f"{typed_foreground(masks)}, else brighten them.",
    )
    if mask_format.foreground is not None:
        return
    greys = [facts for facts in masks if not facts.is_coloured]
    if not mask_format.labels and sum(facts.dark for facts in greys) > sum(facts.bright for facts in greys):
        yield Finding(
            "dark-masks",
            "will hurt",
            check.name,
            "Most of what is not black in the masks is darker than half",
            f"It is read as uncertain: if they are labels, give those of the object, out of {typed_foreground(greys)}.",
        )
    labels = [facts for facts in masks if facts.is_coloured or mask_format.labels]
    values = sorted({value for facts in labels for value in facts.values or ()} - {0})
    coloured = any(facts.kind == "colours" for facts in labels)
    if IGNORED in values and len(values) > 1 and not coloured:
        others = " ".join(f"--foreground {value}" for value in values if value != IGNORED)
        yield Finding(
            "ignored-label",
            "will hurt",
            check.name,
            f"Label {IGNORED}, which usually marks pixels to be ignored, is read as foreground",
            f"Name the others: {others}.",
        )
    elif len(values) > 1:
        shown = ", ".join(f"{value} (#{value:06X})" if coloured else str(value) for value in values[:10])
        yield Finding(
            "several-labels",
            "good to know",
            check.name,
            f"Label maps of several values ({shown}{', ...' if len(values) > 10 else ''})",
            f"Every value but 0 is foreground: to choose, give some of {typed_foreground(labels)}.",
        )


def _extent(check: SplitCheck) -> Iterator[Finding]:
    masked = list(check.masked())
    empty = [one for one in masked if one.foreground.share == 0]
    most = 2 * len(empty) > len(masked)
    yield from found(
        "empty-masks",
        "will hurt" if most else "good to know",
        check.name,
        "masks without foreground",
        (case_of(one.sample) for one in empty),
        "Most images have nothing to find: see that the right values are foreground (--foreground), or leave some out."
        if most
        else "They are kept, as images without an object.",
    )
    yield from found(
        "full-masks",
        "will hurt",
        check.name,
        "masks that are foreground all over",
        (case_of(one.sample) for one in masked if one.foreground.share >= _FULL),
        "Nothing is told apart in them: see how they were exported, or remove them.",
    )
    marked = [one.foreground for one in masked if 0 < one.foreground.share < _FULL]
    if marked and median(one.border for one in marked) > _INVERTED and median(one.share for one in marked) > 0.5:
        yield Finding(
            "inverted-masks",
            "will hurt",
            check.name,
            "Most masks are white along their border, as if black and white were exchanged",
            "White is what is looked for: invert the masks if it is the background.",
        )


def _vanishing(check: SplitCheck, side: int) -> Iterator[Finding]:
    masked = list(check.masked())
    objects = sum(one.foreground.objects for one in masked)
    lost = sum(one.foreground.vanished for one in masked)
    emptied = [one for one in masked if one.foreground.objects and not one.foreground.left]
    many = bool(emptied) or lost > _MANY * objects
    tiles = f"cut tiles (dsu cache-features --tile SIZE; {side} keeps every pixel) or give a larger --hiera-size"
    yield from found(
        "vanishing",
        "will hurt" if many else "good to know",
        check.name,
        f"{lost:,} of {objects:,} objects leave no pixel at {side}x{side}; masks with such objects",
        # Those that become empty first.
        (
            case_of(one.sample)
            for one in sorted(masked, key=lambda one: one.foreground.left > 0)
            if one.foreground.vanished
        ),
        f"Masks that become empty so: {len(emptied):,}; they teach that nothing is there: {tiles}."
        if many
        else f"If they are more than specks, {tiles}.",
    )
    yield from found(
        "tiny",
        "good to know",
        check.name,
        f"masks of less than {_TINY} pixels of foreground at {side}x{side}",
        (case_of(one.sample, f"{one.foreground.left}") for one in masked if 0 < one.foreground.left < _TINY),
        f"The network's finest features have one cell for 4x4 pixels: {tiles}.",
    )


def _edges(check: SplitCheck) -> Iterator[Finding]:
    yield from found(
        "jpeg-masks",
        "good to know",
        check.name,
        "masks saved as JPEG",
        (case_of(sample) for sample in check.samples if sample.mask and sample.mask.storage.format in ("JPEG", "MPO")),
        "Its noise blurs their edges: keep masks as PNG.",
    )
    yield from found(
        "grey-masks",
        "good to know",
        check.name,
        "masks more of which is grey than foreground",
        (case_of(one.sample) for one in check.masked() if one.foreground.soft > one.foreground.share > 0),
        "Grey is kept, as what the network is to be unsure of; evaluation cuts at half of white.",
    )
