"""The whole network as one ONNX graph in float32, with the arithmetic of `DSUNet`, including the rounding of frozen
features.

The check runs the same images through torch and through the file, compares the results and times both.

Python arithmetic with the batch size (`len(tensor)`) would write the traced size into the graph, which then gives wrong
masks for any other size. So the check uses other batch sizes than the trace.
"""

import contextlib
import io
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dsu.config import DSUNetConfig
from dsu.data.datasets import masks_below
from dsu.data.images import UnreadableImage, or_unreadable, read_image
from dsu.data.pairing import find_images
from dsu.data.synthetic import draw_sample
from dsu.errors import DsuError, UsageError
from dsu.metrics.meters import Meters
from dsu.network.network import DSUNet
from dsu.network.resume import earliest
from dsu.runner import Model, mask_of

TRACED: Final = 5
"""Batch size of the trace; the check uses other sizes."""

OPSET: Final = 23
"""The first opset with an Attention operator: one fusion at 88x88 takes 39 MB with it, and 757 MB without."""

EXTERNAL_WEIGHTS_BYTES: Final = 3 << 29
"""Size of weights from which they get a separate file: an ONNX file is limited to 2 GiB."""

BATCHES: Final = (1, 2, 3)
"""Batch sizes of the check; none is the traced one."""

TOLERANCE: Final = 1e-3
"""Tolerance in standard deviations of the logits; correct exports differ by about 5e-6."""

ROUNDS: Final = 3

Arrays = dict[str, NDArray[np.uint8]]


def input_sizes(config: DSUNetConfig) -> dict[str, int]:
    """The graph's inputs, (B, side, side, 3) uint8 RGB each, with their sides."""
    return {"pixels": config.hiera_size, **({"dino_pixels": config.dino_size} if config.injections else {})}


class WholeNetwork(nn.Module):
    """From decoded images to the finest logits, without a loop over the batch."""

    def __init__(self, network: DSUNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor, dino_pixels: Tensor | None = None) -> Tensor:
        """(B, S, S, 3) and (B, S', S', 3) uint8 to (B, 1, S, S)."""
        point = earliest(self.network.config)
        guide = None if dino_pixels is None else dino_pixels.permute(0, 3, 1, 2)
        given = self.network.encode_at_once(None, guide, point.guides)
        return self.network(pixels.permute(0, 3, 1, 2), features=given, start_feature=point.start).logits  # type: ignore[no-any-return]


def write_graph(network: DSUNet, path: Path) -> None:
    """Write a network (on the CPU, in evaluation mode) as ONNX; large weights go into `path` + `.data`."""
    sizes = input_sizes(network.config)
    example = tuple(torch.zeros(TRACED, side, side, 3, dtype=torch.uint8) for side in sizes.values())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), quiet_libraries():
        program = torch.onnx.export(
            WholeNetwork(network.requires_grad_(False)).eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(sizes),
            output_names=["logits"],
            dynamic_shapes=tuple({0: batch} for _ in sizes),
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=weights > EXTERNAL_WEIGHTS_BYTES)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress output and warnings of the exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ---- the check ----


@dataclass(frozen=True)
class Agreement:
    """How closely a float32 model matches torch, and how long both take for one image.

    Attributes:
        logits: the largest difference, in standard deviations of torch's logits.
        grey_levels: the largest difference of min-max normalised masks.
        torch_seconds, seconds: the fastest of several runs on one image, in turns.
    """

    logits: float
    grey_levels: float
    torch_seconds: float
    seconds: float

    @property
    def fault(self) -> str | None:
        """Why the model must not be used, as a clause; None if it is correct."""
        if not self.logits <= TOLERANCE:  # so that NaN also fails
            return f"its logits differ from torch's by {self.logits:.2g} standard deviations, more than {TOLERANCE:g}"
        return None if self.grey_levels <= 1 else f"its masks differ from torch's by {self.grey_levels:.1f} grey levels"


@dataclass(frozen=True)
class Loss:
    """What a model of lower precision loses compared with the float32 one, and how long both take for one image.

    Attributes:
        S: the structure measure of its masks, with the float32 model's masks, binarised at 0.5, as ground truth.
        S_before: the same for the float32 model's own soft masks.
        MAE: the mean difference of min-max normalised masks, 0 to 1.
        grey_levels: the largest difference.
        float_seconds, seconds: the fastest of several runs on one image, in turns.
    """

    S: float
    S_before: float
    MAE: float
    grey_levels: float
    float_seconds: float
    seconds: float


def images_to_check(folder: Path | None, count: int = sum(BATCHES)) -> list[Image.Image]:
    """RGB images evenly spaced over a folder, repeated if there are few; synthetic ones without a folder.

    Skips masks. Raises `UsageError` for a folder without a readable image.
    """
    if folder is None:
        return [Image.fromarray(draw_sample(np.random.default_rng((17, index)))[0]) for index in range(count)]
    images = find_images(folder)
    masks = masks_below(folder)
    paths = [path for path in images if os.path.realpath(path) not in masks]
    chosen = [paths[index * len(paths) // count] for index in range(count)] if paths else []
    found = [one for one in map(or_unreadable(read_image), chosen) if not isinstance(one, UnreadableImage)]
    if not found:
        raise UsageError(f"{folder} contains no readable image: give another folder.")
    return [found[index % len(found)] for index in range(count)]


def compare(network: DSUNet, model: Model, given: Arrays) -> Agreement:
    """Run the same images through both, in batches of `BATCHES`. Raises `DsuError` if the model can't run them."""

    @torch.no_grad()
    def reference(given: Arrays) -> NDArray[np.float32]:
        values = [torch.from_numpy(one).permute(0, 3, 1, 2) for one in given.values()]
        return network(*values, start_feature="pixels").logits.numpy()  # type: ignore[no-any-return]

    a, b = (
        np.concatenate([run(batch) for batch in _batches(given)]) for run in (reference, partial(_run_batch, model))
    )
    seconds = _fastest_times([reference, model.run], given)
    return Agreement(float(np.abs(a - b).max() / a.std()), float(_grey_level_differences(a, b).max()), *seconds)


def loss_of(model: Model, floating: Model, given: Arrays) -> Loss:
    """What a model of lower precision loses. Raises `DsuError` if it can't run, or its output is not finite."""
    masks = [masks_of(one, given) for one in (floating, model)]
    own, other = (_structure_measure(side, masks[0]) for side in masks)
    differences = np.abs(masks[0] - masks[1])
    seconds = _fastest_times([floating.run, model.run], given)
    return Loss(other, own, float(differences.mean()), float(differences.max() * 255), *seconds)


def masks_of(model: Model, given: Arrays) -> NDArray[np.float32]:
    """A model's min-max normalised masks (B, S, S), in batches of `BATCHES`. Raises as `loss_of`."""
    logits = np.concatenate([_run_batch(model, batch) for batch in _batches(given)])
    if not np.isfinite(logits).all():
        raise DsuError("The model's output is not finite at this precision: export with --precision fp32.")
    return np.stack([mask_of(one[0], "minmax") for one in logits])


def _structure_measure(masks: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    meters = Meters()
    for mask, other in zip(masks, truth, strict=True):
        meters.s.step(mask.astype(np.float64), other >= 0.5, normalize=False)
    return float(meters.s.get_results()["sm"])


def _batches(given: Arrays) -> list[Arrays]:
    starts = [sum(BATCHES[:index]) for index in range(len(BATCHES))]
    return [
        {name: values[start : start + size] for name, values in given.items()}
        for start, size in zip(starts, BATCHES, strict=True)
    ]


def _run_batch(model: Model, batch: Arrays) -> NDArray[np.float32]:
    try:
        return model.run(batch)
    except Exception as error:  # onnxruntime's own exceptions
        count = len(next(iter(batch.values())))
        raise DsuError(
            f"The exported model can't run a batch of {count} ({str(error).splitlines()[0]}): this is a bug in dsu, "
            "please report it."
        ) from error


def _grey_level_differences(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Differences of min-max normalised masks, (B, S, S), in grey levels."""
    stretched = [np.stack([mask_of(one[0].copy(), "minmax") for one in logits]) for logits in (a, b)]
    return np.asarray(np.abs(stretched[0] - stretched[1]) * np.float32(255))


def _fastest_times(runs: Sequence[Callable[[Arrays], Any]], given: Arrays) -> list[float]:
    """The fastest time of each for one image, in turns, so that other load affects all alike."""
    one = {name: values[:1] for name, values in given.items()}
    best = [float("inf")] * len(runs)
    for _ in range(ROUNDS):
        for index, run in enumerate(runs):
            started = time.perf_counter()
            run(one)
            best[index] = min(best[index], time.perf_counter() - started)
    return best
