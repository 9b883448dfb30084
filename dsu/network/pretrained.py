"""Models with encoder weights: new ones, and from trained heads."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsu.choices import FeatureDtype
from dsu.config import Ablation, DSUNetConfig, build_config
from dsu.encoders.weights import load_encoders
from dsu.errors import DsuError, UsageError
from dsu.files import make_folder, write_json
from dsu.heads.head_file import CONFIG_FILE, HEAD_FILE, HeadInfo, image_digits, load_head, resolve_head, save_head
from dsu.network.head import Head
from dsu.network.network import DSUNet
from dsu.network.resume import ResumePoint, earliest
from dsu.runtime import torch_type
from dsu.settings import EncoderWeights, WeightsOf

if TYPE_CHECKING:
    from dsu.datasets import SampleDataset


def create_model(
    preset: str = "large",
    *,
    encoder_weights: WeightsOf = "official",
    load_guide: bool = True,
    hiera: str | None = None,
    dino: str | None = None,
    hiera_size: int | None = None,
    dino_size: int | None = None,
    adapt_last: int | None = None,
    ablation: Ablation = "none",
    feature_dtype: FeatureDtype | None = "float16",
    encoder_batch_size: int | None = None,
) -> DSUNet:
    """A new model with frozen encoders and an untrained head, in training mode.

    Args:
        preset: `large` (the paper), `base`, `small`, `tiny` or `toy`.
        encoder_weights: `official` uses the published files from the hub or its cache; a mapping gives files by `hiera`
            and `dino`; None draws random weights, the same at every call.
        load_guide: whether to load DINOv2; without it, `forward` needs V.
        hiera, dino, hiera_size, dino_size: replacements for parts of the preset, sizes in pixels.
        adapt_last: number of Hiera's last blocks with adapters; None: all.
        ablation: A, B or C of the paper's Tables VII and VIII.
        feature_dtype: type to which frozen features are rounded; None: not rounded.
        encoder_batch_size: samples that the encoders process at once; None uses the device's default.

    Raises `UsageError` for an unknown name or an impossible size, and `DsuError` if weights can't be found or read.

    Example:
        >>> model = create_model("toy", adapt_last=2, encoder_weights=None)
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # trainable parameters
    """
    config = build_config(
        preset,
        hiera=hiera,
        dino=dino,
        hiera_size=hiera_size,
        dino_size=dino_size,
        adapt_last=adapt_last,
        ablation=ablation,
    )
    weights = EncoderWeights.of(encoder_weights)
    trunk, guide, digests = load_encoders(config, weights, hiera=True, dino=load_guide and bool(config.injections))
    model = DSUNet(
        config,
        trunk,
        guide,
        feature_dtype=None if feature_dtype is None else torch_type(feature_dtype),
        encoder_batch_size=encoder_batch_size,
    )
    model.encoder_digests, model.random_encoders = digests, weights.random
    return model.train()


def load_network(
    state: Mapping[str, Tensor],
    info: HeadInfo,
    weights: EncoderWeights,
    *,
    point: ResumePoint | None = None,
    from_images: bool = True,
    load_guide: bool = True,
) -> DSUNet:
    """A head's model in evaluation mode, with the encoders needed to predict from images or from `point`.

    Without `load_guide`, DINOv2 is never one of them. Raises `DsuError` if the encoders' weights differ from those in
    training, or the head's tensors do not fit its settings.
    """
    config = info.config
    start = point or earliest(config)
    needs_dino = load_guide and from_images and bool(start.guides)
    needs_hiera = from_images or start.block < config.hiera.depth
    hiera, dino, digests = load_encoders(config, weights, hiera=needs_hiera, dino=needs_dino)
    for encoder, digest in digests.items():
        trained_on = info.encoders.get(encoder)
        if trained_on is not None and trained_on != digest:
            raise DsuError(
                f"The head was trained with other weights of {encoder} ({trained_on[:12]}) than those found "
                f"({digest[:12]}): give the right ones with --{encoder}-weights."
            )
    kind = info.feature_dtype and torch_type(info.feature_dtype)
    model = DSUNet(config, hiera, dino, feature_dtype=kind, encoder_batch_size=info.encoder_batch_size)
    model.encoder_digests, model.random_encoders = {**info.encoders, **digests}, info.random_weights
    try:
        model.head.load_state_dict(dict(state))
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()[:160]
        raise DsuError(f"The head's tensors do not fit its own settings ({detail}): train it again.") from error
    return model.eval()


def from_pretrained(
    folder_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    encoder_weights: WeightsOf = "official",
    load_guide: bool = True,
) -> DSUNet:
    """See `DSUNet.from_pretrained`."""
    state, info = load_head(resolve_head(folder_or_hub_id, revision=revision))
    weights = EncoderWeights(random=True) if info.random_weights else EncoderWeights.of(encoder_weights)
    return load_network(state, info, weights, load_guide=load_guide)


def save_pretrained(
    model: DSUNet,
    folder: str | Path,
    *,
    metrics: Mapping[str, float] | None = None,
    trained_on: "SampleDataset | None" = None,
) -> Path:
    """See `DSUNet.save_pretrained`."""
    dtype = None if model.feature_dtype is None else str(model.feature_dtype).removeprefix("torch.")
    training: dict[str, Any] = {"random_weights": model.random_encoders, "trained_by": "a custom loop"}
    if model.encoder_batch_size is not None:
        training["encoder_batch_size"] = model.encoder_batch_size
    facts = {} if trained_on is None else trained_on.metadata
    info = HeadInfo(
        config=model.config,
        feature_dtype=dtype,  # type: ignore[arg-type]  # checked by the model
        encoders=model.encoder_digests,
        dataset={} if trained_on is None else trained_on.described,
        trained_on=image_digits(facts[name].image_sha256 for name in facts),
        trained_on_pixels=image_digits(facts[name].pixels_sha256 for name in facts),
        training=training,
        metrics=dict(metrics or {}),
    )
    broken = [name for name, tensor in model.head.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise DsuError(f"The model is not saved, since some weights are not finite ({broken[0]}): train it again.")
    out = Path(folder)
    make_folder(out)
    save_head(out / HEAD_FILE, model.head.state_dict(), info)
    write_json(out / CONFIG_FILE, info.model_dump(mode="json"), indent=2)
    return out


def start_from(head: Head, path: Path, config: DSUNetConfig, encoders: Mapping[str, str]) -> tuple[HeadInfo, list[str]]:
    """Copy a trained head's weights into a new one. Returns the trained head's info and notes for the user.

    Blocks that now have an adapter but had none get an identity adapter.

    Args:
        head: the new head.
        path: the trained head's file.
        config: the new head's network.
        encoders: digests of the encoders for training.

    Raises `UsageError` if the networks differ in more than the number of adapters.
    """
    state, info = load_head(path)
    new = head.state_dict()
    lacking = {name for name in new.keys() - state.keys() if name.startswith("adapters.")}
    odd = next((name for name in sorted(new.keys() ^ state.keys()) if name not in lacking), None) or next(
        (name for name in sorted(state) if name in new and state[name].shape != new[name].shape), None
    )
    if odd is not None:
        raise UsageError(
            f"The head {path} belongs to another network ({odd} differs; {_network_text(info.config)}): start from a "
            f"head of {_network_text(config)}, with no more adapters than --adapt-last."
        )
    head.load_state_dict({name: state.get(name, tensor) for name, tensor in new.items()})
    head.init_adapters_identity({name.split(".")[1] for name in lacking})
    other = [name for name, digest in encoders.items() if info.encoders.get(name, digest) != digest]
    remarks = [f"other weights: the initial head was trained with another {name}" for name in other]
    dataset = info.dataset.get("split", "an unknown data set")
    return info, [f"initial head: {path} (trained on {dataset}, {info.epoch} epochs)", *remarks]


def _network_text(config: DSUNetConfig) -> str:
    ablation = "" if config.ablation == "none" else f", ablation {config.ablation}"
    return f"{config.preset} with {config.adapt_last} adapted blocks{ablation}"
