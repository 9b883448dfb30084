"""A block of Hiera without window padding: what sam2's own block gives, from fewer operations.

sam2 cuts a map into square windows and pads it with zeros where they do not fit: at 352 pixels Hiera stage 3 is
22x22 under windows of 16, so 1024 tokens a block are computed instead of 484. Three facts make that avoidable:

* Normalisation, linear layers and MLP see one token at a time. They need the real tokens only.
* A padded token is zero after the norm. Its query, key and value are the bias of the `qkv` layer, the same for all
  of them, and its own output is cut away.
* Attention does not ask where a key comes from. So the real queries of a window over its real keys, and as many
  copies of the bias's key and value as tokens were padded, are the published numbers.

At most four shapes of window arise: whole ones, one cut at the right, one at the bottom, one at the corner. Each is
one call of torch's fused attention. In place of the copies, one key whose logit is raised by the logarithm of their
number would do as well; but bf16 rounds that logarithm by up to a percent, and a mask shuts out the fastest kernels.
Counted for Hiera-L at 352 pixels: 102 instead of 134 G multiply-adds an image.

The first block of a Hiera stage pools its queries 2x2. Windows start at even positions there, so every pooled cell
lies in one window; a last odd row or column is left out of the pooled map, as in sam2.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from sam2.modeling.backbones.hieradet import MultiScaleAttention, MultiScaleBlock

__all__ = ["run_block"]


def run_block(block: "MultiScaleBlock", tokens: Tensor) -> Tensor:
    """What `block(tokens)` gives in evaluation mode, without padding: (B, H, W, C) to (B, H', W', C')."""
    tokens = tokens.contiguous()  # the patch embedding leaves them channels first
    normed = block.norm1(tokens)
    shortcut = tokens if block.dim == block.dim_out else _pool(block.proj(normed), block.pool)
    tokens = shortcut + _attention(block.attn, normed, block.window_size)
    result: Tensor = tokens + block.mlp(block.norm2(tokens))
    return result


class _Span(NamedTuple):
    """`windows` in a row, each of `length` positions, along one side from `start` on."""

    start: int
    windows: int
    length: int


def _spans(side: int, window: int) -> list[_Span]:
    """Whole windows along a side, and the one that the side's end cuts."""
    whole, rest = divmod(side, window)
    return [
        *([_Span(0, whole, window)] if whole else []),
        *([_Span(whole * window, 1, rest)] if rest else []),
    ]


def _pool(x: Tensor, pool: nn.Module | None) -> Tensor:
    """(B, H, W, C) through a pooling layer for (B, C, H, W)."""
    pooled: Tensor = x if pool is None else pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return pooled


def _attention(layer: "MultiScaleAttention", x: Tensor, window: int) -> Tensor:
    """`layer` within windows of that side (0: one window over all): (B, H, W, C) to (B, H', W', C')."""
    height, width = x.shape[1:3]
    qkv = layer.qkv(x)
    rows = _spans(height, window or height)
    columns = _spans(width, window or width)
    mixed = torch.cat(
        [torch.cat([_windows(layer, qkv, row, column, window) for column in columns], dim=2) for row in rows], dim=1
    )
    result: Tensor = layer.proj(mixed)
    return result


def _windows(layer: "MultiScaleAttention", qkv: Tensor, row: _Span, column: _Span, window: int) -> Tensor:
    """Attention within all windows of one shape, put back on their part of the map.

    qkv (B, H, W, 3 C') to (B, rows, columns, C').
    """
    batch, heads = len(qkv), layer.num_heads
    qkv = qkv[:, row.start :, column.start :][:, : row.windows * row.length, : column.windows * column.length]
    qkv = qkv.reshape(batch, row.windows, row.length, column.windows, column.length, 3, -1)
    q, k, v = qkv.permute(5, 0, 1, 3, 2, 4, 6).flatten(1, 3).unbind()  # each (windows, length, length, C')
    q = _pool(q, layer.q_pool)
    length, across = q.shape[1:3]
    q, k, v = (part.reshape(len(part), -1, heads, part.shape[-1] // heads).transpose(1, 2) for part in (q, k, v))
    padded = window * window - row.length * column.length if window else 0
    if padded:
        _, key, value = layer.qkv.bias.to(k.dtype).view(3, 1, heads, 1, -1)
        k = torch.cat([k, key.expand(len(k), -1, padded, -1)], dim=2)
        v = torch.cat([v, value.expand(len(v), -1, padded, -1)], dim=2)
    mixed = functional.scaled_dot_product_attention(q, k, v)  # (windows, heads, positions, C' / heads)
    mixed = mixed.reshape(batch, row.windows, column.windows, heads, length, across, -1)
    return mixed.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, row.windows * length, column.windows * across, -1)
