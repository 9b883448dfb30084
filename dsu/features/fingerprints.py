"""What decides whether a stored array may be used: everything that its numbers depend on."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

from dsu.architecture import Architecture
from dsu.data.extra_views import RECIPE
from dsu.data.masks import MaskReading
from dsu.network.resume import map_names
from dsu.runtime import Runtime
from dsu_cache import Fingerprint

__all__ = ["fingerprint", "library_versions"]


def fingerprint(
    name: str,
    architecture: Architecture,
    *,
    reading: MaskReading,
    stored: str,
    runtime: Runtime,
    digests: Mapping[str, str],
    batch_size: int,
) -> Fingerprint:
    """What array `name` is made of.

    Fields decide whether it may be used; what is recorded beside them (library versions, device, the encoder's
    batch) only warns.
    """
    extra = {"extra views": RECIPE}
    if name == "pixels":
        return Fingerprint(
            {"size": architecture.hiera_size, "resize": "PIL bilinear", "mode": "RGB", **extra}, library_versions()
        )
    if name == "mask":
        return Fingerprint(
            {"size": architecture.hiera_size, "resize": "PIL bicubic", "reading": reading.to_json(), **extra},
            library_versions(),
        )
    is_map = name in map_names(architecture)
    spec = architecture.dino if is_map else architecture.hiera
    fields: dict[str, Any] = {
        "encoder": spec.model_dump(mode="json", exclude={"name"}),
        "weights": digests["dino" if is_map else "hiera"],
        "input size": architecture.dino_size if is_map else architecture.hiera_size,
        "resize": "PIL bilinear",
        "normalisation": "ImageNet",
        "precision": runtime.precision,
        "type": stored,
        "point": name,
        **extra,
    }
    if name == "V":
        fields["grid"] = architecture.level_grid(4)
    return Fingerprint(fields, {**library_versions(), "device": runtime.device.type, "batch": batch_size})


@cache
def library_versions() -> Mapping[str, str]:
    """Versions of the libraries that change numbers, if only in their last digits."""
    return {library: version(library) for library in ("torch", "timm", "sam2", "pillow")}
