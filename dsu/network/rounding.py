"""A head's weights in half precision, rounded in one pass.

Autocast rounds each weight separately and converts each gradient back separately: a thousand kernels per step at N =
48. One pass over all of them gives the same numbers. Norms and scales are unchanged, as under autocast.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def rounded_weights(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the weights and biases of linear and convolution layers in `dtype`, by name.

    For `torch.func.functional_call`. Gradients flow to the parameters; those of unused layers stay None.
    """
    found = {
        f"{prefix}.{name}": parameter
        for prefix, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad
    }
    return dict(zip(found, _Rounded.apply(dtype, *found.values()), strict=True))


class _Rounded(torch.autograd.Function):
    """Convert tensors to `dtype`."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.kind = weights[0].dtype
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(copies, list(weights))
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [gradient for gradient in gradients if gradient is not None]
        # `_foreach_copy_` is one pass only if strides are equal.
        wide = [torch.empty_strided(g.shape, g.stride(), dtype=ctx.kind, device=g.device) for g in given]
        torch._foreach_copy_(wide, given)
        found = iter(wide)
        return None, *(None if gradient is None else next(found) for gradient in gradients)
