"""Where the encoders' weights are published, and where to read them from. Nothing here loads weights."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dsu.config import DSUNetConfig
from dsu.errors import DsuError
from dsu.settings import EncoderWeights


class MissingWeightsError(DsuError):
    """Published weights that are not given by path, not in the hub's cache, and can't be downloaded."""


@dataclass(frozen=True)
class Source:
    """The source of one encoder's weights.

    Attributes:
        what: the encoder's display name.
        option, variable: option and environment variable for the path of the weights.
        repository, filename: on the Hugging Face hub; empty for an unpublished size.
        licence: of the published weights, as a hub identifier.
    """

    what: str
    option: str
    variable: str
    repository: str
    filename: str
    licence: str = "apache-2.0"


_PUBLISHED: Final = {
    **{
        ("hiera", name.replace("-", "_")): (
            f"facebook/sam2.1-hiera-{name}",
            f"sam2.1_hiera_{name.replace('-', '_')}.pt",
        )
        for name in ("large", "base-plus", "small", "tiny")
    },
    **{
        ("dino", name): (f"timm/vit_{size}_patch14_dinov2.lvd142m", "model.safetensors")
        for name, size in {"vitl14": "large", "vitb14": "base", "vits14": "small"}.items()
    },
}


def source_of(encoder: str, name: str) -> Source:
    """The source of the named encoder's weights."""
    repository, filename = _PUBLISHED.get((encoder, name), ("", ""))
    title = "SAM 2.1's Hiera" if encoder == "hiera" else "DINOv2"
    return Source(f"{title} ({name})", f"--{encoder}-weights", f"DSU_{encoder.upper()}", repository, filename)


def published_source(encoder: str, name: str) -> Source | None:
    """The published source of the named encoder's weights; None for unpublished sizes."""
    source = source_of(encoder, name)
    return source if source.repository else None


def check_given(config: DSUNetConfig, weights: EncoderWeights, *, hiera: bool, dino: bool) -> None:
    """Raise `DsuError` if an option or variable names weights that don't exist."""
    of_hiera, of_dino = source_of("hiera", config.hiera.name), source_of("dino", config.dino.name)
    random = weights.random_of(config)
    for encoder, wanted, source, given in (
        ("hiera", hiera, of_hiera, weights.hiera),
        ("dino", dino, of_dino, weights.dino),
    ):
        if wanted and encoder not in random:
            check_file(source, given or os.environ.get(source.variable))


def check_checkpoint(path: Path) -> None:
    """Raise `DsuError` if the file does not exist."""
    if not path.is_file():
        raise DsuError(f"There is no checkpoint at {path}: check the path.")


def check_file(source: Source, path: str | Path | None) -> None:
    """Raise `DsuError` if a given path does not exist."""
    if path and not Path(path).is_file():
        raise DsuError(f"The weights of {source.what} are not at {path}: check {source.option} or {source.variable}.")


def locate(source: Source) -> Path | None:
    """The local path of the weights: the variable's, or one in the hub's cache.

    If the variable is set, its path counts, even if no file exists.
    """
    if os.environ.get(source.variable):
        return Path(os.environ[source.variable])
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.repository, source.filename) if source.repository else None
    return Path(found) if isinstance(found, str) else None
