"""Measure whole commands: stage one and prediction against what limits them, and eval against pysodmetrics."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dsu.batches import Batch
from dsu.bench.machine import data_sizes, disk_rate, images, ratio, seconds_of, take_turns
from dsu.config import DSUNetConfig
from dsu.data.datasets import Paths, SourceFolder, find_dataset
from dsu.data.images import read_mask
from dsu.data.pairing import Split
from dsu.data.synthetic import draw_dataset
from dsu.data.views import ALL_FLIPS, UNFLIPPED
from dsu.evaluation.evaluate import PredictionPair, evaluate
from dsu.features.extraction import extract, plan_extraction
from dsu.graphs import EAGER_CALLS, GraphRunner
from dsu.metrics.meters import Meters
from dsu.network.network import DSUNet, DSUNetOutput, default_encoder_batch_size
from dsu.network.resume import earliest, feature_shape
from dsu.prediction.inference import Predictor
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
class CommandRow:
    """A command and its upper bounds.

    Attributes:
        features: what `cache-features` stores in addition to pixels and mask: V in all views, Hiera's features in one;
            empty for `predict --end-to-end`.
        count: number of views that are encoded, or of images that are predicted: the unit of the rates.
        rate: per second, with decoding and writing.
        network: per second for the network alone, on batches that are ready on the device.
        host: per second with a network that takes no time: decoding, copying and writing alone.
        nbytes: bytes written to the store; 0 for `predict`.
        disk: bytes per second for plain files of the same sizes, written by as many threads and each flushed once; None
            for `predict`.
    """

    features: tuple[str, ...]
    count: int
    rate: float
    network: float
    host: float
    nbytes: int = 0
    disk: float | None = None

    @property
    def written(self) -> float:
        """Bytes per second written to the store."""
        return self.nbytes * self.rate / self.count


@dataclass(frozen=True)
class StageRow:
    """Stage one and prediction over the same images.

    Attributes:
        images: number of synthetic images, of the benchmarks' usual size.
        mixes: stage one with its default features (V in four views), and with V only (on a CPU in one view, to save
            time).
        prediction: `predict --end-to-end`.
    """

    images: int
    mixes: tuple[CommandRow, ...]
    prediction: CommandRow


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


class _InstantNetwork(DSUNet):
    """A network that takes no time: it returns random numbers of the right shapes."""

    def __init__(self, config: DSUNetConfig) -> None:
        with torch.device("meta"):  # its weights are never used
            super().__init__(config, None, None, feature_dtype=torch.float16)
        self._random = cache(torch.randn)

    def encode(
        self, pixel_values: Tensor | None, guide_values: Tensor | None, names: Collection[str]
    ) -> dict[str, Tensor]:
        """See `DSUNet.encode`."""
        given = pixel_values if guide_values is None else guide_values
        assert given is not None
        shapes = {name: (len(given), *feature_shape(self.config, name)) for name in names}
        return {
            name: self._random(shape, dtype=torch.float16, device=given.device).clone()
            for name, shape in shapes.items()
        }

    def forward(self, pixel_values: Tensor | None = None, *_: object, **__: object) -> DSUNetOutput:
        """See `DSUNet.forward`; the logits are as smooth as real ones, which matters for the masks' compression."""
        assert pixel_values is not None
        coarse = self._random((len(pixel_values), 1, *(self.config.level_grid(4),) * 2), device=pixel_values.device)
        return DSUNetOutput((functional.interpolate(4 * coarse, pixel_values.shape[-2:], mode="bilinear"),))


def measure_stages(network: DSUNet, runtime: Runtime, count: int, below: Path, progress: Progress = SILENT) -> StageRow:
    """Run stage one and prediction over `count` synthetic images, in a temporary folder below `below`."""
    below.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".bench-", dir=below) as folder:
        split, source = _draw_split(Path(folder) / "data", count, progress)
        bare = _encoder_rates(network, runtime, default_encoder_batch_size(runtime.device), count, progress)
        instant = _InstantNetwork(network.config).eval()

        def stage_one(features: tuple[str, ...], computed_by: DSUNet) -> tuple[int, float, list[int]]:
            """Number of views, views per second, and the sizes of the written files."""
            short = features == GUIDE_ONLY and runtime.device.type == "cpu"
            settings = ExtractionSettings(features=features, views=UNFLIPPED if short else ALL_FLIPS)
            with TemporaryDirectory(dir=folder) as root:
                plan = plan_extraction(
                    split,
                    source,
                    network.config,
                    settings,
                    runtime,
                    {"hiera": "bench", "dino": "bench"},
                    Path(root),
                    weights=EncoderWeights(),
                )
                seconds = seconds_of(partial(extract, plan, computed_by, runtime, progress))
                return plan.encodings, plan.encodings / seconds, data_sizes(plan.store)

        mixes = []
        for features, alone in bare.items():
            views, rate, sizes = stage_one(features, network)
            _, host, _ = stage_one(features, instant)
            mixes.append(CommandRow(features, views, rate, alone, host, sum(sizes), disk_rate(sizes, below)))

        def prediction(computed_by: DSUNet) -> float:
            """Images per second."""
            with TemporaryDirectory(dir=folder) as masks:
                targets = tuple(Target(pair.name, pair.image, Path(masks) / f"{pair.name}.png") for pair in split.pairs)
                job = Job("drawn", targets, "none", None, None, earliest(network.config))
                outcome = Outcome(Path(masks))
                arguments = job, targets, PredictionSettings(), runtime, outcome, progress
                return count / seconds_of(partial(predict_job, computed_by, *arguments))

        alone = _network_rate(network, runtime, count, progress)
        return StageRow(count, tuple(mixes), CommandRow((), count, prediction(network), alone, prediction(instant)))


def _draw_split(folder: Path, count: int, progress: Progress) -> tuple[Split, SourceFolder]:
    """A training split of `count` synthetic images."""
    draw_dataset(folder, train=min(count, DRAWN), test=1, sizes=SIZES, progress=progress)
    for index in range(DRAWN, count):
        for kind, ending in (("images", "jpg"), ("masks", "png")):
            drawn = folder / "train" / kind
            content = (drawn / f"{index % DRAWN:04}.{ending}").read_bytes()
            # The same pixels, but another file: a store contains equal files once.
            (drawn / f"{index:04}.{ending}").write_bytes(content + str(index).encode())
    split = next(split for split in find_dataset(str(folder), Paths(folder)) if split.kind == "train")
    return split, SourceFolder.of(split, str(folder), Paths(folder))


def _network_rate(network: DSUNet, runtime: Runtime, count: int, progress: Progress) -> float:
    """Images per second of the whole network, as in prediction, on batches ready on the device."""
    size = min(PredictionSettings().batch_size, count)
    batch = images(network.config, size, dino=True).to(runtime.device)
    predictor = Predictor(network, runtime, earliest(network.config))
    repeat, label = max(count // size, 1), "network alone"
    with progress.task(label, repeat * size, "images") as task:
        for _ in range(1 if runtime.device.type == "cpu" else EAGER_CALLS + 1):
            predictor(batch)
        seconds = seconds_of(partial(predictor, batch), runtime.device, repeat)
        task.advance(repeat * size)
    if predictor.refusal:
        progress.say(label + predictor.refusal)
    return size / seconds


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
        if graphs.refusal:
            progress.say(label + graphs.remark)
        return seconds_of(encode_all, runtime.device)

    label = "encoders alone"
    with progress.task(label, 2 * count, "views") as task:
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
