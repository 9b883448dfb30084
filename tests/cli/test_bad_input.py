"""Every bad input: the message names the file or field and the way out, the status is 1 or 2, there is no traceback.

`Dsu` itself asserts the exit status and that no traceback is printed. One store and one trained head are made once;
tests that damage them damage a copy.
"""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import TINY, Dsu

WIDE: Final = ("--levels", "V", "--views", "1")
"""Options of the fastest stage one."""


@dataclass(frozen=True)
class House:
    """A few of the drawn images, and what stage one, stage two and prediction left of them."""

    data: Path
    features: Path
    run: Path

    @property
    def store(self) -> Path:
        [folder] = (self.features / "shapes-TR").iterdir()
        return folder

    @property
    def predictions(self) -> Path:
        return self.run / "predictions"

    def copied(self, to: Path) -> "House":
        """The same in another place, to be damaged."""
        shutil.copytree(self.features, to / "features")
        shutil.copytree(self.run, to / "run")
        return replace(self, features=to / "features", run=to / "run")

    def train(self, *more: object) -> list[object]:
        """`train-head` on the store."""
        return ["train-head", self.data, "--cache-root", self.features, "--epochs", "1", *more]

    def predict(self, *more: object) -> list[object]:
        """`predict` with the head."""
        return ["predict", *more, "--head", self.run, "--cache-root", self.features]


@pytest.fixture(scope="module")
def house(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> House:
    """Made by the commands themselves, outside of the `dsu` fixture, which lives for one test."""
    from dsu_cli.main import run

    home = tmp_path_factory.mktemp("house")
    for part, count in (("train", 5), ("test", 2)):
        for inner in ("images", "masks"):
            (home / "shapes" / part / inner).mkdir(parents=True)
            for path in sorted((drawn / part / inner).iterdir())[:count]:
                shutil.copy(path, home / "shapes" / part / inner)
    made = House(home / "shapes", home / "features", home / "run")
    roots = ("--cache-root", made.features, "--quiet")
    for command in (
        ("cache-features", made.data, *TINY, "--levels", "V", *roots),
        ("train-head", "--epochs", "1", "--out", made.run, *roots),
        ("predict", "--head", made.run, *roots),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["dsu", *map(str, command)])
            with pytest.raises(SystemExit) as left:
                run()
        assert not left.value.code
    return made


@pytest.fixture
def mine(drawn: Path, tmp_path: Path) -> Path:
    """A folder of one's own with four images and masks, to be spoilt."""
    folder = tmp_path / "mine"
    for inner in ("images", "masks"):
        (folder / inner).mkdir(parents=True)
        for path in sorted((drawn / "train" / inner).iterdir())[:4]:
            shutil.copy(path, folder / inner)
    return folder


def refused(dsu: Dsu, arguments: Sequence[object], *words: object, status: int = 2) -> str:
    """Run, and find all of `words` in what is said after `error:`; returns that."""
    said = " ".join(dsu(*arguments, exit_code=status).output.split())
    assert "error:" in said, said
    error = said[said.index("error:") :]
    assert [str(word) for word in words if str(word) not in error] == [], error
    return error


def stage_one(folder: Path | str, *more: object) -> list[object]:
    return ["cache-features", folder, *TINY, *WIDE, *more]


# ---- options ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--levels", "Q"), ("'Q'", "V1 to V4", "S1 to S4", "B1 to B6")),
        (("--levels", "V,B99"), ("'B99'", "B1 to B6")),
        (("--levels", "S5"), ("'S5'", "S1 to S4")),
        (("--levels", "V99"), ("'V99'", "choose V")),
        (("--views", "3"), ("--views", "1, 2, 4")),
        (("--level-views", "0"), ("--level-views", "1, 2, 4")),
        (("--stored", "int8"), ("--stored", "float16, float32")),
        (("--compressor", "gzip"), ("--compressor", "zstd, blosc")),
        (("--batch-size", "0"), ("--batch-size", "from 1 to")),
        (("--batch-size", "-1"), ("--batch-size", "from 1 to")),
        (("--precision", "fp8"), ("--precision", "auto, fp32, bf16")),
        (("--device", "quantum"), ("'quantum'", "cpu, cuda or cuda:N")),
        (("--device", "meta"), ("'meta'", "cpu, cuda or cuda:N")),
        (("--device", "cuda:77"), ("'cuda:77'", "cpu, cuda or cuda:N")),
        (("--preset", "huge"), ("preset", "'huge'", "large, base, small, tiny, toy")),
        (("--hiera", "giant"), ("Hiera", "'giant'", "large, base_plus, small, tiny")),
        (("--dino", "vitg14"), ("DINOv2", "'vitg14'", "vitl14, vitb14, vits14")),
        (("--hiera-size", "100"), ("hiera_size", "128")),
        (("--hiera-size", "200"), ("32", "200", "try 192")),
        (("--dino-size", "100"), ("14", "100", "try 98")),
        (("--images", "images"), ("--images and --masks go together",)),
        (("--images", "photos", "--masks", "gt"), ("photos", "test, train", "--images and --masks")),
    ],
)
def test_options_of_stage_one(dsu: Dsu, drawn: Path, options: Sequence[str], words: Sequence[str]) -> None:
    refused(dsu, stage_one(drawn, *options), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(dsu: Dsu, house: House) -> None:
    for command in (stage_one(house.data), house.train(), house.predict()):
        refused(dsu, [*command, "--device", "cuda"], "'cuda'", "choose cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--adapt-last", "99"), ("--adapt-last 99", "7 blocks")),
        (("--adapt-last", "-1"), ("adapt_last", "greater than or equal to 0")),
        (("--val-fraction", "1.5"), ("val_fraction", "less than 1")),
        (("--keep", "best", "--val-fraction", "0"), ("keep", "val_fraction above 0")),
        (("--keep", "first"), ("keep", "'last' or 'best'")),
        (("--ablation", "Z"), ("ablation", "'A', 'B' or 'C'")),
        (("--ablation", "B"), ("V1, V2, V3, V4", "dsu cache-features", "--levels V1,V2,V3,V4")),
        (("--views", "3"), ("views", "1, 2 or 4")),
        (("--batch-size", "0"), ("batch_size", "greater than 0")),
        (("--lr", "nan"), ("lr", "finite")),
        (("--lr", "-1"), ("lr", "greater than 0")),
        (("--seed", "-1"), ("seed", "greater than or equal to 0")),
        (("--val-every", "0"), ("val_every", "greater than 0")),
        (("--resume-from", "S2"), ("'S2'", "choose pixels")),
        (("--resume-from", "B99"), ("'B99'", "choose pixels")),
        (("--precision", "fp8"), ("precision", "'fp32' or 'bf16'")),
        (("--device", "quantum"), ("'quantum'", "choose cpu")),
        (("--preset", "huge"), ("'huge'", "large, base, small, tiny, toy")),
        (("--preset", "tiny"), ("made with tiny", "dsu cache-features", "same options of the network")),
    ],
)
def test_options_of_stage_two(dsu: Dsu, house: House, options: Sequence[str], words: Sequence[str]) -> None:
    refused(dsu, house.train(*options), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--threshold", "2"), ("--threshold", "from 0 to 1")),
        (("--threshold", "nan"), ("--threshold", "from 0 to 1")),
        (("--normalize", "yes"), ("--normalize", "minmax, none")),
        (("--kind", "x"), ("--kind", "mask, overlay, cutout")),
        (("--batch-size", "0"), ("--batch-size", "from 1 to")),
        (("--precision", "fp8"), ("--precision", "auto, fp32, bf16")),
    ],
)
def test_options_of_prediction(dsu: Dsu, house: House, options: Sequence[str], words: Sequence[str]) -> None:
    refused(dsu, house.predict(*options), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--normalize", "yes"), ("--normalize", "minmax, none")),
        (("--workers", "0"), ("workers", "1 or more")),
        (("nonsense",), ("'nonsense'", "shapes-TE")),
        (("ECSSD",), ("ECSSD", "--data-root")),
        (("--truth", "absent"), ("absent", "not a folder")),
        (("one", "two", "--truth", "."), ("--truth", "at most one name")),
    ],
)
def test_options_of_evaluation(dsu: Dsu, house: House, options: Sequence[str], words: Sequence[str]) -> None:
    refused(dsu, ["eval", *options, "--predictions", house.predictions], *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", "0"), ("--steps", "from 1 to")),
        (("--batch-size", "0"), ("batch_size", "greater than 0")),
        (("--adapt-last", "99"), ("--adapt-last 99", "7 blocks")),
        (("--cache-root", "x"), ("below x", "dsu cache-features")),
        (("--config", "absent.yaml"), ("absent.yaml", "No such file")),
    ],
)
def test_options_of_the_check_of_equivalence(
    dsu: Dsu, house: House, options: Sequence[str], words: Sequence[str]
) -> None:
    refused(dsu, ["check-equivalence", "--cache-root", house.features, *options], *words)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train-head", "--epochs", "many"),
        ("train-head", "--lr", "fast"),
        ("cache-features",),
        ("cache-features", "x", "--foreground", "white"),
        ("predict", "--threshold", "half"),
        ("eval", "--workers", "all"),
        ("predict", "--nonsense"),
        ("nonsense",),
    ],
)
def test_words_that_are_no_numbers_and_options_that_do_not_exist(dsu: Dsu, arguments: Sequence[str]) -> None:
    said = dsu(*arguments, exit_code=2).output
    wrong = next((word for word in arguments if word.startswith("--")), "Missing argument")
    assert "Usage: " in said and ((wrong in said) or "No such command" in said)


# ---- data sets ----


def test_an_unknown_data_set(dsu: Dsu, tmp_path: Path) -> None:
    refused(dsu, stage_one("NOWHERE"), "'NOWHERE'", "below data", "DUTS", "NC4K", "--data-root", "DSU_DATA")


def test_a_benchmark_that_is_not_below_the_data_root(dsu: Dsu, tmp_path: Path) -> None:
    error = refused(dsu, stage_one("duts", "--data-root", "sets"), "duts", "below sets", "DUTS/DUTS-TR", "--data-root")
    assert "neither" not in error


def test_a_folder_without_images(dsu: Dsu, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(dsu, stage_one("empty"), tmp_path / "empty", "holds no images")


def test_a_folder_in_which_images_and_masks_cannot_be_told_apart(dsu: Dsu, mine: Path) -> None:
    (mine / "images").rename(mine / "first")
    (mine / "masks").rename(mine / "second")
    refused(dsu, stage_one(mine), mine, "first, second", "--images SUBFOLDER --masks SUBFOLDER")
    dsu(*stage_one(mine, "--images", "first", "--masks", "second"))


def test_images_without_masks_and_masks_without_images_are_named_and_the_rest_goes_on(dsu: Dsu, mine: Path) -> None:
    (mine / "masks" / "0000.png").rename(mine / "masks" / "lonely.png")
    said = dsu(*stage_one(mine)).output
    assert "1 images have no mask and are passed over: 0000.jpg" in said
    assert "1 masks have no image: lonely.png" in said
    assert "mine: 3 pairs" in said


def test_no_pair_at_all(dsu: Dsu, mine: Path) -> None:
    for path in (mine / "masks").iterdir():
        path.rename(path.with_name(f"other{path.name}"))
    refused(dsu, stage_one(mine), mine / "masks", "0000.jpg", "other0000.png", "--images SUBFOLDER --masks SUBFOLDER")


def test_training_wants_masks(dsu: Dsu, mine: Path) -> None:
    shutil.rmtree(mine / "masks")
    dsu(*stage_one(mine))
    refused(dsu, ["train-head", mine], "mine", "no masks", status=1)
    refused(dsu, ["train-head", mine, "--end-to-end", "--cache-root", "other", *TINY], "mine", "no masks", status=1)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def spoilt(mine: Path, drawn: Path) -> Path:
    """`mine` with one good pair, and a truncated JPEG, a truncated PNG, an empty file, a text and a folder."""
    _truncate(mine / "images" / "0000.jpg")
    _truncate(mine / "masks" / "0001.png")
    (mine / "images" / "0002.jpg").write_bytes(b"")
    for name in ("words", "folder"):
        shutil.copy(mine / "masks" / "0003.png", mine / "masks" / f"{name}.png")
    (mine / "images" / "words.jpg").write_text("not an image")
    (mine / "images" / "folder.png").mkdir()
    return mine


@pytest.mark.parametrize("quiet", [False, True])
def test_broken_files_are_named_and_the_rest_is_stored(dsu: Dsu, spoilt: Path, tmp_path: Path, quiet: bool) -> None:
    from dsu_cache import Store

    error = refused(dsu, stage_one(spoilt, *(["--quiet"] if quiet else [])), status=1)
    for broken in ("images/0000.jpg", "masks/0001.png", "images/0002.jpg", "images/words.jpg"):
        assert str(spoilt / broken) in error
    assert "truncated" in error and "empty" in error and "no image format known here" in error
    [store] = (tmp_path / "features" / "mine").iterdir()
    assert Store.open(store).manifest.names == ("0003",)
    if not quiet:
        assert "1 masks have no image: folder.png" in dsu(*stage_one(spoilt), exit_code=1).output


def test_training_from_the_images_names_broken_files_too(dsu: Dsu, spoilt: Path) -> None:
    said = dsu("train-head", spoilt, "--end-to-end", "--epochs", "1", *TINY).output
    assert "4 files cannot be decoded" in said and "0000.jpg" in said


def test_broken_files_are_named_and_the_rest_is_predicted(dsu: Dsu, house: House, spoilt: Path, tmp_path: Path) -> None:
    error = refused(
        dsu, house.predict(spoilt / "images", "--out", "out"), "0000.jpg", "0002.jpg", "words.jpg", status=1
    )
    assert "2 written to out, 3 skipped" in error
    assert {path.name for path in (tmp_path / "out" / "images").iterdir()} == {"0001.png", "0003.png"}
    refused(dsu, house.predict(spoilt / "images" / "folder.png", "--out", "out"), "folder.png", "holds no images")


def test_nothing_that_can_be_read(dsu: Dsu, mine: Path) -> None:
    for path in (mine / "images").iterdir():
        path.write_bytes(b"")
    error = refused(dsu, stage_one(mine), "mine", "no image that can be read", status=1)
    assert "0000.jpg" in error and "empty" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(dsu: Dsu, mine: Path) -> None:
    (mine / "images" / "0000.jpg").chmod(0)
    refused(dsu, stage_one(mine), "0000.jpg", "Permission denied", status=1)


def test_masks_of_0_and_1_are_labels(dsu: Dsu, mine: Path) -> None:
    for path in (mine / "masks").iterdir():
        Image.fromarray((np.asarray(Image.open(path)) > 127).astype(np.uint8)).save(path)
    said = dsu(*stage_one(mine)).output
    assert "labels (the values 0, 1): every value but 0 is foreground" in said and "--foreground" in said


def test_labels_are_chosen_by_foreground(dsu: Dsu, mine: Path, tmp_path: Path) -> None:
    for path in (mine / "masks").iterdir():
        labels = np.where(np.asarray(Image.open(path)) > 127, 7, 3).astype(np.uint8)
        Image.fromarray(labels).save(path)
    refused(dsu, stage_one(mine), "no pixel of any is 0", "--foreground", "the values 3, 7")
    refused(dsu, stage_one(mine, "--foreground", 5), "the value 5 of --foreground", "the values 3, 7")
    said = dsu(*stage_one(mine, "--foreground", 7)).output
    assert "the value 7 is foreground" in said
    assert set(np.unique(_stored_masks(tmp_path))) >= {0, 255}


def test_colours_are_chosen_by_foreground(dsu: Dsu, mine: Path, tmp_path: Path) -> None:
    for path in (mine / "masks").iterdir():
        coloured = np.zeros((*np.asarray(Image.open(path)).shape, 3), np.uint8)
        coloured[:10, :, 0] = 255
        coloured[10:20, :, 2] = 255
        Image.fromarray(coloured).save(path)
    said = dsu(*stage_one(mine, "--cache-root", "all")).output
    assert "4 in colours" in said and "#FF0000" in said and "all but black" in said
    dsu(*stage_one(mine, "--foreground", 0xFF0000))
    both, red = (_stored_masks(tmp_path, root) > 127 for root in ("all", "features"))
    assert 0 < red.sum() < both.sum()


def _stored_masks(folder: Path, cache_root: str = "features") -> np.ndarray[Any, Any]:
    from dsu_cache import Store

    [path] = (folder / cache_root / "mine").iterdir()
    store = Store.open(path)
    return store.reader(["mask"]).read([store.manifest.row(name) for name in store.manifest.names], [0] * 4)["mask"]


def test_a_mask_of_another_size_is_named(dsu: Dsu, mine: Path) -> None:
    path = mine / "masks" / "0002.png"
    Image.open(path).resize((31, 17)).save(path)
    said = dsu(*stage_one(mine)).output
    assert "1 masks have another size than their image: 0002 (" in said and "mask 31x17" in said


@pytest.mark.parametrize("name", ["größe-écran-画像", "with some  spaces", "n" * 200])
def test_names_of_any_letters_and_length_work(dsu: Dsu, house: House, mine: Path, tmp_path: Path, name: str) -> None:
    (mine / "images" / "0000.jpg").rename(mine / "images" / f"{name}.jpg")
    (mine / "masks" / "0000.png").rename(mine / "masks" / f"{name}.png")
    mine = mine.rename(tmp_path / name)
    dsu(*stage_one(mine))
    dsu(*house.predict(mine / "images", "--out", "out"))
    dsu("eval", "--predictions", "out/images", "--truth", mine / "masks")
    assert (tmp_path / "out" / "images" / f"{name}.png").is_file()


@pytest.mark.parametrize(("reference", "home"), [("tiles", "tiles"), ("data/DUTS", "DUTS/DUTS-TR")])
def test_a_folder_below_the_data_root_is_found_again(dsu: Dsu, mine: Path, reference: str, home: str) -> None:
    (mine.parent / "data" / home).parent.mkdir(parents=True)
    mine.rename(mine.parent / "data" / home)
    dsu(*stage_one(reference))
    dsu("train-head", reference, "--epochs", "1", "--views", "1", "--val-fraction", "0.5")
    (mine.parent / "elsewhere").mkdir()
    os.chdir(mine.parent / "elsewhere")
    dsu("predict", "--head", next((mine.parent / "runs").iterdir()), "--cache-root", mine.parent / "features")


def test_one_image_is_enough(dsu: Dsu, mine: Path) -> None:
    for path in [*(mine / "images").iterdir(), *(mine / "masks").iterdir()]:
        if path.stem != "0000":
            path.unlink()
    dsu(*stage_one(mine))
    dsu("train-head", "--epochs", "1", "--views", "1", "--val-fraction", "0")


# ---- the encoders' weights ----


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network and an empty cache, as HF_HUB_OFFLINE=1 and HF_HOME have it before the first import."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("level", "words"),
    [
        ("S4", ("sam2.1_hiera_tiny.pt", "facebook/sam2.1-hiera-tiny", "--hiera-weights", "DSU_HIERA")),
        ("V", ("model.safetensors", "timm/vit_small_patch14_dinov2", "--dino-weights", "DSU_DINO")),
    ],
)
def test_pretrained_weights_that_are_not_there(dsu: Dsu, drawn: Path, level: str, words: Sequence[str]) -> None:
    refused(dsu, ["cache-features", drawn, "--preset", "tiny", "--levels", level], *words, status=1)


class _Code:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._path),)


def _run_code(path: Path) -> None:
    path.write_bytes(pickle.dumps({"model": _Code(path.with_name("ran"))}))


def _run_code_in_zip(path: Path) -> None:
    torch.save({"model": _Code(path.with_name("ran"))}, path)


def _half_a_checkpoint(path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1000)}}, path)
    _truncate(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ("not at",)),
        (lambda path: path.mkdir(), ("not at",)),
        (lambda path: path.write_text("weights"), ("checkpoint",)),
        (lambda path: path.write_bytes(b""), ("can't be read", "fetch it again")),
        (_half_a_checkpoint, ("can't be read", "fetch it again")),
        (_run_code, ("code out of a checkpoint is never run",)),
        (_run_code_in_zip, ("code out of a checkpoint is never run",)),
        (lambda path: torch.save({"model": [1, 2]}, path), ("no state dict of tensors",)),
        (lambda path: torch.save({"model": {"a": torch.zeros(2)}}, path), ("checkpoint of", "published file")),
    ],
)
@pytest.mark.parametrize(("level", "option"), [("S4", "--hiera-weights"), ("V", "--dino-weights")])
def test_files_of_weights_that_are_none(
    dsu: Dsu, drawn: Path, tmp_path: Path, level: str, option: str, make: Callable[[Path], Any], words: Sequence[str]
) -> None:
    path = tmp_path / "weights.pt"
    make(path)
    command = ["cache-features", drawn, "--preset", "tiny", "--levels", level, option, path]
    refused(dsu, command, path, *words, status=1)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_size(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    from dsu.architecture import DINOS
    from dsu.encoders.dino import build_dino

    path = tmp_path / "other.safetensors"
    save_file(build_dino(DINOS["toy"], 126).state_dict(), path)
    command = ["cache-features", drawn, "--preset", "tiny", "--levels", "V", "--dino-weights", path]
    refused(dsu, command, path, "DINOv2 checkpoint of vits14", "published file of that size", status=1)


# ---- settings files ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ("can't be read", "No such file")),
        ("epochs: [1", ("no valid YAML",)),
        ("- epochs\n- lr\n", ("field: value", "epochs: 20")),
        ("1: 2\n", ("field: value",)),
        ("just words", ("field: value",)),
        ("epoch: 3\n", ("epoch: ", "known fields", "epochs")),
        ("epochs: many\n", ("epochs: ", "valid integer")),
        ("epochs: 2.5\n", ("epochs: ", "valid integer")),
        ("epochs: [3]\n", ("epochs: ", "valid integer")),
        ("lr: .nan\n", ("lr: ", "finite")),
        ("lr: .inf\n", ("lr: ", "finite")),
        ("lr: -0.1\n", ("lr: ", "greater than 0")),
        ("weight_decay: heavy\n", ("weight_decay: ", "valid number")),
        ("views: 3\n", ("views: ", "1, 2 or 4")),
        ("device: 5\n", ("device: ", "valid string")),
        ("bce: other\n", ("bce: ", "'plain' or 'weighted'")),
    ],
)
def test_settings_files(dsu: Dsu, house: House, tmp_path: Path, text: str | None, words: Sequence[str]) -> None:
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    command = ["train-head", "--cache-root", house.features, "--config", "mine.yaml"]
    refused(dsu, command, "mine.yaml", *words)


def test_a_settings_file_that_is_no_text(dsu: Dsu, house: House, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00\x80")
    refused(dsu, house.train("--config", "mine.yaml"), "mine.yaml", "no valid YAML")
    refused(dsu, house.train("--config", tmp_path), tmp_path, "can't be read")


def test_an_option_on_top_of_a_settings_file_is_not_blamed_on_the_file(dsu: Dsu, house: House, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    error = refused(dsu, house.train("--config", "mine.yaml", "--val-fraction", "7"), "val_fraction", "options")
    assert "mine.yaml" not in error


# ---- stores ----


def test_training_without_any_store(dsu: Dsu) -> None:
    refused(dsu, ["train-head"], "training features", "below features", "dsu cache-features", "--end-to-end")
    refused(dsu, ["train-head", "DUTS", "--cache-root", "x"], "of DUTS", "below x", "dsu cache-features DUTS")


def test_what_was_made_otherwise_is_refused_by_field(dsu: Dsu, house: House) -> None:
    roots = ("--cache-root", house.features)
    for options, field in (
        (("--stored", "float32"), "V: type is 'float16' in the store, 'float32' is wanted"),
        (("--precision", "bf16"), "V: precision is 'fp32' in the store, 'bf16' is wanted"),
        (("--foreground", 255), "mask: reading is"),
    ):
        refused(dsu, stage_one(house.data, *roots, *options), field, "--rebuild", "--cache-root", status=1)
    refused(dsu, house.train("--precision", "bf16"), "V: precision is 'fp32'", status=1)


def test_a_damaged_store_is_named(dsu: Dsu, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    for text in ("{ not JSON", '{"zarr_format": 3}', ""):
        (mine.store / "zarr.json").write_text(text)
        for command in (mine.train(), stage_one(mine.data, "--cache-root", mine.features)):
            refused(dsu, command, mine.store, "again", status=1)


@pytest.mark.parametrize("damage", ["array", "manifest", "attributes"])
def test_a_store_with_a_damaged_part_is_named(dsu: Dsu, house: House, tmp_path: Path, damage: str) -> None:
    mine = house.copied(tmp_path)
    if damage == "array":
        (mine.store / "V" / "zarr.json").write_text("{ not JSON")
    elif damage == "manifest":
        for path in (mine.store / "manifest").glob("0*.json"):
            _truncate(path)
    else:
        content = json.loads((mine.store / "zarr.json").read_text())
        content["attributes"]["attributes"] = {"source": {}, "architecture": {}}
        (mine.store / "zarr.json").write_text(json.dumps(content))
    refused(dsu, mine.train(), mine.store, status=1)


def _shard(store: Path, name: str) -> Path:
    return next(path for path in sorted((store / name / "c" / "0" / "0").rglob("*")) if path.is_file())


@pytest.mark.parametrize("name", ["V", "pixels", "mask"])
def test_a_shard_that_was_deleted(dsu: Dsu, house: House, tmp_path: Path, name: str) -> None:
    mine = house.copied(tmp_path)
    _shard(mine.store, name).unlink()
    error = refused(dsu, mine.train(), name, "dsu cache-features", status=1 if name != "V" else 2)
    assert "every sample" not in error
    dsu("cache-features", mine.data, *TINY, "--levels", "V", "--cache-root", mine.features)
    if name == "V":
        dsu(*mine.train())


@pytest.mark.parametrize("name", ["V", "mask"])
def test_a_flipped_bit_is_named_with_its_sample(dsu: Dsu, house: House, tmp_path: Path, name: str) -> None:
    mine = house.copied(tmp_path)
    shard = _shard(mine.store, name)
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    refused(dsu, mine.train("--views", "1"), f"'{name}'", "'0000'", shard, "dsu cache-features", status=1)


def test_a_store_that_another_process_writes(dsu: Dsu, house: House, tmp_path: Path) -> None:
    from dsu_cache import Store

    mine = house.copied(tmp_path)
    with Store.open(mine.store).lock():
        refused(dsu, stage_one(mine.data, "--cache-root", mine.features), mine.store, "wait until it ends", status=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_do_not_fit_are_named_with_their_sample(
    dsu: Dsu, mine: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    from dsu.network.network import DSUNet

    prefix = DSUNet.prefix

    def overflowing(self: DSUNet, *arguments: Any) -> dict[str, torch.Tensor]:
        found = prefix(self, *arguments)
        found["V"][2] = value
        return found

    monkeypatch.setattr(DSUNet, "prefix", overflowing)
    refused(dsu, stage_one(mine), "V of 0002", "not finite as float16", "--stored float32", status=1)


def test_a_disk_that_is_too_small(dsu: Dsu, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(dsu, stage_one(drawn), "0.0 GB free", "--levels V", "--views 1", "--compressor", "--cache-root", status=1)


def test_a_disk_that_fills_up(dsu: Dsu, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsu_cache import Store

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "write_shard", full)
    refused(dsu, stage_one(drawn), "features/shapes-TR", "No space left on device", "free some space", status=1)


def test_a_cache_root_that_cannot_be_written(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(dsu, stage_one(drawn, "--cache-root", "file"), "file/shapes-TR", "may be written", status=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_root(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "features").mkdir(mode=0o500)
    refused(dsu, stage_one(drawn), "Permission denied", "may be written", status=1)


def test_an_image_that_changed_since_it_was_cached(dsu: Dsu, mine: Path) -> None:
    dsu(*stage_one(mine))
    image = mine / "images" / "0001.jpg"
    Image.open(image).rotate(180).save(image)
    refused(dsu, ["train-head"], "1 changed (0001)", f"dsu cache-features {mine}", status=1)
    image.write_bytes(b"")
    refused(dsu, ["train-head"], "0001", f"dsu cache-features {mine}", status=1)


def test_a_data_set_that_is_gone_is_said(dsu: Dsu, mine: Path) -> None:
    dsu(*stage_one(mine))
    shutil.rmtree(mine)
    said = dsu("train-head", "--epochs", "1", "--views", "1").output
    assert f"The images of mine are not at {mine}" in said
    refused(dsu, ["predict"], mine, "--data-root")
    refused(dsu, ["check-equivalence", "--views", "1"], mine, status=1)
    refused(dsu, ["train-head", "--end-to-end"], mine, "where they are now", status=1)


# ---- runs ----


def test_going_on_with_a_run_that_is_not_there(dsu: Dsu, house: House, tmp_path: Path) -> None:
    refused(dsu, house.train("--resume"), "no unfinished run", "runs/", "--out")
    refused(dsu, house.train("--resume", "--out", "nowhere"), "nowhere", "--resume")
    assert not (tmp_path / "nowhere").exists()


def test_going_on_with_other_settings(dsu: Dsu, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    command = ["train-head", "--cache-root", mine.features, "--out", mine.run, "--resume"]
    refused(dsu, [*command, "--lr", "0.5", "--epochs", "1"], "lr 0.001 -> 0.5", mine.run, "--out")


def test_a_folder_that_holds_a_run(dsu: Dsu, house: House) -> None:
    refused(dsu, house.train("--out", house.run), house.run, "--resume", "--overwrite")


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("checkpoint.pt", lambda path: path.write_text("words"), ("damaged", "anew", "--overwrite")),
        ("checkpoint.pt", _truncate, ("damaged", "anew", "--overwrite")),
        ("checkpoint.pt", _run_code, ("damaged", "anew", "--overwrite")),
        ("checkpoint.pt", lambda path: torch.save({"head": {}}, path), ("damaged", "anew", "--overwrite")),
        ("checkpoint.pt", lambda path: path.unlink(), ("no checkpoint", "--resume")),
        ("settings.yaml", lambda path: path.write_text("epochs: ["), ("settings.yaml", "anew")),
        ("settings.yaml", lambda path: path.write_text("words"), ("settings.yaml", "anew")),
        ("settings.yaml", lambda path: path.unlink(), ("settings.yaml", "anew")),
    ],
)
def test_a_run_that_was_damaged(
    dsu: Dsu, house: House, tmp_path: Path, name: str, spoil: Callable[[Path], Any], words: Sequence[str]
) -> None:
    mine = house.copied(tmp_path)
    spoil(mine.run / name)
    command = ["train-head", "--cache-root", mine.features, "--out", mine.run, "--resume", "--epochs", "1"]
    refused(dsu, command, mine.run, *words, status=1)
    assert not (mine.run / "ran").exists()


def test_a_run_folder_that_cannot_be_written(dsu: Dsu, house: House, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(dsu, house.train("--out", "file"), "file", status=1)


def test_a_loss_that_is_not_finite_names_the_batch(dsu: Dsu, house: House) -> None:
    command = ["train-head", "--cache-root", house.features, "--epochs", "9", "--lr", "1e30", "--batch-size", "2"]
    refused(dsu, command, "loss is not finite", "in the batch of 00", "--lr", "checkpoint", status=1)


# ---- heads and predictions ----


def test_prediction_without_a_head(dsu: Dsu, tmp_path: Path) -> None:
    refused(dsu, ["predict"], "no trained head below runs/", "dsu train-head", "--head")
    refused(dsu, ["predict", "--head", "nowhere"], "nowhere", "run folder", "train one first")
    refused(dsu, ["predict", "--head", tmp_path], tmp_path, "run folder", "train one first")


def _rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The same tensors with other metadata."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["dsu"])
    changed = change(content)
    save_file(load_file(path), path, {"dsu": changed if isinstance(changed, str) else json.dumps(changed)})


def _without(content: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != field}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_text("words"), ("can't be read as a head", "give a head.safetensors")),
        (_truncate, ("can't be read as a head", "give a head.safetensors")),
        (lambda path: path.write_bytes(b""), ("can't be read as a head",)),
        (lambda path: save_file({"a": torch.zeros(1)}, path), ("no dsu head", "give a head.safetensors")),
        (lambda path: _rewritten(path, lambda c: {**c, "format": 99, "version": "9.9"}), ("dsu 9.9", "update dsu")),
        (lambda path: _rewritten(path, lambda c: {**c, "format": "new"}), ("settings",)),
        (lambda path: _rewritten(path, lambda c: {**c, "stored": "int8"}), ("stored", "'float16' or 'float32'")),
        (lambda path: _rewritten(path, lambda c: _without(c, "architecture")), ("architecture", "required")),
        (lambda path: _rewritten(path, lambda c: "{ not JSON"), ("damaged settings",)),
        (lambda path: _rewritten(path, lambda c: "[1]"), ("settings",)),
    ],
)
def test_heads_that_are_none(
    dsu: Dsu, house: House, tmp_path: Path, spoil: Callable[[Path], Any], words: Sequence[str]
) -> None:
    head = tmp_path / "head.safetensors"
    shutil.copy(house.run / head.name, head)
    spoil(head)
    refused(dsu, ["predict", house.data / "test" / "images", "--head", head, "--out", "out"], head, *words, status=1)


def test_a_head_whose_tensors_do_not_fit(dsu: Dsu, house: House, tmp_path: Path) -> None:
    head = tmp_path / "head.safetensors"
    shutil.copy(house.run / head.name, head)
    _rewritten(head, lambda c: {**c, "architecture": {**c["architecture"], "ablation": "C"}})
    refused(dsu, ["predict", house.data / "test", "--head", head], "tensors do not fit", "train it again", status=1)


def test_a_head_of_other_encoder_weights(dsu: Dsu, house: House, tmp_path: Path) -> None:
    head = tmp_path / "head.safetensors"
    shutil.copy(house.run / head.name, head)
    _rewritten(head, lambda c: {**c, "encoders": {"hiera": "a" * 64, "dino": "b" * 64}})
    command = ["predict", "--head", head, "--cache-root", house.features]
    refused(dsu, [*command, house.data / "test" / "images"], "hiera", "aaaaaaaaaaaa", "--hiera-weights", status=1)
    refused(dsu, command, "V: weights is", "bbbb", status=1)


def test_a_head_that_names_no_data_set(dsu: Dsu, house: House, tmp_path: Path) -> None:
    head = tmp_path / "head.safetensors"
    shutil.copy(house.run / head.name, head)
    _rewritten(head, lambda c: {**c, "dataset": {}})
    refused(dsu, ["predict", "--head", head], head, "folder or image files")


@pytest.mark.parametrize("source", ["nowhere", "nowhere.jpg", "deep/nowhere.png", "ECSSD"])
def test_sources_that_do_not_exist(dsu: Dsu, house: House, source: str) -> None:
    error = refused(dsu, house.predict(source), source)
    assert ("--data-root" in error) != source.endswith(("jpg", "png"))


def test_a_source_that_is_no_image(dsu: Dsu, house: House, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    error = refused(dsu, house.predict("notes.txt", "--out", "out"), "notes.txt", "no image format", status=1)
    assert "0 written" in error and "1 skipped" in error


def test_predictions_never_fall_on_their_inputs(dsu: Dsu, house: House, mine: Path, tmp_path: Path) -> None:
    image = mine / "images" / "one.png"
    Image.open(mine / "images" / "0000.jpg").save(image)
    before = image.read_bytes()
    refused(dsu, house.predict(image, "--out", image.parent), image, "over an input", "--out")
    refused(dsu, house.predict(mine / "images", "--out", mine, "--overwrite"), image, "over an input", "--out")
    assert image.read_bytes() == before


def test_files_that_stand_in_the_way(dsu: Dsu, house: House, mine: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "out" / "0000.png"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    command = house.predict(mine / "images" / "0000.jpg", "--out", "out")
    refused(dsu, command, "out/0000.png", "--overwrite", "--out", status=1)
    assert foreign.read_text() == "mine"
    dsu(*command, "--overwrite")
    Image.open(foreign).verify()


def test_predictions_of_another_head(dsu: Dsu, house: House, mine: Path, tmp_path: Path) -> None:
    command = house.predict(mine / "images", "--out", "out")
    dsu(*command)
    other = tmp_path / "head.safetensors"
    shutil.copy(house.run / other.name, other)
    _rewritten(other, lambda c: {**c, "epoch": 2})
    refused(dsu, [*command, "--head", other], "out", "another head", "--overwrite", "--out", status=1)
    refused(dsu, [*command, "--threshold", "0.5"], "out", "other settings", "--overwrite", status=1)
    dsu(*command, "--head", other, "--overwrite")


def test_a_folder_for_predictions_that_cannot_be_written(dsu: Dsu, house: House, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(dsu, house.predict("--out", "file"), "file", status=1)


# ---- evaluation ----


def test_no_predictions(dsu: Dsu, tmp_path: Path) -> None:
    refused(dsu, ["eval"], "no predictions below runs/", "dsu predict", "--predictions")
    refused(dsu, ["eval", "--predictions", "nowhere"], "nowhere", "--predictions")
    (tmp_path / "empty").mkdir()
    refused(dsu, ["eval", "--predictions", "empty"], "empty", "--truth")


@pytest.fixture
def judged(house: House, tmp_path: Path) -> Path:
    """A copy of the predictions, to be spoilt."""
    shutil.copytree(house.predictions, tmp_path / "judged")
    return tmp_path / "judged"


def test_missing_and_extra_predictions_are_named_and_the_rest_is_judged(dsu: Dsu, judged: Path) -> None:
    (judged / "shapes-TE" / "0000.png").rename(judged / "shapes-TE" / "stranger.png")
    said = refused(dsu, ["eval", "--predictions", judged], "shapes-TE: 0000 has no prediction", status=1)
    assert "shapes-TE: stranger has no ground truth" in said and "MAE" in said
    for path in (judged / "shapes-TE").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    refused(dsu, ["eval", "--predictions", judged], "No prediction of shapes-TE", "same name")


def test_predictions_of_another_size(dsu: Dsu, judged: Path) -> None:
    path = judged / "shapes-TE" / "0001.png"
    Image.open(path).resize((20, 30)).save(path)
    refused(dsu, ["eval", "--predictions", judged], path, "20x30", "0001.png", "--resize", status=1)
    dsu("eval", "--predictions", judged, "--resize")


@pytest.mark.parametrize("spoil", [_truncate, lambda path: path.write_bytes(b""), lambda path: path.write_text("x")])
def test_predictions_that_cannot_be_read(dsu: Dsu, judged: Path, spoil: Callable[[Path], Any]) -> None:
    path = judged / "shapes-TE" / "0001.png"
    spoil(path)
    refused(dsu, ["eval", "--predictions", judged], path, "cannot be read as an image", status=1)


def test_folders_called_like_images_are_no_predictions(dsu: Dsu, judged: Path) -> None:
    (judged / "shapes-TE" / "0001.png").unlink()
    (judged / "shapes-TE" / "0001.png").mkdir()
    refused(dsu, ["eval", "--predictions", judged], "0001 has no prediction", status=1)


def test_ground_truth_that_is_empty_or_not_there(dsu: Dsu, house: House, judged: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(dsu, ["eval", "--predictions", judged / "shapes-TE", "--truth", "empty"], "empty", "no images")
    record = json.loads((judged / "predictions.json").read_text())
    record["sets"]["shapes-TE"]["source"]["reference"] = str(tmp_path / "gone")
    (judged / "predictions.json").write_text(json.dumps(record))
    refused(dsu, ["eval", "--predictions", judged], "shapes-TE", tmp_path / "gone", "--truth", status=1)


@pytest.mark.parametrize(
    "text", ["{ not JSON", "[]", '{"sets": ["a"]}', '{"sets": {"shapes-TE": {"source": {"a": 1}}}}']
)
def test_a_damaged_record_of_predictions(dsu: Dsu, house: House, judged: Path, text: str) -> None:
    (judged / "predictions.json").write_text(text)
    refused(dsu, ["eval", "--predictions", judged], "predictions.json", "predict again", "--truth", status=1)
    refused(dsu, house.predict("--out", judged), "judged", "--overwrite", status=1)


def test_a_table_that_cannot_be_written(dsu: Dsu, judged: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(dsu, ["eval", "--predictions", judged, "--json", "file/x.json"], "file", "may be written", status=1)


# ---- the rest ----


def test_interruption_is_one_sentence(dsu: Dsu, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsu.extraction._Extraction.run", interrupt)
    refused(dsu, stage_one(drawn), "Stopped.", "run the same command again", status=130)


def test_too_little_memory_is_one_sentence(dsu: Dsu, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]

    def exhaust(*arguments: object, **options: object) -> None:
        raise errors.pop()

    monkeypatch.setattr("dsu.extraction._Extraction.run", exhaust)
    while errors:
        refused(dsu, stage_one(drawn), "too little memory", "--batch-size", "--preset", status=1)


def test_settings_written_by_a_run_are_settings(dsu: Dsu, house: House) -> None:
    written = yaml.safe_load((house.run / "settings.yaml").read_text())
    assert written["epochs"] == 1
    dsu(*house.train("--config", house.run / "settings.yaml"))
