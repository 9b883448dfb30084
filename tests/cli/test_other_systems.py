"""The pipeline without anything that only Unix has, as on Windows: modules, functions, opening folders."""

import subprocess
import sys
from pathlib import Path

import pytest

AS_ON_WINDOWS = """
import builtins, importlib.util, os, sys

ABSENT = {"fcntl", "resource", "grp", "pwd", "termios", "tty"}


def ours():
    return sys._getframe(2).f_globals.get("__name__", "").startswith("dsu")


found, imported = importlib.util.find_spec, builtins.__import__


def find_spec(name, package=None):
    return None if name in ABSENT and ours() else found(name, package)


def import_module(name, *rest, **named):
    if name in ABSENT and ours():
        raise ModuleNotFoundError(name)
    return imported(name, *rest, **named)


importlib.util.find_spec, builtins.__import__ = find_spec, import_module
for call in ("preadv", "pread", "posix_fadvise"):
    if hasattr(os, call):
        delattr(os, call)

opened, killed = os.open, os.kill


def open_file(path, flags, *rest, **named):
    if isinstance(path, (str, bytes, os.PathLike)) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", os.fspath(path))
    return opened(path, flags, *rest, **named)


def kill(process, signal):
    if signal == 0 and ours():
        raise AssertionError("os.kill(pid, 0) ends a process there")
    return killed(process, signal)


os.open, os.kill = open_file, kill
from dsu_cli.main import run

sys.argv = ["dsu", *sys.argv[1:]]
run()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dsu.data.synthetic import draw_dataset

    made = tmp_path_factory.mktemp("windows")
    draw_dataset(made / "tiles", train=12, test=3, sizes=(64, 96))
    return made


def dsu(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_the_pipeline_needs_no_unix_functions(folder: Path) -> None:
    toy = ("--preset", "toy", "--random-weights")
    dsu(folder, "cache-features", "tiles", *toy)
    dsu(folder, "train-head", *toy, "--epochs", "2", "--batch-size", "4", "--out", "run")
    dsu(folder, "predict", "--head", "run", "--out", "masks")
    assert "S" in dsu(folder, "eval", "--predictions", "masks")
    dsu(folder, "cache", "verify")
    dsu(folder, "cache", "list")
    dsu(folder, "datasets", "check", "tiles")
    dsu(folder, "doctor")
    dsu(folder, "cache", "remove", "tiles", "--yes")


def test_no_unix_module_is_imported(folder: Path) -> None:
    assert "cache-features" in dsu(folder, "--help")
    dsu(folder, "cache", "list")
