"""What a run reads of the store, and what the store lacks for it."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Final

from dsu.data.views import view_index
from dsu.encoders.weights import EncoderWeights
from dsu.features.stores import FeatureStore
from dsu.network.resume import resume_point
from dsu.settings import TrainingSettings
from dsu.training.run_notes import item_bytes
from dsu.training.training_data import config_asked

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
    settings: TrainingSettings, store: FeatureStore, weights: EncoderWeights, cache_root: Path
) -> Cost | Lacking:
    """What a run of these settings reads of the store, or which of DINOv2's maps it would want in vain.

    Raises `UsageError` where it can't resume as asked.
    """
    config = config_asked(settings, store)
    available = store.available(settings.views)
    maps = [name for name in dict.fromkeys(config.injections.values()) if name not in available]
    if maps:
        options = ("--features", ",".join(maps), "--views", settings.views)
        command = store.again(*options, *_places(weights, cache_root))
        return Lacking(
            f"since the store lacks {', '.join(maps)} in the views that are drawn ({settings.views}): run {command}."
        )
    point = resume_point(config, available, settings.start_feature)
    stored = settings.feature_dtype or store.feature_dtype
    sizes = {name: item_bytes(config, name, stored) for name in (*point.features, "mask")}
    places = {name: len({view_index(name, view) for view in settings.views.numbers}) for name in sizes}
    return Cost(
        reads=point.features,
        image_bytes=sum(sizes.values()),
        store_bytes=len(store.manifest.entries) * sum(sizes[name] * places[name] for name in sizes),
    )


def _places(weights: EncoderWeights, cache_root: Path) -> list[str]:
    """The options of `dsu cache-features` that name these weights and this root."""
    given = {"--hiera-weights": weights.hiera, "--dino-weights": weights.dino}
    given["--cache-root"] = None if cache_root == _CACHE_ROOT else cache_root
    words = [word for option, path in given.items() if path is not None for word in (option, quote(str(path)))]
    return [*words, *(["--random-weights"] if weights.random else [])]
