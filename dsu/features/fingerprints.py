"""What decides whether a stored array may be used: everything that its numbers depend on."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from dsu.config import DSUNetConfig
from dsu.data.augmentation import RECIPE
from dsu.data.masks import MaskFormat
from dsu.network.resume import guide_names
from dsu.runtime import Runtime, processor_name
from dsu_cache import Fingerprint

__all__ = ["fingerprint", "library_versions"]


def fingerprint(
    name: str,
    config: DSUNetConfig,
    *,
    mask_format: MaskFormat,
    feature_dtype: str,
    runtime: Runtime,
    digests: Mapping[str, str],
    encoder_batch_size: int,
) -> Fingerprint:
    """What array `name` is made of.

    Fields decide whether it may be used; what is recorded beside them (library versions and the machine) only warns.
    """
    extra = {"cached augmentations": RECIPE}
    if name == "pixels":
        return Fingerprint(
            {"size": config.hiera_size, "resize": "PIL bilinear", "mode": "RGB", **extra}, library_versions()
        )
    if name == "mask":
        return Fingerprint(
            {"size": config.hiera_size, "resize": "PIL bicubic", "mask_format": mask_format.to_json(), **extra},
            library_versions(),
        )
    is_map = name in guide_names(config)
    spec = config.dino if is_map else config.hiera
    fields: dict[str, Any] = {
        "encoder": spec.model_dump(mode="json", exclude={"name"}),
        "weights": digests["dino" if is_map else "hiera"],
        "input size": config.dino_size if is_map else config.hiera_size,
        "resize": "PIL bilinear",
        "normalisation": "ImageNet",
        "precision": runtime.precision,
        "type": feature_dtype,
        "feature": name,
        "encoder batch size": encoder_batch_size,
        **extra,
    }
    if name == "V":
        fields |= {"grid": config.level_grid(4), "grid resize": "bilinear, two products"}
    return Fingerprint(fields, {**library_versions(), **_machine(runtime)})


def _machine(runtime: Runtime) -> dict[str, str | int]:
    """What may change a feature's last bits: the GPU, or the processor and its threads."""
    if runtime.device.type == "cuda":
        return {"device": torch.cuda.get_device_name(runtime.device)}
    return {"device": processor_name(), "threads": torch.get_num_threads()}


@cache
def library_versions() -> Mapping[str, str]:
    """Versions of the libraries that change numbers, if only in their last digits."""
    return {library: version(library) for library in ("torch", "timm", "sam2", "pillow")}
