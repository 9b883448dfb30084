"""The network's configuration: encoders, input sizes, depth of adaptation, and presets.

A `DSUNetConfig` determines all shapes of the network and of its stored features. A head's file contains it: loading a
head needs no other files.
"""

from typing import Annotated, Final, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dsu.errors import UsageError, did_you_mean, validation_reasons

LEVELS: Final = (1, 2, 3, 4)
"""Hiera's levels S1..S4, one per Hiera stage."""

Ablation = Literal["none", "A", "B", "C"]
"""Tables VII and VIII of the paper: A has no DINOv2, B fuses four DINOv2 blocks into the four levels, C the last block
into all four."""

Count = Annotated[int, Field(ge=1, le=8192)]
"""A number of blocks, channels, heads or pixels; bounded, since a file may contain any number."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name that becomes part of folder names."""


class _EncoderSpec(BaseModel):
    """Settings that both encoders have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name = "custom"
    embed_dim: Count
    num_heads: Count

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads, {self.num_heads}")
        return self


class HieraSpec(_EncoderSpec):
    """Settings of SAM 2's Hiera trunk (arXiv 2306.00989, 2408.00714), under sam2's own names."""

    stages: tuple[Count, Count, Count, Count]
    global_att_blocks: tuple[int, ...]
    window_pos_embed_bkg_spatial_size: tuple[Count, Count] = (7, 7)
    window_spec: tuple[Count, Count, Count, Count] = (8, 4, 16, 8)

    @model_validator(mode="after")
    def _check(self) -> Self:
        outside = [block for block in self.global_att_blocks if not 0 <= block < self.depth]
        if outside:
            raise ValueError(f"global_att_blocks names block {outside[0]}, but blocks range from 0 to {self.depth - 1}")
        # The first block of a stage pools within its windows, and a global block has no windows.
        pooling = sorted(set(self.global_att_blocks) & set(self.stage_starts[1:]))
        if pooling:
            raise ValueError(
                f"global_att_blocks must not name block {pooling[0]}, the first of a Hiera stage, which pools: "
                f"name a later one"
            )
        if any(window % 2 for window in self.window_spec[:3]):
            raise ValueError(f"window_spec must be even except in the last Hiera stage, not {self.window_spec}")
        return self

    @property
    def depth(self) -> int:
        """Number of blocks over the four Hiera stages."""
        return sum(self.stages)

    @property
    def stage_starts(self) -> tuple[int, ...]:
        """Index of the first block of each Hiera stage; level k is the input of block `stage_starts[k]`."""
        return tuple(sum(self.stages[:stage]) for stage in range(4))

    def level_dim(self, level: int) -> int:
        """Channels of level S`level`; they double from each Hiera stage to the next."""
        return int(self.embed_dim * 2 ** (level - 1))

    def stage_of(self, block: int) -> int:
        """The Hiera stage (1..4) that determines the grid of the tokens entering `block`.

        For the first block of a stage this is the previous stage, since that block pools.
        """
        return max(1, sum(start < block for start in self.stage_starts))

    def input_dim(self, block: int) -> int:
        """Channels of the tokens that enter `block`."""
        return self.level_dim(self.stage_of(block))


class DinoSpec(_EncoderSpec):
    """Settings of a DINOv2 vision transformer (arXiv 2304.07193)."""

    depth: Count
    patch_size: Count = 14
    layer_scale: float = 1e-5
    """Initial value of the layer scales; only the randomly initialised toy keeps it."""


class DSUNetConfig(BaseModel):
    """Both encoders, their input sizes in pixels, and the number of adapted Hiera blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Name = "custom"
    hiera: HieraSpec
    dino: DinoSpec
    hiera_size: int = Field(default=352, ge=128, le=4096)
    dino_size: int = Field(default=518, ge=14, le=4096)
    adapt_last: int = Field(ge=0)
    """Number of Hiera's last blocks with adapters."""
    ablation: Ablation = "none"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hiera_size % 32:
            raise ValueError(
                f"Hiera's input size must be a multiple of 32, not {self.hiera_size}: try "
                f"{round(self.hiera_size / 32) * 32}"
            )
        if self.hiera_size // 4 % self.hiera.window_spec[0]:
            raise ValueError(
                f"Hiera's input size must be a multiple of four of its first windows, {4 * self.hiera.window_spec[0]}, "
                f"not {self.hiera_size}"
            )
        if self.dino_size % self.dino.patch_size:
            raise ValueError(
                f"DINOv2's input size must be a multiple of {self.dino.patch_size}, not {self.dino_size}: try "
                f"{round(self.dino_size / self.dino.patch_size) * self.dino.patch_size}"
            )
        if self.adapt_last > self.hiera.depth:
            raise ValueError(
                f"adapters were requested in the last {self.adapt_last} blocks, but this Hiera has "
                f"{self.hiera.depth} blocks"
            )
        return self

    @property
    def encoders_name(self) -> str:
        """A name for the encoders and input sizes: the preset's, or one composed of the parts' names."""
        if self.preset != "custom":
            return self.preset
        return f"hiera-{self.hiera.name}-{self.hiera_size}+dino-{self.dino.name}-{self.dino_size}"

    @property
    def encoder_settings(self) -> dict[str, str | int | None]:
        """The settings' fields that select these encoders, to copy them to another run."""
        if self.preset != "custom":
            return {"preset": self.preset}
        sizes = {"hiera_size": self.hiera_size, "dino_size": self.dino_size}
        return {"preset": None, "hiera": self.hiera.name, "dino": self.dino.name, **sizes}

    @property
    def first_adapted(self) -> int:
        """Index of the first Hiera block with an adapter (Hiera's depth without adapters); earlier ones are frozen."""
        return self.hiera.depth - self.adapt_last

    @property
    def usual_depths(self) -> list[int]:
        """Depths of adaptation worth comparing: all blocks, half, a quarter, the last Hiera stage, none."""
        depth = self.hiera.depth
        return sorted({depth, depth // 2, depth // 4, self.hiera.stages[3], 0}, reverse=True)

    @property
    def dino_grid(self) -> int:
        """Side of DINOv2's patch grid."""
        return self.dino_size // self.dino.patch_size

    def level_grid(self, level: int) -> int:
        """Side of level S`level`; S1 has stride 4, and each further level twice the stride."""
        return int(self.hiera_size // 4 // 2 ** (level - 1))

    @property
    def injections(self) -> dict[int, str]:
        """The stored DINOv2 map to fuse into each of Hiera's levels (paper, Fig. 3 and Section IV.E).

        `V` is the last block's map on S4's grid; `V6`, ... are the map of the block of that number (counted
        from 1) on DINOv2's own grid, which the ablations resize to each level.
        """
        depth = self.dino.depth
        if self.ablation == "A":
            return {}
        if self.ablation == "B":
            return {level: f"V{max(1, depth * level // 4)}" for level in LEVELS}
        if self.ablation == "C":
            return dict.fromkeys(LEVELS, f"V{depth}")
        return {4: "V"}


HIERAS: Final[dict[str, HieraSpec]] = {
    spec.name: spec
    for spec in (
        HieraSpec(name="large", embed_dim=144, num_heads=2, stages=(2, 6, 36, 4), global_att_blocks=(23, 33, 43)),
        HieraSpec(
            name="base_plus",
            embed_dim=112,
            num_heads=2,
            stages=(2, 3, 16, 3),
            global_att_blocks=(12, 16, 20),
            window_pos_embed_bkg_spatial_size=(14, 14),
            window_spec=(8, 4, 14, 7),
        ),
        HieraSpec(
            name="small",
            embed_dim=96,
            num_heads=1,
            stages=(1, 2, 11, 2),
            global_att_blocks=(7, 10, 13),
            window_spec=(8, 4, 14, 7),
        ),
        HieraSpec(
            name="tiny",
            embed_dim=96,
            num_heads=1,
            stages=(1, 2, 7, 2),
            global_att_blocks=(5, 7, 9),
            window_spec=(8, 4, 14, 7),
        ),
        HieraSpec(name="toy", embed_dim=16, num_heads=1, stages=(1, 2, 3, 1), global_att_blocks=(4,)),
    )
}
"""SAM 2.1's four trunks and a toy; `large` has sam2's default window sizes."""

DINOS: Final[dict[str, DinoSpec]] = {
    spec.name: spec
    for spec in (
        DinoSpec(name="vitl14", embed_dim=1024, depth=24, num_heads=16),
        DinoSpec(name="vitb14", embed_dim=768, depth=12, num_heads=12),
        DinoSpec(name="vits14", embed_dim=384, depth=12, num_heads=6),
        DinoSpec(name="toy", embed_dim=48, depth=4, num_heads=3, layer_scale=1.0),
    )
}
"""DINOv2's published sizes (without registers, as the paper uses them) and a toy."""

PRESETS: Final[dict[str, tuple[str, str, int, int]]] = {
    "large": ("large", "vitl14", 352, 518),
    "base": ("base_plus", "vitb14", 352, 518),
    "small": ("small", "vits14", 352, 518),
    "tiny": ("tiny", "vits14", 352, 518),
    "toy": ("toy", "toy", 192, 266),
}
"""Hiera, DINOv2, and their input sizes in pixels; `large` is the paper's."""


def build_config(
    preset: str = "large",
    *,
    hiera: str | None = None,
    dino: str | None = None,
    hiera_size: int | None = None,
    dino_size: int | None = None,
    adapt_last: int | None = None,
    ablation: Ablation = "none",
) -> DSUNetConfig:
    """The config of a preset with some parts replaced.

    Raises `UsageError` for an unknown name, an impossible size or more adapters than blocks.
    """
    defaults = _known("preset", preset, PRESETS)
    hiera_spec = _known("Hiera", hiera or defaults[0], HIERAS)
    dino_spec = _known("DINOv2", dino or defaults[1], DINOS)
    exchanged = any(value is not None for value in (hiera, dino, hiera_size, dino_size))
    try:
        return DSUNetConfig(
            preset="custom" if exchanged else preset,
            hiera=hiera_spec,
            dino=dino_spec,
            hiera_size=defaults[2] if hiera_size is None else hiera_size,
            dino_size=defaults[3] if dino_size is None else dino_size,
            adapt_last=hiera_spec.depth if adapt_last is None else adapt_last,
            ablation=ablation,
        )
    except ValidationError as error:
        raise UsageError(f"This network can't be built: {validation_reasons(error)}.") from error


T = TypeVar("T")


def config_of(model: object) -> DSUNetConfig:
    """A model's config, or the config itself. Raises `UsageError` for anything else."""
    config = getattr(model, "config", model)
    if not isinstance(config, DSUNetConfig):
        raise UsageError(f"{model!r} is not a model: give one from dsu.create_model, or its config.")
    return config


def _known(kind: str, name: str, among: dict[str, T]) -> T:
    if name not in among:
        near = did_you_mean(name, among)
        raise UsageError(f"There is no {kind} called {name!r}: choose one of {', '.join(among)}{near or '.'}")
    return among[name]
