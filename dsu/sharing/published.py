"""Read and write checkpoints in the authors' published format.

A published file contains the whole network, including the frozen encoders, under the authors' key names.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import ValidationError
from torch import Tensor

from dsu.config import DINOS, HIERAS, PRESETS, DinoSpec, DSUNetConfig, HieraSpec
from dsu.encoders.frozen import build_dino, build_hiera
from dsu.encoders.sources import published_source
from dsu.encoders.weights import load_dino, load_hiera, read_checkpoint, weights_digest
from dsu.errors import DsuError, UsageError, validation_reasons
from dsu.heads.head_file import HeadInfo, load_head
from dsu.network.layers import TAP
from dsu.network.network import DSUNet
from dsu.network.pretrained import load_network
from dsu.progress import few
from dsu.settings import EncoderWeights

SIGNS: Final = (((1, 1), (1, 1)), ((1, 1), (-1, -1)), ((1, -1), (1, -1)), ((1, -1), (-1, 1)))
"""Signs of the 2x2 Haar filters in a published file: LL, then high-pass along the height, the width, and both."""

_ATTENTION = r"(query|key)"
_RENAMINGS: Final = tuple(
    (re.compile(pattern + r"\."), replacement + ".")
    for pattern, replacement in (
        (r"^hiera\.blocks\.(\d+)", r"backbone_sam.sam_encoder.blocks.\1.block"),
        (r"^hiera", r"backbone_sam.sam_encoder"),
        (r"^dino", r"backbone_dino.dino_encoder"),
        (r"^head\.adapters\.(\d+)\.down", r"backbone_sam.sam_encoder.blocks.\1.prompt_learn.0"),
        (r"^head\.adapters\.(\d+)\.up", r"backbone_sam.sam_encoder.blocks.\1.prompt_learn.2"),
        (r"^head\.modulations\.4\.depthwise\.base", r"dino2sam_down14.depthwise.base_conv"),
        (r"^head\.modulations\.4\.depthwise\.subband", r"dino2sam_down14.depthwise.wavelet_convs.0"),
        (r"^head\.modulations\.4\.depthwise\.subband_scale", r"dino2sam_down14.depthwise.wavelet_scale.0"),
        (r"^head\.modulations\.4\.norm", r"dino2sam_down14.bn"),
        (r"^head\.modulations\.4", r"dino2sam_down14"),
        (r"^head\.fusions\.4\.channel", r"fusion4.ca.ca"),
        (r"^head\.fusions\.4\.spatial", r"fusion4.sa.sa"),
        (r"^head\.fusions\.4\.pixel", r"fusion4.pa.pa2"),
        (r"^head\.fusions\.4\.out", r"fusion4.conv"),
        (r"^head\.decoders\.(\d)\.(small|big)", r"head.decoders.\1.conv_\2"),
        (r"^head\.decoders\.(\d)\." + _ATTENTION + r"\.0", r"head.decoders.\1.attention.\2_project"),
        (r"^head\.decoders\.(\d)\." + _ATTENTION + r"\.1", r"head.decoders.\1.attention.\2_project.3"),
        (r"^head\.decoders\.(\d)\.value", r"head.decoders.\1.attention.value_project"),
        (r"^head\.decoders\.(\d)\.attended", r"head.decoders.\1.attention.out_project"),
        (r"^head\.decoders\.(\d)\.join", r"head.decoders.\1.catconv"),
        (r"^head\.decoders\.0", "decoder1"),
        (r"^head\.decoders\.1", "decoder2"),
        (r"^head\.decoders\.2", "decoder3"),
        (r"^head\.sides\.0", "side1"),
        (r"^head\.sides\.1", "side2"),
        (r"^head\.sides\.2", "head"),
        (r"^head\.receptive_fields\.0", "rfb1"),
        (r"^head\.receptive_fields\.1", "rfb2"),
        (r"^head\.receptive_fields\.2", "rfb3"),
        (r"^head\.receptive_fields\.3", "rfb4"),
        (r"^(rfb\d)\.branches\.0\.0", r"\1.branch0.0.conv"),
        (r"^(rfb\d)\.branches\.0\.1", r"\1.branch0.0.bn"),
        (r"^(rfb\d)\.branches\.(\d)\.(\d)\.0", r"\1.branch\2.\3.conv"),
        (r"^(rfb\d)\.branches\.(\d)\.(\d)\.1", r"\1.branch\2.\3.bn"),
        (r"^(rfb\d)\.join\.0", r"\1.conv_cat.conv"),
        (r"^(rfb\d)\.join\.1", r"\1.conv_cat.bn"),
        (r"^(rfb\d)\.shortcut\.0", r"\1.conv_res.conv"),
        (r"^(rfb\d)\.shortcut\.1", r"\1.conv_res.bn"),
    )
)
"""Patterns that turn own names into published ones, applied in this order."""

_IGNORED: Final = frozenset({"backbone_dino.dino_encoder.mask_token"})
"""Keys in published files that the computation does not use."""

_HAAR_KEYS: Final = tuple(f"dino2sam_down14.depthwise.{kind}_filter" for kind in ("wt", "iwt"))


def published_name(own: str) -> str:
    """The authors' name for one of `DSUNet`'s parameters or buffers."""
    name = own
    for pattern, replacement in _RENAMINGS:
        name = pattern.sub(replacement, name)
    return name


def load_published_checkpoint(
    state_dict_or_path: Mapping[str, Tensor] | str | Path,
    hiera: Mapping[str, Any] | None = None,
    dino: Mapping[str, Any] | None = None,
) -> DSUNet:
    """Load the whole network from a checkpoint of the authors' program.

    Args:
        state_dict_or_path: the state dict, or a `.pth` file with it (loaded without running pickled code).
        hiera: settings of Hiera under sam2's names, for unofficial sizes.
        dino: `embed_dim`, `depth`, `num_heads`, `patch_size` and `img_size` of DINOv2, for unofficial sizes.

    Returns:
        The network in evaluation mode, in float32, without rounding of features. It takes normalised pixels at both
        input sizes, (B, 3, 352, 352) and (B, 3, 518, 518), and returns three logit maps, deepest first.

    Raises:
        DsuError: if keys are missing or unknown (the message names them), or the encoders' sizes are not official.
        UsageError: if `hiera` or `dino` is not valid.
    """
    given = state_dict_or_path
    state = dict(given) if isinstance(given, Mapping) else read_checkpoint(Path(given))
    try:
        return _network_of(state, hiera, dino)
    except UsageError:
        raise
    except DsuError as error:
        raise error if isinstance(given, Mapping) else DsuError(f"{given} can't be imported: {error}") from error


def _network_of(state: Mapping[str, Tensor], hiera: Mapping[str, Any] | None, dino: Mapping[str, Any] | None) -> DSUNet:
    config = _recognise(state, hiera, dino)
    network = DSUNet(config, build_hiera(config.hiera), build_dino(config.dino, config.dino_size))
    _check_haar(state)
    own_names = {published_name(own): own for own in network.state_dict()}
    missing = sorted(set(own_names) - set(state))
    unknown = sorted(set(state) - set(own_names) - _IGNORED - set(_HAAR_KEYS))
    if missing or unknown:
        raise DsuError(
            "This is not a checkpoint of the published program: "
            + "; ".join(
                f"{len(keys)} {kind} ({few(keys, 5)})"
                for kind, keys in (("keys are missing", missing), ("are unknown", unknown))
                if keys
            )
            + "."
        )
    try:
        network.load_state_dict({own: state[name] for name, own in own_names.items()})
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip().rstrip(".")
        raise DsuError(f"The checkpoint's tensors do not fit the encoders' sizes: {first}.") from error
    return network.eval()


def export_published(network: DSUNet) -> dict[str, Tensor]:
    """The network's state dict under the authors' names, including Haar filters, as their program loads it."""
    state = {published_name(own): tensor for own, tensor in network.state_dict().items()}
    width = network.config.dino.embed_dim
    return {**state, **dict.fromkeys(_HAAR_KEYS, _haar_filter(width)), **dict.fromkeys(_IGNORED, torch.zeros(1, width))}


def import_head(path: Path, weights: EncoderWeights) -> tuple[dict[str, Tensor], HeadInfo, list[str]]:
    """Extract the head from a published checkpoint; returns its state dict, its info and notes for the user.

    The checkpoint's encoders are compared with the given weights, or published weights that are already downloaded, and
    with the random weights of --random-weights. Encoders that match none of them are recorded as unknown.
    Raises `DsuError` as `load_published_checkpoint`.
    """
    network = load_published_checkpoint(path)
    config = network.config
    inside: dict[str, str] = {}
    kinds: dict[str, str] = {}
    notes = []
    for encoder, size, module, load, given in (
        ("hiera", config.hiera.name, network.hiera, load_hiera, weights.hiera),
        ("dino", config.dino.name, network.dino, load_dino, weights.dino),
    ):
        assert module is not None  # a published file contains both encoders
        digest = inside[encoder] = weights_digest(module)
        place = given or os.environ.get(f"DSU_{encoder.upper()}")
        reference = f"the weights of {place}" if place else "the published weights"
        kinds[encoder], note = "", f"NOT the random weights of {size}"
        if published_source(encoder, size):
            try:
                same = load(config, replace(weights, download=False))[1] == digest
                kinds[encoder], note = "published" if same else "", reference if same else f"NOT {reference}"
            except DsuError:
                note = f"not compared with {reference}, which are not available"
        if not kinds[encoder] and load(config, EncoderWeights(random=True))[1] == digest:
            kinds[encoder], note = "random", "random weights, as --random-weights draws them"
        notes.append(f"{encoder}: {note} ({digest[:12]})")
    training = {
        "imported_from": path.name,
        "random_weights": set(kinds.values()) == {"random"},
        "known_encoders": [encoder for encoder, kind in kinds.items() if kind == "published"],
    }
    info = HeadInfo(config=config, feature_dtype=None, encoders=inside, training=training)
    return network.head.state_dict(), info, notes


def export_head(head: Path, weights: EncoderWeights) -> dict[str, Tensor]:
    """The state dict of a head with its encoders, under the authors' names.

    Raises `DsuError` if the published program does not support the head (fewer adapters, an ablation), or if the
    encoders' weights are not those that it was trained on.
    """
    state, info = load_head(head)
    config = info.config
    if config.adapt_last != config.hiera.depth or config.ablation != "none":
        raise DsuError(
            f"The published program needs adapters in front of all blocks and no ablation, unlike the head {head}: "
            "only a head trained without --adapt-last and --ablation can be exported."
        )
    return export_published(load_network(state, info, weights))


def _recognise(
    state: Mapping[str, Tensor], hiera: Mapping[str, Any] | None, dino: Mapping[str, Any] | None
) -> DSUNetConfig:
    try:
        sam_width = state["backbone_sam.sam_encoder.patch_embed.proj.weight"].shape[0]
        dino_width = state["backbone_dino.dino_encoder.patch_embed.proj.weight"].shape[0]
        positions = state["backbone_dino.dino_encoder.pos_embed"].shape[1] - 1
    except KeyError as error:
        raise DsuError(f"This is not a checkpoint of the published program: the key {error} is missing.") from error
    except IndexError as error:
        raise DsuError("This is not a checkpoint of the published program: its tensors have other shapes.") from error
    sam_depth = 1 + max(
        (int(found[1]) for key in state if (found := re.match(r"backbone_sam\.sam_encoder\.blocks\.(\d+)\.", key))),
        default=-1,
    )
    try:
        hiera_spec = (
            HieraSpec(**{"name": "custom", **hiera})
            if hiera is not None
            else next((s for s in HIERAS.values() if (s.embed_dim, s.depth) == (sam_width, sam_depth)), None)
        )
        dino_spec = (
            DinoSpec(**{key: value for key, value in dino.items() if key != "img_size"})
            if dino is not None
            else next((s for s in DINOS.values() if s.embed_dim == dino_width), None)
        )
    except ValidationError as error:
        raise UsageError(f"The settings given for the encoders are not valid: {validation_reasons(error)}.") from error
    if hiera_spec is None or dino_spec is None:
        raise DsuError(
            f"The checkpoint's encoders (Hiera of width {sam_width} and {sam_depth} blocks, DINOv2 of width "
            f"{dino_width}) have no official size: give their settings as `hiera` and `dino`."
        )
    preset = next(
        (name for name, (h, d, *_) in PRESETS.items() if (h, d) == (hiera_spec.name, dino_spec.name)), "custom"
    )
    try:
        return DSUNetConfig(
            preset=preset,
            hiera=hiera_spec,
            dino=dino_spec,
            dino_size=round(positions**0.5) * dino_spec.patch_size,
            adapt_last=hiera_spec.depth,
        )
    except ValidationError as error:
        raise DsuError(
            f"The checkpoint's position table does not fit any network: {validation_reasons(error)}."
        ) from error


def _haar_filter(channels: int) -> Tensor:
    return (TAP * torch.tensor(SIGNS)).repeat(channels, 1, 1).unsqueeze(1)  # (4 C, 1, 2, 2)


def _check_haar(state: Mapping[str, Tensor]) -> None:
    """Raise `DsuError` if a file's Haar filters differ from the constants in `dsu.network.layers`."""
    for key in _HAAR_KEYS:
        taps = state.get(key)
        haar = _haar_filter(taps.shape[0] // 4) if taps is not None and taps.ndim else None
        if taps is None or haar is None or taps.shape != haar.shape or not taps.float().allclose(haar, 0, 1e-6):
            raise DsuError(f"The checkpoint's {key} is missing or not a Haar filter: it belongs to another network.")
