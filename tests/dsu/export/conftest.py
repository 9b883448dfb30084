"""A head of the smallest network with a large output, and its model, exported once."""

import pytest
from export_of import Export
from loud import loud_network, save_loud_head

from dsu.export.exporting import export_model
from dsu.heads.head_file import HEAD_FILE, load_head
from dsu.network.pretrained import load_network
from dsu.settings import EncoderWeights


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    home = tmp_path_factory.mktemp("exported")
    head = home / "run" / HEAD_FILE
    dataset = {"split": "own", "reference": "/home/me/own", "held_out": ["a"], "depth": [0, 4095]}
    training = {"init_from": "/home/me/runs/other"}
    save_loud_head(head, loud_network(adapt_last=3), dataset=dataset, test=["secret"], training=training)
    made = export_model(head, home / "out" / "model.onnx", EncoderWeights())
    state, info = load_head(head)
    return Export(head, load_network(state, info, EncoderWeights(random=True)), made)
