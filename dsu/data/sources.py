"""Where a split's images lie, in words that find them again."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsu.data.datasets import Paths, Split, find_dataset, is_benchmark
from dsu.data.masks import MaskFormat
from dsu.data.tiles import Tiling, tiled
from dsu.errors import DsuError

__all__ = ["SourceFolder"]


@dataclass(frozen=True)
class SourceFolder:
    """How a split's images were found, to find them again: kept in its store and in heads trained on it.

    `tile` and `overlap` say how they were cut; None: not at all. `mask_format` is how the masks of the whole split were
    read (`MaskFormat.to_json`), which a part of it may not show; None: that is not known.
    """

    split: str
    dataset: str
    kind: str
    benchmark: bool
    reference: str
    data_root: str
    images: str | None = None
    masks: str | None = None
    tile: int | None = None
    overlap: int | None = None
    mask_format: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        texts = (self.split, self.dataset, self.kind, self.reference, self.data_root)
        subfolders = (self.images, self.masks)
        if not (
            all(isinstance(text, str) for text in texts)
            and isinstance(self.benchmark, bool)
            and all(name is None or isinstance(name, str) for name in subfolders)
            and all(number is None or type(number) is int for number in (self.tile, self.overlap))
        ):
            raise TypeError("a source folder's fields are texts, numbers, and whether it is a benchmark")
        try:
            _ = self.parsed_mask_format
        except (KeyError, TypeError, AttributeError) as error:
            raise TypeError("a source folder's mask_format is one of masks") from error

    @classmethod
    def of(
        cls,
        split: Split,
        reference: str,
        paths: Paths,
        tiling: Tiling | None = None,
    ) -> "SourceFolder":
        """How `split` was found by `reference`, a benchmark's name or a folder (here or below the data root)."""
        return cls(
            split=split.name,
            dataset=split.dataset,
            kind=split.kind,
            benchmark=split.benchmark,
            reference=reference if split.benchmark and is_benchmark(reference) else _absolute(reference, paths),
            data_root=os.path.realpath(paths.data_root.expanduser()),
            images=paths.images,
            masks=paths.masks,
            tile=tiling.size if tiling else None,
            overlap=tiling.overlap if tiling else None,
        )

    @property
    def tiling(self) -> Tiling | None:
        """How its images were cut."""
        return Tiling.of(self.tile, self.overlap)

    @property
    def paths(self) -> Paths:
        """Where and how it was found."""
        return Paths(Path(self.data_root), images=self.images, masks=self.masks)

    @property
    def uncut(self) -> "SourceFolder":
        """The same images whole."""
        return replace(self, tile=None, overlap=None)

    @property
    def parsed_mask_format(self) -> MaskFormat | None:
        """How the masks of the split were read, where that is known."""
        return None if self.mask_format is None else MaskFormat.from_json(self.mask_format)

    @property
    def foreground(self) -> tuple[int, ...] | None:
        """Raw mask values that the user named as foreground."""
        known = self.parsed_mask_format
        return None if known is None else known.foreground

    @property
    def asked(self) -> str:
        """What to type after `dsu cache-features` for the same images, read and cut the same."""
        options = [("images", self.images), ("masks", self.masks), ("tile", self.tile), ("overlap", self.overlap)]
        options += [("foreground", value) for value in self.foreground or ()]
        words = [word for name, value in options if value is not None for word in (f"--{name}", str(value))]
        return shlex.join([self.reference, *words])

    @property
    def place(self) -> str:
        """Where its images were: the data root, or the folder itself."""
        return self.reference if Path(self.reference).is_absolute() else self.data_root

    def splits(self) -> tuple[Split, ...]:
        """All splits of its data set as they are now, uncut. Raises `UsageError` where they are gone."""
        return find_dataset(self.reference, self.paths)

    def find(self) -> Split | None:
        """The split as it is now, or None where its images are gone."""
        try:
            found = self.splits()
        except DsuError:
            return None
        return next((tiled(split, self.tiling) for split in found if split.name == self.split), None)


def _absolute(folder: str, paths: Paths) -> str:
    here = Path(folder).expanduser()
    # realpath, since Path.resolve fails on links that lead round in a circle.
    return os.path.realpath(here if here.is_dir() else paths.data_root.expanduser() / folder)
