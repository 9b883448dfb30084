"""Operations of the published program for which the network uses faster ones with the same results."""

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsu.encoders.frozen import dino_maps
from dsu.network.layers import TAP, ContentGuidedFusion, ReceptiveFieldBlock, WaveletConv
from dsu.network.network import DSUNet
from dsu.network.resize import resize_map
from dsu.sharing.published import SIGNS

__all__ = ["grouped_haar", "grouped_inverse_haar", "grouped_pixel_attention", "use_published_operations"]


def grouped_haar(x: Tensor) -> Tensor:
    """Like `haar`, by a convolution with one group per channel."""
    return functional.conv2d(x, _taps(x, x.shape[1]), stride=2, groups=x.shape[1])


def grouped_inverse_haar(subbands: Tensor) -> Tensor:
    """Like `inverse_haar`, by a transposed convolution with one group per channel."""
    channels = subbands.shape[1] // 4
    return functional.conv_transpose2d(subbands.contiguous(), _taps(subbands, channels), stride=2, groups=channels)


def grouped_pixel_attention(fusion: ContentGuidedFusion, total: Tensor, coarse: Tensor) -> Tensor:
    """Apply the layer that owns the weights to the two maps' interleaved channels."""
    pairs = torch.stack([total, coarse], dim=2).flatten(1, 2)
    attended: Tensor = fusion.pixel(functional.pad(pairs, (3, 3, 3, 3), mode="reflect"))
    return attended


def use_published_operations(network: nn.Module) -> None:
    """Use the published operations in a network, in place."""
    for module in network.modules():
        if isinstance(module, WaveletConv):
            module.forward = partial(_wavelet, module)  # type: ignore[method-assign]
        if isinstance(module, ContentGuidedFusion):
            module.forward = partial(_fusion, module)  # type: ignore[method-assign]
        if isinstance(module, ReceptiveFieldBlock):
            module.forward = partial(_receptive_field, module)  # type: ignore[method-assign]
        if isinstance(module, DSUNet):
            module._encode_dino = partial(_encode_dino, module)  # type: ignore[method-assign]


def _wavelet(conv: WaveletConv, x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    even = functional.pad(x, (0, width % 2, 0, height % 2))
    detail = grouped_inverse_haar(conv.subband_scale(conv.subband(grouped_haar(even))))
    base: Tensor = conv.base_scale(conv.base(x))
    return base + detail[..., :height, :width]


def _fusion(fusion: ContentGuidedFusion, level: Tensor, modulated: Tensor) -> Tensor:
    total = level + modulated
    channel = fusion.channel(functional.adaptive_avg_pool2d(total, 1))
    summary = torch.cat([total.mean(1, keepdim=True), total.max(1, keepdim=True).values], dim=1)
    spatial = fusion.spatial(functional.pad(summary, (3, 3, 3, 3), mode="reflect"))
    weight = torch.sigmoid(torch.sigmoid(grouped_pixel_attention(fusion, total, channel + spatial)))
    fused: Tensor = fusion.out(total + weight * level + (1 - weight) * modulated)
    return fused


def _receptive_field(block: ReceptiveFieldBlock, level: Tensor) -> Tensor:
    seen = torch.cat([branch(level) for branch in block.branches], dim=1)
    return functional.relu(block.join(seen) + block.shortcut(level))


def _encode_dino(network: DSUNet, guide_values: Tensor, names: Collection[str], grid: int) -> dict[str, Tensor]:
    assert list(names) == ["V"] and network.dino is not None
    last = network.config.dino.depth
    resized = resize_map(dino_maps(network.dino, guide_values.contiguous(), [last])[last], grid)
    return {"V": resized.permute(0, 2, 3, 1)}


def _taps(like: Tensor, channels: int) -> Tensor:
    """(4 C, 1, 2, 2)."""
    signs = torch.tensor(SIGNS, dtype=like.dtype)
    return (TAP * signs).repeat(channels, 1, 1).unsqueeze(1)
