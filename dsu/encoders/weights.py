"""Find, load and identify the encoders' weights.

Only official files: SAM 2.1's checkpoints as published by Meta, DINOv2 from timm or Meta. The search order is a path
from an option or environment variable, then the Hugging Face hub with its usual cache. Pickled code is never run.
"""

import hashlib
import logging
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch import Tensor, nn

from dsu.config import DSUNetConfig
from dsu.encoders.frozen import build_dino, build_hiera
from dsu.encoders.sources import MissingWeightsError, Source, check_checkpoint, check_file, locate, source_of
from dsu.errors import DsuError, UsageError
from dsu.hub import OutOfReachError, download, reason_of
from dsu.settings import EncoderWeights

if TYPE_CHECKING:
    from sam2.modeling.backbones.hieradet import Hiera
    from timm.models.vision_transformer import VisionTransformer

_M = TypeVar("_M", bound=nn.Module)

_LOG: Final = logging.getLogger(__name__)

_SAM_PREFIX = "image_encoder.trunk."

_CONTAINERS: Final = frozenset({"model", "state_dict", "model_state_dict", "student", "teacher"})
"""Keys under which training programs store weights, next to an optimiser's state, for example."""
_PREFIXES: Final = ("module.", "backbone.", "teacher.", "student.", "model.")
"""Prefixes that training programs add to the names of parameters."""
_NOT_CHECKPOINTS: Final = {
    b"<!doctype html": "an HTML page, such as a login page",
    b"<html": "an HTML page, such as a login page",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}
"""First bytes of files that are often saved instead of a checkpoint."""


def load_hiera(config: DSUNetConfig, weights: EncoderWeights) -> tuple["Hiera", str]:
    """The frozen trunk and its weights' digest.

    Raises `DsuError` if the weights can't be read or don't fit, and `MissingWeightsError` if there are none. The
    message also names DINOv2's weights if they are missing, so that the user can download both at once.
    """
    spec = config.hiera
    if "hiera" in weights.random_of(config):
        return _random_module(lambda: build_hiera(spec), seed=1)
    others = [] if weights.dino else [source_of("dino", config.dino.name)]
    path = _find(source_of("hiera", spec.name), weights.hiera, weights.download, others)
    state = read_checkpoint(path)
    trunk_state = {key.removeprefix(_SAM_PREFIX): value for key, value in state.items() if key.startswith(_SAM_PREFIX)}
    trunk = build_hiera(spec)
    _load(trunk, trunk_state or state, path, f"SAM 2.1 checkpoint of Hiera {spec.name}")
    return trunk, weights_digest(trunk)


def load_dino(config: DSUNetConfig, weights: EncoderWeights) -> tuple["VisionTransformer", str]:
    """The frozen transformer, with its position table resampled to the input size as in timm, and its digest.

    Raises `DsuError` if the weights can't be read or don't fit, and `MissingWeightsError` if there are none.
    """
    from timm.models.vision_transformer import checkpoint_filter_fn

    spec, size = config.dino, config.dino_size
    if "dino" in weights.random_of(config):
        return _random_module(lambda: build_dino(spec, size), seed=2)
    path = _find(source_of("dino", spec.name), weights.dino, weights.download)
    state = read_checkpoint(path)
    encoder = build_dino(spec, size)
    what = f"DINOv2 checkpoint of {spec.name}"
    try:
        converted = checkpoint_filter_fn(state, encoder)
    except Exception as error:  # timm may raise anything for unexpected keys or shapes
        raise DsuError(_mismatch_message(path, what, str(error))) from error
    _load(encoder, {key: value for key, value in converted.items() if key != "mask_token"}, path, what)
    return encoder, weights_digest(encoder)


def load_encoders(
    config: DSUNetConfig, weights: EncoderWeights, *, hiera: bool, dino: bool
) -> tuple[Any, Any, dict[str, str]]:
    """The requested encoders and their digests."""
    digests: dict[str, str] = {}
    trunk = transformer = None
    if hiera:
        trunk, digests["hiera"] = load_hiera(config, weights)
    if dino:
        transformer, digests["dino"] = load_dino(config, weights)
    return trunk, transformer, digests


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values: equal for equal weights, independent of the file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pt`, `.pth` or `.safetensors` file, without running code from it.

    Raises `DsuError` for anything else.
    """
    check_checkpoint(path)
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    for beginning, what in _NOT_CHECKPOINTS.items():
        if start.startswith(beginning):
            raise DsuError(f"{path} is {what}: download the actual file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():  # about pickles not from torch, which are refused or read correctly
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise DsuError(
            f"{path} contains more than weights, and dsu never runs code from a checkpoint: give a file with tensors "
            "only (.safetensors, or a state dict saved by torch)."
        ) from error
    except Exception as error:  # the parsers of torch and safetensors may raise anything
        raise DsuError(f"{path} can't be read as a checkpoint ({reason_of(error)}): download it again.") from error
    state, stripped = _unwrap(state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DsuError(f"{path} is not a state dict of tensors: give the published checkpoint.")
    if stripped:
        names = ", ".join(map(repr, stripped))
        _LOG.info("%s: removed %s, which its training program added around the weights", path, names)
    return dict(state)


def _unwrap(state: Any) -> tuple[Any, list[str]]:
    """Weights without the wrappers that training programs add, and the names of these wrappers."""
    stripped = []
    while isinstance(state, Mapping) and len(inner := _CONTAINERS & state.keys()) == 1:
        [name] = inner
        if not isinstance(state[name], Mapping):
            break
        state = state[name]
        stripped += [] if name == "model" else [name]  # Meta's own files have this wrapper
    while isinstance(state, Mapping) and state:
        prefix = next((one for one in _PREFIXES if all(str(key).startswith(one) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        stripped.append(prefix)
    return state, stripped


def _find(source: Source, given: Path | None, may_download: bool, others: Sequence[Source] = ()) -> Path:
    """The local path of weights: `given`, or in the hub's cache (downloaded if allowed).

    Cached files are used without a request to the hub, since published weights do not change. Raises `UsageError` if
    the weights are not published, and `MissingWeightsError` if they can't be downloaded; it names missing `others`,
    too.
    """
    path = given or locate(source)
    if path is not None:
        check_file(source, path)
        return path
    if not source.repository:
        raise UsageError(f"{source.what} has no official weights: give a file with {source.option} FILE.")
    try:
        if not may_download:
            raise OutOfReachError("access to the Hugging Face hub is off")
        return download(source.repository, source.filename)
    except Exception as error:  # network, authorisation, a full disk: the remedy is the same
        missing = [source, *(other for other in others if other.repository and locate(other) is None)]
        raise MissingWeightsError(_download_advice(missing, reason_of(error))) from error


def _download_advice(missing: Sequence[Source], reason: str) -> str:
    commands = [f"`hf download {source.repository} {source.filename} --local-dir .`" for source in missing]
    options = [f"{source.option} FILE (or {source.variable})" for source in missing]
    return (
        f"The weights of {' and '.join(source.what for source in missing)} are not in the Hugging Face cache and "
        "can't be "
        f"downloaded ({reason}): go online, or download them elsewhere ({' and '.join(commands)}) and give them with "
        f"{' and '.join(options)}; --preset toy needs none."
    )


def _load(module: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> None:
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        raise DsuError(_mismatch_message(path, what, str(error))) from error


def _mismatch_message(path: Path, what: str, reason: str) -> str:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    detail = next((line for line in lines[1:]), lines[0] if lines else "unknown keys")
    return f"{path} is not a {what} ({detail[:200].rstrip('.')}): give the published file of that size."


def _random_module(build: Callable[[], _M], seed: int) -> tuple[_M, str]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build()
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():  # sam2 initialises its position tables with zeros
                nn.init.trunc_normal_(parameter, std=0.02)
    return module, weights_digest(module)
