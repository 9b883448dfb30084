"""Stage one: run what is frozen, once, and store it."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from dsu.batches import Batch, prefetch
from dsu.choices import Precision
from dsu.config import PRESETS, DSUNetConfig
from dsu.data.datasets import Paths, SourceFolder, describe, find_dataset
from dsu.data.tiles import Tiling, tiled
from dsu.data.views import FLIPPED_WHEN_READ, augmentation_of
from dsu.datasets import ImageDataset
from dsu.encoders.weights import EncoderWeights, MissingWeightsError, load_encoders
from dsu.errors import DsuError
from dsu.features.extraction_plan import ExtractionPlan, plan_extraction
from dsu.features.stores import find_stores, store_path
from dsu.features.writing import writing
from dsu.graphs import GraphRunner
from dsu.network.network import DSUNet
from dsu.network.resume import check_features, guide_names
from dsu.progress import SILENT, Progress
from dsu.runtime import Runtime, choose_runtime, torch_type
from dsu.settings import ExtractionSettings

__all__ = ["CachePlan", "cache_features", "extract"]


@dataclass(frozen=True)
class CachePlan:
    """All splits' work, shown before it starts."""

    splits: tuple[ExtractionPlan, ...]
    runtime: Runtime
    free_bytes: int

    @property
    def skipped(self) -> list[tuple[Path, str]]:
        """Files that pair but can't be decoded, and why."""
        return [file for split in self.splits for file in split.inspection.undecodable]


def cache_features(
    dataset: str,
    config: DSUNetConfig,
    settings: ExtractionSettings,
    weights: EncoderWeights,
    *,
    paths: Paths,
    tiling: Tiling | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    before: Callable[[CachePlan], None] = lambda plan: None,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> CachePlan:
    """Stage one for all splits that a data set has, from its images to its stores.

    Args:
        dataset: a benchmark's name or a folder.
        config: encoders and input sizes (its depth of adaptation does not matter).
        settings: what is stored.
        weights: where the encoders' weights come from.
        paths: where images lie and stores go.
        tiling: how images are cut; None keeps them whole.
        device, precision: see `choose_runtime`.
        before: called with the plan once everything is known and nothing has been computed.
        dry_run: stop there.
        progress: who is told.

    Raises `DsuError` or `CacheError` before any work where something does not fit.
    """
    check_features(config, settings.features)
    splits = [
        (SourceFolder.of(split, dataset, paths, tiling), tiled(split, tiling)) for split in find_dataset(dataset, paths)
    ]
    runtime = choose_runtime(device, precision)

    def plan_all(digests: Mapping[str, str], root: Path) -> CachePlan:
        plans = []
        for source, split in splits:
            plans.append(
                plan_extraction(
                    split, source, config, settings, runtime, digests, root, progress, random=weights.random
                )
            )
            for line in describe(split, plans[-1].inspection):
                progress.say(line)
        plan = CachePlan(tuple(plans), runtime, _free_bytes(plans, paths.cache_root))
        before(plan)
        return plan

    if dry_run and not any(store_path(paths.cache_root, split.name, config).exists() for _, split in splits):
        # Nothing is stored that could disagree, so no weights are wanted to say how much there is to do.
        with TemporaryDirectory(prefix="dsu-dry-run-") as folder:
            return plan_all(dict.fromkeys(("hiera", "dino"), "not loaded"), Path(folder))
    maps = set(settings.features) & set(guide_names(config))
    try:
        hiera, dino, digests = load_encoders(
            config, weights, hiera=bool(set(settings.features) - maps), dino=bool(maps)
        )
    except MissingWeightsError as error:
        raise MissingWeightsError(f"{str(error).rstrip('.')}{_stored_otherwise(dataset, paths.cache_root)}.") from error
    plan = plan_all(digests, paths.cache_root)
    if dry_run:
        return plan
    network = DSUNet(config, hiera, dino, feature_dtype=torch_type(settings.feature_dtype)).eval()
    runtime.place(network)
    for work in plan.splits:
        extract(work, network, runtime, progress)
    return plan


def extract(plan: ExtractionPlan, network: DSUNet, runtime: Runtime, progress: Progress = SILENT) -> None:
    """Decode, encode and write what a split's store is missing, the three overlapping, a shard at a time.

    A shard that is finished stays finished, whatever happens to the next one. Raises `DsuError` naming the sample
    when a value is not finite or does not fit the stored type, or when the disk is full.
    """
    network.encoder_batch_size = plan.encoder_batch_size
    _Extraction(plan, network, runtime).run(progress)


def _stored_otherwise(dataset: str, cache_root: Path) -> str:
    """With which presets the features of a data set are stored already, as a clause."""
    presets = sorted({store.path.name for store in find_stores(cache_root, dataset, None)} & set(PRESETS))
    return (
        f"; features of {dataset} are stored already with --preset {' and --preset '.join(presets)}" if presets else ""
    )


def _free_bytes(plans: Sequence[ExtractionPlan], cache_root: Path) -> int:
    """Free bytes under the cache root. Raises `DsuError` with the leaner options when they do not suffice."""
    needed = sum(sum(plan.bytes_by_array.values()) for plan in plans)
    existing = next(folder for folder in (cache_root, *cache_root.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DsuError(
            f"The features need {needed / 1e9:.1f} GB, but {existing} has {free / 1e9:.1f} GB free: leave Hiera's "
            f"levels out (--features V), keep fewer views (--views none, --level-views none), compress (--compressor "
            f"zstd) or give another --cache-root."
        )
    return free


@dataclass(frozen=True)
class _Extraction:
    """One split's plan being carried out."""

    plan: ExtractionPlan
    network: DSUNet
    runtime: Runtime
    _graphs: dict[tuple[str, ...], GraphRunner] = field(default_factory=dict)
    """By the features that are encoded together."""

    def run(self, progress: Progress = SILENT) -> None:
        """See `extract`."""
        if not self.plan.todo:
            return
        with (
            self.plan.store.lock(),
            progress.task(f"encoding {self.plan.split.name}", self.plan.encodings, "views") as task,
            writing(self.plan.store) as writer,
        ):
            for shard, extra, names, batch in self._decoded():
                for view in sorted({view for _, view in self.plan.todo[shard] if augmentation_of(view) == extra}):
                    arrays = [name for name, wanted in self.plan.todo[shard] if wanted == view]
                    for name, parts in self._encode(batch, names, arrays, view, task.advance).items():
                        writer.put(name, view, shard, names, parts)

    def _decoded(self) -> Iterator[tuple[int, int, list[str], Batch]]:
        """Each shard in each augmentation (0: the images as they are), with its samples, decoded one shard ahead."""
        _, dino = self.plan.needs
        inspection, store = self.plan.inspection, self.plan.store
        samples = ImageDataset(
            self.plan.split,
            self.network.config,
            metadata=inspection.facts,
            mask_format=inspection.mask_format,
            guide=dino,
        )
        wanted = [
            (shard, extra, [store.manifest.names_at(int(row))[0] for row in store.rows_in_shard(shard)])
            for shard, todo in sorted(self.plan.todo.items())
            for extra in sorted({augmentation_of(view) for _, view in todo})
        ]

        def decode(extra: int, names: list[str]) -> Batch:
            batch = samples.read(names, [4 * extra] * len(names))
            return batch.pinned() if self.runtime.device.type == "cuda" else batch

        work = (partial(decode, extra, names) for _, extra, names in wanted)
        for (shard, extra, names), batch in zip(wanted, prefetch(work, ahead=1), strict=True):
            yield shard, extra, names, batch

    def _encode(
        self, batch: Batch, names: list[str], arrays: list[str], view: int, advance: Callable[[int], None]
    ) -> dict[str, list[Tensor]]:
        """The named arrays of one shard in one view, (rows, *item) each, in parts that are still on the device.

        Nothing here waits for a GPU: what has been queued is fetched by the threads that write.
        """
        found: dict[str, list[Tensor]] = {name: [getattr(batch, name)] for name in FLIPPED_WHEN_READ if name in arrays}
        encoded = [name for name in arrays if name not in found]
        if not encoded:
            advance(len(names))
            return found
        found |= {name: [] for name in encoded}
        size = self.plan.encoder_batch_size
        graphs = self._graphs.setdefault(tuple(encoded), GraphRunner.on(self.runtime.device))

        def encode(part: Batch) -> dict[str, Tensor]:
            inputs = part.flipped().inputs
            with self.runtime.autocast():
                return self.network.encode(inputs["pixel_values"], inputs["guide_values"], encoded)

        for start in range(0, len(names), size):
            part = batch.part(start, start + size, view).to(self.runtime.device)
            for name, tensor in graphs.run(encode, part).items():
                found[name].append(tensor)
            advance(len(part.names))
        return found
