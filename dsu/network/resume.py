"""Where a run resumes: the one place that knows which stored tensors can serve which depth of adaptation.

A tensor may be stored if and only if no trainable parameter lies upstream of it. The points of the network
at which that can hold are the pixels, DINOv2's maps, Hiera's levels S1..S4 and the tokens `B<k>` entering
block k. S1, S2, S3 are exactly what the first block of Hiera stage 2, 3, 4 reads, S4 is the end.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from dsu.architecture import LEVELS, Architecture
from dsu.errors import UsageError

__all__ = [
    "LEVEL_NAMES",
    "ResumePoint",
    "check_points",
    "earliest",
    "map_names",
    "point_block",
    "point_shape",
    "resume_point",
    "serving_points",
]

LEVEL_NAMES = tuple(f"S{level}" for level in LEVELS)


@dataclass(frozen=True)
class ResumePoint:
    """The tensors from which the rest of the network is computed.

    Attributes:
        tokens: what Hiera goes on from: `pixels`, a level or `B<k>`.
        block: the first Hiera block that still has to run; the trunk's depth when none has.
        levels: levels from before that block, which the decoder needs.
        maps: DINOv2's maps.
    """

    tokens: str
    block: int
    levels: tuple[str, ...]
    maps: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of all tensors that cross from the prefix to the suffix."""
        return tuple(dict.fromkeys((self.tokens, *self.levels, *self.maps)))


def point_block(architecture: Architecture, point: str) -> int:
    """The Hiera block that resumes from `point`: 0 for pixels, k for `B<k>`, the next stage's first for a level.

    Raises `UsageError` for a name that is no point of this trunk.
    """
    hiera = architecture.hiera
    if point == "pixels":
        return 0
    if point in LEVEL_NAMES:
        return sum(hiera.stages[: int(point[1])])
    tokens = re.fullmatch(r"B([1-9]\d*)", point)
    if tokens and int(tokens[1]) < hiera.depth:
        return int(tokens[1])
    raise UsageError(
        f"{point!r} is no point of this network: choose V, V1 to V{architecture.dino.depth} (DINOv2's blocks on its "
        f"own grid), S1 to S4 or B1 to B{hiera.depth - 1} (the tokens entering that Hiera block)."
    )


def point_shape(architecture: Architecture, name: str) -> tuple[int, int, int]:
    """(H, W, C) of a point or map as it is stored."""
    if name == "V":
        side, channels = architecture.level_grid(4), architecture.dino.embed_dim
    elif name in map_names(architecture):
        side, channels = architecture.dino_grid, architecture.dino.embed_dim
    elif name == "pixels":
        side, channels = architecture.hiera_size, 3
    else:
        level = architecture.hiera.stage_of(point_block(architecture, name))
        side, channels = architecture.level_grid(level), architecture.hiera.level_dim(level)
    return (side, side, channels)


def check_points(architecture: Architecture, points: Collection[str]) -> None:
    """Raise `UsageError` for a name that can't be stored of this network."""
    for point in points:
        if point not in map_names(architecture):
            point_block(architecture, point)


def map_names(architecture: Architecture) -> tuple[str, ...]:
    """DINOv2's maps that may be stored: V on S4's grid, V<k> of block k (from 1) on DINOv2's own."""
    return ("V", *(f"V{block}" for block in range(1, architecture.dino.depth + 1)))


def resume_point(architecture: Architecture, available: Collection[str], wanted: str | None = None) -> ResumePoint:
    """The latest point at or before the first adapted block that `available` tensors can serve.

    `available` names what is stored in every view that the run draws, `pixels` included; `wanted` asks for one
    of the points that can serve. Raises `UsageError` when DINOv2's maps are not among what is available (they
    stand beside every resume point), or when `wanted` can't serve.
    """
    maps = tuple(dict.fromkeys(architecture.injections.values()))
    lacking = [name for name in maps if name not in available]
    if lacking:
        raise UsageError(
            f"{', '.join(lacking)} is not stored in all the views that this run draws: run your `dsu cache-features` "
            f"again with --levels {','.join(lacking)} and these --views, or draw fewer, with --views none."
        )
    serving = serving_points(architecture, available)
    if not serving:
        raise UsageError("Nothing is stored to resume from, not even pixels: run your `dsu cache-features` again.")
    if wanted is not None and wanted not in serving:
        raise UsageError(
            f"A run with adapters in the last {architecture.adapt_last} blocks can't resume from {wanted!r} with what "
            f"is stored in the views that it draws: choose {', '.join(sorted(serving))}."
        )
    # Where a level is also stored as the next block's tokens, the level alone is read.
    latest = max(serving, key=lambda point: (point_block(architecture, point), point in LEVEL_NAMES))
    return _at(architecture, wanted or latest, maps)


def serving_points(architecture: Architecture, available: Collection[str]) -> list[str]:
    """Those of `available` from which a run of this depth of adaptation can resume."""
    found = []
    for point in available:
        if point in map_names(architecture):
            continue
        block = point_block(architecture, point)
        needed = _levels_before(architecture, block)
        if block <= architecture.first_adapted and all(level in available for level in needed):
            found.append(point)
    return found


def earliest(architecture: Architecture) -> ResumePoint:
    """Resuming from the pixels, beside DINOv2's maps: what needs no level stored."""
    return _at(architecture, "pixels", tuple(dict.fromkeys(architecture.injections.values())))


def _at(architecture: Architecture, point: str, maps: tuple[str, ...]) -> ResumePoint:
    block = point_block(architecture, point)
    return ResumePoint(point, block, tuple(_levels_before(architecture, block)), maps)


def _levels_before(architecture: Architecture, block: int) -> list[str]:
    """Levels whose Hiera stage has ended before `block`: resuming there, they can't be computed any more."""
    return [f"S{level}" for level in LEVELS if sum(architecture.hiera.stages[:level]) <= block]
