"""Blocks without window padding, and with padding as on a GPU, compared with sam2's: outputs and gradients."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from sam2.modeling.backbones.hieradet import Hiera, MultiScaleBlock
from torch import Tensor

from dsu.config import HIERAS
from dsu.encoders.frozen import build_hiera, embed_pixels, padded_attention, run_block


def random_block(dim: int, dim_out: int, heads: int, window: int, pool: bool) -> MultiScaleBlock:
    torch.manual_seed(dim + window)
    block = MultiScaleBlock(dim, dim_out, heads, q_stride=(2, 2) if pool else None, window_size=window)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # biases that make padded tokens matter
    return block.double().eval().requires_grad_(False)


def padded_block(block: MultiScaleBlock, tokens: Tensor) -> Tensor:
    """Run `run_block` as on a GPU."""
    with patch("dsu.encoders.frozen.unpadded_attention", padded_attention):
        return run_block(block, tokens)


def all_ways(block: MultiScaleBlock, tokens: Tensor) -> list[list[Tensor]]:
    """Output and gradient of sam2's block, of `run_block`, and of `run_block` as on a GPU."""
    found = []
    for run in (block, partial(run_block, block), partial(padded_block, block)):
        x = tokens.clone().requires_grad_()
        output = run(x)
        weight = torch.sin(torch.arange(output.numel(), dtype=output.dtype)).view(output.shape)
        found.append([output, *torch.autograd.grad((output * weight).sum(), x)])
    return found


@settings(max_examples=60)
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    window=st.sampled_from([0, 2, 4, 5, 8]),
    heads=st.integers(1, 2),
    wider=st.booleans(),
)
def test_any_map_size_and_window(batch: int, height: int, width: int, window: int, heads: int, wider: bool) -> None:
    block = random_block(4, 8 if wider else 4, heads, window, pool=False)
    tokens = torch.randn(batch, height, width, 4, dtype=torch.float64)
    expected, *found = all_ways(block, tokens)
    for each in found:
        torch.testing.assert_close(each, expected, atol=1e-11, rtol=1e-11)


@settings(max_examples=40)
@given(height=st.integers(2, 17), width=st.integers(2, 17), window=st.sampled_from([2, 4, 8]))
def test_pooled_queries(height: int, width: int, window: int) -> None:
    """Including odd sides: sam2 omits the last row or column, and fails if it is a window of its own."""
    assume(all(side % window != 1 for side in (height, width)))
    block = random_block(4, 8, 2, window, pool=True)
    tokens = torch.randn(1, height, width, 4, dtype=torch.float64)
    expected, *found = all_ways(block, tokens)
    for each in found:
        torch.testing.assert_close(each, expected, atol=1e-11, rtol=1e-11)


def test_every_block_of_every_trunk_on_the_papers_grids() -> None:
    """The real window sizes, 7x7 to 16x16, on the grids of an image of 352 pixels, at a tenth of the width."""
    for name in ("large", "base_plus", "tiny"):
        spec = HIERAS[name].model_copy(update={"embed_dim": 8 * HIERAS[name].num_heads})
        torch.manual_seed(1)
        trunk = build_hiera(spec).double()
        for parameter in trunk.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, std=0.5)
        pixels = torch.randn(1, 3, 352, 352, dtype=torch.float64)
        with torch.no_grad():
            for level, expected in enumerate(trunk(pixels), start=1):
                found = levels(trunk, pixels)[level - 1]
                torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10, msg=f"{name} S{level}")


def levels(trunk: Hiera, pixels: Tensor) -> list[Tensor]:
    tokens, found = embed_pixels(trunk, pixels), []
    for index, block in enumerate(trunk.blocks):
        tokens = run_block(block, tokens)
        if index in trunk.stage_ends:
            found.append(tokens.permute(0, 3, 1, 2))
    return found


def test_more_windows_than_a_kernel_accepts_are_processed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's kernels accept 65,535; batches of 64 images of 1,024 pixels have more."""
    block = random_block(4, 8, 2, 4, pool=True)
    tokens = torch.randn(2, 10, 12, 4, dtype=torch.float64)
    whole, calls = padded_block(block, tokens), []
    block.attn.register_forward_hook(lambda layer, inputs, output: calls.append(len(inputs[0])))
    monkeypatch.setattr("dsu.encoders.frozen.MAX_WINDOWS", 7)
    torch.testing.assert_close(padded_block(block, tokens), whole, atol=1e-12, rtol=0)
    assert calls == [7, 7, 4]


def test_missing_copies_of_the_bias_would_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    block = random_block(4, 4, 1, 8, pool=False)
    tokens = torch.randn(1, 11, 11, 4, dtype=torch.float64)
    monkeypatch.setattr(torch, "cat", _without_copies(torch.cat))
    expected, found, _ = all_ways(block, tokens)
    assert (found[0] - expected[0]).abs().max() > 1e-3


def _without_copies(cat):  # type: ignore[no-untyped-def]
    def call(tensors: list[Tensor], dim: int) -> Tensor:
        expanded = tensors[-1].ndim == 4 and 0 in tensors[-1].stride()
        result: Tensor = tensors[0] if expanded else cat(tensors, dim=dim)
        return result

    return call


def test_bfloat16_is_as_accurate_as_sam2s_block() -> None:
    block = random_block(32, 32, 2, 8, pool=False)
    tokens = torch.randn(1, 11, 11, 32, dtype=torch.float64)
    exact = block(tokens)
    block.float()
    with torch.autocast("cpu", torch.bfloat16):
        errors = [float((run(tokens.float()) - exact).norm()) for run in (block, lambda x: run_block(block, x))]
    assert errors[1] < 1.2 * errors[0]
