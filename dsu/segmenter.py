"""A trained head with its encoders, for images in Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dsu.batches import Batch, points_of
from dsu.encoders.weights import EncoderWeights
from dsu.errors import DsuError, UsageError
from dsu.heads import HeadInfo, load_head, resolve_head
from dsu.images import read_image, resize_image
from dsu.network.network import DSUNet
from dsu.network.resume import ResumePoint, earliest
from dsu.runtime import Precision, Runtime, choose_runtime
from dsu.stores import load_encoders

__all__ = ["Normalization", "Segmenter", "finish_mask", "load_network", "predict_logits"]

Picture = Image.Image | NDArray[np.uint8] | str | Path

Normalization = Literal["minmax", "none"]
"""`minmax` stretches each map to its full range: the benchmarks' convention, which turns the noise of an image
without any object into a full-range mask."""


def finish_mask(logits: Tensor, size: tuple[int, int], normalization: Normalization) -> NDArray[np.float32]:
    """One image's mask at its own size (paper, Section IV.C, and the published program).

    Args:
        logits: (1, S, S), the finest output.
        size: width and height in pixels.
        normalization: see `Normalization`.

    Returns:
        (height, width) float32 in [0, 1].
    """
    width, height = size
    resized = functional.interpolate(
        logits.float().unsqueeze(0), size=(height, width), mode="bilinear", align_corners=False
    )
    mask = resized.sigmoid()[0, 0]
    if normalization == "minmax":
        mask = (mask - mask.min()) / (mask.max() - mask.min() + 1e-8)
    return mask.cpu().numpy()


def load_network(
    state: Mapping[str, Tensor],
    info: HeadInfo,
    weights: EncoderWeights,
    *,
    point: ResumePoint | None = None,
    from_images: bool = True,
) -> DSUNet:
    """The network of a head in evaluation mode, with the encoders that predicting from images or from `point` needs.

    Raises `DsuError` where the encoders' weights are not those that the head was trained on, or the head's tensors
    do not fit its own settings.
    """
    architecture = info.architecture
    start = point or earliest(architecture)
    needs_dino = from_images and bool(start.maps)
    needs_hiera = from_images or start.block < architecture.hiera.depth
    hiera, dino, digests = load_encoders(architecture, weights, hiera=needs_hiera, dino=needs_dino)
    for encoder, digest in digests.items():
        trained_on = info.encoders.get(encoder)
        if trained_on is not None and trained_on != digest:
            raise DsuError(
                f"The head was trained on other weights of {encoder} ({trained_on[:12]}) than those found "
                f"({digest[:12]}): give the right ones with --{encoder}-weights."
            )
    network = DSUNet(architecture, hiera, dino, info.stored_dtype)
    try:
        network.head.load_state_dict(dict(state))
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()[:160]
        raise DsuError(f"The head's tensors do not fit its own settings ({detail}): train it again.") from error
    return network.eval()


@dataclass
class Segmenter:
    """A trained head with its encoders, for images in Python.

    Example:
        >>> segmenter = Segmenter.load("runs/DUTS-TR-large")
        >>> mask = segmenter.predict(Image.open("photo.jpg"))   # float32 (height, width) in [0, 1]

    Attributes:
        network: in evaluation mode on `runtime.device`.
        runtime: device and precision.
    """

    network: DSUNet
    runtime: Runtime

    @classmethod
    def load(
        cls,
        head: str | Path,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        hiera_weights: str | Path | None = None,
        dino_weights: str | Path | None = None,
    ) -> "Segmenter":
        """Load a run folder, an exported folder or a `head.safetensors`.

        Args:
            head: the folder or file.
            device: auto, cpu, cuda or cuda:N.
            precision: auto, fp32 or bf16.
            hiera_weights, dino_weights: the encoders' checkpoints; None looks for the published ones, as
                `EncoderWeights` says.

        Raises `DsuError` for a head or encoder weights that can't be found, read, or do not belong together.
        """
        state, info = load_head(resolve_head(head))
        weights = EncoderWeights(
            hiera=None if hiera_weights is None else Path(hiera_weights),
            dino=None if dino_weights is None else Path(dino_weights),
            random=bool(info.training.get("random_weights", False)),
        )
        runtime = choose_runtime(device, precision)
        return cls(runtime.place(load_network(state, info, weights)), runtime)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        revision: str | None = None,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        hiera_weights: str | Path | None = None,
        dino_weights: str | Path | None = None,
    ) -> "Segmenter":
        """Load a head that `dsu head export` wrote: from its folder, or as OWNER/NAME from the Hugging Face hub.

        The head is fetched into the hub's ordinary cache (HF_HOME) once; with HF_HUB_OFFLINE=1 it is only looked for
        there. A path that is here goes before a repository of the same name.

        Args:
            folder_or_hub_id: the folder, or OWNER/NAME.
            revision: branch, tag or commit on the hub; None takes the newest.
            device, precision, hiera_weights, dino_weights: see `load`.

        Raises `DsuError` as `load`, and where the repository can't be reached, does not exist or holds no head.

        Example:
            >>> segmenter = Segmenter.from_pretrained("owner/name")
            >>> mask = segmenter.predict("photo.jpg")
        """
        return cls.load(
            resolve_head(folder_or_hub_id, revision=revision),
            device=device,
            precision=precision,
            hiera_weights=hiera_weights,
            dino_weights=dino_weights,
        )

    def predict(self, image: Picture, normalization: Normalization = "none") -> NDArray[np.float32]:
        """The mask of one image.

        Args:
            image: PIL, a path, or (height, width, 3) or (height, width) uint8, RGB or grey.
            normalization: `none` gives probabilities; see `Normalization`.

        Returns:
            (height, width) float32 in [0, 1], at the image's own size.
        """
        return self.predict_batch([image], normalization)[0]

    def predict_batch(
        self, images: Sequence[Picture], normalization: Normalization = "none"
    ) -> list[NDArray[np.float32]]:
        """As `predict`, for several images of any sizes at once."""
        if not images:
            return []
        pictures = [_as_rgb(image) for image in images]
        architecture = self.network.architecture

        def stack(size: int) -> Tensor:
            return torch.from_numpy(np.stack([resize_image(picture, size) for picture in pictures]))

        dino_pixels = stack(architecture.dino_size) if architecture.injections else None
        names = tuple(str(index) for index in range(len(pictures)))
        batch = Batch(names, (0,) * len(names), stack(architecture.hiera_size), None, dino_pixels, {})
        logits = predict_logits(self.network, self.runtime, batch, earliest(architecture))
        return [finish_mask(one, picture.size, normalization) for one, picture in zip(logits, pictures, strict=True)]


@torch.no_grad()
def predict_logits(network: DSUNet, runtime: Runtime, batch: Batch, point: ResumePoint) -> Tensor:
    """(B, 1, S, S) finest logits of an unflipped batch, from the store or from images."""
    ready = batch.to(runtime.device)
    with runtime.autocast():
        return network.suffix(points_of(network, ready, point), point)[-1]


def _as_rgb(image: Any) -> Image.Image:
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        return Image.fromarray(image).convert("RGB")
    raise UsageError("An image must be a PIL image, a path or a uint8 array (height, width[, 3]): convert it first.")
