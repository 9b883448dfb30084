"""Batch norms over a batch that may be divided among processes: each normalises its samples with global statistics.

torch's own sync norm does not support CPUs. Each process contributes its number of positions, means and variances; an
all-reduce collects them, and Chan's formula combines them. The backward pass sums two values per channel. Norms that
can run together share one exchange in each direction, since even a small exchange has a fixed cost.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dsu.distributed import World

_shared: tuple[World, Tensor] | None = None


@contextmanager
def shared_batch(world: World, share: Tensor | None) -> Iterator[None]:
    """Inside this context, training norms use statistics over all processes' samples.

    Args:
        world: the processes.
        share: (2,) number of samples that count in this process and in all (see `Batch`); None: batches are not
            divided.
    """
    global _shared
    before, _shared = _shared, None if share is None else (world, share)
    try:
        yield
    finally:
        _shared = before


def batch_norms(
    inputs: Sequence[Tensor], norms: Sequence[Sequence[Tensor]], *, training: bool, momentum: float, eps: float
) -> list[Tensor]:
    """`functional.batch_norm` of each input (B, C, H, W), all of one size except for channels.

    Args:
        inputs: the tensors to normalise.
        norms: weight, bias, running mean and running variance of each, (C,); the last two are updated in training.
        training, momentum, eps: see `functional.batch_norm`.
    """
    if not training or _shared is None:
        return [
            functional.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
            for x, (weight, bias, mean, variance) in zip(inputs, norms, strict=True)
        ]
    weights, biases, running_means, running_variances = (list(parts) for parts in zip(*norms, strict=True))
    world, share = _shared
    count, mean, variance = _statistics(world, share, inputs, running_means[0].dtype)
    widths = [x.shape[1] for x in inputs]
    torch._foreach_lerp_(running_means, torch.split(mean, widths), momentum)
    torch._foreach_lerp_(running_variances, torch.split(variance * (count / (count - 1)), widths), momentum)
    # A padding sample contributes neither to the statistics nor to their gradient.
    correction = (share[0] > 0) / count
    return list(_SharedNorm.apply(world, eps, correction, mean, variance, *inputs, *weights, *biases))


@torch.no_grad()
def _statistics(
    world: World, share: Tensor, inputs: Sequence[Tensor], kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The total number of positions (a scalar), and the concatenated means and variances of all inputs' channels."""
    own = [torch.var_mean(x.to(kind), (0, 2, 3), correction=0) for x in inputs]
    row = torch.cat(
        [share[:1].to(kind) * inputs[0][0, 0].numel(), *(mean for _, mean in own), *(var for var, _ in own)]
    )
    rows = row.new_zeros(world.size, len(row))
    rows[world.rank] = row
    world.all_reduce(rows)
    counts, values = rows[:, :1], rows[:, 1:]
    means, variances = values.chunk(2, dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    return count, mean, (counts * (variances + (means - mean).square())).sum(0) / count


class _SharedNorm(torch.autograd.Function):
    """Normalise inputs with the statistics of all processes, and differentiate through those statistics.

    Both passes use torch's norm with given statistics: one kernel on any device.
    """

    @staticmethod
    def forward(
        ctx: Any, world: World, eps: float, correction: Tensor, mean: Tensor, variance: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.world, ctx.eps = world, eps
        ctx.save_for_backward(correction, mean, variance, *tensors)
        return tuple(
            functional.batch_norm(x, its_mean, its_variance, weight, bias, eps=eps)
            for x, weight, bias, its_mean, its_variance in _split_by_norm(mean, variance, tensors)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        correction, mean, variance, *tensors = ctx.saved_tensors
        parts = list(_split_by_norm(mean, variance, tensors))
        # With constant statistics: the input's gradient, and the sums over positions of dy xhat and of dy.
        direct = [
            torch.ops.aten.native_batch_norm_backward(
                gradient,
                x,
                weight,
                its_mean,
                its_variance,
                its_mean,  # "saved" statistics, which one of the GPU's kernels requires
                (its_variance + ctx.eps).rsqrt(),
                False,
                ctx.eps,
                [True, True, True],
            )
            for gradient, (x, weight, _, its_mean, its_variance) in zip(gradients, parts, strict=True)
        ]
        of_inputs, of_weights, of_biases = zip(*direct, strict=True)
        sums = torch.cat([*of_weights, *of_biases])
        ctx.world.all_reduce(sums)
        deviation = (variance + ctx.eps).rsqrt().repeat(2)
        scale = torch.cat([weight for _, weight, *_ in parts]).repeat(2) * deviation * correction
        widths = [len(one) for one in of_weights]
        slopes, levels = (torch.split(half, widths) for half in (sums * scale).chunk(2))
        through = [
            of_input - functional.batch_norm(x, its_mean, its_variance, slope, level, eps=ctx.eps)
            for of_input, slope, level, (x, _, _, its_mean, its_variance) in zip(
                of_inputs, slopes, levels, parts, strict=True
            )
        ]
        return (None,) * 5 + (*through, *of_weights, *of_biases)


def _split_by_norm(mean: Tensor, variance: Tensor, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """For each input: the tensor, its weight, bias, mean and variance."""
    third = len(tensors) // 3
    inputs, weights, biases = tensors[:third], tensors[third : 2 * third], tensors[2 * third :]
    widths = [x.shape[1] for x in inputs]
    yield from zip(inputs, weights, biases, torch.split(mean, widths), torch.split(variance, widths), strict=True)
