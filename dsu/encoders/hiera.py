"""SAM 2's Hiera trunk, frozen. Of sam2 only the trunk is used, never its video machinery."""

from typing import TYPE_CHECKING

from torch import Tensor

from dsu.config import HieraSpec

if TYPE_CHECKING:
    from sam2.modeling.backbones.hieradet import Hiera

__all__ = ["build_hiera", "embed_pixels"]


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
