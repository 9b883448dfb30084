"""`dsu visualize`, and the panel of training on a terminal."""

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from house import House
from PIL import Image
from rich.console import Console
from support import TINY, Dsu

from dsu.data.datasets import Paths
from dsu.progress import clock
from dsu.settings import EncoderWeights, TrainingSettings
from dsu.training.runs import prepare_run
from dsu_cli.training_panel import TrainingPanel


def test_features_of_a_folder_with_masks_and_of_files_without(dsu: Dsu, drawn: Path) -> None:
    said = dsu("visualize", "features", drawn / "train", "--count", 2, *TINY, "--tokens", 40).output
    assert "random encoders" in said and "2 of 12 images" in said and "t-SNE" in said
    assert "features of 2 images on 1 page\n" in said and said.endswith("Written: features.png\n")
    with Image.open("features.png") as picture:
        assert picture.width > 1500
    files = sorted((drawn / "train" / "images").iterdir())[:2]
    dsu("visualize", "features", *files, *TINY, "--tokens", 40, "--dino-blocks", "2,4", "-o", "new/some.pdf")
    assert Path("new/some.pdf").read_bytes().startswith(b"%PDF")


def test_features_skip_an_unreadable_image(dsu: Dsu, drawn: Path) -> None:
    shutil.copytree(drawn / "test", "mine")
    first = min(Path("mine/images").iterdir())
    first.write_bytes(b"rubbish")
    said = dsu("visualize", "features", "mine", "--count", 3, "--no-tsne", *TINY, exit_code=1).output
    assert f"{first.name} cannot be read" in said and "features of 2 images" in said and Path("features.png").is_file()


def test_features_before_and_after_a_heads_adapters(dsu: Dsu, house: House) -> None:
    image = next(iter(sorted((house.data / "train" / "images").iterdir())))
    said = dsu("visualize", "features", image, *TINY, "--no-tsne", "-o", "frozen.png").output
    assert "t-SNE" not in said
    dsu("visualize", "features", image, "--head", house.run, "--no-tsne", "-o", "adapted.png")
    frozen, adapted = (np.asarray(Image.open(name)).shape for name in ("frozen.png", "adapted.png"))
    assert adapted[1] == frozen[1] and adapted[0] == pytest.approx(1.5 * frozen[0], abs=3)


def test_features_of_a_benchmark(dsu: Dsu, drawn: Path) -> None:
    place = Path("data/DUTS/DUTS-TE")
    place.mkdir(parents=True)
    shutil.copytree(drawn / "test" / "images", place / "DUTS-TE-Image")
    shutil.copytree(drawn / "test" / "masks", place / "DUTS-TE-Mask")
    said = dsu("visualize", "features", "duts", "--count", 2, "--no-tsne", *TINY).output
    assert "duts: 2 of 5 images" in said and "Written: features.png" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-o", "a.jpg"), ("a.jpg", ".png or a .pdf")),
        (("--dino-blocks", "x"), ("--dino-blocks", "'x'", "6,12,18,24")),
        (("--dino-blocks", "9"), ("block 9", "1 to 4")),
        (("--tokens", "2"), ("--tokens", "from 4")),
        (("--count", "0"), ("--count", "from 1")),
        (("--masks", "nowhere"), ("nowhere", "not a folder")),
        (("--precision", "fp8"), ("--precision", "'auto', 'fp32' or 'bf16'")),
    ],
)
def test_bad_options_of_features(dsu: Dsu, drawn: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    said = dsu("visualize", "features", drawn / "train", *TINY, *options, exit_code=2).output
    assert all(word in " ".join(said.split()) for word in words), said


def test_features_refuse_invalid_requests(dsu: Dsu, drawn: Path, house: House) -> None:
    image = next((drawn / "train" / "images").iterdir())
    said = dsu("visualize", "features", image, "--head", house.run, "--preset", "toy", exit_code=2).output
    assert "--preset" in said and "--head" in said
    said = dsu("visualize", "features", "nothing.jpg", *TINY, exit_code=2).output
    assert "nothing.jpg does not exist" in said
    said = dsu("visualize", "features", *[image] * 25, *TINY, exit_code=2).output
    assert "25 images" in said and "24 at most" in said
    Path("features.png").write_bytes(b"mine")
    said = dsu("visualize", "features", image, *TINY, exit_code=2).output
    assert "features.png already exists: give another --out, or --overwrite for a file." in said
    assert Path("features.png").read_bytes() == b"mine"
    dsu("visualize", "features", image, *TINY, "--no-tsne", "--overwrite", "--quiet")
    assert Path("features.png").read_bytes() != b"mine"
    Path("folder.png").mkdir()
    said = dsu("visualize", "features", image, *TINY, "-o", "folder.png", "--overwrite", exit_code=2).output
    assert "folder.png already exists" in said


def test_predictions_of_a_run_need_only_its_folder(dsu: Dsu, house: House) -> None:
    said = dsu("visualize", "predictions", "--predictions", f"Ours={house.run}").output
    assert f"Ours: {house.predictions}" in said and "2 images on 1 page" in said
    assert said.endswith("Written: predictions.png\n")
    dsu("visualize", "predictions", "--predictions", house.run, "--worst", 1, "-o", "worst.png", "--quiet")
    shutil.copytree(house.run, "runs/newest")
    shutil.copytree(house.run, "runs/unused", ignore=shutil.ignore_patterns("predictions"))
    said = dsu("visualize", "predictions", "--predictions", "Ours=runs/unused", "-o", "no.png", exit_code=2).output
    assert "runs/unused contains a head but no predictions: run `dsu predict --head runs/unused` first." in said
    said = dsu("visualize", "predictions", "shapes-TE", "-o", "newest.png").output
    assert f"newest: {Path('runs/newest/predictions')}" in said
    with Image.open("predictions.png") as ours, Image.open("worst.png") as worst:
        assert ours.width == worst.width and ours.height > worst.height


def test_pages_are_announced_and_every_file_is_named(dsu: Dsu, drawn: Path) -> None:
    images, masks = drawn / "test" / "images", drawn / "test" / "masks"
    command = ("visualize", "predictions", images, "--truth", masks, "--predictions", f"Ours={masks}", "-o", "a.png")
    command += ("--rows", 2)
    said = dsu(*command).output
    pages = len(list(Path.cwd().glob("a*.png")))
    assert pages > 1 and f"5 images on {pages} pages" in said
    named = [line.removeprefix("Written: ") for line in said.splitlines() if line.startswith("Written: ")]
    assert named == ["a.png", *(f"a-{page}.png" for page in range(2, pages + 1))]
    assert said.index("pages") < said.index("drawing") < said.index("Written")
    Path("a.png").unlink()
    said = dsu(*command, exit_code=2).output
    assert "a-2.png already exists" in said and not Path("a.png").exists()
    assert dsu(*command, "--overwrite", "--quiet").output == ""


def test_predictions_of_several_heads_in_one_figure(dsu: Dsu, drawn: Path) -> None:
    images, masks = drawn / "test" / "images", drawn / "test" / "masks"
    shutil.copytree(masks, "theirs")
    columns = ("--truth", masks, "--predictions", f"Ours={masks}", "--predictions", "Theirs=theirs")
    dsu("visualize", "predictions", images, *columns, "--worst", 2, "--by", "MAE", "-o", "worst.pdf")
    said = dsu("visualize", "predictions", images, *columns, "--first", 3).output
    assert "the first 3 of 5" in said and "predictions.png" in said
    with Image.open("predictions.png") as picture:
        assert abs(picture.width - 4.65 * 300) <= 4
    dsu("visualize", "predictions", images, *columns, "--width", 2.5, "-o", "narrow.png")
    with Image.open("narrow.png") as picture:
        assert abs(picture.width - 2.5 * 300) <= 4
    name = sorted(images.iterdir())[2].stem
    dsu("visualize", "predictions", images, *columns, "--names", name, "-o", "one.png", "--labels")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--names", "nobody"), ("'nobody'",)),
        (("--names", "a", "--worst", "2"), ("--names and --worst",)),
        (("--worst", "0"), ("--worst", "from 1")),
        (("--first", "0"), ("--first", "from 1")),
        (("--width", "0"), ("--width", "1")),
        (("--rows", "0"), ("--rows", "1")),
        (("--worst", "2", "--by", "X"), ("--by", "'X'", "MAE")),
        (("--predictions", "Ours="), ("--predictions", "'Ours='", "NAME=FOLDER")),
        (("--predictions", "Other=nowhere"), ("nowhere is not a folder",)),
        (("--predictions", "Ours=."), ("the name Ours twice",)),
        (("-o", "figure.svg"), ("figure.svg", ".pdf")),
    ],
)
def test_bad_options_of_predictions(dsu: Dsu, drawn: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    images, masks = drawn / "test" / "images", drawn / "test" / "masks"
    command = ("visualize", "predictions", images, "--truth", masks, "--predictions", f"Ours={masks}", *options)
    said = " ".join(dsu(*command, exit_code=2).output.split())
    assert all(word in said for word in words), said


# ---- the panel ----


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (750, "12:30"), (10_930, "3:02:10"), (187_200, "2 d 4 h")])
def test_the_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize("width", [100, 60])
def test_the_panel_shows_progress_and_leaves_one_line_per_epoch(house: House, tmp_path: Path, width: int) -> None:
    run = prepare_run(
        TrainingSettings(epochs=2, sheet_every=0, val_fraction=0.3, batch_size=2),
        paths=Paths(house.data, house.features),
        weights=EncoderWeights(),
    )
    run.trainer.out = tmp_path
    screen = io.StringIO()
    panel = TrainingPanel(Console(file=screen, force_terminal=True, width=width, soft_wrap=True), run.trainer)
    frames: list[str] = []

    def frame() -> None:
        shot = io.StringIO()
        Console(file=shot, width=width).print(panel.render())
        frames.append(shot.getvalue())

    advance = panel.advance
    panel.advance = lambda units=1: (advance(units), frame())[0]  # type: ignore[method-assign, misc]
    frame()
    run.trainer.callbacks.append(panel)
    with panel.shown():
        run.trainer.run(panel)
    assert "epoch 1/2" in frames[0] and "not validated yet" in frames[0]
    last = frames[-1]
    for word in ("epoch 2/2", "validating", "loss", "D1", "D3", "images/s", "data wait", "best S"):
        assert word in last or width < 80, last
    assert any("left" in one for one in frames[1:])
    assert all(len(line) <= width for one in frames for line in one.splitlines())
    left = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for epoch in (1, 2):
        assert re.search(rf"epoch {epoch}/2 in \d+:\d\d: loss \d", left)


def test_no_panel_without_a_terminal_and_nothing_when_quiet(dsu: Dsu, house: House) -> None:
    said = dsu(*house.train("--out", "spoken")).output
    assert "epoch 1/1:" in said and "images/s" in said and "╭" not in said
    assert dsu(*house.train("--out", "silent", "--quiet")).output == ""
