"""Predicted maps against ground truth: the paper's metrics (its section IV-B), computed by pysodmetrics.

All formulas are the library's. The metrics:

* S: structure measure, alpha 0.5 (arXiv 1708.00786).
* F_adaptive, F_mean, F_max: F-measure, beta^2 0.3 (Achanta et al., CVPR 2009). The adaptive threshold is twice
  the map's mean, at most 1. Mean and max are taken from the curve over 256 thresholds, after averaging it over
  images.
* F_weighted: weighted F-measure, beta^2 1 (Margolin et al., CVPR 2014).
* E_adaptive, E_mean, E_max: enhanced alignment measure, same thresholds (arXiv 1805.10421).
* MAE: mean absolute error (Perazzi et al., CVPR 2012), the only metric where lower is better.
* IoU, Dice: with pixels above 0.5 as foreground (8-bit values from 128), averaged over images.

Conventions. A ground truth is foreground above 128 (label maps: where not 0). With `normalize`, each map is
min-max normalised (a constant map stays as it is); without, a map is v / 255. Adaptive metrics and curves count
pixels `>=` the threshold; curves use the map truncated to 8 bits. All toolboxes treat an all-black map as all
foreground in F_adaptive and E_adaptive, because its adaptive threshold is 0; so do we. Two oddities are corrected:
E divides by the number of pixels minus one, so a perfect map scores just over 1, and a map of one pixel 3e14; here an
image's E is at most 1. S of an object within the last row or column is NaN in the library, and so is the set's.

A ground truth without a foreground pixel is legal. Its S is 1 - mean(map), its MAE mean(map), and its E the share of
background pixels: S, E_mean, E_max and MAE are meaningful if maps are not normalised. But F, IoU and Dice are 0 for any
prediction, and E_adaptive is 0 for the perfect, all-black map. Sets with such images therefore also get
`object_metrics`, the same metrics over images with an object, and `image_level`: false alarms, misses and AUROC (see
`dsu.metrics.image_level`).

Compared with the MATLAB toolboxes, on real maps (reference values are in the tests):

* S, MAE, adaptive F and E, and the SOD toolbox's precision, recall and IoU curves agree to 1e-12.
* The SOD toolbox's F curve is the F of the averaged precision and recall; pysodmetrics, like the COD toolbox, averages
  the images' F. On PiCANet's 300 maps, max F is 0.853 and 0.811, respectively.
* Rounding moves 14 of the COD toolbox's 256 thresholds, `1:-1/255:0`, just above the grey value that they should equal:
    max F differs by 1.0e-5, mean F by 7.5e-7. Its E curve counts values `>` instead of `>=` the threshold: it begins
    with the empty map where ours ends with the full one, and mean E differs by 1.2e-5.
* Its weighted F differs by 1.2e-10, which single-precision distances would explain.
"""

import os
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.data.datasets import Paths, find_samples
from dsu.data.images import grey_levels, image_head, raw_mask
from dsu.data.masks import MaskFacts, MaskFormat, choose_mask_format, examine_mask, is_photograph
from dsu.data.pairing import Pair, make_split, named_images, pair_names
from dsu.distributed import ALONE, World
from dsu.errors import DsuError, UsageError
from dsu.metrics.figures import IMAGE_LEVEL, MINMAX
from dsu.metrics.image_level import ImageLevel
from dsu.progress import SILENT, Progress
from dsu.thresholds import DEFAULT_THRESHOLD, level_of

if TYPE_CHECKING:
    from dsu.metrics.meters import Meters

_CHUNK: Final = 8
_ROUND: Final = 16
"""Chunks of each process between two exchanges of results: few, since curves take 12 KB per image."""
# Starting a process takes about as long as measuring this many images.
_IMAGES_WORTH_A_PROCESS: Final = 64


@dataclass(frozen=True)
class PredictionPair:
    """One predicted map and its ground truth, called `name` in errors and per-image tables.

    `image` is the segmented image, if known: it is only shown in reports.
    """

    name: str
    prediction: Path
    truth: Path
    image: Path | None = None


def truths_in(truth: str | Path, paths: Paths) -> list[Pair]:
    """The samples of a data set, or one for each mask of a folder of masks.

    A folder in which some files have no mask next to them is a folder of masks.
    """
    splits = find_samples(truth, paths)
    if any(split.masks == split.images and split.images_without_mask for split in splits):
        splits = (make_split("", "", "all", Path(truth), None),)
    return [pair for split in splits for pair in split.pairs]


def match(predictions: Path, samples: Sequence[Pair]) -> tuple[list[PredictionPair], list[str], list[str]]:
    """Pair a folder of predictions with samples and their masks, by the same rule as in training.

    Args:
        predictions: A folder of maps, subfolders included.
        samples: Each with its mask, or with a mask in place of its image, see `truths_in`.

    Returns:
        The pairs, in the order of `samples`; the names of ground truths without a prediction; the names of
        predictions without a ground truth.

    Raises:
        UsageError: The folder is missing or has no images.
        DsuError: Two predictions differ in their endings only.
    """
    files = named_images(predictions)
    found = pair_names([(sample.name,) for sample in samples], files)
    pairs = [
        PredictionPair(sample.name, files[name], sample.mask or sample.image, sample.image if sample.mask else None)
        for sample, name in zip(samples, found, strict=True)
        if name is not None
    ]
    missing = [sample.name for sample, name in zip(samples, found, strict=True) if name is None]
    used = set(found)
    return pairs, missing, [name for name in files if name not in used]


def read_pair(
    pair: PredictionPair, mask_format: MaskFormat, *, resize: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read one pair, prediction and ground truth, both uint8 (H, W) of the ground truth's size.

    A prediction of its image's size is resized to its mask, if that has another size of the same proportions.

    Raises:
        DsuError: A file cannot be read, a prediction has colours, sizes differ without `resize`, one of the two is
            rotated, or a ground truth has other proportions than its image.
    """
    prediction = _read_map(pair.prediction)
    head = None if pair.image is None else image_head(pair.image)
    truth = mask_format.read(pair.truth, image=head)
    if prediction.shape == truth.shape:
        return prediction, truth
    height, width = truth.shape
    sizes = (
        f"the prediction {pair.prediction} has {prediction.shape[1]}x{prediction.shape[0]} pixels and its ground "
        f"truth {pair.truth} {width}x{height}"
    )
    if prediction.shape == truth.shape[::-1]:
        raise DsuError(f"{sizes}, so one of them is rotated: rotate it back.")
    if not resize and (head is None or head.size != prediction.shape[::-1]):
        raise DsuError(f"{sizes}: predict at the images' own size, or resize predictions to their masks with --resize.")
    resized = Image.fromarray(prediction).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized), truth


def _read_map(path: Path) -> NDArray[np.uint8]:
    """A predicted map (H, W), uint8; for a cutout its opacity. Raises `DsuError` for a colour image."""
    values, kind = raw_mask(path)
    if kind in ("indices", "colours"):
        raise DsuError(f"the prediction {path} is a colour image, not a map: predict with --kind mask.")
    if kind == "deep":
        _check_probabilities(path)
    return grey_levels(values, kind)


def _check_probabilities(path: Path) -> None:
    """Raise `DsuError` for a map of floats outside [0, 1]; 16-bit integers are accepted."""
    with Image.open(path) as image:
        if image.mode != "F":
            return
        values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # also for NaN
        raise DsuError(
            f"the prediction {path} contains floats from {low:.4g} to {high:.4g}: save probabilities from 0 to 1, or "
            "an 8-bit image."
        )


@dataclass(frozen=True)
class Evaluation:
    """The scores of one set.

    Attributes:
        metrics: The set's score for each of `METRICS`, in that order.
        images: Number of evaluated images.
        per_image: One row per image, in the order given: its "name", the metrics that exist for a single image, its
            "response" in [0, 1] and whether its ground truth is "empty".
        curves: Precision, recall, F and E, each (256,), averaged over images; entry k counts pixels of at least
            255 - k as foreground.
        conventions: How the scores were computed, in words.
        pairs: The evaluated predictions with their ground truths.
        normalize: Whether each map was min-max normalised first.
        mask_format: How the ground truths were read.
        object_metrics: `METRICS` over the images with an object only; empty if no image has one.
        image_level: The images' responses, and metrics of whole images.
        levels: Number of pixels outside and inside objects by 8-bit value, not normalised, int64 (2, 256).
        missing: Number of the set's ground truths without a prediction, which no score includes.
        trained_on: Number of images that the head was trained on.
    """

    metrics: dict[str, float]
    images: int
    per_image: list[dict[str, str | float]]
    curves: dict[str, NDArray[np.float64]]
    conventions: dict[str, str]
    pairs: tuple[PredictionPair, ...]
    normalize: bool
    mask_format: MaskFormat
    object_metrics: dict[str, float]
    image_level: ImageLevel
    levels: NDArray[np.int64]
    missing: int = 0
    trained_on: int = 0

    @property
    def faint(self) -> str:
        """Why IoU and Dice are close to zero although the maps may be good, in words; empty if they are not."""
        objects = int(self.levels[1].sum())
        above = int(self.levels[1, level_of(DEFAULT_THRESHOLD) :].sum())
        if self.normalize or "predicted" in self.conventions or not objects or above > 0.05 * objects:
            return ""
        return (
            f"IoU and Dice count pixels above {DEFAULT_THRESHOLD}, which only {100 * above / objects:.1f} % of the "
            "objects' pixels reach: the maps are faint; if S and AUROC are good, use a lower threshold"
        )


def evaluate(
    images: Iterable[PredictionPair],
    *,
    normalize: bool = True,
    resize: bool = False,
    mask_format: MaskFormat | None = None,
    foreground: Sequence[int] | None = None,
    workers: int | None = None,
    progress: Progress = SILENT,
    world: World = ALONE,
) -> Evaluation:
    """Score predictions against ground truths in several processes; all digits equal those of one process.

    Args:
        images: Pairs of 8-bit grey images (H, W), maps and masks.
        normalize: Min-max normalise each map first (the benchmarks' convention, and pysodmetrics' default). This
            turns noise of 1/255 into a full-range map, so leave it off for images without an object.
        resize: Resize maps of another size to their mask's, bilinearly (Pillow's, with a low-pass filter when it
            shrinks), instead of refusing them.
        mask_format: How to read the ground truths; None examines all of them first, because label maps of 0 and 1
            look like masks without an object.
        foreground: Raw values of the ground truths that are foreground, if the user gave them.
        workers: Processes; by default up to one per core, fewer for few images; 1 uses this process. A script that
            asks for more needs the usual `if __name__ == "__main__":`.
        progress: Receives every evaluated image.
        world: Processes that divide the images; each has as many workers, and returns the scores of all images.

    Raises:
        UsageError: No images, fewer than one worker, or an unclear foreground in the ground truths.
        DsuError: A file cannot be read, or the sizes of a pair differ without `resize`.

    Example:
        >>> pairs, missing, extra = match(Path("predictions/ECSSD"), truths_in("ECSSD", Paths()))
        >>> evaluate(pairs).metrics["S"]
        0.953
    """
    from dsu.metrics.meters import Totals  # slow to load, and not needed to report a mistake

    images = list(images)
    workers = _workers(workers, len(images), world)
    chunks = [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]
    totals = Totals()
    with _mapping(workers, world) as map_chunks:
        mask_format = mask_format or choose_mask_format(
            list(chain.from_iterable(map_chunks(partial(_examine, opaque=foreground is not None), chunks))), foreground
        )
        measure = partial(_measure, normalize=normalize, resize=resize, mask_format=mask_format)
        with progress.task("evaluating", total=len(images)) as task:
            for chunk, measured in zip(chunks, map_chunks(measure, chunks), strict=True):
                totals.add(measured)
                task.advance(len(chunk))
    level = totals.image_level
    return Evaluation(
        metrics=totals.averages(),
        images=len(images),
        per_image=totals.per_image([image.name for image in images]),
        curves=totals.curves(),
        conventions=_conventions(normalize, resize, mask_format, level),
        pairs=tuple(images),
        normalize=normalize,
        mask_format=mask_format,
        object_metrics=totals.averages(with_object=True) if level.with_object else {},
        image_level=level,
        levels=totals.levels,
    )


def _examine(images: Sequence[PredictionPair], *, opaque: bool) -> list[MaskFacts]:
    """Examine the ground truths. Raises `DsuError` for a photograph."""
    facts = [examine_mask(image.truth, opaque=opaque) for image in images]
    for image, found in zip(images, facts, strict=True):
        if found.values is None and not opaque and is_photograph(raw_mask(image.truth)[0]):
            raise DsuError(
                f"the ground truth {image.truth} is a photograph, not a mask: give the mask folder with --truth, or "
                "the object's values with --foreground."
            )
    return facts


def _measure(images: Sequence[PredictionPair], *, normalize: bool, resize: bool, mask_format: MaskFormat) -> "Meters":
    from dsu.metrics.meters import Meters

    meters = Meters()
    for image in images:
        meters.step(*read_pair(image, mask_format, resize=resize), normalize=normalize)
    return meters


def _workers(asked: int | None, images: int, world: World) -> int:
    if not images:
        raise UsageError("nothing to evaluate: no prediction has a ground truth of the same name.")
    if asked is not None and asked < 1:
        raise UsageError(f"There can't be {asked} workers: give 1 or more.")
    machines = world.all_gather(platform.node())
    cores = (os.cpu_count() or 1) // machines.count(machines[world.rank])
    enough = -(-images // world.size // (_IMAGES_WORTH_A_PROCESS if asked is None else _CHUNK))
    return max(1, min(asked or cores, enough))


@contextmanager
def _mapping(workers: int, world: World) -> Iterator[Callable[..., Iterable[Any]]]:
    """Give an ordered `map` over the processes of a world: the built-in one in each, or one over new processes.

    Processes are spawned: a forked one would inherit CUDA and threads in a broken state.
    """
    if workers == 1:
        yield partial(_divided, world, map)
        return
    try:
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent) as pool:
            try:
                yield partial(_divided, world, pool.map)
            except BaseException:
                pool.shutdown(cancel_futures=True)  # without waiting for the rest
                raise
    except BrokenProcessPool as error:
        raise DsuError(
            f"one of {workers} evaluation processes died, from too little memory or because the calling script "
            'lacks `if __name__ == "__main__":`: use 1 worker.'
        ) from error


def _end_with_parent() -> None:
    """End this worker if its parent is killed, which can't tell it to."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _divided(
    world: World, own_map: Callable[..., Iterable[Any]], work: Callable[..., Any], chunks: Sequence[Any]
) -> Iterator[Any]:
    """Yield what `work` makes of each chunk, in order; each process does its share, and has the results of all."""
    own = iter(own_map(work, chunks[world.rank :: world.size]))
    some = _ROUND if world.connected else 1
    for start in range(0, len(chunks), some * world.size):
        done = world.all_gather(list(islice(own, some)))
        for index in range(min(some * world.size, len(chunks) - start)):
            yield done[index % world.size][index // world.size]


def _conventions(normalize: bool, resize: bool, mask_format: MaskFormat, found: ImageLevel) -> dict[str, str]:
    truth = (
        "foreground: labels other than 0" if mask_format.labels else "foreground above 128, in colours all but black"
    )
    if mask_format.foreground is not None:
        truth = f"foreground: values {', '.join(map(str, mask_format.foreground))}"
    said = {
        "ground truth": truth,
        "map": MINMAX if normalize else "value / 255, not normalised",
        "other sizes": "map resized bilinearly to its mask" + ("" if resize else " if that is not of its image's size"),
        "S": "alpha 0.5",
        "F": "beta^2 0.3 (weighted: 1); mean and max of the averaged curve",
        "IoU, Dice": "map > 0.5, averaged over images",
        "library": f"pysodmetrics {version('pysodmetrics')}",
    }
    if found.without_object:  # details in `dsu.metrics.image_level`
        said |= {
            ", ".join(
                IMAGE_LEVEL
            ): "from each map's largest value / 255, never normalised; alarm from 0.5 (128 of 255)",
            "with an object": "over those images only; on the others F, IoU and Dice are 0 for any prediction",
        }
    return said
