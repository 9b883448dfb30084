"""Regression tests for figures and the images behind them, each with the right behaviour."""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import zarr
from house import House
from numpy.typing import NDArray
from PIL import Image
from support import TINY, Dsu

from dsu import Segmenter
from dsu.prediction import predict

QUICK: Final = ("--views", "1", "--sheet-every", "0", "--quiet")
"""Options of the fastest training."""

STAGE_ONE: Final = (*TINY, "--features", "V", "--views", "1", "--quiet")


@pytest.fixture(scope="module")
def benchmarks(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a few images of two benchmarks."""
    root = tmp_path_factory.mktemp("benchmarks")
    for name in ("ECSSD", "CHAMELEON"):
        copied(drawn / "test", root / name, range(2))
    return root


@pytest.fixture
def photos(drawn: Path, tmp_path: Path) -> Path:
    """Six own images and masks, outside the working folder."""
    return copied(drawn / "train", tmp_path / "elsewhere" / "photos", range(6))


def copied(drawn: Path, folder: Path, which: range) -> Path:
    """Copy some synthetic images and masks into a new folder."""
    for inner in ("images", "masks"):
        (folder / inner).mkdir(parents=True)
        for path in sorted((drawn / inner).iterdir())[which.start : which.stop]:
            shutil.copy(path, folder / inner)
    return folder


def saved(folder: Path, pictures: dict[str, NDArray[np.uint8] | Image.Image], **options: Any) -> Path:
    """Write images into a folder, by their names."""
    folder.mkdir(parents=True)
    for name, picture in pictures.items():
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        image.save(folder / name, **options)
    return folder


def box(width: int, height: int) -> NDArray[np.uint8]:
    """A mask (H, W) with a box that changes its place in every rotation."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 8 : height // 2, width // 4 : width // 2] = 255
    return mask


def photo(width: int, height: int) -> NDArray[np.uint8]:
    """Noise (H, W, 3) with a quarter of its pixels nearly black, like dark parts of photographs."""
    rng = np.random.default_rng(width)
    values = rng.integers(60, 256, (height, width, 3), dtype=np.uint8)
    values[rng.random((height, width)) < 0.25] //= 16
    return values


def figures(dsu: Dsu, *words: object) -> dict[str, Any]:
    """The figures of `eval` for its only set."""
    [found] = json.loads(dsu("eval", *words, "--format", "json", "--quiet").stdout).values()
    return dict(found)


# ---- which maps are evaluated ----


def test_sets_predicted_by_an_old_head_are_not_evaluated(
    dsu: Dsu, house: House, benchmarks: Path, tmp_path: Path
) -> None:
    mine = house.copied(tmp_path)
    root = ("--data-root", benchmarks)
    into = (*root, "--out", "maps", "--quiet")
    dsu(*mine.predict("ECSSD", "CHAMELEON", *into))
    dsu(*mine.train("--seed", "1", "--out", mine.run, "--overwrite", *QUICK))
    dsu(*mine.predict("ECSSD", *into, "--overwrite"))
    result = dsu("eval", "--predictions", "maps", *root, "--format", "json", exit_code=None)
    assert set(json.loads(result.stdout)) == {"ECSSD"}
    assert "CHAMELEON" in result.output
    said = dsu("eval", "CHAMELEON", "--predictions", "maps", *root, exit_code=2).output
    assert "no set 'CHAMELEON'" in said


def test_maps_of_an_old_head_are_not_evaluated_as_the_new_ones(dsu: Dsu, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    dsu("eval", "--predictions", mine.run, "--quiet")
    dsu(*mine.train("--seed", "1", "--out", "other", *QUICK))
    shutil.copy("other/head.safetensors", mine.run / "head.safetensors")
    result = dsu("eval", "--predictions", mine.run, exit_code=None)
    assert result.exit_code != 0, result.output


# ---- normalisation ----


def test_equal_maps_have_equal_figures(dsu: Dsu, house: House, drawn: Path, tmp_path: Path) -> None:
    tiles = copied(drawn / "test", tmp_path / "tiles", range(3))
    dsu("predict", tiles / "images", "--head", house.run, "--out", "of-images", "--quiet")
    dsu("predict", tiles, "--head", house.run, "--out", "of-all", "--quiet")
    (tmp_path / "bare").mkdir()
    maps = sorted(Path("of-images").rglob("*.png"))
    for path, other in zip(maps, sorted(Path("of-all").rglob("*.png")), strict=True):
        assert path.read_bytes() == other.read_bytes()
        shutil.copy(path, tmp_path / "bare")
    folders = ("of-images", "of-all", "bare")
    found = [figures(dsu, "--predictions", folder, "--truth", tiles / "masks")["S"] for folder in folders]
    plain = figures(dsu, "--predictions", "bare", "--truth", tiles / "masks", "--normalize", "none")["S"]
    assert found == [plain] * 3


def test_the_tables_header_has_the_normalisation(dsu: Dsu, house: House) -> None:
    lines = dsu("eval", "--predictions", house.predictions).stdout.splitlines()
    first = next(index for index, line in enumerate(lines) if line.split()[:2] == ["S", "↑"])
    assert re.search("normali[sz]", " ".join(lines[:first])), lines


# ---- which ground truth maps are compared with ----

NAMES: Final = ("one", "two", "three")

LAYOUTS: Final = {
    "ending beside": ("", "", "_mask"),
    "beside": ("", "", ""),
    "ending apart": ("images", "masks", "_mask"),
}
"""Folder of the images, folder of the masks, and the suffix of the masks' names."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ground_truth_pairs_as_in_training(dsu: Dsu, tmp_path: Path, layout: str) -> None:
    images, masks, ending = LAYOUTS[layout]
    saved(tmp_path / "maps", {f"{name}.png": box(60, 40) for name in NAMES})
    for inner in {images, masks}:
        (tmp_path / "truth" / inner).mkdir(parents=True)
    for name in NAMES:
        Image.fromarray(photo(60, 40)).save(tmp_path / "truth" / images / f"{name}.jpg")
        Image.fromarray(box(60, 40)).save(tmp_path / "truth" / masks / f"{name}{ending}.png")
    found = figures(dsu, "--predictions", "maps", "--truth", "truth", "--normalize", "none")
    assert (found["images"], found["IoU"], found["MAE"]) == (3, 1, 0)


# ---- which share a figure is from ----


def test_training_images_are_evaluated_only_on_request(dsu: Dsu, photos: Path) -> None:
    """The set is found by its name in its store, since its folder is not in the working folder."""
    dsu("cache-features", photos, *STAGE_ONE)
    dsu("train-head", "--epochs", "1", "--out", "run", *QUICK)
    if dsu("predict", "photos", "--head", "run", "--quiet", exit_code=None).exit_code != 0:
        return
    assert dsu("eval", "--predictions", "run", exit_code=None).exit_code != 0
    for form in ("table", "markdown", "latex", "csv", "json"):
        said = dsu("eval", "--predictions", "run", "--all", "--format", form).stdout
        assert "train" in said.lower(), said


def _with_exif(path: Path, to: Path) -> None:
    """Copy a JPEG's compressed data, with another header."""
    data, exif = path.read_bytes(), Image.Exif()
    exif[0x010E] = "described"
    head = exif.tobytes()
    to.write_bytes(data[:2] + b"\xff\xe1" + (len(head) + 2).to_bytes(2, "big") + head + data[2:])


SAVED_ANEW: Final[dict[str, Callable[[Path, Path], None]]] = {
    "0.png": lambda path, to: Image.open(path).save(to),
    "1.png": lambda path, to: Image.open(path).save(to, compress_level=1),
    "2.tif": lambda path, to: Image.open(path).save(to, compression="tiff_lzw"),
    "3.webp": lambda path, to: Image.open(path).save(to, lossless=True),
    "4.jpg": _with_exif,
}
"""Lossless ways to save training images in other files."""


@pytest.mark.parametrize("cut", [(), ("--tile", "64")])
def test_training_images_in_other_files_are_recognised(
    dsu: Dsu, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: tuple[str, ...]
) -> None:
    """The record has each image before its mask is written: otherwise, a kill would leave it unrecognised."""
    dsu("cache-features", photos, *STAGE_ONE)
    dsu("train-head", "--epochs", "1", "--val-fraction", "0", "--out", "run", *QUICK)
    anew, trained = tmp_path / "anew", sorted((photos / "images").iterdir())
    anew.mkdir()
    for (name, save), path in zip(SAVED_ANEW.items(), trained, strict=False):
        save(path, anew / name)
    Image.open(trained[5]).save(anew / "lossy.jpg", quality=50)
    record, known, write = Path("maps/predictions.json"), list[bool](), predict.write_mask

    def looking(row: Any, target: Any, *more: Any) -> Any:
        known.append(target.name in json.loads(record.read_text())["sets"][""]["trained_on"])
        return write(row, target, *more)

    monkeypatch.setattr(predict, "write_mask", looking)
    dsu("predict", anew, "--head", "run", "--out", "maps", *cut, "--quiet")
    assert sorted(known) == [False] + [True] * 5
    assert json.loads(record.read_text())["sets"][""]["trained_on"] == sorted(SAVED_ANEW)
    truth = saved(tmp_path / "truth", {f"{path.stem}.png": box(*Image.open(path).size) for path in anew.iterdir()})
    said = dsu("eval", "--predictions", "maps", "--truth", truth, exit_code=2).stderr
    assert "5 of 6 images of maps were used to train the head of maps" in said
    dsu("eval", "--predictions", "maps", "--truth", truth, "--all")
    said = dsu("eval", "--predictions", "maps", "--truth", truth, "--common").stdout
    assert ["images", "1"] in [line.split() for line in said.splitlines()] and "too good" not in said


def test_an_image_and_its_copy_are_in_one_share(dsu: Dsu, photos: Path) -> None:
    for path in sorted((photos / "images").iterdir()):
        Image.open(path).save(path.with_name(f"copy-{path.stem}.png"))
        shutil.copy(photos / "masks" / f"{path.stem}.png", photos / "masks" / f"copy-{path.stem}.png")
    dsu("cache-features", photos, *STAGE_ONE)
    dsu("train-head", "--val-fraction", "0.5", "--epochs", "1", "--out", "run", *QUICK)
    shares = {name: share for name, (share, *_) in json.loads(Path("run/run.json").read_text())["samples"].items()}
    assert len(shares) == 12 and set(shares.values()) == {"train", "val"}
    assert all(shares[f"copy-{name}"] == share for name, share in shares.items() if not name.startswith("copy"))
    dsu("predict", "--head", "run", "--quiet")
    dsu("eval", "--predictions", "run")


def test_an_edited_image_of_the_same_file_size_is_not_evaluated(dsu: Dsu, house: House, tmp_path: Path) -> None:
    """Files with only another modification time, such as copies, are still evaluated."""
    for name in "ab":
        pictures = {"image": photo(60, 40), "mask": box(60, 40)}
        for inner, picture in pictures.items():
            (tmp_path / "ECSSD" / f"{inner}s").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / "ECSSD" / f"{inner}s" / f"{name}.bmp")
    dsu("predict", "ECSSD", "--head", house.run, "--out", "maps", "--data-root", tmp_path, "--quiet")
    for image in (tmp_path / "ECSSD" / "images").iterdir():
        os.utime(image, (0, 0))
    evaluate = ("eval", "--predictions", "maps", "--data-root", tmp_path, "--format", "json")
    assert json.loads(dsu(*evaluate).stdout)["ECSSD"]["images"] == 2
    edited = tmp_path / "ECSSD" / "images" / "a.bmp"
    size = edited.stat().st_size
    Image.open(edited).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(edited)
    assert edited.stat().st_size == size
    result = dsu(*evaluate, exit_code=1)
    assert json.loads(result.stdout)["ECSSD"]["images"] == 1
    assert "a has changed since it was predicted" in result.stderr


@pytest.fixture
def validated(dsu: Dsu, photos: Path) -> Path:
    """A run with the best weights on validation, and predictions of its validation images."""
    dsu("cache-features", photos, *STAGE_ONE)
    dsu("train-head", "--val-fraction", "0.3", "--epochs", "1", "--out", "run", *QUICK)
    dsu("predict", "--head", "run", "--quiet")
    return Path("run")


def test_figures_of_validation_images_are_marked(dsu: Dsu, validated: Path) -> None:
    said = dsu("eval", "--predictions", validated, "--conventions", "--report", "page.html").output
    page = Path("page.html").read_text()
    for told in (said, page):
        assert re.search("chose|validat", told.lower()), said


def test_training_never_uses_the_test_share(dsu: Dsu, photos: Path) -> None:
    dsu("cache-features", photos, *STAGE_ONE)
    shares = ("--val-fraction", "0.3", "--test-fraction", "0.3")
    dsu("train-head", *shares, "--epochs", "1", "--out", "run", *QUICK)
    dsu("predict", "--head", "run", "--quiet")
    result = dsu("eval", "--predictions", "run")
    assert "test" in result.stdout.lower(), result.output


# ---- formats of masks and maps ----


def test_masks_of_unrotated_pixels_are_rotated_like_their_images(dsu: Dsu, tmp_path: Path) -> None:
    """Each image is rotated by EXIF, and its mask was drawn on the unrotated pixels."""
    maps: dict[str, NDArray[np.uint8] | Image.Image] = {}
    for orientation in (5, 6, 7, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        name, lying = f"turned-{orientation}", Image.fromarray(box(160, 146))
        images = tmp_path / "tiles" / "images"
        images.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(160, 146)).save(images / f"{name}.jpg", exif=exif)
        (tmp_path / "tiles" / "masks").mkdir(exist_ok=True)
        lying.save(tmp_path / "tiles" / "masks" / f"{name}.png")
        turn = {5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}[orientation]
        maps[f"{name}.png"] = lying.transpose(Image.Transpose[turn])
    saved(tmp_path / "maps", maps)
    found = figures(dsu, "--predictions", "maps", "--truth", "tiles", "--normalize", "none")
    assert (found["images"], found["IoU"], found["MAE"]) == (4, 1, 0)


def test_a_mask_with_another_aspect_ratio_is_refused_by_name(dsu: Dsu, tmp_path: Path) -> None:
    saved(tmp_path / "tiles" / "images", {"good.jpg": photo(160, 146), "narrow.jpg": photo(160, 146)})
    saved(tmp_path / "tiles" / "masks", {"good.png": box(160, 146), "narrow.png": box(100, 146)})
    saved(tmp_path / "maps", {"good.png": box(160, 146), "narrow.png": box(160, 146)})
    result = dsu("eval", "--predictions", "maps", "--truth", "tiles", exit_code=None)
    assert result.exit_code == 1 and "narrow" in result.output, result.output


def cutouts() -> dict[str, NDArray[np.uint8] | Image.Image]:
    """Photographs with a mask as their alpha channel."""
    return {
        f"{name}.png": np.dstack([photo(60 + 2 * index, 40), box(60 + 2 * index, 40)])
        for index, name in enumerate(NAMES)
    }


@pytest.mark.parametrize(("maps", "truth"), [("cutouts", "masks"), ("masks", "cutouts")])
def test_cutouts_are_evaluated_by_their_alpha_channel(dsu: Dsu, tmp_path: Path, maps: str, truth: str) -> None:
    saved(tmp_path / "cutouts", cutouts())
    saved(tmp_path / "masks", {name: np.asarray(picture)[..., 3] for name, picture in cutouts().items()})
    found = figures(dsu, "--predictions", maps, "--truth", truth, "--normalize", "none")
    assert (found["IoU"], found["MAE"]) == (1, 0)


def test_cutouts_as_masks_are_read_from_their_alpha_channel(dsu: Dsu, tmp_path: Path) -> None:
    names = [Path(name).with_suffix(".jpg").name for name in cutouts()]
    stored = []
    for folder in ("cut", "plain"):
        saved(tmp_path / folder / "images", {name: photo(60 + 2 * index, 40) for index, name in enumerate(names)})
        masks = cutouts() if folder == "cut" else {name: np.asarray(mask)[..., 3] for name, mask in cutouts().items()}
        saved(tmp_path / folder / "masks", masks)
        dsu("cache-features", folder, *STAGE_ONE)
        [store] = Path("features", folder).iterdir()
        stored.append(np.asarray(zarr.open_group(store, mode="r")["mask"][:]))
    assert stored[1].any() and np.array_equal(*stored)


def test_coloured_maps_are_refused_by_name(dsu: Dsu, tmp_path: Path) -> None:
    saved(tmp_path / "truth", {f"{name}.png": box(60, 40) for name in NAMES})
    saved(tmp_path / "maps", {"one.png": box(60, 40), "two.png": photo(60, 40), "three.png": box(60, 40)})
    result = dsu("eval", "--predictions", "maps", "--truth", "truth", exit_code=None)
    assert result.exit_code == 1 and "two.png" in result.output, result.output


RANGES: Final = (
    "S",
    "F_adaptive",
    "F_mean",
    "F_max",
    "F_weighted",
    "E_adaptive",
    "E_mean",
    "E_max",
    "MAE",
    "IoU",
    "Dice",
)


@pytest.mark.parametrize("values", [(0, 0), (0, 255), (255, 255), (128, 255), (128, 0)], ids=str)
def test_figures_of_one_pixel_are_in_their_ranges(dsu: Dsu, tmp_path: Path, values: Sequence[int]) -> None:
    for folder, value in zip(("maps", "truth"), values, strict=True):
        saved(tmp_path / folder, {"point.png": np.full((1, 1), value, np.uint8)})
    found = figures(dsu, "--predictions", "maps", "--truth", "truth")
    assert {name: found[name] for name in RANGES if not 0 <= found[name] <= 1} == {}


# ---- in Python ----


@pytest.mark.parametrize("kind", ["turned", "deep"])
def test_an_opened_image_is_read_like_its_file(house: House, tmp_path: Path, kind: str) -> None:
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        path = tmp_path / "turned.jpg"
        Image.fromarray(photo(60, 40)).save(path, exif=exif)
    else:
        path = tmp_path / "deep.png"
        Image.fromarray(np.linspace(0, 65535, 60 * 40).astype(np.uint16).reshape(40, 60)).save(path)
    segmenter = Segmenter.load(house.run, device="cpu")
    opened, read = segmenter(Image.open(path)), segmenter(path)
    assert opened.shape == read.shape and np.array_equal(opened, read)
