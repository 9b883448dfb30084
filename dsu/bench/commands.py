"""Measure whole commands: stage one and prediction against what limits them, and eval against pysodmetrics."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from PIL import Image
from torch import Tensor

from dsu.batches import Batch
from dsu.bench.machine import disk_rate, file_sizes, images, ratio, seconds_of, take_turns
from dsu.data.datasets import Paths, SourceFolder, find_dataset
from dsu.data.images import read_mask
from dsu.data.synthetic import draw_dataset
from dsu.data.views import ALL_FLIPS, UNFLIPPED
from dsu.evaluation.evaluate import PredictionPair, evaluate
from dsu.features.extraction import extract, plan_extraction
from dsu.graphs import EAGER_CALLS, GraphRunner
from dsu.metrics.meters import Meters
from dsu.network.network import DSUNet, default_encoder_batch_size
from dsu.network.resume import earliest
from dsu.prediction.predict import predict_job
from dsu.prediction.targets import Job, Target
from dsu.prediction.writing import Outcome
from dsu.progress import SILENT, Progress
from dsu.runtime import Runtime
from dsu.settings import EncoderWeights, ExtractionSettings, PredictionSettings

SIZES: Final = (300, 400)
"""Typical sides of the benchmarks' images, in pixels."""
DRAWN: Final = 64
"""Number of different images; further images are copies."""
GUIDE_ONLY: Final = ("V",)
"""The features of `--features V`, in addition to pixels and mask."""


@dataclass(frozen=True)
class MixRow:
    """Stage one of a training split, and its upper bounds.

    Attributes:
        features: the features stored in addition to pixels and mask: V in all views, Hiera's features in one.
        views: total number of encoded views, the unit of the rates.
        bare: views per second of the encoders alone, for the same features, on batches that are ready on the device.
        stage_one: views per second of `cache-features`: decoding, encoders, writing.
        nbytes: bytes written.
        disk: bytes per second when writing plain files of the same sizes with as many threads, each flushed once.
    """

    features: tuple[str, ...]
    views: int
    bare: float
    stage_one: float
    nbytes: int
    disk: float

    @property
    def written(self) -> float:
        """Bytes per second written by `cache-features`."""
        return self.nbytes * self.stage_one / self.views


@dataclass(frozen=True)
class StageRow:
    """Stage one and prediction over the same images.

    Attributes:
        images: number of synthetic images, of the benchmarks' usual size.
        mixes: stage one with its default features (V in four views), and with V only (on a CPU in one view, to save
            time).
        prediction: images per second of `predict --end-to-end`: decoding, the whole network, writing.
    """

    images: int
    mixes: tuple[MixRow, ...]
    prediction: float


@dataclass(frozen=True)
class EvalRow:
    """`eval` compared with a loop over pysodmetrics.

    Attributes:
        images, workers: number of images and of processes.
        library, ours: images per second.
        speedup: the median over rounds of each round's ratio.
        same: whether all metrics are bit-identical.
    """

    images: int
    workers: int
    library: float
    ours: float
    speedup: float
    same: bool


def measure_stages(network: DSUNet, runtime: Runtime, count: int, below: Path, progress: Progress = SILENT) -> StageRow:
    """Run stage one and prediction over `count` synthetic images, in a temporary folder below `below`."""
    below.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".bench-", dir=below) as folder:
        data = Path(folder) / "data"
        draw_dataset(data, train=min(count, DRAWN), test=1, sizes=SIZES, progress=progress)
        for index in range(DRAWN, count):
            for kind, ending in (("images", "jpg"), ("masks", "png")):
                below_data = data / "train" / kind
                shutil.copy(below_data / f"{index % DRAWN:04}.{ending}", below_data / f"{index:04}.{ending}")
        split = next(split for split in find_dataset(str(data), Paths(data)) if split.kind == "train")
        source = SourceFolder.of(split, str(data), Paths(data))
        bare = _encoder_rates(network, runtime, default_encoder_batch_size(runtime.device), count, progress)
        mixes = []
        for features, rate in bare.items():
            short = features == GUIDE_ONLY and runtime.device.type == "cpu"
            settings = ExtractionSettings(features=features, views=UNFLIPPED if short else ALL_FLIPS)
            digests, root = {"hiera": "bench", "dino": "bench"}, Path(folder) / "-".join(features)
            plan = plan_extraction(
                split, source, network.config, settings, runtime, digests, root, weights=EncoderWeights()
            )
            stage_one = plan.encodings / seconds_of(partial(extract, plan, network, runtime, progress))
            sizes = file_sizes(plan.store)
            mixes.append(MixRow(features, plan.encodings, rate, stage_one, sum(sizes), disk_rate(sizes, below)))
        masks = Path(folder) / "masks"
        masks.mkdir()
        targets = tuple(Target(pair.name, pair.image, masks / f"{pair.name}.png") for pair in split.pairs)
        job = Job("drawn", targets, "none", None, None, earliest(network.config))
        predict = partial(predict_job, network, job, targets, PredictionSettings(), runtime, Outcome(masks), progress)
        return StageRow(count, tuple(mixes), count / seconds_of(predict))


def _encoder_rates(
    network: DSUNet, runtime: Runtime, size: int, count: int, progress: Progress
) -> dict[tuple[str, ...], float]:
    """Views per second of the encoders for each set of features, as in stage one, on batches ready on the device."""
    batch = images(network.config, size, dino=True).to(runtime.device)

    def seconds(features: Sequence[str]) -> float:
        graphs = GraphRunner.on(runtime.device)

        def encode(part: Batch) -> dict[str, Tensor]:
            with runtime.autocast():
                return network.encode(part.inputs["pixel_values"], part.inputs["guide_values"], features)

        def encode_all() -> None:
            for start in range(0, count, size):
                graphs.run(encode, batch.part(0, min(size, count - start)))
                task.advance(min(size, count - start))

        for _ in range(1 if runtime.device.type == "cpu" else EAGER_CALLS + 1):
            graphs.run(encode, batch)
        return seconds_of(encode_all, runtime.device)

    with progress.task("encoders alone", 2 * count, "views") as task:
        whole, maps = seconds(usual := ExtractionSettings().features), seconds(GUIDE_ONLY)
    # Only the first of four views has Hiera's features; the others take as long as views of V only.
    return {usual: 4 * count / (whole + 3 * maps), GUIDE_ONLY: count / maps}


def measure_eval(runtime: Runtime, count: int, times: int, rounds: int, progress: Progress = SILENT) -> EvalRow:
    """Evaluate blurred masks as predictions with both programs; each of `count` images counts `times` times."""
    with TemporaryDirectory(prefix="dsu-bench-") as folder:
        draw_dataset(Path(folder), train=count, test=1, sizes=SIZES, progress=progress)
        predictions = Path(folder) / "predictions"
        predictions.mkdir()
        cases = []
        for truth in sorted((Path(folder) / "train" / "masks").iterdir()):
            case = PredictionPair(truth.stem, predictions / f"{truth.stem}.png", truth)
            with Image.open(truth) as mask:
                small = mask.convert("L").resize((24, 24), Image.Resampling.BILINEAR)
                small.resize(mask.size, Image.Resampling.BILINEAR).save(case.prediction)
            cases += [replace(case, name=f"{case.name}-{turn}") for turn in range(times)]
        figures: dict[str, dict[str, float]] = {}

        def library() -> None:
            meters = Meters()
            for case in cases:
                meters.step(read_mask(case.prediction), read_mask(case.truth), normalize=True)
            figures["library"] = meters.averages()

        def ours() -> None:
            figures["ours"] = evaluate(cases).metrics

        timings = take_turns({"library": library, "ours": ours}, rounds, runtime, progress)
    return EvalRow(
        len(cases),
        os.cpu_count() or 1,
        len(cases) / timings["library"].median,
        len(cases) / timings["ours"].median,
        ratio(timings["ours"], timings["library"]),
        figures["library"] == figures["ours"],
    )
