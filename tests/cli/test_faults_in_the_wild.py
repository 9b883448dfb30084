"""Regression tests with users' folders, files, file systems and checkpoints, each with the right behaviour."""

import builtins
import errno
import fcntl
import gc
import io
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
import zarr
from cached import data_files
from house import House
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from stopping import stop_at
from support import TINY, Dsu, pixel_difference

from dsu import Segmenter

DSU: Final = Path(sys.executable).with_name("dsu")
"""The command's script, for tests that need a separate process."""

QUICK: Final = ("--views", "1", "--sheet-every", "0", "--quiet")
"""Options of the fastest training."""

STAGE_ONE: Final = (*TINY, "--features", "V", "--views", "1")


def photo(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """A structured image that depends on the seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def mask(size: tuple[int, int] = (60, 40)) -> Image.Image:
    """A mask with a box."""
    grey = np.zeros(size[::-1], np.uint8)
    grey[size[1] // 8 : size[1] // 2, size[0] // 4 : size[0] // 2] = 255
    return Image.fromarray(grey)


def written(folder: Path, images: Mapping[str, Image.Image], masks: tuple[str, ...]) -> Path:
    """A user's folder with images and masks, by their relative paths."""
    for path in (*images, *masks):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    for path, image in images.items():
        image.save(folder / path)
    for path in masks:
        mask().save(folder / path)
    return folder


def plain(folder: Path, which: range) -> Path:
    """An ordinary user's folder."""
    images = {f"images/photo-{index}.png": photo(index) for index in which}
    return written(folder, images, tuple(f"masks/photo-{index}.png" for index in which))


def stored(name: str, array: str) -> NDArray[Any]:
    """An array of a data set's only store, read with plain Zarr."""
    [store] = Path("features", name).iterdir()
    return np.asarray(zarr.open_group(store, mode="r")[array][:])


def maps(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*.png"))}


# ---- names ----


def composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def decomposed(name: str) -> str:
    return unicodedata.normalize("NFD", name)


NAMES: Final[dict[str, tuple[Callable[[str], str], Callable[[str], str]]]] = {
    "normalised otherwise": (lambda n: f"images/{composed(n)}.jpg", lambda n: f"masks/{decomposed(n)}.png"),
    "from Windows": (lambda n: f"images\\{n}.jpg", lambda n: f"masks\\{n}.png"),
    "beginnings": (lambda n: f"images/image_{n}.jpg", lambda n: f"masks/mask_{n}.png"),
    "channels": (lambda n: f"images/{n}_0000.png", lambda n: f"labels/{n}.png"),
}
"""Paths of an image and its mask, from their common name."""


@pytest.mark.parametrize("kind", NAMES)
def test_common_naming_schemes_pair(dsu: Dsu, tmp_path: Path, kind: str) -> None:
    image, truth = NAMES[kind]
    names = ("café", "naïve", "plain", "über")
    images = {image(name): photo(index) for index, name in enumerate(names)}
    folder = written(tmp_path / "mine", images, tuple(map(truth, names)))
    result = dsu("datasets", "check", folder, "--json", "--quiet", exit_code=None)
    assert result.exit_code == 0, result.output
    [split] = json.loads(result.stdout)["splits"]
    assert (split["pairs"], split["images_without_mask"], split["masks_without_image"]) == (4, 0, 0)


def test_masks_from_windows_are_not_predicted(dsu: Dsu, house: House, tmp_path: Path) -> None:
    folder = written(
        tmp_path / "mine", {f"images\\{n}.jpg": photo(ord(n)) for n in "ab"}, ("masks\\a.png", "masks\\b.png")
    )
    dsu("predict", folder, "--head", house.run, "--out", "maps", "--quiet")
    assert len(maps("maps")) == 2


def test_two_masks_for_one_image_are_refused_by_name(dsu: Dsu, tmp_path: Path) -> None:
    images = {f"images/{name}.jpg": photo(index) for index, name in enumerate(("one", "two"))}
    folder = written(tmp_path / "mine", images, ("masks/one.png", "masks/two_gt.png", "masks/two_mask.png"))
    result = dsu("cache-features", folder, *STAGE_ONE, exit_code=None)
    assert result.exit_code != 0, result.output
    assert "two_gt.png" in result.output and "two_mask.png" in result.output


def test_left_out_files_are_reported_first_and_in_the_exit_status(dsu: Dsu, tmp_path: Path) -> None:
    images = {f"images/{name}.jpg": photo(index) for index, name in enumerate(("one", "two", "lonely"))}
    folder = written(tmp_path / "mine", images, ("masks/one.png", "masks/two.png"))
    result = dsu("cache-features", folder, *STAGE_ONE, exit_code=None)
    assert result.exit_code == 1, result.output
    assert "lonely" in result.output.splitlines()[0]


# ---- deep images ----


def _scaled(factor: float, kind: Any) -> Callable[[NDArray[np.uint8]], Image.Image]:
    return lambda grey: Image.fromarray((grey.astype(np.float64) * factor).astype(kind))


DEEP: Final = {
    "floats to 255": (".tif", _scaled(1, np.float32)),
    "floats to 1.001": (".tif", _scaled(1.001 / 255, np.float32)),
    "whole numbers": (".tif", _scaled(1, np.int32)),
    "twelve bits": (".png", _scaled(16, np.uint16)),
}
"""Images with more than 8 bits: their extension, and how to make them from 8-bit images."""


def greys() -> list[NDArray[np.uint8]]:
    """Three images; only the first has the full range, so that a separate range for each would differ."""
    return [np.asarray(photo(index).convert("L").resize((60, 40))) for index in range(3)]


def drawn_deep(folder: Path, ending: str, make: Callable[[NDArray[np.uint8]], Image.Image]) -> Path:
    pictures = {}
    for index, (grey, share) in enumerate(zip(greys(), (1, 0.6, 0.4), strict=True)):
        whole = np.interp(grey, (grey.min(), grey.max()), (0, 255))
        pictures[f"images/photo-{index}{ending}"] = make((whole * share).astype(np.uint8))
    return written(folder, pictures, tuple(f"masks/photo-{index}.png" for index in range(3)))


@pytest.mark.parametrize("kind", DEEP)
def test_deep_images_use_the_range_of_their_data_set(dsu: Dsu, tmp_path: Path, kind: str) -> None:
    drawn_deep(tmp_path / "flat", ".png", Image.fromarray)
    drawn_deep(tmp_path / "deep", *DEEP[kind])
    for folder in ("flat", "deep"):
        dsu("cache-features", folder, *STAGE_ONE, "--quiet")
    flat, deep = stored("flat", "pixels").astype(int), stored("deep", "pixels").astype(int)
    assert np.abs(flat - deep).max() <= 2


def test_deep_images_are_predicted_with_the_range_of_training(dsu: Dsu, tmp_path: Path) -> None:
    drawn_deep(tmp_path / "flat", ".png", Image.fromarray)
    drawn_deep(tmp_path / "deep", *DEEP["floats to 255"])
    for folder in ("flat", "deep"):
        dsu("cache-features", folder, *STAGE_ONE, "--quiet")
        dsu("train-head", folder, "--epochs", "1", "--val-fraction", "0", "--out", f"run-{folder}", *QUICK)
        # A single image, not the brightest: it is read with the range that the head was trained with.
        [image] = (tmp_path / folder / "images").glob("photo-2.*")
        dsu("predict", image, "--head", f"run-{folder}", "--out", f"maps-{folder}", "--quiet")
    assert pixel_difference(Path("maps-flat/photo-2.png"), Path("maps-deep/photo-2.png")) <= 2


def test_a_file_outside_the_range_is_named(dsu: Dsu, tmp_path: Path) -> None:
    folder = drawn_deep(tmp_path / "deep", *DEEP["floats to 255"])
    said = dsu("cache-features", folder, *STAGE_ONE, "--range", "0,180", exit_code=None).output
    assert "photo-0.tif" in said and "photo-1.tif" not in said


# ---- files that Pillow limits ----


def _wordy(path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "prompt " * 300_000, zip=True)
    photo(0).save(path, pnginfo=text)


def _profiled(path: Path) -> None:
    photo(0).save(path, icc_profile=bytes(3_000_000))


@pytest.mark.parametrize("make", [_wordy, _profiled])
def test_pngs_with_large_metadata_are_read(
    dsu: Dsu, house: House, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "large.png")
    dsu("predict", "large.png", "--head", house.run, "--out", "maps")
    assert len(maps("maps")) == 1


# ---- file systems ----


@pytest.fixture(params=["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def without_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Lustre and some NFS systems."""
    number = getattr(errno, request.param)

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("without_flock")
def test_stores_are_read_without_flock(dsu: Dsu, house: House, tmp_path: Path) -> None:
    dsu(*house.copied(tmp_path).train("--out", "trained", *QUICK))


@pytest.mark.usefixtures("without_flock")
def test_stores_are_written_without_flock_with_a_warning(dsu: Dsu, tmp_path: Path) -> None:
    said = dsu("cache-features", plain(tmp_path / "mine", range(2)), *STAGE_ONE).output
    assert "lock" in said.lower(), said


def test_stores_are_written_where_folders_cannot_be_flushed(
    dsu: Dsu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CIFS."""
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    dsu("cache-features", plain(tmp_path / "mine", range(2)), *STAGE_ONE)


# ---- limits ----


@pytest.fixture
def many_files(dsu: Dsu, tmp_path: Path) -> list[object]:
    """A training that opens about forty files of its store."""
    views = ("--views", "flips+12")
    dsu("cache-features", plain(tmp_path / "mine", range(10)), *TINY, "--features", "V", *views, "--quiet")
    return ["train-head", *views, "--epochs", "6", "--val-fraction", "0", "--sheet-every", "0", "--quiet"]


@contextmanager
def few_files(more: int) -> Iterator[None]:
    """Limit this process to so many more open files than it has now; the limit can be raised."""
    gc.collect()  # close files of earlier tests now, not during this test
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_limit_on_open_files_is_raised(dsu: Dsu, many_files: list[object]) -> None:
    with few_files(24):
        dsu(*many_files)


def test_a_limit_on_open_files_is_not_reported_as_damage(
    dsu: Dsu, many_files: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    with few_files(12), monkeypatch.context() as patch:
        patch.setattr(resource, "setrlimit", forbidden)
        result = dsu(*many_files, exit_code=None)
    assert result.exit_code == 0 or not re.search("damage|discard", result.output), result.output


# ---- moved and removed data ----


def test_stored_features_are_predicted_after_their_images_have_moved(dsu: Dsu, tmp_path: Path) -> None:
    dsu("cache-features", plain(tmp_path / "mine", range(5)), *STAGE_ONE, "--quiet")
    dsu("train-head", "--val-fraction", "0.5", "--epochs", "1", "--out", "run", *QUICK)
    dsu("predict", "--head", "run", "--out", "before", "--quiet")
    (tmp_path / "mine").rename(tmp_path / "moved")
    dsu("predict", "--head", "run", "--out", "after", "--quiet")
    assert maps("before") and maps("after") == maps("before")


def test_a_store_of_another_folder_with_the_same_name_is_not_used(dsu: Dsu, tmp_path: Path) -> None:
    dsu("cache-features", plain(tmp_path / "elsewhere" / "mine", range(3)), *STAGE_ONE, "--quiet")
    plain(tmp_path / "mine", range(3, 6))
    result = dsu("train-head", "mine", "--epochs", "1", "--out", "run", *QUICK, exit_code=None)
    assert result.exit_code != 0 and not Path("run").exists(), result.output


def test_features_of_an_unmounted_folder_are_kept(dsu: Dsu, tmp_path: Path) -> None:
    away, here = plain(tmp_path / "disk" / "mine", range(3)), plain(tmp_path / "home" / "mine", range(3, 6))
    dsu("cache-features", away, *STAGE_ONE, "--quiet")
    away.rename(tmp_path / "unmounted")
    dsu("cache-features", here, *STAGE_ONE, "--quiet", exit_code=None)
    here.rename(tmp_path / "gone")
    (tmp_path / "unmounted").rename(away)
    before = data_files(tmp_path / "features")
    dsu("cache-features", away, *STAGE_ONE, "--quiet")
    assert data_files(tmp_path / "features") == before


def test_images_removed_from_a_store_are_reported(dsu: Dsu, tmp_path: Path) -> None:
    folder = plain(tmp_path / "mine", range(3))
    dsu("cache-features", folder, *STAGE_ONE, "--quiet")
    (folder / "images" / "photo-1.png").unlink()
    (folder / "masks" / "photo-1.png").unlink()
    said = dsu("cache-features", folder, *STAGE_ONE).output
    assert "photo-1" in said, said


def test_features_of_a_benchmark_in_two_data_roots_are_kept(dsu: Dsu, tmp_path: Path) -> None:
    roots = [tmp_path / "first", tmp_path / "second"]
    plain(roots[0] / "ECSSD", range(3))
    plain(roots[1] / "ECSSD", range(2, 5))
    for root in roots:
        dsu("cache-features", "ECSSD", "--data-root", root, *STAGE_ONE, "--quiet")
    before = data_files(tmp_path / "features")
    dsu("cache-features", "ECSSD", "--data-root", roots[0], *STAGE_ONE, "--quiet")
    assert data_files(tmp_path / "features") == before


def test_the_decoded_file_is_the_hashed_file(dsu: Dsu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image changes after its first reading, and changes back when the command has ended."""
    image = plain(tmp_path / "mine", range(2)) / "images" / "photo-1.png"
    shutil.copytree(tmp_path / "mine", tmp_path / "undisturbed")
    shutil.copy(image, tmp_path / "itself.png")
    photo(99).save(tmp_path / "other.png")
    opened = 0

    def opening(real: Any) -> Any:
        def open_(path: Any, *more: Any, **options: Any) -> Any:
            nonlocal opened
            if path == image or path == str(image):
                opened += 1
                if opened == 2:
                    (tmp_path / "other.png").replace(image)
            return real(path, *more, **options)

        return open_

    with monkeypatch.context() as patch:
        for module in (io, builtins, os):
            patch.setattr(module, "open", opening(module.open))
        dsu("cache-features", "mine", *STAGE_ONE, "--quiet", exit_code=None)
    assert opened >= 1
    (tmp_path / "itself.png").replace(image)
    for folder in ("mine", "undisturbed"):
        dsu("cache-features", folder, *STAGE_ONE, "--quiet")
    assert np.array_equal(stored("mine", "pixels"), stored("undisturbed", "pixels"))


# ---- predictions below the images ----


def test_masks_below_the_images_are_not_input(dsu: Dsu, house: House, tmp_path: Path) -> None:
    (plain(tmp_path / "mine", range(3)) / "images").rename(tmp_path / "photos")
    command = ("predict", "photos", "--head", house.run, "--out", "photos/results", "--quiet")
    dsu(*command)
    before = maps("photos/results")
    assert len(before) == 3
    dsu(*command)
    assert maps("photos/results") == before


def test_overlays_below_the_images_are_not_input(dsu: Dsu, house: House, tmp_path: Path) -> None:
    (plain(tmp_path / "mine", range(3)) / "images").rename(tmp_path / "photos")
    dsu("predict", "photos", "--head", house.run, "--kind", "overlay", "--out", "photos/overlays", "--quiet")
    dsu("predict", "photos", "--head", house.run, "--out", "maps", "--quiet")
    assert len(maps("maps")) == 3


# ---- cutouts ----


def test_cutouts_keep_transparent_pixels_transparent(dsu: Dsu, house: House, tmp_path: Path) -> None:
    image = photo(0).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 30, 40))
    image.save(tmp_path / "half.png")
    for kind in ("mask", "cutout"):
        dsu("predict", "half.png", "--head", house.run, "--kind", kind, "--out", kind, "--quiet")
    opacity = np.asarray(Image.open("cutout/half.png"))[..., 3]
    assert not opacity[:, :30].any()
    mask = np.asarray(Image.open("mask/half.png"))[:, 30:]
    assert np.array_equal(opacity[:, 30:], np.where(mask >= 128, mask, 0))


def test_transparent_pixels_of_cutouts_have_no_colour(dsu: Dsu, house: House, tmp_path: Path) -> None:
    photo(0).save(tmp_path / "photo.png")
    dsu("predict", "photo.png", "--head", house.run, "--out", "maps", "--quiet")
    middle = float(np.median(np.asarray(Image.open("maps/photo.png")))) / 255
    cut = ("--kind", "cutout", "--threshold", middle, "--out", "cutouts", "--quiet")
    dsu("predict", "photo.png", "--head", house.run, *cut)
    picture = np.asarray(Image.open("cutouts/photo.png"))
    transparent = picture[..., 3] == 0
    assert transparent.any() and not transparent.all()
    assert not picture[transparent].any()


# ---- messages ----


def test_tables_are_printed_in_limited_encodings(house: House, tmp_path: Path) -> None:
    done = subprocess.run(
        [DSU, "eval", "--predictions", house.predictions],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        text=True,
        encoding="latin-1",
    )
    assert done.returncode == 0 and "MAE" in done.stdout, done.stderr


def test_tiles_of_a_mask_far_smaller_than_its_image(dsu: Dsu, tmp_path: Path) -> None:
    folder = written(tmp_path / "mine", {"images/large.png": photo(0, (500, 100))}, ())
    (folder / "masks").mkdir()
    mask((2, 1)).save(folder / "masks" / "large.png")
    result = dsu("cache-features", folder, *STAGE_ONE, "--tile", "100", "--overlap", "0", exit_code=None)
    assert result.exit_code == 0 or (result.exit_code == 1 and "large" in result.output)


def test_runs_without_held_out_images_report_no_validation(dsu: Dsu, tmp_path: Path) -> None:
    dsu("cache-features", plain(tmp_path / "mine", range(1)), *STAGE_ONE, "--quiet")
    said = dsu("train-head", "--epochs", "1", "--views", "1", "--sheet-every", "0", "--out", "run").output
    assert "validated" not in said, said


def test_a_check_gives_no_unnecessary_advice(dsu: Dsu, tmp_path: Path) -> None:
    folder = plain(tmp_path / "mine", range(3))
    for path in (folder / "masks").iterdir():
        mask((30, 20)).save(path)
    said = dsu("datasets", "check", folder, exit_code=None).output
    assert "another size" in said and "--resize" not in said, said


def test_no_error_suggests_removing_a_folder(house: House, drawn: Path) -> None:
    segmenter = Segmenter.load(house.run, device="cpu")
    with pytest.raises(Exception, match="images") as refused:
        segmenter(drawn / "test" / "images")
    assert "remove" not in str(refused.value)


# ---- checkpoints ----

SMALL: Final = ("--hiera", "toy", "--dino", "vits14", "--hiera-size", "128", "--dino-size", "126", "--features", "V")


@pytest.fixture(scope="module")
def dino() -> dict[str, torch.Tensor]:
    """Random weights of the smallest DINOv2, in timm's format."""
    import timm

    torch.manual_seed(0)
    return dict(timm.create_model("vit_small_patch14_dinov2", pretrained=False).state_dict())


Weights = dict[str, torch.Tensor]


def _behind(prefix: str) -> Callable[[Weights], Any]:
    return lambda weights: {f"{prefix}{name}": tensor for name, tensor in weights.items()}


WRAPPED: Final[dict[str, Callable[[Weights], Any]]] = {
    "module.": _behind("module."),
    "backbone.": _behind("backbone."),
    "teacher.": _behind("teacher."),
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 3},
    "student": lambda weights: {"student": weights},
}
"""Formats in which training programs save weights."""


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_around_weights_are_removed(dsu: Dsu, tmp_path: Path, dino: Weights, kind: str) -> None:
    torch.save(WRAPPED[kind](dino), "wrapped.pth")
    save_file(dino, "bare.safetensors")
    for file in ("bare.safetensors", "wrapped.pth"):
        plain(tmp_path / Path(file).stem, range(1))
        said = dsu("cache-features", Path(file).stem, *SMALL, "--views", "1", "--dino-weights", file).output
    assert kind.rstrip(".") in said, said
    assert np.array_equal(stored("wrapped", "V"), stored("bare", "V"))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n", "HTML"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 88283115\n", "LFS"),
    ],
    ids=["page", "pointer"],
)
def test_files_that_are_not_checkpoints_are_named(dsu: Dsu, tmp_path: Path, content: str, word: str) -> None:
    (tmp_path / "weights.pth").write_text(content)
    plain(tmp_path / "mine", range(1))
    said = dsu("cache-features", "mine", *SMALL, "--dino-weights", "weights.pth", exit_code=1).output
    assert "weights.pth" in said and word in said, said


def test_encoders_of_an_imported_head_are_not_official(dsu: Dsu, house: House) -> None:
    dsu("export-checkpoint", house.run, "-o", "authors.pth")
    said = dsu("import-checkpoint", "authors.pth", "-o", "head.safetensors").output
    assert ": the official" not in said, said


# ---- another device ----


def test_a_run_from_a_gpu_resumes_with_this_devices_optimiser(
    dsu: Dsu, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint as saved on a GPU: the same numbers, with the flag for fused kernels."""
    train = house.train("--epochs", "2", "--val-fraction", "0", *QUICK)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        dsu(*train, "--out", "moved", exit_code=130)
    state = torch.load("moved/checkpoint.pt", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = True
    torch.save(state, "moved/checkpoint.pt")
    dsu(*train, "--out", "undisturbed")
    dsu("train-head", "--resume", "--out", "moved", "--cache-root", house.features, "--quiet")
    one, other = (load_file(f"{run}/head.safetensors") for run in ("moved", "undisturbed"))
    assert all(torch.equal(one[name], other[name]) for name in other)
