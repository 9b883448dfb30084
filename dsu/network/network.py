"""The whole network: one forward pass, from images or from stored features.

Everything upstream of the first trainable layer is frozen and may be stored. `encode` computes these features, and
`forward` continues from them: it uses the given ones and encodes the rest. Stored and recomputed features give the same
numbers by construction. The encoders always process a fixed number of samples at once, so a feature depends only on its
own sample; and every feature passes through `to_stored`, so it equals the stored one byte for byte.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dsu.config import LEVELS, DSUNetConfig
from dsu.encoders.frozen import dino_maps, embed_pixels, run_block
from dsu.errors import UsageError
from dsu.network.head import Head
from dsu.network.resize import bilinear_weights, resize_by_products
from dsu.network.resume import (
    ResumePoint,
    feature_block,
    feature_shape,
    guide_names,
    resume_at,
    resume_point,
    serving_features,
)
from dsu.runtime import computing_threads
from dsu.settings import WeightsOf

if TYPE_CHECKING:
    from sam2.modeling.backbones.hieradet import Hiera, MultiScaleBlock
    from timm.models.vision_transformer import VisionTransformer

    from dsu.datasets import SampleDataset

RunBlock: TypeAlias = "Callable[[MultiScaleBlock, Tensor], Tensor]"

MEAN: Final = (0.485, 0.456, 0.406)
STD: Final = (0.229, 0.224, 0.225)

_MAX_NORMALISED: Final = 5.0
"""An upper bound on normalised pixels, which range from -2.1 to 2.7."""
STRIDE: Final = 32
"""Pixels per position of S4, the deepest level."""

ENCODER_ATTENTION: Final = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""The encoders use the first of these that is available: by default, torch may choose differently elsewhere.

On an H200 DINOv2's 24 layers take 4.1 ms for 8 images with the first and 6.1 ms with the second.
"""


def default_encoder_batch_size(device: torch.device) -> int:
    """Default number of samples that the encoders process at once: 1 on a CPU, 8 on a GPU."""
    return 8 if device.type == "cuda" else 1


def to_stored(tokens: Tensor, feature_dtype: torch.dtype | None) -> Tensor:
    """Convert (B, H, W, C) to its stored form: contiguous and rounded to `feature_dtype` (None: not rounded)."""
    return tokens.to(feature_dtype or tokens.dtype).contiguous()


@dataclass(frozen=True)
class DSUNetOutput:
    """The network's output.

    Attributes:
        side_logits: three maps (B, 1, S, S) at the input's size, deepest first.
    """

    side_logits: tuple[Tensor, ...]

    @property
    def logits(self) -> Tensor:
        """The finest of `side_logits`: the prediction."""
        return self.side_logits[-1]


class DSUNet(nn.Module):
    """DSU-Net: DINOv2's last feature guides SAM 2's Hiera through small adapters, fusion and a U-shaped decoder.

    Either encoder may be absent: with V stored, no DINOv2 is needed; with S4 stored and no adapters, no Hiera.

    Args:
        config: all sizes.
        hiera: the frozen trunk, or None.
        dino: the frozen transformer, or None.
        feature_dtype: the type to which frozen features are rounded; None: not rounded.
        encoder_batch_size: samples that the frozen encoders process at once; the last group is padded to this number.
            It determines which kernels run, and so the features' last bits. None uses the device's default.
        as_published: run the authors' operations in their order (padded windows, explicit attention): the same numbers
            up to rounding, slower. For comparisons.

    Attributes:
        encoder_digests: SHA-256 of the loaded encoders' weights, by `hiera` and `dino`.
        random_encoders: whether the encoders have random weights.
        encoder_threads: number of threads for the frozen encoders on a CPU; None: the same as for the head.
        gradient_checkpointing: whether adapted blocks recompute their activations in the backward pass: the same
            numbers, less memory, a third more time.

    Example:
        >>> network = DSUNet(config, hiera, dino).eval()
        >>> network(pixel_values, guide_values).logits                      # (B, 1, 352, 352)
        >>> features = network.encode(pixel_values, guide_values, ["V"])    # (B, 11, 11, 1024), as in a store
        >>> network(pixel_values, features=features).logits                 # the same numbers
    """

    mean: Tensor
    std: Tensor
    guide_weights: Tensor

    def __init__(
        self,
        config: DSUNetConfig,
        hiera: "Hiera | None",
        dino: "VisionTransformer | None",
        *,
        feature_dtype: torch.dtype | None = None,
        encoder_batch_size: int | None = None,
        as_published: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.feature_dtype = feature_dtype
        self.encoder_batch_size = encoder_batch_size
        self.hiera = hiera
        self.dino = dino
        self.head = Head(config, as_published=as_published)
        self.encoder_threads: int | None = None
        self.gradient_checkpointing = False
        self.encoder_digests: dict[str, str] = {}
        self.random_encoders = False
        # Buffers, since a captured GPU graph can't contain tensors created on the host.
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        weights = bilinear_weights(config.dino_grid, config.level_grid(4))
        self.register_buffer("guide_weights", weights, persistent=False)
        self._encoder_block: RunBlock = _published_block if as_published else run_block
        self._trained_block = _with_adapter

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        encoder_weights: WeightsOf = "official",
        load_guide: bool = True,
    ) -> "DSUNet":
        """A trained head with its encoders, in evaluation mode.

        Args:
            folder_or_hub_id: a run's folder, a folder written by `save_pretrained` or `dsu head export`, a head's file,
                or OWNER/NAME on the Hugging Face hub.
            revision: branch, tag or commit on the hub.
            encoder_weights, load_guide: see `create_model`.

        Raises `DsuError` if the encoders' digests differ from those that the head was trained on.
        """
        from dsu.network.pretrained import from_pretrained

        return from_pretrained(
            folder_or_hub_id, revision=revision, encoder_weights=encoder_weights, load_guide=load_guide
        )

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        metrics: Mapping[str, float] | None = None,
        trained_on: "SampleDataset | None" = None,
    ) -> Path:
        """Write `head.safetensors` and `config.json`, which `from_pretrained` and `dsu predict --head FOLDER` load.

        Args:
            folder: created if missing.
            metrics: scores to store with the head, such as `{"val_S": 0.9}`.
            trained_on: the training set: `dsu eval` then leaves its images out, and `dsu predict` without images
                predicts the rest of its store.

        Returns the folder. Raises `DsuError` if weights are not finite or the folder can't be written.
        """
        from dsu.network.pretrained import save_pretrained

        return save_pretrained(self, folder, metrics=metrics, trained_on=trained_on)

    def compile_adapted_blocks(self, backend: str = "inductor") -> None:
        """Compile the adapted blocks with torch.compile, for training.

        Each shape is compiled at first use; equal blocks share the result. Fused operations round in another order, so
        numbers change by about the precision's rounding; `encode` and passes without gradients do not change. The head
        is not compiled: compiling it takes as long as compiling all blocks, and gains little.
        """
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
        torch._dynamo.config.suppress_errors = True  # blocks that can't be compiled run eagerly, with a warning
        self._trained_block = torch.compile(_with_adapter, backend=backend, dynamic=False)

    def train(self, mode: bool = True) -> "DSUNet":
        """Set the mode of the head; the encoders always stay in evaluation mode."""
        super().train(False)
        self.training = mode
        self.head.train(mode)
        return self

    def forward(
        self,
        pixel_values: Tensor | None = None,
        guide_values: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        start_feature: str | None = None,
    ) -> DSUNetOutput:
        """Logits from images, stored features, or both: only missing features are computed.

        Args:
            pixel_values: (B, 3, S, S) at Hiera's input size: uint8 RGB, or normalised float.
            guide_values: (B, 3, S', S') at DINOv2's input size, same types.
            features: frozen features by name, (B, H, W, C) each, from `encode` or a store.
            start_feature: the feature that Hiera starts from; None: the latest possible one in `features`. It may be
                past some adapters, which are then skipped: frozen-adapter epochs use this.

        Raises `UsageError` if a required input is neither given nor computable, if shapes do not match, or if the
        encoders' parameters require gradients.
        """
        levels, guides = self._levels_and_guides(pixel_values, guide_values, features, start_feature)
        return DSUNetOutput(tuple(self.head(levels, guides)))

    def forward_intermediates(
        self,
        pixel_values: Tensor | None = None,
        guide_values: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        start_feature: str | None = None,
    ) -> dict[str, Tensor]:
        """All features by the paper's names, (B, C, H, W) each; arguments as for `forward`.

        S1..S4 after the adapters, V (or V<k> in ablations), modulated, fused, R1..R4, D1..D3.
        """
        levels, guides = self._levels_and_guides(pixel_values, guide_values, features, start_feature)
        found = {f"S{level}": levels[level] for level in LEVELS}
        return found | guides | self.head.intermediates(levels, guides)

    @torch.no_grad()
    def encode(
        self, pixel_values: Tensor | None, guide_values: Tensor | None, names: Collection[str]
    ) -> dict[str, Tensor]:
        """The named frozen features, exactly as in a store.

        Args:
            pixel_values, guide_values: as for `forward`; either may be None if not needed.
            names: Hiera's features (S1..S4, B<k>) and DINOv2's (V, V<k>), see `resume`.

        Returns:
            (B, H, W, C) each, contiguous, rounded to `feature_dtype`.
        """
        given = pixel_values if guide_values is None else guide_values
        if not names or given is None:
            return self.encode_at_once(None, None, names)
        count, size = len(given), self.encoder_batch_size or default_encoder_batch_size(given.device)
        widths = frozenset(spec.embed_dim // spec.num_heads for spec in (self.config.hiera, self.config.dino))
        with _encoder_kernels(given.device, widths), computing_threads(self.encoder_threads):
            blocks = [
                self.encode_at_once(
                    _padded_block(pixel_values, start, size), _padded_block(guide_values, start, size), names
                )
                for start in range(0, count, size)
            ]
        return {name: _concatenate([block[name] for block in blocks], count) for name in names}

    def encode_at_once(
        self, pixel_values: Tensor | None, guide_values: Tensor | None, names: Collection[str]
    ) -> dict[str, Tensor]:
        """Like `encode`, but on all samples at once and in the current gradient mode: for `encode` and for export."""
        guides = [name for name in names if name in guide_names(self.config)]
        tokens = [name for name in names if name not in guides]
        side = self.config.hiera_size if pixel_values is None else pixel_values.shape[-1]
        found = self._encode_hiera(pixel_values, tokens) | self._encode_dino(guide_values, guides, side // STRIDE)
        return {name: to_stored(tensor, self.feature_dtype) for name, tensor in found.items()}

    def _encode_hiera(self, pixel_values: Tensor | None, names: Collection[str]) -> dict[str, Tensor]:
        """Hiera's features without adapters, (B, H, W, C) each."""
        if not names:
            return {}
        if pixel_values is None:
            raise UsageError(
                f"{', '.join(names)} of Hiera can't be computed without pixel_values: give pixel_values, or these "
                "features."
            )
        wanted: dict[int, list[str]] = {}
        for name in names:
            wanted.setdefault(feature_block(self.config, name), []).append(name)
        hiera = self._require_hiera()
        tokens = embed_pixels(hiera, self._normalize(pixel_values))
        found: dict[str, Tensor] = {}
        for index in range(max(wanted)):
            tokens = self._encoder_block(hiera.blocks[index], tokens)
            found |= dict.fromkeys(wanted.get(index + 1, ()), tokens)
        return found

    def _encode_dino(self, guide_values: Tensor | None, names: Collection[str], grid: int) -> dict[str, Tensor]:
        """DINOv2's features, (B, H, W, C) each: V on S4's grid with side `grid`, V<k> on DINOv2's own grid."""
        if not names:
            return {}
        if self.dino is None:
            raise UsageError(
                f"{', '.join(names)} of DINOv2 must be given, because the model was created without DINOv2 "
                "(load_guide)."
            )
        if guide_values is None:
            raise UsageError(
                f"{', '.join(names)} of DINOv2 can't be computed without guide_values: give guide_values, or these "
                "features."
            )
        blocks = {name: int(name[1:] or self.config.dino.depth) for name in names}
        maps = dino_maps(self.dino, self._normalize(guide_values), blocks.values())
        found = {name: maps[block].permute(0, 2, 3, 1) for name, block in blocks.items()}
        if "V" in found:
            found["V"] = resize_by_products(found["V"], self._guide_weights(found["V"].shape[1], grid))
        return found

    def _guide_weights(self, source: int, target: int) -> Tensor:
        """The buffer, or new weights if images have another size than the config's."""
        if self.guide_weights.shape == (target, source):
            return self.guide_weights
        return bilinear_weights(source, target).to(self.guide_weights.device)

    def _levels_and_guides(
        self,
        pixel_values: Tensor | None,
        guide_values: Tensor | None,
        features: Mapping[str, Tensor] | None,
        start_feature: str | None,
    ) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """Adapted levels and DINOv2's features, (B, C, H, W), with the types and layouts of an end-to-end pass."""
        given = dict(features or {})
        self._check_inputs(given, pixel_values, guide_values)
        if pixel_values is not None:
            given["pixels"] = pixel_values
        point = self._resume_point(given, start_feature)
        lacking = [name for name in point.features if name not in given]
        if lacking:
            given |= self.encode(pixel_values, guide_values, lacking)
        live = {name: self._cast_live(name, given[name]) for name in point.features if name != "pixels"}
        levels = {int(name[1]): live[name].permute(0, 3, 1, 2) for name in point.levels}
        if point.block < self.config.hiera.depth:
            if point.start == "pixels":
                with computing_threads(self.encoder_threads):
                    tokens = embed_pixels(self._require_hiera(), self._normalize(given["pixels"]))
            else:
                tokens = live[point.start]
            self._run_blocks(tokens, point, levels)
        return levels, {name: live[name].permute(0, 3, 1, 2) for name in point.guides}

    def _check_inputs(self, features: Mapping[str, Tensor], *images: Tensor | None) -> None:
        """Raise `UsageError` if shapes do not match (broadcasting would hide it) or the encoders require gradients."""
        if torch.compiler.is_compiling():
            return
        if self.training and any(p.requires_grad for e in (self.hiera, self.dino) if e for p in e.parameters()):
            raise UsageError(
                "The encoders' parameters require gradients, and a saved head could not keep what they learn: "
                "give the optimizer only model.head.parameters(), and freeze the rest again."
            )
        counts = {one.shape[0] for one in (*features.values(), *images) if one is not None}
        if len(counts) > 1:
            raise UsageError(
                f"Images and features have different numbers of samples ({sorted(counts)}): give the same samples "
                "for each."
            )
        for name, tensor in features.items():
            if name == "pixels":
                continue
            channels = feature_shape(self.config, name)[-1]
            if tensor.ndim != 4 or tensor.shape[-1] != channels:
                raise UsageError(f"{name} is {tuple(tensor.shape)} and should be (B, H, W, {channels}), channels last.")

    def _resume_point(self, given: Collection[str], start_feature: str | None) -> ResumePoint:
        if start_feature is not None:
            return resume_at(self.config, start_feature)
        if not serving_features(self.config, given):
            raise UsageError("The model has nothing to start from: give pixel_values, or features of Hiera.")
        return resume_point(self.config, {*given, *self.config.injections.values()})

    def _run_blocks(self, tokens: Tensor, point: ResumePoint, levels: dict[int, Tensor]) -> None:
        """Run Hiera from `point.block` on, and add the levels that its stages produce."""
        hiera, first_adapted = self._require_hiera(), self.config.first_adapted
        for index in range(point.block, len(hiera.blocks)):
            if index < first_adapted:
                with torch.no_grad(), computing_threads(self.encoder_threads):
                    tokens = self._encoder_block(hiera.blocks[index], tokens)
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                # Blocks have no randomness, and a captured graph could not restore the generator's state.
                tokens = checkpoint(self._adapted_block, index, tokens, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = self._adapted_block(index, tokens)
            if index in hiera.stage_ends:
                # Autograd sums a level's gradients in the order of its uses: first the decoder, then the next block,
                # like the published program.
                levels[hiera.stage_ends.index(index) + 1] = tokens.permute(0, 3, 1, 2)

    def _adapted_block(self, index: int, tokens: Tensor) -> Tensor:
        block, adapter = self._require_hiera().blocks[index], self.head.adapters[str(index)]
        run = self._trained_block if torch.is_grad_enabled() else _with_adapter
        return run(self._encoder_block, block, adapter, tokens)

    def _cast_live(self, name: str, tensor: Tensor) -> Tensor:
        """Convert a feature to the type that an end-to-end pass gives it; the layout stays channels last.

        Hiera's residual stream changes from the parameters' type to autocast's after stage 1, since the shortcut then
        passes through a linear layer.
        """
        dtype, kind = self.mean.dtype, tensor.device.type  # the parameters' type, which may be rounded for this call
        may_change = name[0] in "SB" and torch.is_autocast_enabled(kind)
        if may_change and self.config.hiera.stage_of(feature_block(self.config, name)) > 1:
            dtype = torch.get_autocast_dtype(kind)
        return tensor.to(dtype)

    def _normalize(self, values: Tensor) -> Tensor:
        """Normalise uint8 RGB to float32 by ImageNet's mean and deviation; floats are taken as normalised already."""
        if values.dtype == torch.uint8:
            return (values.float() / 255 - self.mean) / self.std
        if values.device.type == "cpu" and not torch.compiler.is_compiling() and values.abs().max() > _MAX_NORMALISED:
            raise UsageError(
                f"Float images must be normalised, but these reach {values.abs().max().item():g}: give uint8, or "
                "subtract ImageNet's mean and divide by its standard deviation."
            )
        return values

    def _require_hiera(self) -> "Hiera":
        if self.hiera is None:
            raise UsageError("The model was created without Hiera, but Hiera's blocks have to run: load it.")
        return self.hiera


@contextmanager
def _encoder_kernels(device: torch.device, widths: frozenset[int]) -> Iterator[None]:
    """Select the same kernels in every mode: torch's deterministic mode would exclude some of them.

    This stays deterministic, since no forward kernel sums in a varying order.
    """
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with sdpa_kernel(_attention_backends(device, _dtype_in_autocast(device), widths), set_priority=True):
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)


@cache
def _attention_backends(device: torch.device, dtype: torch.dtype, widths: frozenset[int]) -> list[SDPBackend]:
    """`ENCODER_ATTENTION`, without cuDNN if it can't compute heads of these widths: it fails on some GPUs only when it
    is called, although torch offers it there."""
    if dtype not in (torch.float16, torch.bfloat16):  # cuDNN's has no others
        return ENCODER_ATTENTION[1:]
    if device.type == "cuda":
        try:
            with torch.no_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                for width in widths:
                    heads = torch.zeros(1, 1, 64, width, device=device, dtype=dtype)
                    functional.scaled_dot_product_attention(heads, heads, heads)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return ENCODER_ATTENTION[1:]
    return ENCODER_ATTENTION


def _dtype_in_autocast(device: torch.device) -> torch.dtype:
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else torch.get_default_dtype()


def _padded_block(values: Tensor | None, start: int, size: int) -> Tensor | None:
    """`size` samples from `start` on, padded by repeating the last one.

    The layout is always that of decoded images, since another layout may select other kernels.
    """
    if values is None:
        return None
    part = values[start : start + size]
    if len(part) < size:
        part = torch.cat([part, part[-1:].expand(size - len(part), -1, -1, -1)])
    return part.contiguous(memory_format=torch.channels_last)


def _concatenate(blocks: Sequence[Tensor], count: int) -> Tensor:
    """All groups without padding. Without autocast, which supports only one half-precision type and rejects others."""
    if len(blocks) == 1:
        return blocks[0][:count]
    with torch.autocast(blocks[0].device.type, enabled=False):
        return torch.cat(list(blocks))[:count]


def _with_adapter(run: RunBlock, block: "MultiScaleBlock", adapter: nn.Module, tokens: Tensor) -> Tensor:
    return run(block, adapter(tokens))


def _published_block(block: "MultiScaleBlock", tokens: Tensor) -> Tensor:
    result: Tensor = block(tokens)
    return result
