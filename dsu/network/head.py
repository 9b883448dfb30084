"""The head, all layers that are trained: adapters, modulation and fusion of DINOv2, and the decoder."""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsu.config import LEVELS, DSUNetConfig
from dsu.network.layers import (
    WIDTH,
    Adapter,
    BatchNorm,
    ChannelModulation,
    ContentGuidedFusion,
    ReceptiveFieldBlock,
    SpatialFeatureFusion,
)
from dsu.network.resize import resize_map

SIDE_SCALES = (16, 8, 4)
"""Upsampling factors of the side outputs, deepest first: their grids are those of S3, S2 and S1."""


class Head(nn.Module):
    """All trainable parts of DSU-Net (7.226 M parameters in the paper's setting).

    The network calls the adapters inside Hiera; `forward` runs everything after the encoders.

    Args:
        config: determines all widths, which blocks have adapters and which levels DINOv2 is fused into.
        as_published: see `DSUNet`.
    """

    def __init__(self, config: DSUNetConfig, *, as_published: bool = False) -> None:
        super().__init__()
        hiera = config.hiera
        self.injections = config.injections
        self.adapters = nn.ModuleDict(
            {str(block): Adapter(hiera.input_dim(block)) for block in range(config.first_adapted, hiera.depth)}
        )
        self.modulations = nn.ModuleDict(
            {str(level): ChannelModulation(config.dino.embed_dim, hiera.level_dim(level)) for level in self.injections}
        )
        self.fusions = nn.ModuleDict(
            {str(level): ContentGuidedFusion(hiera.level_dim(level)) for level in self.injections}
        )
        self.receptive_fields = nn.ModuleList(ReceptiveFieldBlock(hiera.level_dim(level)) for level in LEVELS)
        self.decoders = nn.ModuleList(SpatialFeatureFusion(as_published=as_published) for _ in SIDE_SCALES)
        self.sides = nn.ModuleList(nn.Conv2d(WIDTH, 1, 1) for _ in SIDE_SCALES)
        self._norms = tuple(layer for layer in self.modules() if isinstance(layer, BatchNorm))

    @property
    def norm_groups(self) -> int:
        """Number of normalisations per pass, where norms that run together count once: see `dsu.network.norms`."""
        return len(self.modulations) + 5 * len(self.receptive_fields) + 5 * len(self.decoders)

    def init_adapters_identity(self, blocks: Iterable[str] | None = None) -> None:
        """Initialise the adapters of some blocks, or of all, as the identity."""
        for block in self.adapters if blocks is None else blocks:
            cast(Adapter, self.adapters[block]).init_identity()

    def forward(self, levels: Mapping[int, Tensor], guides: Mapping[str, Tensor]) -> list[Tensor]:
        """Logits (B, 1, S, S) at the input's size, deepest first; the last one is the prediction.

        `levels` maps 1..4 to (B, C, H, W); `guides` has the maps named in `injections`.
        """
        found = self.intermediates(levels, guides)
        return [
            functional.interpolate(side(found[f"D{index}"]), scale_factor=scale, mode="bilinear")
            for index, (side, scale) in enumerate(zip(self.sides, SIDE_SCALES, strict=True), start=1)
        ]

    def intermediates(self, levels: Mapping[int, Tensor], guides: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every intermediate map by the paper's names: `modulated` and `fused` (of the deepest level that DINOv2 is
        fused into), R1..R4 after the receptive-field blocks, D1..D3 after the decoders, deepest first; if DINOv2 is
        fused into several levels, also `modulated1`, ... and `fused1`, ...
        """
        if self.training:
            torch._foreach_add_([cast(Tensor, norm.num_batches_tracked) for norm in self._norms], 1)
        found: dict[str, Tensor] = {}
        reduced = []
        for level, field in zip(LEVELS, self.receptive_fields, strict=True):
            x = levels[level]
            if level in self.injections:
                modulated = self.modulations[str(level)](resize_map(guides[self.injections[level]], x.shape[-1]))
                x = self.fusions[str(level)](x, modulated)
                suffix = str(level) if len(self.injections) > 1 else ""
                found |= {f"modulated{suffix}": modulated, f"fused{suffix}": x}
            reduced.append(field(x))
            found[f"R{level}"] = reduced[-1]
        deep = reduced[3]
        for index, (decoder, big) in enumerate(zip(self.decoders, reduced[2::-1], strict=True), start=1):
            deep = decoder(deep, big)
            found[f"D{index}"] = deep
        return found
