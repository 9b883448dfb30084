"""Whether a store is what was written, and of the images that are there: everything is read and hashed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dsu.data.datasets import Pair, SampleMetadata, Split
from dsu.data.images import UnreadableImage, file_sha256, raw_mask, read_image
from dsu.data.tiles import LastUsed
from dsu.errors import DsuError
from dsu.features.stores import FeatureStore, sample_key
from dsu.progress import SILENT, Progress, Task
from dsu_cache import BusyError, CacheError, Entry, Finding, Manifest, audit, audited_nbytes, discard_refuted

__all__ = ["Verification", "verify_store"]

_FORGOTTEN = -1
"""A time of change that no file has: the file is hashed anew by whoever looks at it next."""


@dataclass(frozen=True)
class Verification:
    """What came of verifying a store.

    Attributes:
        path, split, reference: its folder, and which images it is of.
        findings: files of the store that are not as they were written, or are missing.
        changed, new, gone: names of samples whose image or mask is not what its features were made of, of such as
            have no features, and of such as have no image any more.
        source_there: whether the images are there to be compared with.
        nbytes: how much was read.
        marked: how many shards have been made to count as missing.
        unmarked: why they have not been, where they could not be.
        unopenable: why the store cannot be opened, where it cannot.
    """

    path: Path
    split: str = ""
    reference: str = ""
    findings: tuple[Finding, ...] = ()
    changed: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    source_there: bool = False
    nbytes: int = 0
    marked: int = 0
    unmarked: str | None = None
    unopenable: str | None = None

    @property
    def passed(self) -> bool:
        """Whether everything is there, as it was written, and of the images as they are."""
        return not (self.unopenable or self.findings or self.changed or self.new or self.gone)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        findings = []
        for finding in self.findings:
            fields = {**asdict(finding), "file": str(finding.file)}
            del fields["commit"]
            findings.append(fields | {"shard": finding.shard and finding.shard._asdict()})
        return {**asdict(self), "path": str(self.path), "findings": findings, "passed": self.passed}


def verify_store(path: Path, *, mark: bool = True, workers: int = 4, progress: Progress = SILENT) -> Verification:
    """Verify one store: see `dsu.features.upkeep.verify_stores`. What is wrong is in the result, not raised."""
    try:
        store = FeatureStore.open(path)
        source = store.source
    except (DsuError, CacheError) as error:
        return Verification(path, unopenable=str(error))
    split = source.find()
    nbytes = audited_nbytes(store) + (0 if split is None else sum(map(_source_nbytes, store.metadata.values())))
    with progress.task(f"verifying {path.parent.name}", max(1, round(nbytes / 1e6)), "MB") as task:
        advance = _in_megabytes(task)
        findings = tuple(audit(store, advance, workers))
        changed, new, gone = ((), (), ()) if split is None else _compare(store, split, advance, workers)
        advance(0)
    found = Verification(
        path,
        path.parent.name,
        source.asked,
        findings,
        changed,
        new,
        gone,
        source_there=split is not None,
        nbytes=nbytes,
    )
    if not mark:
        return replace(found, unmarked="--keep was given")
    try:
        marked = len(discard_refuted(store, list(findings)))
        _forget_times(store, changed)
    except (BusyError, OSError) as error:
        return replace(found, unmarked=str(error))
    return replace(found, marked=marked)


def _source_nbytes(facts: SampleMetadata) -> int:
    return facts.image_bytes + (facts.mask_bytes or 0)


def _compare(
    store: FeatureStore, split: Split, advance: Callable[[int], None], workers: int
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names of samples that are changed, new and gone."""
    stored = store.metadata
    pairs = {pair.name: pair for pair in split.pairs}

    hashed = LastUsed(file_sha256, most=2 * workers)  # once for all tiles of an image

    def differs(name: str) -> bool:
        facts, pair = stored[name], pairs[name]
        try:
            image = hashed(pair.image)
            mask = None if pair.mask is None else hashed(pair.mask)
        except UnreadableImage:
            return True
        return (image, mask) != (facts.image_sha256, facts.mask_sha256)

    known = [name for name in store.manifest.names if name in pairs]
    changed = []
    with ThreadPoolExecutor(workers, thread_name_prefix="hash") as pool:
        for name, different in zip(known, pool.map(differs, known), strict=True):
            advance(_source_nbytes(stored[name]))
            if different:
                changed.append(name)
    new = sorted(name for name in set(pairs) - set(stored) if _decodes(pairs[name]))
    return tuple(changed), tuple(new), tuple(sorted(set(stored) - set(pairs)))


def _decodes(pair: Pair) -> bool:
    """Whether stage one would take a pair: it skips, and names, what it cannot read."""
    try:
        read_image(pair.image)
        if pair.mask is not None:
            raw_mask(pair.mask)
    except UnreadableImage:
        return False
    return True


def _forget_times(store: FeatureStore, names: tuple[str, ...]) -> None:
    """Let changed files be hashed anew, even where they have kept size and time: by these they are known else."""
    if not names:
        return
    with store.lock():
        entries, stored = dict(store.manifest.entries), store.metadata
        for name in set(names) & set(entries):
            facts = replace(stored[name], image_mtime_ns=_FORGOTTEN)
            entries[name] = Entry(sample_key(facts), facts.to_json())
        manifest = Manifest(entries, store.manifest.rows, store.manifest.next_row)
        if manifest != store.manifest:
            store.set_manifest(manifest)


def _in_megabytes(task: Task) -> Callable[[int], None]:
    """Count bytes, and tell the task of whole megabytes."""
    counted, told = 0, 0

    def advance(nbytes: int) -> None:
        nonlocal counted, told
        counted += nbytes
        if (due := round(counted / 1e6) - told) > 0:
            task.advance(due)
            told += due

    return advance
