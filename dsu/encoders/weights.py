"""Where the encoders' weights come from, and which weights they are.

Official files only: SAM 2.1's checkpoints as Meta publishes them, DINOv2 as timm or Meta publish it. They are
looked for at a path given by option or environment variable and then on the Hugging Face hub, in its ordinary
cache. Nothing pickled is ever run.
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

__all__ = [
    "MissingWeightsError",
    "load_dino",
    "load_encoders",
    "load_hiera",
    "read_checkpoint",
    "weights_digest",
]

_M = TypeVar("_M", bound=nn.Module)

_LOG: Final = logging.getLogger(__name__)

_SAM_PREFIX = "image_encoder.trunk."


_CONTAINERS: Final = frozenset({"model", "state_dict", "model_state_dict", "student", "teacher"})
"""What training programs file weights under, beside an optimiser's state and the like."""
_PREFIXES: Final = ("module.", "backbone.", "teacher.", "student.", "model.")
"""What they put before every name."""
_NO_CHECKPOINT: Final = {
    b"<!doctype html": "an HTML page, as a download that wants a login gives",
    b"<html": "an HTML page, as a download that wants a login gives",
    b"version https://git-lfs": "a Git LFS pointer to the file, not the file",
}
"""How files begin that are often saved in a checkpoint's place."""


def load_hiera(config: DSUNetConfig, weights: EncoderWeights) -> tuple["Hiera", str]:
    """The frozen trunk and its weights' digest.

    Raises `DsuError` where the weights can't be read or do not fit, and `MissingWeightsError` where there are none. It
    names DINOv2's as well, if they are not here either: who has to go for files goes once.
    """
    spec = config.hiera
    if "hiera" in weights.random_of(config):
        return _random(lambda: build_hiera(spec), seed=1)
    others = [] if weights.dino else [source_of("dino", config.dino.name)]
    path = _find(source_of("hiera", spec.name), weights.hiera, weights.download, others)
    state = read_checkpoint(path)
    trunk_state = {key.removeprefix(_SAM_PREFIX): value for key, value in state.items() if key.startswith(_SAM_PREFIX)}
    trunk = build_hiera(spec)
    _load(trunk, trunk_state or state, path, f"SAM 2.1 checkpoint of Hiera {spec.name}")
    return trunk, weights_digest(trunk)


def load_dino(config: DSUNetConfig, weights: EncoderWeights) -> tuple["VisionTransformer", str]:
    """The frozen transformer, its position table resampled timm's way to the input size, and its digest.

    Raises `DsuError` where the weights can't be read or do not fit, and `MissingWeightsError` where there are none.
    """
    from timm.models.vision_transformer import checkpoint_filter_fn

    spec, size = config.dino, config.dino_size
    if "dino" in weights.random_of(config):
        return _random(lambda: build_dino(spec, size), seed=2)
    path = _find(source_of("dino", spec.name), weights.dino, weights.download)
    state = read_checkpoint(path)
    encoder = build_dino(spec, size)
    what = f"DINOv2 checkpoint of {spec.name}"
    try:
        converted = checkpoint_filter_fn(state, encoder)
    except Exception as error:  # timm reads keys and shapes of whatever it is given
        raise DsuError(_misfit(path, what, str(error))) from error
    _load(encoder, {key: value for key, value in converted.items() if key != "mask_token"}, path, what)
    return encoder, weights_digest(encoder)


def load_encoders(
    config: DSUNetConfig, weights: EncoderWeights, *, hiera: bool, dino: bool
) -> tuple[Any, Any, dict[str, str]]:
    """Those of the two encoders that are wanted, and their digests."""
    digests: dict[str, str] = {}
    trunk = transformer = None
    if hiera:
        trunk, digests["hiera"] = load_hiera(config, weights)
    if dino:
        transformer, digests["dino"] = load_dino(config, weights)
    return trunk, transformer, digests


def weights_digest(module: nn.Module) -> str:
    """sha256 over names, types, shapes and values: the same for the same weights, whatever file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pt`, `.pth` or `.safetensors` file, without running any code that it may contain.

    Raises `DsuError` for anything else.
    """
    check_checkpoint(path)
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    for beginning, what in _NO_CHECKPOINT.items():
        if start.startswith(beginning):
            raise DsuError(f"{path} is {what}: fetch the file itself.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():  # of other pickles than torch's own, which are refused or read as they are
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise DsuError(
            f"{path} is no file of weights alone, and code out of a checkpoint is never run: give a file of tensors "
            f"alone (.safetensors, or a state dict saved by torch)."
        ) from error
    except Exception as error:  # torch and safetensors raise whatever their parsers meet
        raise DsuError(f"{path} can't be read as a checkpoint ({reason_of(error)}): fetch it again.") from error
    state, stripped = _unwrapped(state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DsuError(f"{path} is no state dict of tensors: give the checkpoint as it is published.")
    if stripped:
        names = ", ".join(map(repr, stripped))
        _LOG.info("%s: read without %s, which its training program put around the weights", path, names)
    return dict(state)


def _unwrapped(state: Any) -> tuple[Any, list[str]]:
    """What a training program put around weights taken off, where it is plain what that is; and its names."""
    stripped = []
    while isinstance(state, Mapping) and len(inner := _CONTAINERS & state.keys()) == 1:
        [name] = inner
        if not isinstance(state[name], Mapping):
            break
        state = state[name]
        stripped += [] if name == "model" else [name]  # Meta's own
    while isinstance(state, Mapping) and state:
        prefix = next((one for one in _PREFIXES if all(str(key).startswith(one) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        stripped.append(prefix)
    return state, stripped


def _find(source: Source, given: Path | None, may_download: bool, others: Sequence[Source] = ()) -> Path:
    """A local path: the given one, or the hub's cache (downloading into it if it may); `others` are named if missing.

    What the cache has is taken without asking: weights that are published do not change.
    """
    path = given or locate(source)
    if path is not None:
        check_file(source, path)
        return path
    if not source.repository:
        raise UsageError(f"{source.what} is of no official size, so its weights must be given by {source.option} FILE.")
    try:
        if not may_download:
            raise OutOfReachError("the Hugging Face hub may not be asked")
        return download(source.repository, source.filename)
    except Exception as error:  # network, authorisation, a full disk: one way out for all of them
        missing = [source, *(other for other in others if other.repository and locate(other) is None)]
        raise MissingWeightsError(_how_to_get(missing, reason_of(error))) from error


def _how_to_get(missing: Sequence[Source], reason: str) -> str:
    commands = [f"`hf download {source.repository} {source.filename} --local-dir .`" for source in missing]
    options = [f"{source.option} FILE (or {source.variable})" for source in missing]
    return (
        f"The weights of {' and '.join(source.what for source in missing)} are not in the Hugging Face cache, and "
        f"can't be fetched ({reason}): go online, or fetch them where you can ({' and '.join(commands)}) and give them "
        f"by {' and '.join(options)}; --preset toy needs none."
    )


def _load(module: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> None:
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        raise DsuError(_misfit(path, what, str(error))) from error


def _misfit(path: Path, what: str, reason: str) -> str:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    detail = next((line for line in lines[1:]), lines[0] if lines else "unknown keys")
    return f"{path} is no {what} ({detail[:200].rstrip('.')}): give the published file of that size."


def _random(build: Callable[[], _M], seed: int) -> tuple[_M, str]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build()
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():  # sam2 leaves its position tables at zero
                nn.init.trunc_normal_(parameter, std=0.02)
    return module, weights_digest(module)
