"""The smallest network with an output that varies over the image, like a trained network's, and its head."""

from pathlib import Path
from typing import Any

import torch
from support import toy_network
from torch import nn

from dsu.heads.head_file import HeadInfo, save_head
from dsu.network.network import DSUNet

__all__ = ["loud_network", "save_loud_head"]


def loud_network(seed: int = 1, **options: Any) -> DSUNet:
    """`toy_network` with a large output; the same at every call with the same seed."""
    network = toy_network(feature_dtype=torch.float16, **options)
    torch.manual_seed(seed)
    for layer in network.head.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
    nn.init.normal_(network.head.sides[-1].weight, std=2)
    return network


def save_loud_head(path: Path, network: DSUNet, **info: Any) -> Path:
    """Write the network's head; `info` are fields of `HeadInfo`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    training = {"random_weights": True, **info.pop("training", {})}
    noted = HeadInfo(config=network.config, encoders=network.encoder_digests, training=training, **info)
    save_head(path, network.head.state_dict(), noted)
    return path
