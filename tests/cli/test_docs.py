"""Every command in README and docs/ runs as shown, but with toy encoders instead of the paper's."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from s3 import Server
from served import serving
from settings_page import PAGE, settings_page
from support import TINY, Dsu

HOUSE = Path(__file__).parents[2]
DOCUMENTS = (HOUSE / "README.md", *sorted((HOUSE / "docs").glob("*.md")))

TOY = {"V6,V12,V18,V24": "V1,V2,V3,V4", "--preset toy": ""}
"""Replacements in commands for the toy encoders."""

SHOWN_ONLY = ("dsu COMMAND", "dsu demo")
"""Commands that are not run: a placeholder, and the command of `make demo`."""

SERVED = "127.0.0.1:8000"
"""The server's address in documents; tests start it on a free port."""

SMALLER = {
    "cache-features": TINY,
    "train-head": ("--epochs", "1"),
    "check-equivalence": ("--steps", "1", "--batch-size", "2"),
    "visualize features": (*TINY, "--count", "2"),
    "bench": (*TINY, "--rounds", "1", "--images", "2", "--parts", "reading"),
    "cache remove": ("--yes",),
    "study folds": ("--epochs", "1", "-k", "2"),
    "study": ("--epochs", "1"),
}
"""Additional options by command, which override earlier ones."""


def commands(document: Path) -> list[str]:
    """Indented lines with `dsu` commands, exported programs or requests to the server, without their comments."""
    lines = document.read_text(encoding="utf-8").splitlines()
    shown = [line.strip() for line in lines if line.startswith(("    dsu ", "    python shared/", "    curl "))]
    return [line.partition("  #")[0].strip() for line in shown if not line.startswith(SHOWN_ONLY)]


def test_documents_have_commands() -> None:
    assert sum(len(commands(document)) for document in DOCUMENTS) > 20


def test_the_settings_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_page(), "run `python tests/settings_page.py`"


def test_no_install_line_fetches_a_foreign_package() -> None:
    """On PyPI, `dsu` is another program and `dsu-net` does not exist, so documents install a path or a URL."""
    assert tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]["name"] == "dsu-net"
    folders = [HOUSE / name for name in ("dsu", "cache", "cli", "docs", ".ci")]
    files = [HOUSE / "README.md", HOUSE / "Makefile", *(path for folder in folders for path in folder.rglob("*"))]
    lines = [
        line
        for path in files
        if path.is_file() and path.suffix != ".pyc"
        for line in re.findall(r"pip install ([^`\n]*)", path.read_text(encoding="utf-8"))
    ]
    assert len(lines) > 4
    assert [line for line in lines if re.search(r"(^|[\s'\"])dsu(-net)?(\[\w+\])?($|[\s'\"=<>~!](?! *@))", line)] == []


@pytest.fixture
def running() -> Iterator[ExitStack]:
    """Start servers, which end with the test."""
    with ExitStack() as stack:
        yield stack


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_commands_of(
    document: Path,
    dsu: Dsu,
    drawn: Path,
    monkeypatch: pytest.MonkeyPatch,
    running: ExitStack,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    lines = commands(document)
    if not lines:
        pytest.skip("shows no command")
    if any("s3://" in line for line in lines):
        for name, value in running.enter_context(Server(tmp_path_factory.mktemp("s3"))).environment().items():
            monkeypatch.setenv(name, value)
    here = Path.cwd()
    benchmarks(here / "data", drawn)
    for folder in ("tiles", "photos", "new-images"):
        shutil.copytree(drawn / "test", here / folder)
    for kind in ("images", "masks"):
        for path in sorted((drawn / "train" / kind).iterdir())[:4]:
            shutil.copy(path, here / "tiles" / kind)
    shutil.copy(sorted((drawn / "test" / "images").iterdir())[0], here / "photo.jpg")
    monkeypatch.setenv("HOME", str(here))
    address = SERVED
    if not any("cache-features" in line for line in lines):
        dsu("cache-features", "DUTS", *TINY, "--features", "V", "--quiet")
        dsu("train-head", "--epochs", 1, "--quiet")
        dsu("predict", "--quiet")
    for line in lines:
        for paper, toy in TOY.items():
            line = line.replace(paper, toy)
        program, *words = (os.path.expanduser(word) for word in shlex.split(line))
        if program in ("python", "curl"):
            called = sys.executable if program == "python" else program
            subprocess.run([called, *(word.replace(SERVED, address) for word in words)], check=True)
            continue
        if words[0] == "serve":
            address = f"127.0.0.1:{running.enter_context(serving(*words[1:]))[0]}"
            continue
        smaller = next((extra for start, extra in SMALLER.items() if " ".join(words).startswith(start)), ())
        dsu(*words, *smaller)


def benchmarks(root: Path, drawn: Path) -> None:
    """All nine benchmarks in known layouts, with two synthetic pairs per split."""
    pairs = itertools.cycle(sorted((drawn / "train" / "images").iterdir()))
    plain = ("DUTS/DUTS-TR", "DUTS/DUTS-TE", "DUT-OMRON", "HKU-IS", "PASCAL-S", "ECSSD")
    tests = ("TestDataset/CAMO", "TestDataset/COD10K", "TestDataset/CHAMELEON", "TestDataset/NC4K")
    for home, names in itertools.chain(
        ((home, ("0001", "0002")) for home in plain),
        ((home, ("camourflage_00001", "camourflage_00002")) for home in tests),
        [("TrainDataset", ("camourflage_00003", "COD10K-CAM-1-Aquatic-1-Bat-1"))],
    ):
        for name, image in zip(names, pairs, strict=False):
            _copy(image, root / home / "Imgs" / f"{name}{image.suffix}")
            _copy(drawn / "train" / "masks" / f"{image.stem}.png", root / home / "GT" / f"{name}.png")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
