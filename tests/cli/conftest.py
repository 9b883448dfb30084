"""Fixtures for tests of the commands: a house that the commands built, a folder to damage, and checks of refusals."""

import shutil
from pathlib import Path

import pytest
from cached import Cached
from house import House, build_house
from rubbish import Refused
from support import Dsu

from dsu.config import build_config
from dsu.data.datasets import Paths
from dsu.features.extraction import cache_features
from dsu.settings import EncoderWeights, ExtractionSettings


@pytest.fixture(scope="session")
def house(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> House:
    return build_house(drawn, tmp_path_factory.mktemp("house"))


@pytest.fixture
def mine(drawn: Path, tmp_path: Path) -> Path:
    """A user's folder with four images and masks, to be damaged."""
    folder = tmp_path / "mine"
    for inner in ("images", "masks"):
        (folder / inner).mkdir(parents=True)
        for path in sorted((drawn / "train" / inner).iterdir())[:4]:
            shutil.copy(path, folder / inner)
    return folder


@pytest.fixture
def refused(dsu: Dsu, request: pytest.FixtureRequest, tmp_path: Path, house: House, drawn: Path) -> Refused:
    return Refused(dsu, request.node, (tmp_path, house.data.parent, drawn))


@pytest.fixture(scope="session")
def cached(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Cached:
    """A user's five images and their features; tests that change them use a copy."""
    home = tmp_path_factory.mktemp("cached")
    for inner in ("images", "masks"):
        (home / "tiles" / inner).mkdir(parents=True)
        for path in sorted((drawn / "train" / inner).iterdir())[:5]:
            shutil.copy(path, home / "tiles" / inner)
    cache_features(
        str(home / "tiles"),
        build_config("toy", hiera_size=128, dino_size=126),
        ExtractionSettings(features=("V", "S3")),
        EncoderWeights(),
        paths=Paths(home, home / "features"),
        device="cpu",
    )
    return Cached(home / "tiles", home / "features")
