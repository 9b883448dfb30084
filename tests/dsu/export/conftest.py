"""A head on the smallest network with a loud output, and its model: exported once."""

import pytest
import torch
from export_of import Export
from support import toy_network
from torch import nn

from dsu.export.exporting import export_model
from dsu.heads.head_file import HEAD_FILE, HeadInfo, load_head, save_head
from dsu.network.pretrained import load_network
from dsu.settings import EncoderWeights


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    home = tmp_path_factory.mktemp("exported")
    head = home / "run" / HEAD_FILE
    head.parent.mkdir()
    network = toy_network(adapt_last=3, feature_dtype=torch.float16)
    torch.manual_seed(1)
    for layer in network.head.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
    nn.init.normal_(network.head.sides[-1].weight, std=2)
    dataset = {"split": "own", "reference": "/home/me/own", "held_out": ["a"], "depth": [0, 4095]}
    info = HeadInfo(
        config=network.config,
        encoders=network.encoder_digests,
        dataset=dataset,
        test=["secret"],
        training={"random_weights": True, "init_from": "/home/me/runs/other"},
    )
    save_head(head, network.head.state_dict(), info)
    made = export_model(head, home / "out" / "model.onnx", EncoderWeights())
    state, info = load_head(head)
    return Export(head, load_network(state, info, EncoderWeights(random=True)), made)
