"""Fixtures: two heads, loaded once, and servers for them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from served import load_two_heads
from starlette.testclient import TestClient

from dsu.serving.app import create_app
from dsu.serving.heads import ServedHead
from dsu.settings import ServingSettings

Heads = Mapping[str, ServedHead]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent of the heads' folders."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="session")
def heads(home: Path) -> Heads:
    return load_two_heads(home)


@pytest.fixture
def serve(heads: Heads) -> Iterator[Callable[..., TestClient]]:
    """Start a server with the given settings, and optionally other heads; returns a client without a socket."""
    with ExitStack() as running:

        def started(others: Heads = heads, **settings: float) -> TestClient:
            app = create_app(others, ServingSettings.model_validate(settings))
            return running.enter_context(TestClient(app, raise_server_exceptions=False))

        yield started
