"""DINOv2 from timm, frozen."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsu.config import DinoSpec

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

__all__ = ["build_dino", "dino_maps"]


def build_dino(spec: DinoSpec, size: int) -> "VisionTransformer":
    """An uninitialised vision transformer for inputs of `size` pixels, in evaluation mode without gradients."""
    from timm.models.vision_transformer import VisionTransformer

    encoder = VisionTransformer(
        img_size=size,
        patch_size=spec.patch_size,
        embed_dim=spec.embed_dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        init_values=spec.layer_scale,
        num_classes=0,
    )
    return encoder.eval().requires_grad_(False)


def dino_maps(encoder: "VisionTransformer", pixels: Tensor, blocks: Collection[int]) -> dict[int, Tensor]:
    """Patch tokens after the given blocks (counted from 1), each through the final norm.

    (B, 3, S, S) normalised pixels to one (B, C, S/14, S/14) a block; for the last block these are DINOv2's
    `x_norm_patchtokens`.
    """
    with torch.no_grad():
        wanted = sorted(set(blocks))
        found = encoder.forward_intermediates(
            pixels, indices=[block - 1 for block in wanted], norm=True, intermediates_only=True
        )
        return {block: tensor for block, tensor in zip(wanted, found, strict=True) if isinstance(tensor, Tensor)}
