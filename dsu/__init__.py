"""DSU-Net: DINOv2 guiding SAM 2's Hiera, trained in two stages, exactly."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsu.api import evaluate, predict, train
    from dsu.config import DSUNetConfig
    from dsu.data.decoding import ImageProcessor
    from dsu.datasets import ImageDataset
    from dsu.environment import prepare_environment
    from dsu.features.samples import FeatureDataset
    from dsu.loss import SegmentationLoss
    from dsu.network.network import DSUNet
    from dsu.network.pretrained import create_model
    from dsu.prediction.segmenter import Segmenter

__version__ = "0.1.0"

__all__ = [
    "DSUNet",
    "DSUNetConfig",
    "FeatureDataset",
    "ImageDataset",
    "ImageProcessor",
    "SegmentationLoss",
    "Segmenter",
    "__version__",
    "create_model",
    "evaluate",
    "predict",
    "prepare_environment",
    "train",
]

_MODULES = {
    "DSUNet": "dsu.network.network",
    "DSUNetConfig": "dsu.config",
    "FeatureDataset": "dsu.features.samples",
    "ImageDataset": "dsu.datasets",
    "ImageProcessor": "dsu.data.decoding",
    "SegmentationLoss": "dsu.loss",
    "Segmenter": "dsu.prediction.segmenter",
    "create_model": "dsu.network.pretrained",
    "evaluate": "dsu.api",
    "predict": "dsu.api",
    "prepare_environment": "dsu.environment",
    "train": "dsu.api",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use: loading torch takes seconds, and `dsu --help` does not need it."""
    if name not in _MODULES:
        raise AttributeError(f"module 'dsu' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
