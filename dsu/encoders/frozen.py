"""The frozen encoders: DINOv2 from timm, and SAM 2's Hiera trunk (only the trunk of sam2, never its video part).

`run_block` runs a block, on a CPU without window padding: the same result as sam2's own block with fewer operations.

sam2 divides a map into square windows, and pads it with zeros if they do not fit: at 352 pixels Hiera stage 3 is 22x22
with windows of 16, so a block computes 1024 tokens instead of 484. Three facts make that unnecessary:

* Normalisation, linear layers and MLP process one token at a time. They need only the real tokens.
* A padded token is zero after the norm. Its query, key and value are the bias of the `qkv` layer, the same for all
  padded tokens, and its own output is cropped away.
* Attention does not depend on where a key comes from. So attention of a window's real queries over its real keys, plus
  one copy of the bias's key and value per padded token, gives the published numbers.

There are at most four window shapes: whole, cropped at the right, at the bottom, and at the corner. Each is one call of
torch's fused attention. A single key with the logarithm of the number of copies added to its logit would work too, but
bf16 rounds that logarithm by up to a percent, and a mask rules out the fastest kernels. For Hiera-L at 352 pixels this
takes 102 instead of 134 G multiply-adds per image.

On a GPU four small calls take longer than one padded call, so windows are padded there as in sam2.

The first block of a Hiera stage pools its queries 2x2. Windows start at even positions there, so every pooled cell is
within one window; a last odd row or column is omitted from the pooled map, as in sam2.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsu.config import DinoSpec, HieraSpec

if TYPE_CHECKING:
    from sam2.modeling.backbones.hieradet import Hiera, MultiScaleAttention, MultiScaleBlock
    from timm.models.vision_transformer import VisionTransformer

MAX_WINDOWS: Final = 32768
"""Windows per attention call: CUDA's kernels accept at most 65,535."""


# ---- DINOv2 ----


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

    (B, 3, S, S) normalised pixels to one (B, C, S/14, S/14) per block; for the last block these are DINOv2's
    `x_norm_patchtokens`.
    """
    with torch.no_grad():
        wanted = sorted(set(blocks))
        found = encoder.forward_intermediates(
            pixels, indices=[block - 1 for block in wanted], norm=True, intermediates_only=True
        )
        return {block: tensor for block, tensor in zip(wanted, found, strict=True) if isinstance(tensor, Tensor)}


# ---- Hiera ----


def build_hiera(spec: HieraSpec) -> "Hiera":
    """An uninitialised trunk (sam2's class and parameter names) in evaluation mode without gradients."""
    from sam2.modeling.backbones.hieradet import Hiera

    trunk = Hiera(**spec.model_dump(exclude={"name"}))
    return trunk.eval().requires_grad_(False)


def embed_pixels(trunk: "Hiera", pixels: Tensor) -> Tensor:
    """The tokens entering block 0: (B, 3, S, S) normalised pixels to (B, S/4, S/4, C)."""
    tokens = trunk.patch_embed(pixels)
    embedded: Tensor = tokens + trunk._get_pos_embed(tokens.shape[1:3])
    return embedded


def run_block(block: "MultiScaleBlock", tokens: Tensor) -> Tensor:
    """The result of `block(tokens)` in evaluation mode: (B, H, W, C) to (B, H', W', C')."""
    tokens = tokens.contiguous()  # the patch embedding leaves them channels first
    normed = block.norm1(tokens)
    shortcut = tokens if block.dim == block.dim_out else _pool(block.proj(normed), block.pool)
    attend = padded_attention if tokens.is_cuda else unpadded_attention
    tokens = shortcut + attend(block.attn, normed, block.window_size)
    result: Tensor = tokens + block.mlp(block.norm2(tokens))
    return result


def _pool(x: Tensor, pool: nn.Module | None) -> Tensor:
    """(B, H, W, C) through a pooling layer for (B, C, H, W)."""
    pooled: Tensor = x if pool is None else pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return pooled


def padded_attention(layer: "MultiScaleAttention", x: Tensor, window: int) -> Tensor:
    """Apply `layer` within windows with side `window` (0: one window over the map), the last ones padded with zeros.

    (B, H, W, C) to (B, H', W', C').
    """
    from sam2.modeling.backbones.utils import window_partition, window_unpartition

    x = x.to(layer.qkv.weight.dtype)  # before padding and copying; autocast would do it afterwards
    if not window:
        mixed: Tensor = layer(x)
        return mixed
    windows, padded = window_partition(x, window)
    parts = [layer(part) for part in windows.split(MAX_WINDOWS)]
    mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
    stride = window // mixed.shape[1]  # 2 where queries are pooled
    left, padded = ([side // stride for side in sides] for sides in (x.shape[1:3], padded))
    merged: Tensor = window_unpartition(mixed, window // stride, padded, left)
    return merged


def unpadded_attention(layer: "MultiScaleAttention", x: Tensor, window: int) -> Tensor:
    """The result of `padded_attention`, without padding."""
    strips = layer.qkv(x).split(_window_lengths(x.shape[1], window), dim=1)
    mixed = torch.cat(
        [
            torch.cat(
                [
                    _attend_in_windows(layer, part, window)
                    for part in strip.split(_window_lengths(x.shape[2], window), 2)
                ],
                dim=2,
            )
            for strip in strips
        ],
        dim=1,
    )
    result: Tensor = layer.proj(mixed)
    return result


def _window_lengths(side: int, window: int) -> list[int]:
    """The length of a side that whole windows cover, and the remainder for the last, cropped window."""
    rest = side % window if window else 0
    return [length for length in (side - rest, rest) if length]


def _attend_in_windows(layer: "MultiScaleAttention", qkv: Tensor, window: int) -> Tensor:
    """Attention within the equally shaped windows of one part of the map: (B, H, W, 3 C') to (B, H', W', C')."""
    batch, height, width, _ = qkv.shape
    high, wide = min(height, window or height), min(width, window or width)
    rows, columns, heads = height // high, width // wide, layer.num_heads
    qkv = qkv.reshape(batch, rows, high, columns, wide, 3, -1)
    q, k, v = qkv.permute(5, 0, 1, 3, 2, 4, 6).flatten(1, 3).unbind()  # each (windows, high, wide, C')
    q = _pool(q, layer.q_pool)
    high, wide = q.shape[1:3]
    q, k, v = (part.reshape(part.shape[0], -1, heads, part.shape[-1] // heads).transpose(1, 2) for part in (q, k, v))
    padded = window * window - k.shape[2] if window else 0
    if padded:
        _, key, value = layer.qkv.bias.to(k.dtype).view(3, 1, heads, 1, -1)
        k = torch.cat([k, key.expand(k.shape[0], -1, padded, -1)], dim=2)
        v = torch.cat([v, value.expand(v.shape[0], -1, padded, -1)], dim=2)
    mixed = functional.scaled_dot_product_attention(q, k, v)  # (windows, heads, positions, C' / heads)
    mixed = mixed.reshape(batch, rows, columns, heads, high, wide, -1)
    return mixed.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, rows * high, columns * wide, -1)
