"""Predicted maps against ground truth: the paper's metrics (its section IV-B), computed by pysodmetrics.

No formula of `METRICS` is our own. In their order:

* S: structure measure, alpha 0.5 (arXiv 1708.00786).
* F_adaptive, F_mean, F_max: F-measure, beta^2 0.3 (Achanta et al., CVPR 2009). Adaptive cuts each map at
  twice its own mean, at most 1. Mean and max are those of the curve over 256 thresholds, averaged over
  images first.
* F_weighted: weighted F-measure, beta^2 1 (Margolin et al., CVPR 2014).
* E_adaptive, E_mean, E_max: enhanced alignment, cut likewise (arXiv 1805.10421).
* MAE: mean absolute error (Perazzi et al., CVPR 2012), the only one where less is better.
* IoU, Dice: of the pixels strictly above half (`map > 0.5`; in 8-bit values from 128), averaged over
  images.

Conventions. Ground truth is foreground strictly above 128 (label maps: where not 0). With `normalize` each
map is stretched to 0..1 by its own minimum and maximum (a constant map stays as it is); without, a map is v
/ 255. Adaptive cuts and curves keep pixels `>=` the threshold, curves those of the map truncated to 8 bits.
An oddity of all the toolboxes is kept: an all-black map has the adaptive threshold 0 and so counts as ALL
foreground in F_adaptive and E_adaptive. Two are mended. E divides by one pixel less than there are, so
perfect maps score just over 1, and maps of one pixel 3e14: here an image's E is at most 1. S of an object that
lies within the last row or column is NaN, and with it the whole set's.

An empty ground truth, one without a foreground pixel, is legal. There S is 1 - mean(map), MAE is mean(map) and E
is the share of pixels left background: S, E_mean, E_max and MAE are right, of maps that were not normalised. Every
F, IoU and Dice is 0 there whatever was predicted, and E_adaptive is 0 for the all-black map, which is the perfect
one. So sets that have such images get, beside the figures over all images, `object_metrics`, the same over the
images with an object alone, and `image_level`: false alarms, misses and AUROC (see `dsu.metrics.image_level`).

Against the MATLAB toolboxes, on real maps (the tests hold the figures):

* S, MAE, adaptive F and E, and the SOD toolbox's precision, recall and IoU curves agree to 1e-12.
* The SOD toolbox's F curve is the F of the averaged precision and recall; pysodmetrics, like the COD
  toolbox, averages the images' F. On PiCANet's 300 maps max F is 0.853 the one way and 0.811 the other.
* The COD toolbox's thresholds, `1:-1/255:0`, are rounded so that grey values lying exactly on one fall
  below it at 14 of the 256: max F differs by 1.0e-5, mean F by 7.5e-7. Its E curve cuts at `>`, not `>=`:
  it begins with the empty map where ours ends with the full one, and mean E differs by 1.2e-5.
* Its weighted F differs by 1.2e-10, about what distances in single precision would make.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.data.datasets import Paths, find_samples
from dsu.data.images import FEW_VALUES, grey_levels, image_head, raw_mask
from dsu.data.masks import MaskFacts, MaskFormat, choose_mask_format, examine_mask
from dsu.data.pairing import Pair, make_split, named_images, pair_names
from dsu.errors import DsuError, UsageError
from dsu.metrics.figures import IMAGE_LEVEL, METRICS, MINMAX
from dsu.metrics.image_level import ImageLevel
from dsu.progress import SILENT, Progress
from dsu.thresholds import DEFAULT_THRESHOLD, level_of

if TYPE_CHECKING:
    from dsu.metrics.meters import Meters

__all__ = ["METRICS", "Evaluation", "JudgedImage", "evaluate", "match", "read_judged", "truths_in"]

_CHUNK: Final = 8
# A process takes about as long to start as it takes to measure this many images.
_IMAGES_WORTH_A_PROCESS: Final = 64


@dataclass(frozen=True)
class JudgedImage:
    """One predicted map and its ground truth; `name` is what errors and per-image tables call it.

    `image` is what was segmented, where that is known: it is shown to people, and no figure depends on it.
    """

    name: str
    prediction: Path
    truth: Path
    image: Path | None = None


def truths_in(truth: str | Path, paths: Paths) -> list[Pair]:
    """The samples that masks are of: a data set's, or one for each mask of any other folder.

    A folder in which but few files lie beside a mask of theirs is taken for one of masks.
    """
    splits = find_samples(truth, paths)
    if any(split.masks == split.images and split.images_without_mask for split in splits):
        splits = (make_split("", "", "all", Path(truth), None),)
    return [pair for split in splits for pair in split.pairs]


def match(predictions: Path, samples: Sequence[Pair]) -> tuple[list[JudgedImage], list[str], list[str]]:
    """Pair a folder of predictions with samples and their masks, by the rule by which these pair in training.

    Args:
        predictions: A folder of maps, subfolders included.
        samples: Each with its mask; where there is none the image is one, as `truths_in` gives them.

    Returns:
        What can be judged, in the order of `samples`; the names of ground truths without a prediction; the names of
        predictions without a ground truth.

    Raises:
        UsageError: A folder that is absent or has no images.
        DsuError: Two predictions that differ in ending only.
    """
    files = named_images(predictions)
    found = pair_names([(sample.name,) for sample in samples], files)
    judged = [
        JudgedImage(sample.name, files[name], sample.mask or sample.image, sample.image if sample.mask else None)
        for sample, name in zip(samples, found, strict=True)
        if name is not None
    ]
    missing = [sample.name for sample, name in zip(samples, found, strict=True) if name is None]
    used = set(found)
    return judged, missing, [name for name in files if name not in used]


def read_judged(
    judged: JudgedImage, mask_format: MaskFormat, *, resize: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read one pair, prediction and ground truth, both uint8 (H, W) of the ground truth's size.

    A prediction of its image's own size is brought to the mask's where that is another of the same proportions.

    Raises:
        DsuError: A file that cannot be read, a prediction in colours, different sizes without `resize`, one of the two
            on its side, or a ground truth of other proportions than its image.
    """
    prediction = _read_map(judged.prediction)
    head = None if judged.image is None else image_head(judged.image)
    truth = mask_format.read(judged.truth, image=head)
    if prediction.shape == truth.shape:
        return prediction, truth
    height, width = truth.shape
    sizes = (
        f"the prediction {judged.prediction} has {prediction.shape[1]}x{prediction.shape[0]} pixels and its ground "
        f"truth {judged.truth} {width}x{height}"
    )
    if prediction.shape == truth.shape[::-1]:
        raise DsuError(f"{sizes}, so one of them is rotated: turn it.")
    if not resize and (head is None or head.size != prediction.shape[::-1]):
        raise DsuError(f"{sizes}: predict at the images' own size, or resize predictions to their masks with --resize.")
    resized = Image.fromarray(prediction).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized), truth


def _read_map(path: Path) -> NDArray[np.uint8]:
    """A predicted map (H, W), uint8; of a cutout its opacity. Raises `DsuError` for a picture in colours."""
    values, kind = raw_mask(path)
    if kind in ("indices", "colours"):
        raise DsuError(f"the prediction {path} is a colour picture, not a map: predict with --kind mask.")
    if kind == "deep":
        _check_probabilities(path)
    return grey_levels(values, kind)


def _check_probabilities(path: Path) -> None:
    """Raise `DsuError` for a map of floats that are no probabilities; integers of 16 bits are left alone."""
    with Image.open(path) as image:
        if image.mode != "F":
            return
        values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # which holds for NaN, too
        raise DsuError(
            f"the prediction {path} contains floats from {low:.4g} to {high:.4g}: save probabilities from 0 to 1, or "
            "an 8-bit image."
        )


@dataclass(frozen=True)
class Evaluation:
    """The scores of one set.

    Attributes:
        metrics: Each of `METRICS`, in that order, with the set's figure.
        images: How many were judged.
        per_image: One row per image, in the order given: its "name", what of the metrics exists for a single image,
            its "response" in [0, 1] and whether its ground truth is "empty".
        curves: Precision, recall, F and E, each (256,), averaged over images; entry k is for the pixels of at
            least 255 - k.
        conventions: What the figures rest on, in words.
        judged: What was.
        normalize: Whether each map was stretched first.
        mask_format: How the ground truths were read.
        object_metrics: `METRICS` over the images with an object alone; nothing where no image has one.
        image_level: The images' responses and what follows from them.
        levels: How many pixels off objects and on them have each 8-bit value, not stretched, (2, 256).
        missing: How many more ground truths the set has, without a prediction and so in no figure.
        trained_on: How many of the images the head was trained on.
    """

    metrics: dict[str, float]
    images: int
    per_image: list[dict[str, str | float]]
    curves: dict[str, NDArray[np.float64]]
    conventions: dict[str, str]
    judged: tuple[JudgedImage, ...]
    normalize: bool
    mask_format: MaskFormat
    object_metrics: dict[str, float]
    image_level: ImageLevel
    levels: NDArray[np.int64]
    missing: int = 0
    trained_on: int = 0

    @property
    def faint(self) -> str:
        """Why IoU and Dice are next to nothing though the maps need not be bad, in words; empty if it is not so."""
        objects = int(self.levels[1].sum())
        above = int(self.levels[1, level_of(DEFAULT_THRESHOLD) :].sum())
        if self.normalize or not objects or above > 0.05 * objects:
            return ""
        return (
            f"IoU and Dice count pixels above {DEFAULT_THRESHOLD}, which {100 * above / objects:.1f} % of the objects' "
            f"pixels reach: the maps are faint; if S and AUROC are good, use a lower threshold"
        )


def evaluate(
    images: Iterable[JudgedImage],
    *,
    normalize: bool = True,
    resize: bool = False,
    mask_format: MaskFormat | None = None,
    foreground: Sequence[int] | None = None,
    workers: int | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Score predictions against ground truths in several processes; all digits equal those of one process.

    Args:
        images: Pairs of 8-bit grey images (H, W), maps and masks.
        normalize: Stretch each map to 0..1 first (the benchmarks' convention, and pysodmetrics' default). It
            turns 1/255 of noise into a full-range map, so leave it off to judge images without an object.
        resize: Bring maps of another size to their mask's size, bilinearly (Pillow's, which filters when it
            shrinks), instead of refusing them.
        mask_format: How the ground truths are meant, where that is known; else they are all looked at first, since
            label maps of 0 and 1 would pass for masks without an object.
        foreground: Raw values of the ground truths that are foreground, where the user named them.
        workers: Processes; by default up to one a core where there are images enough, and 1 measures in this
            very process. A script that asks for more needs the usual `if __name__ == "__main__":`.
        progress: Told of every image measured.

    Raises:
        UsageError: No images, fewer than one worker, or ground truths that leave open what is foreground.
        DsuError: A file that cannot be read, or a pair of different sizes without `resize`.

    Example:
        >>> judged, missing, extra = match(Path("predictions/ECSSD"), truths_in("ECSSD", Paths()))
        >>> evaluate(judged).metrics["S"]
        0.953
    """
    from dsu.metrics.meters import Totals  # its library takes longer to load than a mistake takes to tell

    images = list(images)
    workers = _workers(workers, len(images))
    chunks = [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]
    totals = Totals()
    with _mapping(workers) as map_chunks:
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
        judged=tuple(images),
        normalize=normalize,
        mask_format=mask_format,
        object_metrics=totals.averages(with_object=True) if level.with_object else {},
        image_level=level,
        levels=totals.levels,
    )


def _examine(images: Sequence[JudgedImage], *, opaque: bool) -> list[MaskFacts]:
    """Look at the ground truths. Raises `DsuError` for one that is a photograph."""
    facts = [examine_mask(image.truth, opaque=opaque) for image in images]
    for image, found in zip(images, facts, strict=True):
        if found.values is None and not opaque and _is_photograph(image.truth):
            raise DsuError(
                f"the ground truth {image.truth} is a photograph, not a mask: give the mask folder with --truth, or "
                "the object's values with --foreground."
            )
    return facts


def _is_photograph(path: Path) -> bool:
    """Whether a picture's few commonest values cover but little of it, as no mask's do, soft edges or not."""
    values, _ = raw_mask(path)
    _, counts = np.unique(values, return_counts=True)
    return bool(np.sort(counts)[-FEW_VALUES:].sum() < values.size / 2)


def _measure(images: Sequence[JudgedImage], *, normalize: bool, resize: bool, mask_format: MaskFormat) -> "Meters":
    from dsu.metrics.meters import Meters

    meters = Meters()
    for image in images:
        meters.step(*read_judged(image, mask_format, resize=resize), normalize=normalize)
    return meters


def _workers(asked: int | None, images: int) -> int:
    if not images:
        raise UsageError("nothing to evaluate: no prediction has a ground truth of the same name.")
    if asked is not None and asked < 1:
        raise UsageError(f"{asked} workers are not possible: give 1 or more.")
    enough = -(-images // _IMAGES_WORTH_A_PROCESS) if asked is None else -(-images // _CHUNK)
    return min(asked or os.cpu_count() or 1, enough)


@contextmanager
def _mapping(workers: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """Give a `map` that keeps the order: this process's own, or one over fresh processes.

    Processes are spawned, since a forked one inherits CUDA and threads in a state that neither survives.
    """
    if workers == 1:
        yield map
        return
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield pool.map
    except BrokenProcessPool as error:
        raise DsuError(
            f"one of {workers} evaluation processes died, from too little memory or because the calling script "
            'lacks `if __name__ == "__main__":`: use 1 worker.'
        ) from error


def _conventions(normalize: bool, resize: bool, mask_format: MaskFormat, found: ImageLevel) -> dict[str, str]:
    truth = (
        "foreground: labels other than 0" if mask_format.labels else "foreground above 128, in colours all but black"
    )
    if mask_format.foreground is not None:
        truth = f"foreground: values {', '.join(map(str, mask_format.foreground))}"
    said = {
        "ground truth": truth,
        "map": MINMAX if normalize else "value / 255, not normalised",
        "other sizes": "map resized bilinearly to its mask"
        if resize
        else "refused, unless the mask's is not its image's",
        "S": "alpha 0.5",
        "F": "beta^2 0.3 (weighted: 1); mean and max of the averaged curve",
        "IoU, Dice": "map > 0.5, averaged over images",
        "library": f"pysodmetrics {version('pysodmetrics')}",
    }
    if found.without_object:  # said at length in `dsu.metrics.image_level`
        said |= {
            ", ".join(IMAGE_LEVEL): "of each map's largest value / 255, never normalised; alarm from 0.5 (128 of 255)",
            "with an object": "over those images alone; on the others F, IoU and Dice are 0 whatever is predicted",
        }
    return said
