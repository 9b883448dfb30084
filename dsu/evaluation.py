"""Predicted maps against ground truth: the paper's metrics (its section IV-B), computed by pysodmetrics.

No formula here is our own. In the order of `METRICS`:

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
Two oddities of all the toolboxes: an all-black map has the adaptive threshold 0 and so counts as ALL
foreground in F_adaptive and E_adaptive, and E divides by one pixel less than there are, so perfect maps
score just over 1. A third is mended here: S of an object that lies within the last row or column is
NaN, and with it the whole set's.

An empty ground truth is legal. There S is 1 - mean(map), MAE is mean(map), E is the share of pixels left
background (so 0 for E_adaptive of an all-black map), and every F, IoU and Dice is 0 whatever was predicted.
Sets with many empty masks are best read by S, E_mean and MAE.

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
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.errors import DsuError, UsageError
from dsu.images import IMAGE_SUFFIXES, read_mask
from dsu.masks import MaskFacts, MaskReading, choose_reading, examine_mask
from dsu.meters import METRICS, Meters
from dsu.progress import SILENT, Progress

__all__ = [
    "METRICS",
    "Case",
    "Evaluation",
    "evaluate",
    "match",
    "match_folders",
    "named_images",
    "read_case",
]

_CHUNK: Final = 8
# A process takes about as long to start as it takes to measure this many images.
_IMAGES_WORTH_A_PROCESS: Final = 64


@dataclass(frozen=True)
class Case:
    """One predicted map and its ground truth; `name` is what errors and per-image tables call it.

    `image` is what was segmented, where that is known: it is shown to people, and no figure depends on it.
    """

    name: str
    prediction: Path
    truth: Path
    image: Path | None = None


@dataclass(frozen=True)
class Evaluation:
    """What one set scored.

    `metrics` maps each of `METRICS`, in that order, to the set's figure. `per_image` has a row a case, in
    the order given: its name and what exists for a single image. `curves` holds precision, recall, F and E,
    each (256,), averaged over images; entry k is for the pixels of at least 255 - k. `conventions` says in
    words what the figures rest on; `cases`, `normalize` and `reading` are what was judged, and how.
    """

    metrics: dict[str, float]
    images: int
    per_image: list[dict[str, str | float]]
    curves: dict[str, NDArray[np.float64]]
    conventions: dict[str, str]
    cases: tuple[Case, ...]
    normalize: bool
    reading: MaskReading


def evaluate(
    cases: Iterable[Case],
    *,
    normalize: bool = True,
    resize: bool = False,
    reading: MaskReading | None = None,
    workers: int | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Score predictions against their ground truths, in several processes, to the digits of one.

    Args:
        cases: Pairs of 8-bit grey images (H, W), maps and masks.
        normalize: Stretch each map to 0..1 first (the benchmarks' convention, and pysodmetrics' default). It
            turns 1/255 of noise into a full-range map, so leave it off to judge images without an object.
        resize: Bring maps of another size to their mask's size, bilinearly (Pillow's, which filters when it
            shrinks), instead of refusing them.
        reading: How the ground truths are meant, where that is known; else they are all looked at first, since
            label maps of 0 and 1 would pass for masks without an object.
        workers: Processes; by default up to one a core where there are images enough, and 1 measures in this
            very process. A script that asks for more needs the usual `if __name__ == "__main__":`.
        progress: Told of every image measured.

    Raises:
        UsageError: No cases, fewer than one worker, or ground truths that leave open what is foreground.
        DsuError: A file that cannot be read, or a pair of different sizes without `resize`.

    Example:
        >>> cases, missing, extra = match_folders(Path("predictions/ECSSD"), Path("ECSSD/masks"))
        >>> evaluate(cases).metrics["S"]
        0.953
    """
    cases = list(cases)
    workers = _workers(workers, len(cases))
    chunks = [cases[start : start + _CHUNK] for start in range(0, len(cases), _CHUNK)]
    meters = Meters()
    with _mapping(workers) as map_chunks:
        reading = reading or choose_reading(list(chain.from_iterable(map_chunks(_examine, chunks))))
        measure = partial(_measure, normalize=normalize, resize=resize, reading=reading)
        with progress.task("evaluating", total=len(cases)) as task:
            for chunk, measured in zip(chunks, map_chunks(measure, chunks), strict=True):
                meters.extend(measured)
                task.advance(len(chunk))
    metrics, curves = meters.averages()
    return Evaluation(
        metrics=metrics,
        images=len(cases),
        per_image=meters.per_image([case.name for case in cases]),
        curves=curves,
        conventions=_conventions(normalize, resize, reading),
        cases=tuple(cases),
        normalize=normalize,
        reading=reading,
    )


def match_folders(predictions: Path, truth: Path) -> tuple[list[Case], list[str], list[str]]:
    """Pair the images of two folders by path without suffix, subfolders included.

    Returns:
        The cases; the names of ground truths without a prediction; the names of predictions without a ground
        truth. All in the order of their paths.

    Raises:
        UsageError: A folder that is absent or has no images.
        DsuError: Two files of one folder that differ in suffix only.
    """
    return match(predictions, named_images(truth).items())


def match(predictions: Path, truths: Iterable[tuple[str, Path]]) -> tuple[list[Case], list[str], list[str]]:
    """Pair a folder of predictions with named masks, as `match_folders` does, in the order of `truths`.

    A name is a prediction's path inside its folder, without suffix: `val/0001` finds `val/0001.png`.
    """
    found = named_images(predictions)
    wanted = dict(truths)
    cases = [Case(name, found[name], mask) for name, mask in wanted.items() if name in found]
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    return cases, missing, extra


def named_images(folder: Path) -> dict[str, Path]:
    """Index a folder's images, hidden ones left out, by path without suffix, in order.

    Raises:
        UsageError: A folder that is absent or has no images.
        DsuError: Two files that differ in suffix only.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: name the one that holds the images.")
    named: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() not in IMAGE_SUFFIXES or any(part.startswith(".") for part in inside.parts):
            continue
        if path.is_dir():
            continue
        name = inside.with_suffix("").as_posix()
        if name in named:
            raise DsuError(
                f"{named[name]} and {path} have one name: keep one of them, so that it is plain which counts."
            )
        named[name] = path
    if not named:
        raise UsageError(
            f"{folder} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}): name the folder that holds them."
        )
    return named


def read_case(case: Case, reading: MaskReading, *, resize: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read one pair, prediction and ground truth, both uint8 (H, W) of the ground truth's size.

    Raises:
        DsuError: A file that cannot be read, or different sizes without `resize`.
    """
    prediction, truth = read_mask(case.prediction), reading.read(case.truth)
    if prediction.shape == truth.shape:
        return prediction, truth
    height, width = truth.shape
    if not resize:
        raise DsuError(
            f"the prediction {case.prediction} has {prediction.shape[1]}x{prediction.shape[0]} pixels and "
            f"its ground truth {case.truth} {width}x{height}: predict at the images' own size, or bring "
            "predictions to their masks' size with --resize."
        )
    resized = Image.fromarray(prediction).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized), truth


def _examine(cases: Sequence[Case]) -> list[MaskFacts]:
    return [examine_mask(case.truth)[1] for case in cases]


def _measure(cases: Sequence[Case], *, normalize: bool, resize: bool, reading: MaskReading) -> Meters:
    meters = Meters()
    for case in cases:
        meters.step(*read_case(case, reading, resize=resize), normalize=normalize)
    return meters


def _workers(asked: int | None, images: int) -> int:
    if not images:
        raise UsageError("there is nothing to evaluate: no prediction has a ground truth of the same name.")
    if asked is not None and asked < 1:
        raise UsageError(f"{asked} workers cannot evaluate anything: ask for 1 or more.")
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
            f"one of {workers} evaluating processes died, of too little memory or because the calling script "
            'lacks `if __name__ == "__main__":`: use 1 worker.'
        ) from error


def _conventions(normalize: bool, resize: bool, reading: MaskReading) -> dict[str, str]:
    if reading.foreground is not None:
        truth = f"foreground: values {', '.join(map(str, reading.foreground))}"
    else:
        truth = (
            "foreground: labels other than 0" if reading.labels else "foreground above 128, in colours all but black"
        )
    return {
        "ground truth": truth,
        "map": "min-max normalised, image by image" if normalize else "value / 255, not normalised",
        "other sizes": "map resized bilinearly to its mask" if resize else "refused",
        "S": "alpha 0.5",
        "F": "beta^2 0.3 (weighted: 1); mean and max of the averaged curve",
        "IoU, Dice": "map > 0.5, averaged over images",
        "library": f"pysodmetrics {version('pysodmetrics')}",
    }
