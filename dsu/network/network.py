"""The whole network, one forward pass split in one place.

`network(images)` is `suffix(prefix(images))` by construction. Stage two gives the suffix what the store holds
or what the prefix computes now; nothing downstream can know which, because the prefix ends in `settle`: the
tensors it returns are, bit for bit and byte for byte, what the store keeps.
"""

from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsu.architecture import LEVELS, Architecture
from dsu.encoders.dino import dino_maps
from dsu.encoders.hiera import embed_pixels
from dsu.encoders.windows import run_block
from dsu.network.head import Head
from dsu.network.modulation import resize_map
from dsu.network.resume import ResumePoint, earliest, map_names, point_block

if TYPE_CHECKING:
    from sam2.modeling.backbones.hieradet import Hiera, MultiScaleBlock
    from timm.models.vision_transformer import VisionTransformer

__all__ = ["DSUNet", "normalize_pixels", "settle"]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize_pixels(pixels: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 RGB to (B, 3, S, S) float32 with ImageNet's mean and deviation."""
    mean, std = _statistics(pixels.device)
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and deviation, (3, 1, 1) each; kept, because a copy to the device waits for it."""
    return torch.tensor(MEAN, device=device).view(3, 1, 1), torch.tensor(STD, device=device).view(3, 1, 1)


def settle(tokens: Tensor, stored: torch.dtype | None) -> Tensor:
    """(B, H, W, C) as a store keeps it: contiguous and rounded to `stored` (None: as computed)."""
    return tokens.to(stored or tokens.dtype).contiguous()


class DSUNet(nn.Module):
    """DSU-Net: DINOv2's last feature guides SAM 2's Hiera through small adapters, fusion and a U-shaped decoder.

    Either encoder may be absent: what a run resumes from decides what it needs (all of DINOv2 is in the stored
    maps; with S4 stored and no adapters, so is all of Hiera).

    Args:
        architecture: every size.
        hiera: the frozen trunk, or None.
        dino: the frozen transformer, or None.
        stored: the type to which everything that crosses the split is rounded; None leaves it as computed.
        as_published: run the authors' operations in their order (padded windows, attention written out): the same
            numbers up to rounding, slower. What comparisons with their program and of speed are made against.

    Attributes:
        recompute: whether adapted blocks keep no activations for the backward pass but run again in it: the same
            numbers for less memory and a third more time.

    Example:
        >>> network = DSUNet(architecture, hiera, dino).eval()
        >>> deepest, middle, finest = network(pixels, dino_pixels)   # logits (B, 1, S, S)
    """

    def __init__(
        self,
        architecture: Architecture,
        hiera: "Hiera | None",
        dino: "VisionTransformer | None",
        stored: torch.dtype | None = None,
        *,
        as_published: bool = False,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.stored = stored
        self.hiera = hiera
        self.dino = dino
        self.head = Head(architecture, as_published=as_published)
        self.recompute = False
        self._block: Callable[[MultiScaleBlock, Tensor], Tensor] = _published_block if as_published else run_block

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Run Hiera's blocks, where most kernels are launched, through torch.compile: a graph a shape, when first met.

        Fused operations round in another order, so numbers move by about the precision's rounding.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self._block = torch.compile(self._block, backend=backend)

    def train(self, mode: bool = True) -> "DSUNet":
        """Switch the head; the encoders always stay in evaluation mode."""
        super().train(False)
        self.training = mode
        self.head.train(mode)
        return self

    def forward(self, pixels: Tensor, dino_pixels: Tensor | None) -> list[Tensor]:
        """Three logit maps (B, 1, S, S), deepest first, from normalised pixels at both input sizes."""
        point = earliest(self.architecture)
        return self.suffix(self.prefix(pixels, dino_pixels, point.reads), point)

    @torch.no_grad()
    def prefix(self, pixels: Tensor, dino_pixels: Tensor | None, names: Collection[str]) -> dict[str, Tensor]:
        """What is frozen: the named points of the encoders as they are without any adapter.

        Args:
            pixels: (B, 3, S, S) normalised, at Hiera's input size.
            dino_pixels: (B, 3, S', S') normalised, at DINOv2's; may be None where no map is asked for.
            names: points (`pixels`, S1..S4, B<k>) and maps (V, V<k>), see `resume`.

        Returns:
            The named tensors, each (B, H, W, C) settled, except `pixels`, which stay (B, 3, S, S).
        """
        maps = [name for name in names if name in map_names(self.architecture)]
        tokens = [name for name in names if name not in maps and name != "pixels"]
        found = {
            name: settle(tensor, self.stored)
            for name, tensor in (
                self._frozen_tokens(pixels, tokens) | self._frozen_maps(dino_pixels, maps, grid=pixels.shape[-1] // 32)
            ).items()
        }
        return found | ({"pixels": pixels} if "pixels" in names else {})

    def suffix(self, points: Mapping[str, Tensor], point: ResumePoint) -> list[Tensor]:
        """The rest: frozen blocks up to the first adapter without gradient, adapted blocks, and the head."""
        levels, maps = self._encode(points, point)
        outputs: list[Tensor] = self.head(levels, maps)
        return outputs

    def features(self, pixels: Tensor, dino_pixels: Tensor | None) -> dict[str, Tensor]:
        """Every feature by the paper's names: S1..S4, V (DINOv2's whole grid), modulated, fused, R1..R4, D1..D3.

        All (B, C, H, W). Takes what `forward` takes.
        """
        point = earliest(self.architecture)
        levels, maps = self._encode(self.prefix(pixels, dino_pixels, point.reads), point)
        found = {f"S{level}": levels[level] for level in LEVELS}
        if self.dino is not None and dino_pixels is not None:
            last = self.architecture.dino.depth
            found["V"] = dino_maps(self.dino, dino_pixels, [last])[last]
        return found | self.head.features(levels, maps)

    def _frozen_tokens(self, pixels: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Hiera's levels and tokens by name, (B, H, W, C)."""
        if not names:
            return {}
        wanted: dict[int, list[str]] = {}
        for name in names:
            wanted.setdefault(point_block(self.architecture, name), []).append(name)
        hiera = self._hiera()
        tokens = embed_pixels(hiera, pixels)
        found: dict[str, Tensor] = {}
        for index in range(max(wanted)):
            tokens = self._block(hiera.blocks[index], tokens)
            found |= dict.fromkeys(wanted.get(index + 1, ()), tokens)
        return found

    def _frozen_maps(self, dino_pixels: Tensor | None, names: Collection[str], grid: int) -> dict[str, Tensor]:
        """DINOv2's maps by name, (B, H, W, C); V on S4's `grid`, whose side is in positions."""
        if not names:
            return {}
        if self.dino is None or dino_pixels is None:
            raise RuntimeError("this network was built without DINOv2 and its maps were not given")
        blocks = {name: int(name[1:] or self.architecture.dino.depth) for name in names}
        maps = dino_maps(self.dino, dino_pixels, blocks.values())
        found = {name: maps[block] for name, block in blocks.items()}
        if "V" in found:
            found["V"] = resize_map(found["V"], grid)
        return {name: x.permute(0, 2, 3, 1) for name, x in found.items()}

    def _encode(self, points: Mapping[str, Tensor], point: ResumePoint) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """All four levels and the maps, (B, C, H, W) in the types and layouts that they have live."""
        live = {name: self._live(name, tensor) for name, tensor in points.items()}
        levels = {int(name[1]): live[name].permute(0, 3, 1, 2) for name in point.levels}
        if point.block < self.architecture.hiera.depth:
            self._run_blocks(live[point.tokens], point, levels)
        return levels, {name: live[name].permute(0, 3, 1, 2) for name in point.maps}

    def _run_blocks(self, tokens: Tensor, point: ResumePoint, levels: dict[int, Tensor]) -> None:
        """Run Hiera from `point.block` on and add the levels it ends."""
        hiera, first_adapted = self._hiera(), self.architecture.first_adapted
        if point.tokens == "pixels":
            tokens = embed_pixels(hiera, tokens)
        for index in range(point.block, len(hiera.blocks)):
            if index < first_adapted:
                with torch.no_grad():
                    tokens = self._block(hiera.blocks[index], tokens)
            elif self.recompute and torch.is_grad_enabled():
                tokens = checkpoint(self._adapted_block, index, tokens, use_reentrant=False)
            else:
                tokens = self._adapted_block(index, tokens)
            if index in hiera.stage_ends:
                # Autograd adds a level's gradients up in the order of its uses: the decoder's comes before the
                # next block's, as in the published program.
                levels[hiera.stage_ends.index(index) + 1] = tokens.permute(0, 3, 1, 2)

    def _adapted_block(self, index: int, tokens: Tensor) -> Tensor:
        return self._block(self._hiera().blocks[index], self.head.adapters[str(index)](tokens))

    def _live(self, name: str, tensor: Tensor) -> Tensor:
        """The type that a point has where it is computed; the layout, channels last, is the stored one.

        Hiera's residual stream turns from the parameters' type to autocast's at the end of stage 1, where the
        shortcut passes through a linear layer.
        """
        parameter = next(self.head.parameters())
        kind = parameter.device.type
        if name[0] not in "SB" or self._stage(name) == 1:
            return tensor.to(parameter.dtype)
        return tensor.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype)

    def _stage(self, name: str) -> int:
        return int(name[1]) if name[0] == "S" else self.architecture.hiera.stage_of(int(name[1:]))

    def _hiera(self) -> "Hiera":
        if self.hiera is None:
            raise RuntimeError("this network was built without Hiera, but blocks of it have to run")
        return self.hiera


def _published_block(block: "MultiScaleBlock", tokens: Tensor) -> Tensor:
    result: Tensor = block(tokens)
    return result
