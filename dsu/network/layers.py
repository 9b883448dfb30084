"""The trained layers, in the order of the paper's Section III.

adapter -> wavelet convolution -> channel modulation -> content-guided fusion -> receptive-field block -> spatial
feature fusion. `dsu.network.head` connects them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsu.network.norms import batch_norms

HIDDEN = 32
"""Width of an adapter's bottleneck."""
TAP = 0.4999999701976776
"""Product of two float32 taps 1/sqrt(2), as in the published filters; used in float64 too."""
SQUEEZE = 8
"""Reduction factor of the channel attention's middle layer."""
WIDTH = 64
"""Channels of the decoder."""
INNER = 32
"""Channels of the decoder's attention."""
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
"""The tensors of a batch norm, in the order of `batch_norms`."""


# ---- the adapter in front of a Hiera block (after arXiv 2304.09148) ----


class Adapter(nn.Module):
    """x + GELU(W2 GELU(W1 x)) on the tokens that enter a block.

    The bottleneck's width is always 32; both layers have biases and GELU is exact.

    Args:
        dim: channels of the tokens entering the block.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, HIDDEN)
        self.up = nn.Linear(HIDDEN, dim)
        self.activation = nn.GELU()

    def init_identity(self) -> None:
        """Initialise as the identity, still trainable: only the second layer is zero, and GELU'(0) is 1/2."""
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, H, W, dim) to the same shape."""
        prompt: Tensor = self.activation(self.up(self.activation(self.down(tokens))))
        return tokens + prompt


# ---- depthwise convolution with a wavelet branch (arXiv 2407.05848): a large receptive field with few weights ----


def haar(x: Tensor) -> Tensor:
    """One level of the orthonormal Haar transform.

    (B, C, H, W) with even sides to (B, 4 C, H/2, W/2): channel 4 c + subband, in the order LL, low along the width
    and high along the height, high along the width and low along the height, HH.

    Computed by additions within each 2x2 cell: a grouped convolution gives the same numbers, but cuDNN runs its groups
    one by one.
    """
    return _butterfly(functional.pixel_unshuffle(x, 2))


def inverse_haar(subbands: Tensor) -> Tensor:
    """Undo `haar`: (B, 4 C, H, W) to (B, C, 2 H, 2 W).

    The transform is orthonormal and its 4x4 matrix symmetric, so the same additions undo it.
    """
    return functional.pixel_shuffle(_butterfly(subbands), 2)


def _butterfly(x: Tensor) -> Tensor:
    """The sums (++++), (++--), (+-+-) and (+--+) of every four channels in a row, times the tap: same shape."""
    batch, channels, height, width = x.shape
    a, b, c, d = x.reshape(batch, channels // 4, 4, height, width).unbind(2)
    top, bottom, left, right = a + b, c + d, a - b, c - d
    return TAP * torch.stack([top + bottom, top - bottom, left + right, left - right], dim=2).flatten(1, 2)


class ChannelScale(nn.Module):
    """One learned factor per channel."""

    def __init__(self, channels: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, channels, 1, 1), start))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) times (1, C, 1, 1)."""
        return x * self.weight


class WaveletConv(nn.Module):
    """A depthwise 3x3 convolution, plus another one between a Haar transform and its inverse.

    Both branches have a learned factor per channel: the base starts at 1 (and scales its bias too), the wavelet branch
    at 0.1.

    Args:
        channels: channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.base = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.base_scale = ChannelScale(channels, 1.0)
        self.subband = nn.Conv2d(4 * channels, 4 * channels, 3, padding=1, groups=4 * channels, bias=False)
        self.subband_scale = ChannelScale(4 * channels, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape; odd sides are padded by a zero row or column and cropped again."""
        height, width = x.shape[-2:]
        even = functional.pad(x, (0, width % 2, 0, height % 2))
        detail = inverse_haar(self.subband_scale(self.subband(haar(even))))
        base: Tensor = self.base_scale(self.base(x))
        return base + detail[..., :height, :width]


# ---- channel modulation: adapt DINOv2's map to a level of Hiera ----


class BatchNorm(nn.BatchNorm2d):
    """torch's batch norm without its batch counter: the head counts for all norms at once, which saves 88 kernels per
    step."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return _apply_norms([self], [x])[0]


def _apply_norms(norms: Sequence[BatchNorm], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Apply each norm to its own (B, C, H, W), all of one size."""
    parts = [[getattr(norm, name) for name in _NORM_TENSORS] for norm in norms]
    first = norms[0]
    return batch_norms(inputs, parts, training=first.training, momentum=first.momentum or 0, eps=first.eps)


def _apply_layers(layers: Sequence[nn.Sequential], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Apply each layer (convolution, norm, optional activation) to its own (B, C, H, W), the norms jointly."""
    convolved = [layer[0](x) for layer, x in zip(layers, inputs, strict=True)]
    normed = _apply_norms([layer[1] for layer in layers], convolved)  # type: ignore[misc]
    return [layer[2](x) if len(layer) > 2 else x for layer, x in zip(layers, normed, strict=True)]


class ChannelModulation(nn.Module):
    """Depthwise wavelet convolution, 1x1 convolution to the level's width, batch norm, ReLU.

    The map is already on the level's grid (resized bilinearly), so only its number of channels changes here.

    Args:
        dino_dim: channels of DINOv2's map.
        level_dim: channels of the Hiera level to fuse it into.
    """

    def __init__(self, dino_dim: int, level_dim: int) -> None:
        super().__init__()
        self.depthwise = WaveletConv(dino_dim)
        self.pointwise = nn.Conv2d(dino_dim, level_dim, 1, bias=False)
        self.norm = BatchNorm(level_dim)

    def forward(self, dino_map: Tensor) -> Tensor:
        """(B, dino_dim, h, w), already on the level's grid, to (B, level_dim, h, w)."""
        return functional.relu(self.norm(self.pointwise(self.depthwise(dino_map))))


# ---- content-guided attention fusion of a Hiera level and modulated DINOv2 (arXiv 2301.04805) ----


class ContentGuidedFusion(nn.Module):
    """Fuse two feature maps, weighted by channel, spatial and pixel attention.

    The pixel attention's sigmoid is applied twice, as in the published program: each map's weight is between 0.5 and
    0.73.

    Args:
        dim: channels of both maps, which need at least 4x4 positions (reflect padding by 3).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.channel = nn.Sequential(nn.Conv2d(dim, dim // SQUEEZE, 1), nn.ReLU(), nn.Conv2d(dim // SQUEEZE, dim, 1))
        self.spatial = nn.Conv2d(2, 1, 7)
        self.pixel = nn.Conv2d(2 * dim, dim, 7, groups=dim)
        self.out = nn.Conv2d(dim, dim, 1)

    def forward(self, level: Tensor, modulated: Tensor) -> Tensor:
        """Two (B, dim, H, W) to one."""
        total = level + modulated
        channel = self.channel(total.mean((2, 3), keepdim=True))  # (B, dim, 1, 1)
        summary = torch.cat([total.mean(1, keepdim=True), total.max(1, keepdim=True).values], dim=1)
        spatial = self.spatial(reflect_pad(summary, 3))  # (B, 1, H, W)
        coarse = channel + spatial
        weight = torch.sigmoid(torch.sigmoid(self._pixel_attention(total, coarse)))
        fused: Tensor = self.out(total + weight * level + (1 - weight) * modulated)
        return fused

    def _pixel_attention(self, total: Tensor, coarse: Tensor) -> Tensor:
        """Apply `self.pixel` to both maps with interleaved channels: (B, dim, H, W).

        Each group of that layer reads one channel of the sum and the same channel of the coarse attention. Two
        depthwise convolutions with the halves of its weight give the same numbers and have fast kernels; groups of two
        don't.
        """
        weight, dim = self.pixel.weight, len(self.pixel.weight)
        total, coarse = reflect_pad(total, 3), reflect_pad(coarse, 3)
        of_total = functional.conv2d(total, weight[:, :1], self.pixel.bias, groups=dim)
        return of_total + functional.conv2d(coarse, weight[:, 1:], groups=dim)


def reflect_pad(x: Tensor, by: int) -> Tensor:
    """Reflect-pad (B, C, H, W): (B, C, H + 2 by, W + 2 by).

    torch's reflection padding has no deterministic backward pass on a GPU; concatenated slices do.
    """
    x = torch.cat([x[..., 1 : by + 1].flip(-1), x, x[..., -by - 1 : -1].flip(-1)], dim=-1)
    return torch.cat([x[..., 1 : by + 1, :].flip(-2), x, x[..., -by - 1 : -1, :].flip(-2)], dim=-2)


# ---- receptive-field block: every level to 64 channels (after arXiv 1711.07767) ----


class ConvNorm(nn.Sequential):
    """A convolution without bias and its batch norm; no activation between the layers of a branch.

    `kernel` is a side or (height, width); the padding keeps the size.
    """

    def __init__(self, dim_in: int, dim_out: int, kernel: int | tuple[int, int], dilation: int = 1) -> None:
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (height // 2 * dilation, width // 2 * dilation)
        super().__init__(
            nn.Conv2d(dim_in, dim_out, (height, width), padding=padding, dilation=dilation, bias=False),
            BatchNorm(dim_out),
        )


class ReceptiveFieldBlock(nn.Module):
    """Four branches with kernels and dilations 1, 3, 5 and 7, joined by a 3x3 convolution, plus a 1x1 of the input.

    Args:
        dim: channels of the level.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                ConvNorm(dim, WIDTH, 1),
                *(
                    nn.Sequential(
                        ConvNorm(dim, WIDTH, 1),
                        ConvNorm(WIDTH, WIDTH, (1, kernel)),
                        ConvNorm(WIDTH, WIDTH, (kernel, 1)),
                        ConvNorm(WIDTH, WIDTH, 3, dilation=kernel),
                    )
                    for kernel in (3, 5, 7)
                ),
            ]
        )
        self.join = ConvNorm(4 * WIDTH, WIDTH, 3)
        self.shortcut = ConvNorm(dim, WIDTH, 1)

    def forward(self, level: Tensor) -> Tensor:
        """(B, dim, H, W) to (B, 64, H, W)."""
        branches: Sequence[Any] = list(self.branches)[1:]
        firsts: list[Any] = [*(branch[0] for branch in branches), self.shortcut]
        started = functional.conv2d(level, torch.cat([first[0].weight for first in firsts]))
        *passed, shortcut = torch.split(_apply_norms_to_channels([first[1] for first in firsts], started), WIDTH, dim=1)
        for index in (1, 2):
            passed = _apply_layers([branch[index] for branch in branches], passed)
        lasts: list[Any] = [self.branches[0], *(branch[3] for branch in branches)]
        ends = [last[0](x) for last, x in zip(lasts, [level, *passed], strict=True)]
        seen = _apply_norms_to_channels([last[1] for last in lasts], torch.cat(ends, dim=1))
        return functional.relu(self.join(seen) + shortcut)


def _apply_norms_to_channels(norms: Sequence[BatchNorm], x: Tensor) -> Tensor:
    """Apply each norm to its own channels of (B, C, H, W), all in one pass, since norms are per channel."""
    first, widths = norms[0], [norm.num_features for norm in norms]
    parts = {name: [getattr(norm, name) for norm in norms] for name in _NORM_TENSORS}
    weight, bias, mean, variance = (torch.cat(parts[name]) for name in _NORM_TENSORS)
    [x] = batch_norms(
        [x],
        [[weight, bias, mean, variance]],
        training=first.training,
        momentum=first.momentum or 0,
        eps=first.eps,
    )
    if first.training:
        torch._foreach_copy_(parts["running_mean"], torch.split(mean, widths))
        torch._foreach_copy_(parts["running_var"], torch.split(variance, widths))
    return x


# ---- spatial feature fusion, a decoder step: a small, deep map guides a large one ----


def _conv_norm_relu(dim_in: int, dim_out: int, kernel: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim_in, dim_out, kernel, padding=kernel // 2, bias=False),
        BatchNorm(dim_out),
        nn.ReLU(),
    )


class SpatialFeatureFusion(nn.Module):
    """Single-head attention over the large map's positions: queries from both maps, keys and values from the large one.

    At 88x88 the attention matrix has 60 million entries per image. Torch's fused attention never materialises it, in
    training or inference: at batch 2 it needs 100 MiB instead of 1.5 GB, and its backward pass recomputes the matrix
    block by block in less time than reading it back would take.

    Args:
        as_published: materialise the matrix, as the authors do.
    """

    def __init__(self, *, as_published: bool = False) -> None:
        super().__init__()
        self._attend = _attend_explicitly if as_published else _attend
        self.small = _conv_norm_relu(WIDTH, WIDTH)
        self.big = _conv_norm_relu(WIDTH, WIDTH)
        self.query = nn.Sequential(_conv_norm_relu(WIDTH, INNER), _conv_norm_relu(INNER, INNER))
        self.key = nn.Sequential(_conv_norm_relu(WIDTH, INNER), _conv_norm_relu(INNER, INNER))
        self.value = _conv_norm_relu(WIDTH, INNER)
        self.attended = _conv_norm_relu(INNER, WIDTH)
        self.join = _conv_norm_relu(2 * WIDTH, WIDTH, kernel=3)

    def forward(self, small: Tensor, big: Tensor) -> Tensor:
        """(B, 64, h, w) and (B, 64, H, W) to (B, 64, H, W)."""
        small = functional.interpolate(small, size=big.shape[-2:], mode="bilinear", align_corners=False)
        small, large = _apply_layers([self.small, self.big], [small, big])
        both = small + large
        query, key, value = _apply_layers([self.query[0], self.key[0], self.value], [both, both, big])  # type: ignore[list-item]
        query, key = _apply_layers([self.query[1], self.key[1]], [query, key])  # type: ignore[list-item]
        mixed = self._attend(query, key, value)
        joined: Tensor = self.join(torch.cat([self.attended(mixed), big], dim=1))
        return joined


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, 32, H, W) each to the same shape: every position of `query` attends to all of `key`, scaled by 32^-0.5."""
    query, key, sequence = (_as_sequence(x).unsqueeze(1) for x in (query, key, value))  # one head
    mixed = functional.scaled_dot_product_attention(query, key, sequence)
    return mixed.squeeze(1).transpose(1, 2).reshape(value.shape)


def _attend_explicitly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Like `_attend`, with the authors' operations in their order."""
    weight = (INNER**-0.5 * (_as_sequence(query) @ key.flatten(2))).softmax(-1)
    mixed: Tensor = weight @ _as_sequence(value)
    return mixed.transpose(1, 2).contiguous().view(value.shape)


def _as_sequence(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H W, C), contiguous: otherwise torch falls back to the materialised attention."""
    return x.flatten(2).transpose(1, 2).contiguous()
