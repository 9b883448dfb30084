"""Which benchmarks lie below a data root, where, how complete, and where each can be had."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsu.data.benchmarks import BENCHMARK_SPLITS, COD_TRAIN, PAGES, BenchmarkSplit
from dsu.data.datasets import find_benchmark
from dsu.data.pairing import Split
from dsu.errors import UsageError

__all__ = ["SplitState", "survey"]


@dataclass(frozen=True)
class SplitState:
    """A benchmark's split as it is below a data root.

    Attributes:
        sought: the split, with its official number of pairs.
        found: what is there; None where nothing is.
        problem: why a folder of its name cannot be read as the split.
    """

    sought: BenchmarkSplit
    found: Split | None = None
    problem: str | None = None

    @property
    def page(self) -> str:
        """Where its authors publish it."""
        return PAGES[self.sought.dataset]

    @property
    def pairs(self) -> int:
        """How many pairs of image and mask are there."""
        return len(self.found.pairs) if self.found else 0

    @property
    def complete(self) -> bool:
        """Whether exactly the official pairs are there, by their number."""
        return self.pairs == self.sought.official_count

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = self.found
        return {
            "split": self.sought.name,
            "dataset": self.sought.dataset,
            "kind": self.sought.kind,
            "pairs": self.pairs,
            "official": self.sought.official_count,
            "complete": self.complete,
            "images": str(found.images) if found else None,
            "masks": str(found.masks) if found and found.masks else None,
            "images_without_mask": len(found.images_without_mask) if found else 0,
            "masks_without_image": len(found.masks_without_image) if found else 0,
            "problem": self.problem,
            "page": self.page,
        }


def survey(data_root: Path) -> list[SplitState]:
    """The state of every benchmark's splits below `data_root`, those that are not there too; no image is opened."""
    states = []
    for dataset in PAGES:
        wanted = [split for split in (*BENCHMARK_SPLITS, COD_TRAIN) if split.dataset == dataset]
        problem, found = None, {}
        try:
            found = {split.name: split for split in find_benchmark(dataset, data_root)}
        except UsageError as error:
            problem = str(error)
        states += [SplitState(split, found.get(split.name), problem) for split in wanted]
    return states
