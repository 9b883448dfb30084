"""Decide whether the masks of a data set are grey levels, labels or colours.

One file is not enough. A mask of 0s and 1s may be a label map or an almost black image, and one whose grey edges never
reach half may belong to a set of ordinary grey masks. So each file gives compact `MaskFacts`, and `choose_mask_format`
decides on one `MaskFormat` from all of them.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dsu.data.images import FEW_VALUES, WHITE_16, ImageHead, MaskKind, UnreadableImage, raw_mask, read_mask
from dsu.errors import UsageError
from dsu.progress import counted

_MAX_OPTIONS: Final = 6
"""At most this many values are written out as options; more would hide the sentence around them."""


@dataclass(frozen=True)
class MaskFormat:
    """How to convert the masks of a data set to grey levels: one rule for all files, part of fingerprints.

    Coloured masks are always labels: every palette index but 0, every colour but black is foreground.

    Attributes:
        foreground: The foreground raw values, all others being background; None: see `labels`.
        labels: In grey masks too, every value but 0 is foreground.
        white: The white value in 16-bit masks: 65535, or 255 if they contain 8-bit values.
    """

    foreground: tuple[int, ...] | None = None
    labels: bool = False
    white: int = WHITE_16

    def read(self, path: Path, data: bytes | None = None, image: ImageHead | None = None) -> NDArray[np.uint8]:
        """Read one mask in this format: arguments, result (H, W) and errors as in `dsu.data.images.read_mask`."""
        return read_mask(path, self.foreground, self.labels, self.white, data, image)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "foreground": self.foreground and list(self.foreground)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "MaskFormat":
        """The format from `to_json`."""
        foreground = fields["foreground"]
        return cls(None if foreground is None else tuple(foreground), fields["labels"], fields["white"])


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """Facts about one mask, compact enough to keep for every file of a data set.

    Attributes:
        kind: Type of its raw values.
        values: The distinct raw values, ascending; None if there are more than 32.
        minimum: The least raw value.
        maximum: The greatest raw value.
        dark: Number of pixels above 0 but darker than half of white.
        bright: Number that are at least half of white; for indices and colours, all that are not 0.
    """

    kind: MaskKind
    values: tuple[int, ...] | None
    minimum: int
    maximum: int
    dark: int
    bright: int

    @property
    def is_coloured(self) -> bool:
        """Whether it is a label map, whatever the other masks are."""
        return self.kind in ("indices", "colours")

    def is_empty(self, mask_format: MaskFormat) -> bool:
        """Whether it has no foreground in this format."""
        if mask_format.foreground is not None:
            return self.values is not None and not set(self.values) & set(mask_format.foreground)
        return self.maximum == 0 if mask_format.labels else self.bright == 0

    def foreground(self, mask_format: MaskFormat) -> int:
        """Number of foreground pixels in this format; with given values, of pixels that are not 0 if any is
        foreground."""
        if self.is_empty(mask_format):
            return 0
        grey = mask_format.foreground is None and not mask_format.labels
        return self.bright if grey else self.bright + self.dark

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "MaskFacts":
        """The facts that `to_json` wrote."""
        values = fields["values"]
        return cls(**{**fields, "values": None if values is None else tuple(values)})


def examine_mask(path: Path, *, opaque: bool = False) -> MaskFacts:
    """Facts about a mask before a format is chosen; arguments and errors as in `dsu.data.images.raw_mask`."""
    raw, kind = raw_mask(path, opaque=opaque)
    return mask_facts(raw, kind, int(raw.max()))


def check_mask(path: Path, raw: NDArray[Any], kind: MaskKind, *, is_image: bool = False) -> None:
    """Raise `UnreadableImage` if a supposed mask is a photograph, by its raw values (H, W).

    Soft greys may be confidence maps, so they are refused only if the file `is_image`, the mask's own image, and shows
    something.
    """
    if (is_image or (kind == "colours" and is_photograph(raw))) and raw.min() != raw.max():
        way = "give the object's mask, or its values with --foreground"
        raise UnreadableImage(path, "it is a photograph, not a mask", way)


def is_photograph(raw: NDArray[Any]) -> bool:
    """Whether the few most frequent of the raw values (H, W) cover less than half, unlike in any mask, even a soft
    one."""
    _, counts = np.unique(raw, return_counts=True)
    return bool(np.sort(counts)[-FEW_VALUES:].sum() < raw.size / 2)


def mask_facts(raw: NDArray[Any], kind: MaskKind, brightest: int) -> MaskFacts:
    """Facts about a mask, or a part of one whose brightest value is `brightest`, from raw values (H, W)."""
    values, counts = np.unique(raw, return_counts=True)
    half = 1 if kind in ("indices", "colours") else _half(brightest)
    return MaskFacts(
        kind=kind,
        values=tuple(values.tolist()) if len(values) <= FEW_VALUES else None,
        minimum=int(values[0]),
        maximum=int(values[-1]),
        dark=int(counts[(values > 0) & (values < half)].sum()),
        bright=int(counts[values >= half].sum()),
    )


def choose_mask_format(masks: Collection[MaskFacts], foreground: Sequence[int] | None = None) -> MaskFormat:
    """Decide how to read the masks of a data set, so that no label map is taken for an almost black image.

    Grey masks are labels if no pixel of the whole set reaches half of white. They are also labels if the set has few
    values and either other masks are coloured, or only white itself is above half and most nonzero pixels are below.
    Otherwise they are grey.

    Args:
        masks: The facts of all masks of the set.
        foreground: Raw values from the user, which decide.

    Raises:
        UsageError: No mask contains a given value, or the masks are labels without any background.
    """
    greys = [mask for mask in masks if not mask.is_coloured]
    deepest = max((mask.maximum for mask in greys if mask.kind == "deep"), default=WHITE_16)
    white = 255 if deepest <= 255 else WHITE_16
    if foreground is not None:
        mask_format = MaskFormat(_with_greys_of_colours(foreground, masks), white=white)
        if masks and all(mask.is_empty(mask_format) for mask in masks):
            raise UsageError(
                f"no mask contains {_join_values(foreground)} of --foreground: they contain {_describe_values(masks)}."
            )
        return mask_format
    mask_format = MaskFormat(labels=_are_labels(greys, len(greys) < len(masks)), white=white)
    labels = [mask for mask in masks if mask.is_coloured or mask_format.labels]
    if labels and all(mask.minimum > 0 for mask in labels):
        raise UsageError(
            "the masks are labels without any 0, so all pixels would be foreground: choose from "
            f"{typed_foreground(labels)} (they contain {_describe_values(labels)})."
        )
    return mask_format


def describe_mask_format(mask_format: MaskFormat, masks: Collection[MaskFacts]) -> list[str]:
    """Describe how the masks are read and what may be surprising, in sentences for people."""
    if mask_format.foreground is not None:
        named = f"{_join_values(mask_format.foreground)} {'is' if len(mask_format.foreground) == 1 else 'are'}"
        return [f"Masks: {named} foreground, from --foreground (they contain {_describe_values(masks)})."]
    greys, coloured = ([mask for mask in masks if mask.is_coloured is side] for side in (False, True))
    lines = []
    if coloured:
        lines.append(
            f"Masks: {len(coloured):,} in colours ({_describe_values(coloured)}): "
            f"all but black (palettes: but index 0) is foreground{_choice_hint(coloured)}."
        )
    if mask_format.labels and greys:
        lines.append(
            f"Masks: labels ({_describe_values(greys)}): every value but 0 is foreground{_choice_hint(greys)}."
        )
    elif greys:
        lines.append("Masks: grey levels, soft edges kept.")
        dark, bright = (sum(getattr(mask, shade) for mask in greys) for shade in ("dark", "bright"))
        if dark > bright:
            lines.append(
                "Most nonblack pixels in the masks are darker than half: if they are labels, give the object's "
                f"with {typed_foreground(greys)}."
            )
    empty = sum(mask.is_empty(mask_format) for mask in masks)
    if empty:
        lines.append(f"{counted(empty, 'masks')} without foreground: kept as examples without an object.")
    return lines


def typed_foreground(masks: Iterable[MaskFacts]) -> str:
    """Options for the values other than 0, as typed: `--foreground 1 --foreground 2`."""
    values = sorted((_distinct_values(masks) or set()) - {0})
    if 0 < len(values) <= _MAX_OPTIONS:
        return f"`{' '.join(f'--foreground {value}' for value in values)}`"
    return "`--foreground VALUE`, once for each value"


def _half(maximum: int) -> int:
    """Half of white in grey masks, rounded up."""
    return 128 if maximum <= 255 else (WHITE_16 + 1) // 2


def _are_labels(greys: Collection[MaskFacts], among_coloured: bool) -> bool:
    top = max((mask.maximum for mask in greys), default=0)
    half = _half(top)
    if top < half:
        return top > 0
    values = _distinct_values(greys)
    if values is None or among_coloured:
        return values is not None
    # White in a label map marks pixels to ignore (255 in Pascal VOC), mostly outlines.
    below_white = max(values - {255, WHITE_16}, default=0)
    return below_white < half and sum(mask.dark for mask in greys) > sum(mask.bright for mask in greys)


def _with_greys_of_colours(foreground: Sequence[int], masks: Collection[MaskFacts]) -> tuple[int, ...]:
    """For coloured masks, add the grey level of each grey colour: a mask with only that colour is grey."""
    coloured = any(mask.kind == "colours" for mask in masks)
    greys = {value // 0x010101 for value in foreground if coloured and value % 0x010101 == 0}
    return tuple(sorted({*foreground, *greys}))


def _distinct_values(masks: Iterable[MaskFacts]) -> set[int] | None:
    """All distinct values; None if there are too many for labels."""
    masks = list(masks)
    values = {value for mask in masks for value in mask.values or ()}
    return None if len(values) > FEW_VALUES or any(mask.values is None for mask in masks) else values


def _describe_values(masks: Collection[MaskFacts]) -> str:
    """The values in masks, as text; colours as the number for --foreground and as #RRGGBB."""
    values = _distinct_values(masks)
    if values is None:
        return f"more than {FEW_VALUES} values"
    colours = any(mask.kind == "colours" for mask in masks)
    shown = [f"{value} (#{value:06X})" if colours else str(value) for value in sorted(values)]
    return _join_values(shown) if shown else "nothing"


def _choice_hint(labels: Collection[MaskFacts]) -> str:
    """How to choose labels, if there are several."""
    values = _distinct_values(labels)
    alone = values is not None and len(values - {0}) < 2
    return "" if alone else f"; to choose, give any of {typed_foreground(labels)}"


def _join_values(values: Collection[object]) -> str:
    return f"{'the value' if len(values) == 1 else 'the values'} {', '.join(map(str, values))}"


def object_boxes(foreground: NDArray[np.bool_]) -> list[tuple[slice, slice]]:
    """Row and column slices of every object, a connected region of (H, W) foreground (8-connected)."""
    from scipy import ndimage  # type: ignore[import-untyped]  # takes longer to load than most commands want it

    labels, _ = ndimage.label(foreground, np.ones((3, 3)))
    return list(ndimage.find_objects(labels))
