"""Resume points: from which stored features a network can start, given its number of adapted blocks.

A tensor may be stored if and only if no trainable parameter is upstream of it. Candidates are the pixels, DINOv2's
features (V, V<k>), Hiera's levels S1..S4 and the tokens `B<k>` that enter block k. S1, S2, S3 are the inputs of the
first block of Hiera stages 2, 3, 4; S4 is the end.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from dsu.choices import FeatureDtype
from dsu.config import LEVELS, DSUNetConfig
from dsu.errors import UsageError

LEVEL_NAMES = tuple(f"S{level}" for level in LEVELS)


@dataclass(frozen=True)
class ResumePoint:
    """The features from which the rest of the network runs.

    Attributes:
        start: where Hiera starts: `pixels`, a level or `B<k>`.
        block: the first Hiera block to run; the trunk's depth if none.
        levels: levels before that block, for the decoder.
        guides: DINOv2's features.
    """

    start: str
    block: int
    levels: tuple[str, ...]
    guides: tuple[str, ...]

    @property
    def features(self) -> tuple[str, ...]:
        """The names of all features of this point."""
        return tuple(dict.fromkeys((self.start, *self.levels, *self.guides)))


def feature_block(config: DSUNetConfig, name: str) -> int:
    """The Hiera block that reads a feature: 0 for pixels, k for `B<k>`, the next stage's first for a level.

    Raises `UsageError` for a name that is not a feature of this trunk.
    """
    hiera = config.hiera
    if name == "pixels":
        return 0
    if name in LEVEL_NAMES:
        return sum(hiera.stages[: int(name[1])])
    tokens = re.fullmatch(r"B([1-9]\d*)", name)
    if tokens and int(tokens[1]) < hiera.depth:
        return int(tokens[1])
    raise UsageError(
        f"{name!r} is not a feature of this network: choose V, V1 to V{config.dino.depth} (DINOv2's blocks on its "
        f"own grid), S1 to S4 or B1 to B{hiera.depth - 1} (the tokens entering that Hiera block)."
    )


def feature_shape(config: DSUNetConfig, name: str) -> tuple[int, int, int]:
    """(H, W, C) of a stored feature."""
    if name == "V":
        side, channels = config.level_grid(4), config.dino.embed_dim
    elif name in guide_names(config):
        side, channels = config.dino_grid, config.dino.embed_dim
    elif name == "pixels":
        side, channels = config.hiera_size, 3
    else:
        level = config.hiera.stage_of(feature_block(config, name))
        side, channels = config.level_grid(level), config.hiera.level_dim(level)
    return (side, side, channels)


def check_features(config: DSUNetConfig, names: Collection[str]) -> None:
    """Raise `UsageError` for a name that is not a storable feature of this network."""
    for name in names:
        if name not in guide_names(config):
            feature_block(config, name)


def guide_names(config: DSUNetConfig) -> tuple[str, ...]:
    """DINOv2's storable features: V on S4's grid, V<k> of block k (from 1) on DINOv2's own grid."""
    return ("V", *(f"V{block}" for block in range(1, config.dino.depth + 1)))


def resume_point(config: DSUNetConfig, available: Collection[str], wanted: str | None = None) -> ResumePoint:
    """The latest possible resume point with `available` features, at or before the first adapted block.

    `available` names the features stored in every view that the run draws, including `pixels`; `wanted` selects one of
    the possible starts. Raises `UsageError` if DINOv2's features, which every start needs, are not available, or if
    `wanted` is not possible.
    """
    guides = tuple(dict.fromkeys(config.injections.values()))
    lacking = [name for name in guides if name not in available]
    if lacking:
        raise UsageError(
            f"{', '.join(lacking)} is not stored in all views that this run draws: run your `dsu cache-features` "
            f"again with --features {','.join(lacking)} and these --views, or draw fewer views, with --views none."
        )
    serving = serving_features(config, available)
    if not serving:
        raise UsageError(
            "The store has no feature to start from, not even pixels: run your `dsu cache-features` again."
        )
    if wanted is not None and wanted not in serving:
        raise UsageError(
            f"With adapters in the last {config.adapt_last} blocks, and the features stored in the views that it "
            f"draws, a run can't start from {wanted!r}: choose {', '.join(sorted(serving))}."
        )
    # If a level is also stored as the next block's tokens, only the level is read.
    latest = max(serving, key=lambda name: (feature_block(config, name), name in LEVEL_NAMES))
    return resume_at(config, wanted or latest)


def serving_features(config: DSUNetConfig, available: Collection[str]) -> list[str]:
    """The `available` features from which a run with this number of adapted blocks can start."""
    found = []
    for name in available:
        if name in guide_names(config):
            continue
        block = feature_block(config, name)
        needed = _levels_before(config, block)
        if block <= config.first_adapted and all(level in available for level in needed):
            found.append(name)
    return found


def earliest(config: DSUNetConfig) -> ResumePoint:
    """The point at the pixels: with DINOv2's features, without stored levels."""
    return resume_at(config, "pixels")


def resume_at(config: DSUNetConfig, start: str) -> ResumePoint:
    """The point at a named feature, regardless of adapters."""
    block = feature_block(config, start)
    guides = tuple(dict.fromkeys(config.injections.values()))
    return ResumePoint(start, block, tuple(_levels_before(config, block)), guides)


def _levels_before(config: DSUNetConfig, block: int) -> list[str]:
    """Levels whose Hiera stage ends before `block`, so they can't be computed from there."""
    return [f"S{level}" for level in LEVELS if sum(config.hiera.stages[:level]) <= block]


def item_bytes(config: DSUNetConfig, name: str, feature_dtype: FeatureDtype) -> int:
    """Size in bytes of one view of a sample in a store's array, uncompressed."""
    if name == "mask":
        return int(config.hiera_size**2)
    height, width, channels = feature_shape(config, name)
    return height * width * channels * (1 if name == "pixels" else np.dtype(feature_dtype).itemsize)
