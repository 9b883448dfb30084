"""Fixtures for tests of the library and the command line: a synthetic data set, and the command itself."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

from dsu.environment import prepare_environment

prepare_environment()  # before anything imports torch
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Consoles read their width when they are created, which is when the first test imports them.
os.environ["COLUMNS"] = "200"
# A background job ignores Ctrl-C, and so would the commands that tests interrupt.
with suppress(ValueError):  # not in the main thread
    signal.signal(signal.SIGINT, signal.default_int_handler)

import click
import hypothesis
import pytest
from click.testing import CliRunner, Result
from support import Dsu

# Other work on the machine makes any example slow.
hypothesis.settings.register_profile("dsu", deadline=None)
hypothesis.settings.load_profile("dsu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` if there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counts recorded by passed tests, such as "bad inputs refused or handled: N"."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for what, count in report.user_properties:
            counts[what] += count
    for what, count in counts.items():
        terminalreporter.write_line(f"{what}: {count}")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and test/ images and masks, generated once."""
    from dsu.data.synthetic import draw_dataset

    folder = tmp_path_factory.mktemp("drawn") / "shapes"
    draw_dataset(folder, train=12, test=5, seed=3)
    return folder


@pytest.fixture
def dsu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dsu:
    """Run `dsu ...` in an empty working folder, as a user would; `result.output` is everything printed."""
    from dsu_cli.main import run

    monkeypatch.chdir(tmp_path)
    for name in ("DSU_DATA", "DSU_CACHE", "DSU_HIERA", "DSU_DINO"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: object, exit_code: int | None = 0) -> Result:
        result = _invoke(run, [str(argument) for argument in arguments])
        if exit_code is not None:
            assert result.exit_code == exit_code, result.output
        assert "Traceback" not in result.output, result.output
        return result

    return call


def _invoke(run: Callable[[], None], arguments: list[str]) -> Result:
    """Call `run`, which turns errors into sentences; `output` contains both streams."""

    @click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    def dsu(words: tuple[str, ...]) -> None:
        with patch.object(sys, "argv", ["dsu", *words]):
            run()

    before = signal.getsignal(signal.SIGINT)
    try:
        return CliRunner().invoke(dsu, arguments, catch_exceptions=False)
    finally:
        signal.signal(signal.SIGINT, before)  # a command that was stopped ignores it from then on


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images; the test is skipped if there is none."""
    folder = os.environ.get("DSU_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DSU_TEST_DATA names no folder of real images")
    return Path(folder)
