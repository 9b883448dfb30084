"""Read every file of a split once: hashes, sizes, undecodable files, and how to read its masks."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from dsu.data.images import (
    Box,
    Depth,
    UnreadableImage,
    choose_depth,
    file_bytes_and_time,
    mask_box,
    or_unreadable,
    printable,
    raw_mask,
    read_bytes,
    read_image_and_head,
)
from dsu.data.masks import (
    MaskFacts,
    MaskFormat,
    check_mask,
    choose_mask_format,
    describe_mask_format,
    mask_facts,
)
from dsu.data.pairing import Pair, Split
from dsu.progress import SILENT, Progress, counted, few, in_threads

_MASK_PREFIX: Final = "/"
"""Prefix of a mask's facts among those of a sample."""


@dataclass(frozen=True, slots=True)
class SampleMetadata:
    """Facts about an image and its mask when they were read. Sizes are (width, height), upright.

    Hashes are SHA-256 of the files and of the image's pixels; times are modification times. Facts about the mask are
    None without one. For a tile, sizes and mask facts are the tile's own, and `box` is its place in the image. `extent`
    is the minimum and maximum raw value of an image with more than 8 bits.
    """

    image_sha256: str
    image_bytes: int
    image_mtime_ns: int
    size: tuple[int, int]
    mask_sha256: str | None = None
    mask_bytes: int | None = None
    mask_mtime_ns: int | None = None
    mask_size: tuple[int, int] | None = None
    mask: MaskFacts | None = None
    box: Box | None = None
    extent: Depth | None = None
    pixels_sha256: str = ""

    @property
    def content(self) -> str:
        """Identifies the image's content, or the part of it: equal for copies, whatever their names."""
        return self.image_sha256 if self.box is None else f"{self.image_sha256}{list(self.box)}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values on one level: a store keeps each in its own column."""
        noted = {name: getattr(self, name) for name in self.__slots__ if name != "mask"}
        return (
            noted if self.mask is None else noted | {_MASK_PREFIX + name: v for name, v in self.mask.to_json().items()}
        )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "SampleMetadata":
        """The facts from `to_json`."""
        mask = {name[1:]: value for name, value in fields.items() if name[0] == _MASK_PREFIX}
        own: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
            if name[0] != _MASK_PREFIX
        }
        return cls(**own, mask=MaskFacts.from_json(mask) if mask else None)

    def are_of(self, pair: Pair) -> bool:
        """Whether the files of a pair have the sizes and times recorded here."""
        if (self.image_bytes, self.image_mtime_ns) != file_bytes_and_time(pair.image):
            return False
        if pair.mask is None or self.mask is None:
            return pair.mask is None and self.mask is None
        return (self.mask_bytes, self.mask_mtime_ns) == file_bytes_and_time(pair.mask)


@dataclass(frozen=True)
class Inspection:
    """The result of reading every file of a split.

    Attributes:
        facts: By sample name, in the split's order, without undecodable samples.
        undecodable: Undecodable files, with the reason and what to do.
        size_mismatches: Samples whose mask has another size than the image.
        mask_format: How the masks of the split are read.
        depth: Black and white point of its images with more than 8 bits; None if there are none.
    """

    facts: dict[str, SampleMetadata]
    undecodable: tuple[tuple[Path, str, str], ...]
    size_mismatches: tuple[str, ...]
    mask_format: MaskFormat
    depth: Depth | None = None


def inspect(
    split: Split,
    previous: Mapping[str, SampleMetadata] | None = None,
    progress: Progress = SILENT,
    foreground: Sequence[int] | None = None,
    depth: Depth | None = None,
) -> Inspection:
    """Read, hash and decode every image and mask of a split, and decide how to read its masks.

    Args:
        split: What to read.
        previous: Earlier facts: a sample with the same name, sizes and times is not read again.
        progress: Receives progress.
        foreground: Foreground values, if the user gave them.
        depth: Black and white point of deep images, if known; else chosen from all of them.

    Raises:
        UsageError: As `dsu.data.masks.choose_mask_format`.
    """
    known = previous or {}
    facts: dict[str, SampleMetadata] = {}
    undecodable: list[tuple[Path, str, str]] = []

    # An image's tiles are consecutive: it is read once for all of them.
    images = [list(pairs) for _, pairs in groupby(split.pairs, key=lambda pair: (pair.image, pair.mask))]

    @or_unreadable
    def examine(pairs: Sequence[Pair]) -> list[SampleMetadata]:
        same = [known[pair.name] for pair in pairs if pair.name in known and known[pair.name].are_of(pair)]
        return same if len(same) == len(pairs) else read_metadata(pairs, opaque=foreground is not None)

    label = f"{'comparing' if known else 'reading'} {split.name}"
    for pairs, found in zip(images, in_threads(examine, images, label, progress), strict=True):
        if isinstance(found, UnreadableImage):
            undecodable.append((found.path, found.reason, found.remedy))
        else:
            facts |= {pair.name: one for pair, one in zip(pairs, found, strict=True)}
    return Inspection(
        facts=facts,
        undecodable=tuple(undecodable),
        size_mismatches=tuple(name for name, fact in facts.items() if fact.mask_size not in (None, fact.size)),
        mask_format=choose_mask_format([fact.mask for fact in facts.values() if fact.mask], foreground),
        depth=depth or choose_depth(fact.extent for fact in facts.values() if fact.extent),
    )


def unpaired(split: Split) -> list[str]:
    """Lines about images without a mask and masks without an image, which are skipped."""
    unmasked = [os.path.relpath(path, split.images) for path in split.images_without_mask]
    alone = [os.path.relpath(path, split.masks or split.images) for path in split.masks_without_image]
    return [
        *_count_and_names("images", f"of {split.name} without a mask, skipped", unmasked),
        *_count_and_names("masks", f"of {split.name} without an image", alone),
    ]


def describe(split: Split, inspection: Inspection) -> list[str]:
    """Describe a split and how its masks are read, in lines for people.

    Unpaired and undecodable files are in `unpaired` and `unreadable`.
    """
    things, kind = ("images", "without masks") if split.masks is None else ("pairs", "of image and mask")
    held = f"{counted(len({pair.image for pair in split.pairs}), things)} {kind}"
    if any(pair.box for pair in split.pairs):
        held = f"{counted(len(split.pairs), 'tiles')} of {held}"
    official = split.official_count
    officially = "" if official in (None, len(split.pairs)) else f" (officially {official:,})"
    lines = [f"{split.name}: {held}{officially} in {split.images}."]
    if split.left_out:
        lines.append(
            f"{counted(split.left_out, 'images')} left out: by convention neither for training nor for testing."
        )
    lines += _describe_depth(split, inspection)
    mismatches = [_describe_sizes(name, inspection.facts[name]) for name in inspection.size_mismatches]
    lines += _count_and_names("masks", "of another size than the image", mismatches)
    masks = [fact.mask for fact in inspection.facts.values() if fact.mask]
    return lines + (describe_mask_format(inspection.mask_format, masks) if masks else [])


def _describe_depth(split: Split, inspection: Inspection) -> list[str]:
    """Describe the black and white point of images with more than 8 bits, and which exceed it."""
    extents = [
        (os.path.relpath(pair.image, split.images), facts.extent)
        for pair in split.pairs
        if (facts := inspection.facts.get(pair.name)) and facts.extent is not None
    ]
    if inspection.depth is None or not extents:
        return []
    low, high = inspection.depth
    beyond = [f"{name} ({a:g} to {b:g})" for name, (a, b) in extents if a < low or b > high + 0.01 * abs(high)]
    return [
        f"{counted(len(extents), 'images')} with more than 8 bits: {low:g} is black and {high:g} white "
        "(--range LOW,HIGH overrides this).",
        *_count_and_names("images", "exceed this range and are clipped", beyond),
    ]


def unreadable(inspection: Inspection) -> list[str]:
    """One sentence for each undecodable file, so that none is skipped silently."""
    return [
        f"{printable(path)} cannot be read ({reason}) and is left out: {remedy}."
        for path, reason, remedy in inspection.undecodable
    ]


def read_metadata(pairs: Sequence[Pair], *, opaque: bool) -> list[SampleMetadata]:
    """The facts of one image's tiles, or of the image itself.

    Raises `UnreadableImage` for a file that can't be read, and for a mask that does not fit its image or, unless
    `opaque`, is a photograph.
    """
    first = pairs[0]
    image, noted = _read_file(first.image, "image")
    _, head = read_image_and_head(first.image, image, hashed=True)
    facts = SampleMetadata(**noted, size=head.size, extent=head.extent, pixels_sha256=head.pixels_sha256)
    if first.mask is None:
        return [_part_metadata(facts, pair.box) for pair in pairs]
    mask, noted = _read_file(first.mask, "mask")
    raw, kind = raw_mask(first.mask, mask, head, opaque=opaque)
    if not opaque:
        check_mask(first.mask, raw, kind, is_image=image == mask)
    examine = partial(mask_facts, kind=kind, brightest=int(raw.max()))
    return [_part_metadata(replace(facts, **noted), pair.box, raw, examine) for pair in pairs]


def _read_file(path: Path, side: str) -> tuple[bytes, dict[str, Any]]:
    """A file's bytes, and the facts about it for `SampleMetadata`."""
    size, time = file_bytes_and_time(path)
    data = read_bytes(path)
    return data, {f"{side}_sha256": hashlib.sha256(data).hexdigest(), f"{side}_bytes": size, f"{side}_mtime_ns": time}


def _part_metadata(
    facts: SampleMetadata,
    box: Box | None,
    mask: NDArray[Any] | None = None,
    examine: Callable[[NDArray[Any]], MaskFacts] | None = None,
) -> SampleMetadata:
    """Facts about an image, or about a part of it, with what `examine` finds in the mask's raw values (H, W)."""
    left, top, right, bottom = box or (0, 0, *facts.size)
    part = replace(facts, size=(right - left, bottom - top), box=box)
    if mask is None or examine is None:
        return part
    x, y, end, low = mask_box((left, top, right, bottom), facts.size, (mask.shape[1], mask.shape[0]))
    return replace(part, mask_size=(end - x, low - y), mask=examine(mask[y:low, x:end]))


def _describe_sizes(name: str, facts: SampleMetadata) -> str:
    (width, height), (mask_width, mask_height) = facts.size, facts.mask_size or facts.size
    turned = ", as if one were turned" if (width, height) == (mask_height, mask_width) else ""
    return f"{name} ({width}x{height}, mask {mask_width}x{mask_height}{turned})"


def _count_and_names(things: str, what: str, names: Sequence[str]) -> list[str]:
    """A line with the count and the first ten names; none if there are no names."""
    return [f"{counted(len(names), things)} {what}: {few(names, 10)}."] if names else []
