"""Starting from a trained head."""

from collections.abc import Mapping
from pathlib import Path

from dsu.config import DSUNetConfig
from dsu.errors import UsageError
from dsu.heads.head_file import HeadInfo, load_head
from dsu.network.head import Head

__all__ = ["start_from"]


def start_from(head: Head, path: Path, config: DSUNetConfig, encoders: Mapping[str, str]) -> tuple[HeadInfo, list[str]]:
    """Give a new head the weights of a trained one; that one's info, and what its user should know.

    Blocks that have an adapter now and had none then get one that does nothing yet.

    Args:
        head: the new one.
        path: the trained one's file.
        config: of the new one's network.
        encoders: digests of the encoders that it will be trained with.

    Raises `UsageError` where the two differ in more than how many blocks have adapters.
    """
    state, info = load_head(path)
    new = head.state_dict()
    lacking = {name for name in new.keys() - state.keys() if name.startswith("adapters.")}
    odd = next((name for name in sorted(new.keys() ^ state.keys()) if name not in lacking), None) or next(
        (name for name in sorted(state) if name in new and state[name].shape != new[name].shape), None
    )
    if odd is not None:
        raise UsageError(
            f"The head {path} is of another network ({odd} differs; {_network_text(info.config)}): start from "
            f"one of {_network_text(config)}, with no more adapters than --adapt-last asks for."
        )
    head.load_state_dict({name: state.get(name, tensor) for name, tensor in new.items()})
    head.init_adapters_identity({name.split(".")[1] for name in lacking})
    other = [name for name, digest in encoders.items() if info.encoders.get(name, digest) != digest]
    remarks = [f"other weights: the head to start from was trained with another {name}" for name in other]
    dataset = info.dataset.get("split", "an unknown data set")
    return info, [f"starts with: {path} (trained on {dataset}, {info.epoch} epochs)", *remarks]


def _network_text(config: DSUNetConfig) -> str:
    ablation = "" if config.ablation == "none" else f", ablation {config.ablation}"
    return f"{config.preset} with {config.adapt_last} adapted blocks{ablation}"
