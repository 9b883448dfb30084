import pytest
import torch
from torch.nn import functional

from dsu.network.resize import bilinear_weights, resize_by_products, resize_map


def test_a_map_of_the_right_size_is_returned_unchanged() -> None:
    x = torch.randn(1, 2, 4, 4)
    assert resize_map(x, 4) is x


def test_resizing_does_not_align_corners() -> None:
    """Halving averages four pixels if corners are not aligned; aligned corners would keep the corner pixels."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert resize_map(x, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize(("source", "target"), [(37, 11), (9, 4), (4, 9), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_products_resize_like_interpolate(source: int, target: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, source, source, 3, dtype=dtype)
    expected = functional.interpolate(
        x.permute(0, 3, 1, 2), size=(target, target), mode="bilinear", align_corners=False
    )
    found = resize_by_products(x, bilinear_weights(source, target))
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1), atol=tolerance, rtol=0)


def test_products_are_not_rounded_by_autocast() -> None:
    x, weights = torch.randn(1, 9, 9, 5), bilinear_weights(9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize_by_products(x, weights), resize_by_products(x, weights).float())
        found = resize_by_products(x, weights)
    assert torch.equal(found, resize_by_products(x, weights))


def test_deterministic_mode_changes_nothing() -> None:
    x, weights = torch.randn(1, 37, 37, 8), bilinear_weights(37, 11)
    expected = resize_by_products(x, weights)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(resize_by_products(x, weights), expected)
    finally:
        torch.use_deterministic_algorithms(False)
