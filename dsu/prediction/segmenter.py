"""A trained head with its encoders, for images in Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.choices import Normalization, Precision
from dsu.data.decoding import ImageLike, ImageProcessor, as_images, open_image
from dsu.data.images import Depth
from dsu.data.tiles import Tiling
from dsu.heads.head_file import is_exported, load_head, resolve_head
from dsu.network.resume import earliest
from dsu.settings import EncoderWeights

if TYPE_CHECKING:
    import torch

    from dsu.network.network import DSUNet
    from dsu.runtime import Runtime

# Modules that load torch are imported where needed: an exported model works without it.


class Segmenter:
    """A trained head with its encoders, for images in Python.

    Example:
        >>> segmenter = Segmenter.load("runs/DUTS-TR-large")
        >>> mask = segmenter(Image.open("photo.jpg"))   # float32 (height, width) in [0, 1]

    Args:
        network: on `runtime.device`; it is switched to evaluation mode.
        runtime: device and precision; None: the network's device, and its usual precision.
        tiling: how images are cut into tiles, as in training; None: no tiles.
        depth: black and white point of files and PIL images with more than 8 bits, as in training.
    """

    def __init__(
        self,
        network: "DSUNet",
        runtime: "Runtime | None" = None,
        tiling: Tiling | None = None,
        depth: Depth | None = None,
    ) -> None:
        from dsu.prediction.inference import Predictor
        from dsu.runtime import choose_runtime

        self.network, self.tiling, self.depth = network.eval(), tiling, depth
        self.runtime = runtime or choose_runtime(str(network.mean.device), "auto")
        self._predictor = Predictor(self.network, self.runtime, earliest(network.config))

    def __repr__(self) -> str:
        return f"Segmenter({self.network.config.preset}, {self.runtime.device} at {self.runtime.precision})"

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
        """Load a run folder, an exported folder, a `head.safetensors`, or a model of `dsu export` (without torch).

        Args:
            head: the folder or file.
            device: auto, cpu, cuda or cuda:N.
            precision: auto, fp32 or bf16; an exported model has its own.
            hiera_weights, dino_weights: the encoders' checkpoints; None finds the published ones, see
                `EncoderWeights`.

        Raises `DsuError` for a head or encoder weights that can't be found or read, or do not match.
        """
        path = resolve_head(head)
        if is_exported(path):
            from dsu.prediction.exported import ExportedSegmenter

            return ExportedSegmenter(path, device, precision)
        from dsu.network.pretrained import load_network
        from dsu.runtime import choose_runtime

        state, info = load_head(path)
        weights = EncoderWeights(
            hiera=None if hiera_weights is None else Path(hiera_weights),
            dino=None if dino_weights is None else Path(dino_weights),
            random=info.random_weights,
        )
        runtime = choose_runtime(device, precision)
        return cls(runtime.place(load_network(state, info, weights)), runtime, info.tiling, info.depth)

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

        The head is downloaded once into the hub's ordinary cache (HF_HOME); with HF_HUB_OFFLINE=1 only the cache is
        searched. A local path takes precedence over a repository of the same name.

        Args:
            folder_or_hub_id: the folder, or OWNER/NAME.
            revision: branch, tag or commit on the hub; None takes the newest.
            device, precision, hiera_weights, dino_weights: see `load`.

        Raises `DsuError` as `load`, and if the repository can't be reached, does not exist or contains no head.

        Example:
            >>> segmenter = Segmenter.from_pretrained("owner/name")
            >>> mask = segmenter("photo.jpg")
        """
        return cls.load(
            resolve_head(folder_or_hub_id, revision=revision),
            device=device,
            precision=precision,
            hiera_weights=hiera_weights,
            dino_weights=dino_weights,
        )

    def to(self, device: "str | torch.device") -> "Segmenter":
        """Move the network, keeping its precision; returns this segmenter. Raises `UsageError` for an absent device."""
        from dsu.prediction.inference import Predictor
        from dsu.runtime import choose_runtime

        self.runtime = choose_runtime(str(device), self.runtime.precision, "as before")
        self.runtime.place(self.network)
        self._predictor = Predictor(self.network, self.runtime, self._predictor.point)
        return self

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence of str
        self, images: ImageLike, normalization: Normalization = "none"
    ) -> NDArray[np.float32]: ...

    @overload
    def __call__(
        self, images: Sequence[ImageLike], normalization: Normalization = "none"
    ) -> list[NDArray[np.float32]]: ...

    def __call__(
        self, images: "ImageLike | Sequence[ImageLike]", normalization: Normalization = "none"
    ) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        """Predict the mask of an image, or the masks of several images of any sizes as one batch.

        Args:
            images: one, or a sequence: paths, PIL images, arrays or tensors, see `dsu.data.decoding.open_image`.
            normalization: `none` gives probabilities; see `Normalization`.

        Returns:
            (height, width) float32 in [0, 1] at the image's own size; a list of these for a sequence.

        Raises:
            UnreadableImage: A file that cannot be read or decoded.
            UsageError: Something that is not an image.
        """
        several = as_images(images)
        masks = (
            self._predict([open_image(image, self.depth) for image in several], normalization) if len(several) else []
        )
        return masks if several is images else masks[0]

    def _predict(self, pictures: Sequence[Image.Image], normalization: Normalization) -> list[NDArray[np.float32]]:
        return self.segment(pictures, normalization)

    def segment(
        self, pictures: Sequence[Image.Image], normalization: Normalization = "none"
    ) -> list[NDArray[np.float32]]:
        """The soft masks of upright RGB images, as `open_image` returns them; never binarised."""
        from dsu.batches import Batch
        from dsu.prediction.inference import finish_mask

        if self.tiling is not None:
            return [self._predict_tiles(picture, self.tiling, normalization) for picture in pictures]
        processor = ImageProcessor(self.network.config, bool(self._predictor.point.guides))
        batch = Batch.decoded([str(index) for index in range(len(pictures))], list(map(processor.fit, pictures)))
        logits = self._predictor(batch)
        return [finish_mask(one, picture.size, normalization) for one, picture in zip(logits, pictures, strict=True)]

    def _predict_tiles(self, picture: Image.Image, tiling: Tiling, normalization: Normalization) -> NDArray[np.float32]:
        from dsu.prediction.inference import mask_of, segment_tiles, tiled_image

        tiles = tiled_image(self.network, picture, tiling)
        return mask_of(segment_tiles(self._predictor, tiles, self._predictor.batch_size), normalization)
