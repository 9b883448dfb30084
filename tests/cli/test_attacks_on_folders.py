"""Regression tests with unusual folders and machines: each case once had no error, or a wrong one."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from house import House
from PIL import Image
from support import TINY, Dsu

from dsu.training import callbacks

STAGE_ONE: Final = (*TINY, "--features", "V", "--views", "1")
QUICK: Final = ("--views", "1", "--epochs", "1", "--sheet-every", "0", "--quiet")


def photo(seed: int, mode: str = "RGB") -> Image.Image:
    """A 60x40 photograph that depends on the seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((60, 40), Image.Resampling.BICUBIC).convert(mode)


def box() -> Image.Image:
    """A 60x40 mask."""
    grey = np.zeros((40, 60), np.uint8)
    grey[5:20, 15:30] = 255
    return Image.fromarray(grey)


def written(folder: Path, pictures: Mapping[str, Image.Image]) -> Path:
    """Write images into a folder, by their relative paths."""
    for path, picture in pictures.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / path)
    return folder


def plain(folder: Path, count: int = 3) -> Path:
    """A folder with ordinary images and masks."""
    pictures = {f"images/p{index}.png": photo(index) for index in range(count)}
    return written(folder, pictures | {f"masks/p{index}.png": box() for index in range(count)})


def checked(dsu: Dsu, folder: Path) -> dict[str, Any]:
    """The result of `datasets check` for the only split."""
    [split] = json.loads(dsu("datasets", "check", folder, "--json", "--quiet", exit_code=None).stdout)["splits"]
    return dict(split)


# ---- names ----

NAMES: Final[dict[str, Callable[[str], tuple[str, str]]]] = {
    "capitals": lambda name: (name.upper(), name),
    "spaces around": lambda name: (f"{name} ", f" {name}"),
    "capitals and endings": lambda name: (f"{name}_0000", f"{name.upper()}_Mask"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_pair_regardless_of_case_and_spaces(dsu: Dsu, tmp_path: Path, kind: str) -> None:
    pictures = {}
    for index, name in enumerate(("cat", "dog", "owl")):
        image, mask = NAMES[kind](name)
        pictures |= {f"images/{image}.jpg": photo(index), f"masks/{mask}.png": box()}
    found = checked(dsu, written(tmp_path / "mine", pictures))
    assert (found["pairs"], found["images_without_mask"]) == (3, 0)


def test_names_that_differ_only_in_case_are_different(dsu: Dsu, tmp_path: Path) -> None:
    pictures = {f"images/{name}.jpg": photo(ord(name)) for name in "aA"} | {f"masks/{name}.png": box() for name in "aA"}
    folder = written(tmp_path / "mine", pictures)
    dsu("cache-features", folder, *STAGE_ONE)
    (folder / "masks" / "A.png").unlink()
    said = dsu("cache-features", folder, *STAGE_ONE, exit_code=1).output
    assert "1 image of mine without a mask, skipped: A.jpg" in said


# ---- files that are not images or masks ----


@pytest.mark.parametrize("place", ["@eaDir/p0.png", "$RECYCLE.BIN", "lost+found"])
def test_files_of_operating_systems_are_not_images(dsu: Dsu, house: House, tmp_path: Path, place: str) -> None:
    folder = written(plain(tmp_path / "mine"), {f"images/{place}/thumbnail.jpg": photo(9)})
    dsu("cache-features", folder, *STAGE_ONE)
    said = dsu("predict", folder, "--head", house.run, "--out", "maps").output
    assert "mine: 3 from images" in said


def test_photographs_in_unsupported_formats_are_named(dsu: Dsu, house: House, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    written(folder, {"a.jpg": photo(0), "raw-and-jpeg.jpg": photo(1)})
    for name in ("b.HEIC", "c.avif", "raw-and-jpeg.CR2", "notes.pdf"):
        (folder / name).write_bytes(b"\0\0\0\x18ftypheic")
    result = dsu("predict", folder, "--head", house.run, "--out", "maps", exit_code=1)
    assert [name for name in ("b.HEIC", "c.avif", "raw-and", "notes") if name in result.stderr] == ["b.HEIC", "c.avif"]
    assert "2 written to maps, 2 skipped" in result.output.replace("\n", " ")


def test_stereo_photographs_are_read(dsu: Dsu, tmp_path: Path) -> None:
    folder = plain(tmp_path / "mine", 1)
    photo(5).save(folder / "images" / "p5.mpo", format="MPO", save_all=True, append_images=[photo(6)])
    box().save(folder / "masks" / "p5.png")
    assert checked(dsu, folder)["pairs"] == 2


NO_MASKS: Final[dict[str, Callable[[Path], None]]] = {
    "a link to its image": lambda folder: _linked(folder / "masks" / "p0.png", "../images/p0.png"),
    "a grey image itself": lambda folder: _copied_grey(folder),
    "a photograph": lambda folder: photo(7).save(folder / "masks" / "p0.png"),
}


def _linked(path: Path, to: str) -> None:
    path.unlink()
    path.symlink_to(to)


def _copied_grey(folder: Path) -> None:
    photo(7, "L").save(folder / "images" / "p0.png")
    shutil.copy(folder / "images" / "p0.png", folder / "masks" / "p0.png")


@pytest.mark.parametrize("kind", NO_MASKS)
def test_a_photograph_is_refused_as_mask(dsu: Dsu, tmp_path: Path, kind: str) -> None:
    folder = plain(tmp_path / "mine")
    NO_MASKS[kind](folder)
    for status, command in enumerate((("datasets", "check", folder), ("cache-features", folder, *STAGE_ONE))):
        said = " ".join(dsu(*command, exit_code=status).output.split())
        assert "p0.png" in said and "photograph" in said, said
    dsu("train-head", *QUICK, "--out", "run")
    assert set(json.loads(Path("run/run.json").read_text())["samples"]) == {"p1", "p2"}


def test_masks_that_link_to_the_images_are_refused(dsu: Dsu, tmp_path: Path) -> None:
    folder = written(tmp_path / "mine", {f"images/p{index}.png": photo(index) for index in range(3)})
    (folder / "masks").symlink_to("images")
    assert "photograph" in dsu("cache-features", folder, *STAGE_ONE, exit_code=1).stderr


def test_images_and_masks_with_exchanged_extensions_are_refused(dsu: Dsu, tmp_path: Path) -> None:
    """`p0.png` is the photograph and `p0.jpg` its mask; the usual guess is the opposite."""
    pictures = {f"p{index}.png": photo(index) for index in range(3)} | {f"p{index}.jpg": box() for index in range(3)}
    said = dsu("cache-features", written(tmp_path / "mine", pictures), *STAGE_ONE, exit_code=1).stderr
    assert "p0.png" in said and "photograph" in said


def test_blank_images_may_equal_their_masks(dsu: Dsu, tmp_path: Path) -> None:
    folder = plain(tmp_path / "mine")
    for inner in ("images", "masks"):
        Image.new("L", (60, 40)).save(folder / inner / "p0.png")
    dsu("cache-features", folder, *STAGE_ONE)


def test_an_archive_is_refused(dsu: Dsu, tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "packed"), "zip", plain(tmp_path / "mine"))
    assert "packed.zip is a file" in dsu("cache-features", "packed.zip", *STAGE_ONE, exit_code=2).stderr


def test_an_unreadable_folder_is_named(dsu: Dsu, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is simulated, since root may read everything."""
    folder = written(plain(tmp_path / "mine"), {"images/locked/q.png": photo(9), "masks/q.png": box()})
    scan = os.scandir

    def scandir(path: Any = ".") -> Any:
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    commands: tuple[tuple[object, ...], ...] = (
        ("datasets", "check", folder),
        ("cache-features", folder, *STAGE_ONE),
        ("predict", folder, "--head", house.run, "--out", "maps"),
    )
    for command in commands:
        said = dsu(*command, exit_code=1).stderr
        assert "locked can't be read (Permission denied)" in said.replace("\n", " ")


def test_unreadable_files_are_not_reported_as_damaged_or_missing(
    dsu: Dsu, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, opened = house.copied(tmp_path).run, Path.open

    def locked(name: str) -> Callable[..., Any]:
        def opening(path: Path, *more: Any, **options: Any) -> Any:
            if path.name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, *more, **options)

        return opening

    again = ("predict", house.data / "test" / "images", "--head", run)
    for name, command in (
        ("head.safetensors", again),
        ("predictions.json", again),
        ("predictions.json", ("eval", "--predictions", run)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", locked(name))
            said = dsu(*command, exit_code=1).stderr.replace("\n", " ")
        assert f"{name} can't be read" in said and "Permission denied" in said, said


# ---- runs among the images ----


@pytest.fixture
def beside(dsu: Dsu, tmp_path: Path) -> Path:
    """A working folder with images and masks in the same folder, and their stored features."""
    pictures = {f"p{index}.jpg": photo(index) for index in range(3)} | {f"p{index}.png": box() for index in range(3)}
    written(tmp_path, pictures)
    dsu("cache-features", ".", *STAGE_ONE, "--quiet")
    return tmp_path


def test_a_runs_figures_are_not_images(dsu: Dsu, beside: Path) -> None:
    dsu("train-head", "--views", "1", "--epochs", "1", "--quiet")
    assert list(beside.glob("runs/*/sheets/*.png"))
    dsu("cache-features", ".", *STAGE_ONE)
    # A .png next to a .jpg of the same name may be another image.
    assert f"{beside.name}: 6 from images" in dsu("predict", ".", "--out", "maps").output


@pytest.mark.parametrize("out", [".", ".."])
def test_a_run_folder_can_not_contain_the_images(dsu: Dsu, beside: Path, out: str) -> None:
    before = sorted(beside.iterdir())
    said = dsu("train-head", *QUICK, "--out", out, exit_code=2).stderr
    assert "give the run its own folder with --out" in said
    assert sorted(beside.iterdir()) == before


def test_a_removed_run_folder_is_not_created_again(dsu: Dsu, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is removed after an epoch's checkpoint and before its sheet."""
    drawn = callbacks.Curves.on_epoch_end

    def remove(self: callbacks.Curves, trainer: Any, row: Any) -> None:
        drawn(self, trainer, row)
        shutil.rmtree(trainer.out)

    monkeypatch.setattr(callbacks.Curves, "on_epoch_end", remove)
    said = dsu(*house.train("--views", "1", "--out", "run", "--quiet"), exit_code=1).stderr
    assert "run/sheets can't be created (No such file or directory)" in said
    assert not Path("run").exists()


# ---- machines ----


def command(*words: object, folder: Path, streams: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `dsu ...` in a new process, with its standard streams redirected by a shell."""
    program = Path(sys.executable).with_name("dsu")
    return subprocess.run(
        ["sh", "-c", f'"$0" "$@" {streams}', program, *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        **options,
    )


def test_a_closed_error_stream_damages_no_file(dsu: Dsu, tmp_path: Path) -> None:
    """The next opened file gets the file descriptor of a closed stream."""
    plain(tmp_path / "mine")
    done = command("cache-features", "mine", *STAGE_ONE, folder=tmp_path, streams="2>&-")
    assert done.returncode == 0, done
    dsu("cache", "verify", "mine")


def test_a_question_without_standard_input_is_answered_no(dsu: Dsu, tmp_path: Path) -> None:
    dsu("cache-features", plain(tmp_path / "mine"), *STAGE_ONE, "--quiet")
    done = command("cache", "remove", "mine", folder=tmp_path, streams="<&-")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    dsu("cache", "verify", "mine")


def test_a_removed_working_folder_gives_an_error(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("dsu")
    (tmp_path / "gone").mkdir()
    script = f"cd gone && rmdir ../gone && {program} doctor"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "The working folder no longer exists" in done.stderr, done.stderr


def test_too_little_memory_for_torch_gives_an_error(tmp_path: Path, house: House) -> None:
    def little() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    done = command(*house.train(*QUICK, "--out", "run"), folder=tmp_path, preexec_fn=little)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "memory" in done.stderr and "ulimit -v" in done.stderr


def test_full_shared_memory_gives_an_error(dsu: Dsu, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    assert "/dev/shm, is full" in dsu(*house.train(*QUICK, "--out", "run"), exit_code=1).stderr


def test_a_limit_on_file_sizes_gives_an_error(tmp_path: Path, house: House) -> None:
    """As with a quota; the accompanying signal (SIGXFSZ) must not kill the process."""

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    done = command(*house.train(*QUICK, "--out", "run"), folder=tmp_path, preexec_fn=small)
    assert done.returncode == 1 and "run/checkpoint.pt can't be written (File too large)" in done.stderr, done.stderr
    assert not list((tmp_path / "run").glob("*.pt*"))


@pytest.mark.parametrize("time", [-(10**9), 0, 5 * 10**9])
def test_files_with_any_modification_time_are_recognised(dsu: Dsu, tmp_path: Path, time: int) -> None:
    folder = plain(tmp_path / "mine")
    os.utime(folder / "images" / "p0.png", (time, time))
    dsu("cache-features", folder, *STAGE_ONE, "--quiet")
    dsu("train-head", *QUICK, "--out", "run")
    dsu("predict", "--head", "run", "--out", "maps", "--quiet")
    dsu("eval", "--predictions", "maps", "--quiet")
