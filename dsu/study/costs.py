"""What a run reads of the store, and what the store lacks for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import join
from typing import Final

from dsu.config import DSUNetConfig
from dsu.data.sources import SourceFolder
from dsu.data.views import view_index
from dsu.encoders.weights import EncoderWeights
from dsu.features.stores import available_features, config_of, recorded_feature_dtype
from dsu.network.resume import resume_point
from dsu.settings import TrainingSettings
from dsu.training.run_notes import item_bytes
from dsu.training.training_data import encoders_as_settings
from dsu_cache import Store

__all__ = ["Cost", "Lacking", "cost_of"]

_CACHE_ROOT: Final = Path("features")
"""Where commands look for stores by themselves."""


@dataclass(frozen=True)
class Cost:
    """What a run reads.

    Attributes:
        reads: the arrays that a step resumes from.
        image_bytes: for an image, its mask included.
        store_bytes: of all samples in all views that the run draws: what it needs of the store, before compression.
    """

    reads: tuple[str, ...]
    image_bytes: int
    store_bytes: int


@dataclass(frozen=True)
class Lacking:
    """Why a run can't be served: a clause that ends with the command that helps."""

    reason: str


def cost_of(
    settings: TrainingSettings, store: Store, source: SourceFolder, weights: EncoderWeights, cache_root: Path
) -> Cost | Lacking:
    """What a run of these settings reads of the store, or which of DINOv2's maps it would want in vain.

    Raises `UsageError` where it can't resume as asked.
    """
    like = config_of(store)
    depth = like.hiera.depth if settings.adapt_last is None else settings.adapt_last
    config = like.model_copy(update={"adapt_last": depth, "ablation": settings.ablation})
    available = available_features(store, settings.views)
    maps = [name for name in dict.fromkeys(config.injections.values()) if name not in available]
    if maps:
        command = _command(like, source, weights, cache_root, ("--features", ",".join(maps)), settings)
        return Lacking(
            f"since the store lacks {', '.join(maps)} in the views that are drawn ({settings.views}): run `{command}`."
        )
    point = resume_point(config, available, settings.start_feature)
    stored = settings.feature_dtype or recorded_feature_dtype(store)
    sizes = {name: item_bytes(config, name, stored) for name in (*point.features, "mask")}
    places = {name: len({view_index(name, view) for view in settings.views.numbers}) for name in sizes}
    return Cost(
        reads=point.features,
        image_bytes=sum(sizes.values()),
        store_bytes=len(store.manifest.entries) * sum(sizes[name] * places[name] for name in sizes),
    )


def _command(
    like: DSUNetConfig,
    source: SourceFolder,
    weights: EncoderWeights,
    cache_root: Path,
    levels: Sequence[str],
    settings: TrainingSettings,
) -> str:
    """The `dsu cache-features` that adds to this very store."""
    cut = () if source.tile is None else ("--tile", source.tile, "--overlap", source.overlap)
    encoders = {name: value for name, value in encoders_as_settings(like).items() if value not in (None, "large")}
    named = [part for name, value in encoders.items() for part in (f"--{name.replace('_', '-')}", value)]
    paths = [
        part
        for option, path in (("--hiera-weights", weights.hiera), ("--dino-weights", weights.dino))
        if path is not None
        for part in (option, path)
    ]
    random = ["--random-weights"] if weights.random else []
    root = [] if cache_root == _CACHE_ROOT else ["--cache-root", cache_root]
    words = [source.reference, *cut, *levels, "--views", settings.views, *named, *paths, *random, *root]
    return f"dsu cache-features {join(map(str, words))}"
