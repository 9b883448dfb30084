"""Errors in names, options and files, and listings, do not load torch, which takes seconds.

Each command runs in a new process and prints the slow libraries that it has loaded, instead of measuring time.
"""

import subprocess
import sys
from pathlib import Path
from typing import Final, get_args

import pytest
from support import TINY

from dsu.choices import ReportFormat
from dsu.report.tables import FORMATS

SLOW: Final = ("torch", "timm", "sam2", "zarr", "scipy", "sklearn", "matplotlib")

PROGRAM: Final = f"""
import atexit, sys
sys.argv[0] = "dsu"
atexit.register(lambda: print("LOADED", *(name for name in {SLOW} if name in sys.modules)))
from dsu_cli.main import run
run()
"""

ERRORS: Final[dict[str, tuple[str, str]]] = {
    "train-head --region foo": ("--region must be", ""),
    "train-head --device tpu": ("--device must be auto, cpu, cuda or cuda:N", ""),
    "train-head --epochs x": ("--epochs", ""),
    "train-head --fold 3/2": ("--fold must be", ""),
    "train-head --preset huge": ("no preset called 'huge'", ""),
    "train-head --config nosuch.yaml": ("nosuch.yaml can't be read", ""),
    "train-head nosuch": ("no training features of nosuch", ""),
    "train-head --resume --out nosuch": ("no run in nosuch", ""),
    "train-head --init-from nosuch": ("no head at nosuch", ""),
    "train-head --val-fraction 0.6 --test-fraction 0.6": ("leave nothing for training", ""),
    "train-head --views none --group nosuch.csv": ("nosuch.csv can't be read", ""),
    "train-head --hiera-weights no.pt --hiera toy": ("There are no training features", ""),
    "cache-features nosuch": ("neither a folder", ""),
    "cache-features {images} --features Q": ("'Q' is not a feature", ""),
    "cache-features {images} --hiera-weights no.pt": ("not at no.pt", ""),
    "predict --kind maks": ("--kind must be", ""),
    "predict --head nosuch": ("no head at nosuch", ""),
    "predict nosuch": ("neither a folder", ""),
    "predict nosuch.jpg --out mask.png": ("no image at nosuch.jpg", ""),
    "predict {empty} --out masks": ("no image", ""),
    "eval": ("no predictions", ""),
    "eval nosuch": ("no predictions", ""),
    "eval --predictions nosuch": ("no folder of predictions at nosuch", ""),
    "eval --predictions {images}/images": ("give --truth", ""),
    "eval --predictions {images}/images --truth nosuch": ("neither a folder", ""),
    "visualize predictions": ("no predictions", ""),
    "visualize predictions {images} --predictions nosuch": ("nosuch is not a folder", ""),
    "visualize predictions {images} --predictions Q={images}/masks --names nosuch": ("is called 'nosuch'", ""),
    "visualize predictions {images} --predictions Q={images}/masks --worst 2 --by Q": ("--by can't be 'Q'", ""),
    "visualize predictions -o a.svg": ("a.svg can't be drawn", ""),
    "visualize features nosuch": ("neither a folder", ""),
    "visualize features {images} --head nosuch": ("no head at nosuch", ""),
    "visualize features {images} --masks nosuch": ("nosuch is not a folder", ""),
    "visualize features {images} --dino-blocks 99": ("--dino-blocks contains block 99", ""),
    "visualize features {images} --preset large --dino-weights no.pt": ("not at no.pt", ""),
    "study folds nosuch": ("no training features of nosuch", ""),
    "study folds --metrics Q": ("--metrics can't be Q", ""),
    "study depth --depths x": ("--depths can't have 'x'", ""),
    "check-equivalence nosuch": ("no training features of nosuch", ""),
    "bench --parts nosuch": ("--parts can't be nosuch", ""),
    "bench --hiera-weights no.pt": ("not at no.pt", ""),
    "datasets check nosuch": ("neither a folder", ""),
    "datasets check {images} --sheet a.bmp": ("a.bmp can't be drawn", ""),
    "eval --format xml": ("--format can't be xml", ""),
    "eval --metrics Q": ("--metrics can't be Q", ""),
    "visualize features {images} --tokens 1": ("--tokens can't be 1", ""),
    "head info nosuch": ("no head at nosuch", ""),
    "head export nosuch -o shared": ("no head at nosuch", ""),
    "export nosuch": ("no head at nosuch", ""),
    "export --precision int4": ("--precision can't be int4", ""),
    "predict --head nosuch.onnx": ("no head at nosuch.onnx", ""),
    "serve --port 0 --head nosuch": ("no head at nosuch", ""),
    "serve --max-megabytes 0": ("--max-megabytes must be greater than 0", ""),
    "export-checkpoint nosuch": ("no head at nosuch", ""),
    "import-checkpoint nosuch.pth": ("no checkpoint at nosuch.pth", ""),
    "check-equivalence --steps 0": ("--steps can't be 0", ""),
    "bench --json no/y/x.json": ("--json can't be no/y/x.json", ""),
    "check-equivalence --json {images}": ("is a folder: give a name for the file in it", ""),
    "bench --preset huge": ("no preset called 'huge'", ""),
}
"""For each command: a part of its error message, and the slow libraries that it may load."""


@pytest.fixture(scope="module")
def here(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a store and a run."""
    folder = tmp_path_factory.mktemp("here")
    for command in (
        ["cache-features", drawn / "train", *TINY, "--features", "V", "--views", "none", "--quiet"],
        ["train-head", "--epochs", 1, "--adapt-last", 0, "--views", "none", "--sheet-every", 0, "--quiet"],
    ):
        said, status = typed(folder, [str(word) for word in command])
        assert status == 0, said
    return folder


def typed(folder: Path, words: list[str]) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], cwd=folder, capture_output=True, text=True, check=False
    )
    return " ".join((done.stderr + done.stdout).split()), done.returncode


@pytest.mark.parametrize("command", ERRORS)
def test_errors_do_not_load_torch(command: str, here: Path, drawn: Path) -> None:
    words, wanted = ERRORS[command]
    (here / "empty").mkdir(exist_ok=True)
    said, status = typed(here, command.format(images=drawn / "train", empty="empty").split())
    assert status in (1, 2) and words in said, said
    assert said.rpartition("LOADED")[2].split() == wanted.split(), said


@pytest.mark.parametrize(
    "command", ["--help", "train-head --help", "--version", "head info", "head list", "cache list", "datasets"]
)
def test_listings_do_not_load_torch(command: str, here: Path) -> None:
    said, status = typed(here, command.split())
    assert status == 0 and not said.rpartition("LOADED")[2].split(), said


def test_report_formats_are_the_allowed_values() -> None:
    assert get_args(ReportFormat) == tuple(FORMATS)
