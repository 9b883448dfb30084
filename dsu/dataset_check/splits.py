"""All that a check reads of one split: every image, every mask, and how the masks are read."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from dsu.data.images import UnreadableImage, or_unreadable
from dsu.data.masks import MaskFacts, MaskFormat, choose_mask_format
from dsu.data.pairing import Split
from dsu.dataset_check.samples import Foreground, Sample, look_at, measure
from dsu.errors import UsageError
from dsu.progress import SILENT, Progress
from dsu.threads import in_threads

__all__ = ["Masked", "SplitCheck", "read_split"]


@dataclass(frozen=True)
class Masked:
    """A sample whose mask could be read: its sample, what its file holds, and what it marks."""

    sample: Sample
    facts: MaskFacts
    foreground: Foreground


@dataclass(frozen=True)
class SplitCheck:
    """What a split holds.

    Attributes:
        split: What pairs in it and what does not.
        samples: Pairs of which both files can be read; images alone where it has no masks.
        unreadable: Files that cannot, and why.
        values: How many pixels of the masks have which raw value, masks of very many values (16-bit greys) left out.
        mask_format: How the masks are read; None where there are none or none was found.
        refusal: Why none was found.
        foreground: What the masks mark, read so, by sample name.
    """

    split: Split
    samples: tuple[Sample, ...]
    unreadable: tuple[tuple[Path, str], ...]
    values: Counter[int]
    mask_format: MaskFormat | None = None
    refusal: str | None = None
    foreground: dict[str, Foreground] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The split's."""
        return self.split.name

    @property
    def trains(self) -> bool:
        """Whether it is trained on."""
        return self.split.kind != "test"

    @property
    def masks(self) -> list[MaskFacts]:
        """What each mask's file holds."""
        return [sample.mask.facts for sample in self.samples if sample.mask]

    def masked(self) -> Iterator[Masked]:
        """The samples with what their masks mark; none where no reading was found."""
        for sample in self.samples:
            if sample.mask and sample.name in self.foreground:
                yield Masked(sample, sample.mask.facts, self.foreground[sample.name])


def read_split(
    split: Split,
    side: int,
    foreground: Sequence[int] | None = None,
    progress: Progress = SILENT,
    workers: int | None = None,
) -> SplitCheck:
    """Read every image and mask of a split, one a thread at a time.

    Args:
        split: What to read.
        side: The network's input in pixels, at which objects are looked for again.
        foreground: Raw mask values that are foreground, where the user named them.
        progress: Who is told.
        workers: How many files are read at once; by default as many as there are processors, at most 16.
    """
    samples: list[Sample] = []
    unreadable: list[tuple[Path, str]] = []
    values: Counter[int] = Counter()
    look = or_unreadable(partial(look_at, split=split.name))
    for seen in in_threads(look, split.pairs, f"reading {split.name}", progress, workers):
        if isinstance(seen, UnreadableImage):
            unreadable.append((seen.path, seen.reason))
        else:
            samples.append(seen[0])
            values.update(seen[1])
    check = SplitCheck(split, tuple(samples), tuple(unreadable), values)
    if not check.masks:
        return check
    try:
        mask_format = choose_mask_format(check.masks, foreground)
    except UsageError as error:
        return replace(check, refusal=str(error))
    paths = {sample.name: sample.mask.path for sample in samples if sample.mask}
    work, label = partial(measure, mask_format=mask_format, side=side), f"measuring masks of {split.name}"
    marked = in_threads(work, list(paths.values()), label, progress, workers, "masks")
    return replace(check, mask_format=mask_format, foreground=dict(zip(paths, marked, strict=True)))
