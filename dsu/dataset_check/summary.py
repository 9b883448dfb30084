"""What a split holds, in figures: for the table and for programs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dsu.data.masks import MaskFacts, MaskFormat
from dsu.dataset_check.samples import Sample, Storage
from dsu.dataset_check.splits import SplitCheck

__all__ = ["FileCount", "file_counts", "mask_format_of", "summary"]

_SHARES: Final = (0.25, 0.5, 0.75)

_MODES: Final = {
    **{"L": "grey", "LA": "grey", "1": "1 bit", "P": "palette", "PA": "palette"},
    **{"RGBA": "RGB", "F": "float"},
}
"""Pillow's modes in words; transparency is said apart."""

_READ_AS: Final = {
    "RGB": "as it is",
    "RGBA": "as it is",
    "L": "grey, the same in all three channels",
    "LA": "grey, the same in all three channels",
    "1": "black and white",
    "P": "the palette's colours",
    "PA": "the palette's colours",
    "CMYK": "converted to RGB, its colour profile left aside",
    "F": "0 to 1 is black to white; larger values as 16 bits",
}
"""What `dsu.data.images.read_image` makes of an image, by Pillow's mode."""


@dataclass(frozen=True)
class FileCount:
    """How many files of one kind there are: `kind` ("JPEG, grey"), and what is made of them."""

    what: str
    kind: str
    read_as: str
    count: dict[str, int]
    """By split."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self)}


def file_counts(checks: Sequence[SplitCheck]) -> list[FileCount]:
    """Kinds of files of all splits, images before masks, the most frequent first."""
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    for check in checks:
        for sample in check.samples:
            storage = sample.storage
            counts.setdefault(("images", _kind(storage), _image_read_as(storage)), Counter())[check.name] += 1
            if sample.mask:
                key = ("masks", _kind(sample.mask.storage), _mask_read_as(sample.mask.facts, check.mask_format))
                counts.setdefault(key, Counter())[check.name] += 1
    ordered = sorted(counts.items(), key=lambda item: (item[0][0], -item[1].total(), item[0]))
    return [FileCount(*key, dict(count)) for key, count in ordered]


def summary(check: SplitCheck) -> dict[str, Any]:
    """Plain JSON values of one split. Sizes are [width, height], shares 0 to 1; None where nothing was measured."""
    split = check.split
    sizes = sorted((sample.size for sample in check.samples), key=lambda size: size[0] * size[1])
    marked = list(check.foreground.values())
    shares = np.quantile([one.share for one in marked], _SHARES).tolist() if marked else None
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
        "masks_of_another_size": sum(_is_mismatched(sample) for sample in check.samples),
        "masks_read_as": mask_format_of(check),
        "mask_format": check.mask_format.to_json() if check.mask_format else None,
        "mask_values": {str(value): pixels for value, pixels in check.values.most_common()},
        "foreground_quartiles": shares,
        "empty_masks": sum(one.share == 0 for one in marked),
        "soft_masks": sum(one.soft > 0 for one in marked),
        "objects": sum(one.objects for one in marked),
        "vanishing_objects": sum(one.vanished for one in marked),
        "masks_that_become_empty": sum(one.objects > 0 and one.left == 0 for one in marked),
    }


def mask_format_of(check: SplitCheck) -> str | None:
    """How the masks of a split are read, in a few words; None where there are none or none was found."""
    if check.mask_format is None:
        return None
    return ", ".join(dict.fromkeys(_mask_read_as(facts, check.mask_format) for facts in check.masks))


def _is_mismatched(sample: Sample) -> bool:
    return sample.mask is not None and sample.mask.size != sample.size


def _kind(storage: Storage) -> str:
    """`PNG, grey, alpha`: the format and what is remarkable."""
    mode = "16-bit grey" if storage.deep else storage.mode
    extras = (("alpha", storage.alpha), ("turned by EXIF", storage.turned), ("several pictures", storage.frames))
    return ", ".join([storage.format, _MODES.get(storage.mode, mode), *(name for name, there in extras if there)])


def _image_read_as(storage: Storage) -> str:
    """What `dsu.data.images.read_image` does with it."""
    if storage.deep and storage.mode != "F":
        steps = ["scaled to 8 bits: 65535 is white"]
    else:
        steps = [_READ_AS.get(storage.mode, "converted to RGB")]
    steps += ["alpha dropped"] if storage.alpha else []
    steps += ["turned upright"] if storage.turned else []
    steps += ["the first picture only"] if storage.frames else []
    return ", ".join(steps)


def _mask_read_as(facts: MaskFacts, mask_format: MaskFormat | None) -> str:
    """What `dsu.data.masks.MaskFormat.read` does with it."""
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
