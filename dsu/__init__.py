"""DSU-Net: DINOv2 guiding SAM 2's Hiera, trained in two stages, exactly."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsu.heads.published import load_published_checkpoint
    from dsu.loss import total_loss
    from dsu.prediction.segmenter import Segmenter

__version__ = "0.1.0"

__all__ = ["Segmenter", "__version__", "load_published_checkpoint", "total_loss"]

_HOMES = {
    "Segmenter": "dsu.prediction.segmenter",
    "load_published_checkpoint": "dsu.heads.published",
    "total_loss": "dsu.loss",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: torch takes seconds, and `dsu --help` needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dsu' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
