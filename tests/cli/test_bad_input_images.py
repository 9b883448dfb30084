"""Bad data sets, images and masks: each is named, none is left out silently, and the others are processed."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from house import House, stage_one
from PIL import Image
from rubbish import ODD, UNREADABLE, Refused, picture, truncate
from support import TINY, Dsu


def test_an_unknown_data_set(refused: Refused, tmp_path: Path) -> None:
    refused(stage_one("NOWHERE"), "'NOWHERE'", "below data", "DUTS", "NC4K", "--data-root", "DSU_DATA")


def test_a_benchmark_that_is_not_in_the_data_root(refused: Refused, tmp_path: Path) -> None:
    error = refused(stage_one("duts", "--data-root", "sets"), "duts", "below sets", "DUTS/DUTS-TR", "--data-root")
    assert "neither" not in error


def test_a_folder_without_images(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(stage_one("empty"), tmp_path / "empty", "contains no images")


def test_a_folder_with_indistinguishable_images_and_masks(dsu: Dsu, refused: Refused, mine: Path) -> None:
    (mine / "images").rename(mine / "first")
    (mine / "masks").rename(mine / "second")
    refused(stage_one(mine), mine, "first, second", "--images SUBFOLDER --masks SUBFOLDER")
    dsu(*stage_one(mine, "--images", "first", "--masks", "second"))


def test_images_without_masks_and_masks_without_images_are_named(dsu: Dsu, mine: Path) -> None:
    (mine / "masks" / "0000.png").rename(mine / "masks" / "lonely.png")
    said = dsu(*stage_one(mine), exit_code=1).output
    assert said.startswith("1 image of mine without a mask, skipped: 0000.jpg")
    assert "1 mask of mine without an image: lonely.png" in said
    assert "mine: 3 pairs" in said


def test_no_pair_at_all(refused: Refused, mine: Path) -> None:
    for path in (mine / "masks").iterdir():
        path.rename(path.with_name(f"other{path.name}"))
    refused(stage_one(mine), mine / "masks", "0000.jpg", "other0000.png", "--images SUBFOLDER --masks SUBFOLDER")


def test_training_needs_masks(dsu: Dsu, refused: Refused, mine: Path) -> None:
    shutil.rmtree(mine / "masks")
    dsu(*stage_one(mine))
    refused(["train-head", mine], "mine", "no masks", status=1)
    refused(["train-head", mine, "--end-to-end", "--cache-root", "other", *TINY], "mine", "no masks", status=1)


@pytest.fixture
def spoilt(mine: Path, drawn: Path) -> Path:
    """`mine` with one good pair, and a truncated JPEG, a truncated PNG, an empty file, a text and a folder."""
    truncate(mine / "images" / "0000.jpg")
    truncate(mine / "masks" / "0001.png")
    (mine / "images" / "0002.jpg").write_bytes(b"")
    for name in ("words", "folder"):
        shutil.copy(mine / "masks" / "0003.png", mine / "masks" / f"{name}.png")
    (mine / "images" / "words.jpg").write_text("not an image")
    (mine / "images" / "folder.png").mkdir()
    return mine


@pytest.mark.parametrize("quiet", [False, True])
def test_broken_files_are_named_and_the_rest_is_stored(
    dsu: Dsu, refused: Refused, spoilt: Path, tmp_path: Path, quiet: bool
) -> None:
    from dsu_cache import Store

    error = refused(stage_one(spoilt, *(["--quiet"] if quiet else [])), status=1)
    for broken in ("images/0000.jpg", "masks/0001.png", "images/0002.jpg", "images/words.jpg"):
        assert str(spoilt / broken) in error
    assert "truncated" in error and "empty" in error and "known image format" in error
    [store] = (tmp_path / "features" / "mine").iterdir()
    assert Store.open(store).manifest.names == ("0003",)
    if not quiet:
        assert "1 mask of mine without an image: folder.png" in dsu(*stage_one(spoilt), exit_code=1).output


def test_training_from_the_images_names_broken_files_too(dsu: Dsu, spoilt: Path) -> None:
    said = dsu("train-head", spoilt, "--end-to-end", "--epochs", "1", *TINY).output
    for broken in ("images/0000.jpg", "masks/0001.png", "images/0002.jpg", "images/words.jpg"):
        assert said.count(f"{spoilt / broken} cannot be read") == 1


def test_broken_files_are_named_and_the_rest_is_predicted(
    refused: Refused, house: House, spoilt: Path, tmp_path: Path
) -> None:
    error = refused(house.predict(spoilt / "images", "--out", "out"), "0000.jpg", "0002.jpg", "words.jpg", status=1)
    assert "2 written to out, 3 skipped" in error
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"0001.png", "0003.png"}
    refused(house.predict(spoilt / "images" / "folder.png", "--out", "out"), "folder.png", "contains no images")


def test_a_folder_with_only_unreadable_files(refused: Refused, mine: Path) -> None:
    for path in (mine / "images").iterdir():
        path.write_bytes(b"")
    error = refused(stage_one(mine), "mine", "no readable image", status=1)
    assert "0000.jpg" in error and "empty" in error


def test_masks_of_0_and_1_are_labels(dsu: Dsu, mine: Path) -> None:
    for path in (mine / "masks").iterdir():
        Image.fromarray((np.asarray(Image.open(path)) > 127).astype(np.uint8)).save(path)
    said = dsu(*stage_one(mine)).output
    assert "labels (the values 0, 1): every value but 0 is foreground." in said


def test_labels_are_chosen_by_foreground(dsu: Dsu, refused: Refused, mine: Path, tmp_path: Path) -> None:
    for path in (mine / "masks").iterdir():
        labels = np.where(np.asarray(Image.open(path)) > 127, 7, 3).astype(np.uint8)
        Image.fromarray(labels).save(path)
    refused(stage_one(mine), "labels without any 0", "--foreground", "the values 3, 7")
    refused(stage_one(mine, "--foreground", 5), "the value 5 of --foreground", "the values 3, 7")
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
    width, height = Image.open(path).size
    Image.open(path).resize((2 * width, 2 * height)).save(path)
    said = dsu(*stage_one(mine)).output
    assert "1 mask of another size than the image: 0002 (" in said and f"mask {2 * width}x{2 * height}" in said
    Image.open(path).resize((31, 17)).save(path)
    said = dsu(*stage_one(mine), exit_code=1).output
    assert "0002.png" in said and "31x17 pixels have another aspect ratio" in said


@pytest.mark.parametrize("name", ["größe-écran-画像", "with some  spaces", "n" * 200])
def test_names_of_any_letters_and_length_work(dsu: Dsu, house: House, mine: Path, tmp_path: Path, name: str) -> None:
    (mine / "images" / "0000.jpg").rename(mine / "images" / f"{name}.jpg")
    (mine / "masks" / "0000.png").rename(mine / "masks" / f"{name}.png")
    mine = mine.rename(tmp_path / name)
    dsu(*stage_one(mine))
    dsu(*house.predict(mine / "images", "--out", "out"))
    dsu("eval", "--predictions", "out", "--truth", mine / "masks", "--all")
    assert (tmp_path / "out" / f"{name}.png").is_file()


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


# ---- unreadable and unusual files ----


def unique(name: str) -> str:
    """The name of a file in `UNREADABLE`, with a unique stem."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}-{ending}.{ending}"


@pytest.fixture
def rubbish(tmp_path: Path) -> Path:
    """A folder with all unreadable files as images and as masks, and one good pair."""
    images, masks = tmp_path / "bad" / "images", tmp_path / "bad" / "masks"
    for folder, mode in ((images, "RGB"), (masks, "L")):
        folder.mkdir(parents=True)
        picture(mode=mode).save(folder / "good.png")
    for name, (make, _) in UNREADABLE.items():
        make(images / f"image-{unique(name)}")
        picture(mode="L").save((masks / f"image-{unique(name)}").with_suffix(".png"))
        make(masks / f"mask-{unique(name)}")
        picture().save((images / f"mask-{unique(name)}").with_suffix(".png"))
    return tmp_path / "bad"


def names_each_once(said: str, folder: Path, prefix: str) -> None:
    """Check that every unreadable file is named once, with the reason and the way out."""
    for name, (_, reason) in UNREADABLE.items():
        if prefix == "mask-" and "UTF-8" in reason:
            continue  # the image of this name is named first
        shown = os.fsencode(folder / f"{prefix}{unique(name)}").decode("utf-8", "replace")
        assert said.count(f"{shown} ") == 1, f"{shown} in {said}"
        sentence = said[said.index(f"{shown} ") :].split("error:")[0]
        assert reason in sentence
        assert "remove it" in sentence or "run again" in sentence or "rename it" in sentence, sentence


def test_stage_one_names_unreadable_files(refused: Refused, rubbish: Path, tmp_path: Path) -> None:
    from dsu_cache import Store

    said = refused(stage_one(rubbish), status=1, count=2 * len(UNREADABLE))
    names_each_once(said, rubbish / "images", "image-")
    names_each_once(said, rubbish / "masks", "mask-")
    [store] = (tmp_path / "features" / "bad").iterdir()
    assert Store.open(store).manifest.names == ("good",)
    assert not (rubbish / "images" / "ran").exists()


def test_end_to_end_training_names_unreadable_files(refused: Refused, rubbish: Path) -> None:
    command = ["train-head", rubbish, "--end-to-end", "--epochs", "1", "--val-fraction", "0", *TINY]
    said = refused.handled(command, count=2 * len(UNREADABLE))
    for line in ("image-empty-jpg.jpg", "mask-pipe-jpg.jpg", "image-device-jpg.jpg", "mask-bomb-png.png"):
        assert said.count(f"/{line} ") == 1


def test_prediction_names_unreadable_files(refused: Refused, house: House, rubbish: Path, tmp_path: Path) -> None:
    shutil.rmtree(rubbish / "masks")
    for path in (rubbish / "images").glob("mask-*"):
        path.unlink()
    said = refused(house.predict(rubbish / "images", "--out", "out"), status=1, count=len(UNREADABLE))
    names_each_once(said, rubbish / "images", "image-")
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["good.png"]
    assert not (rubbish / "images" / "ran").exists()


@pytest.mark.parametrize("name", UNREADABLE)
def test_evaluation_names_unreadable_files(refused: Refused, tmp_path: Path, name: str) -> None:
    make, reason = UNREADABLE[name]
    for folder in ("predicted", "truth", "good"):
        (tmp_path / folder).mkdir()
    make(tmp_path / "truth" / name)
    make(tmp_path / "predicted" / name)
    picture().convert("1", dither=Image.Dither.NONE).save(tmp_path / "good" / f"{Path(name).stem}.png")
    for predicted, truth, broken in (("good", "truth", "truth"), ("predicted", "good", "predicted")):
        command = ["eval", "--predictions", predicted, "--truth", truth]
        stem = os.fsencode(Path(name).stem).decode("utf-8", "replace")
        refused(command, stem if "UTF-8" in reason else f"{broken}/{name}", reason, status=1)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder with all unusual but valid files as images and as masks, and with a folder named like an image."""
    for inner in ("images", "masks"):
        (tmp_path / "odd" / inner).mkdir(parents=True)
    for name, (make, _) in ODD.items():
        make(tmp_path / "odd" / "images" / name)
        make(tmp_path / "odd" / "masks" / name)
    (tmp_path / "odd" / "images" / "folder.png").mkdir()
    (tmp_path / "odd" / "images" / "round").symlink_to(tmp_path / "odd" / "images")
    return tmp_path / "odd"


def test_odd_images_and_masks_are_stored_and_trained_on(refused: Refused, odd: Path, tmp_path: Path) -> None:
    """The masks are images of all kinds, read with --foreground 255."""
    from dsu_cache import Store

    refused.handled(stage_one(odd, "--foreground", "255"), count=2 * len(ODD))
    [path] = (tmp_path / "features" / "odd").iterdir()
    store = Store.open(path)
    assert set(store.manifest.names) == {os.path.splitext(name)[0] for name in ODD}
    for name, entry in store.manifest.entries.items():
        [size] = [size for file, (_, size) in ODD.items() if os.path.splitext(file)[0] == name]
        assert tuple(entry.info["size"]) == size, name  # type: ignore[arg-type]
    refused.handled(["train-head", "--epochs", "1", "--views", "1", "--val-fraction", "0", "--out", "run"])
    refused.handled(["check-equivalence", "--steps", "1", "--views", "1", "--batch-size", "2"], "pass", count=2)


def test_odd_images_are_predicted_and_evaluated(refused: Refused, house: House, odd: Path, tmp_path: Path) -> None:
    refused.handled(house.predict(odd / "images", "--out", "out", "--kind", "overlay"), count=len(ODD))
    refused.handled(house.predict(odd / "images", "--out", "out", "--overwrite"), count=len(ODD))
    for name, (_, size) in ODD.items():
        with Image.open(tmp_path / "out" / f"{os.path.splitext(name)[0]}.png") as mask:
            assert (mask.mode, mask.size) == ("L", size), name
    assert len(list((tmp_path / "out").glob("*.png"))) == len(ODD)
    evaluate = ["eval", "--predictions", "out", "--truth", odd / "masks", "--foreground", "255"]
    refused.handled(evaluate, "MAE", count=len(ODD))
    assert not (tmp_path / "ran").exists()


def test_images_that_differ_only_in_their_extension(refused: Refused, house: House, mine: Path, tmp_path: Path) -> None:
    shutil.copy(mine / "images" / "0001.jpg", mine / "images" / "0001_jpg.jpg")
    Image.open(mine / "images" / "0000.jpg").save(mine / "images" / "0000.webp")
    refused.handled(stage_one(mine), "0001_jpg.jpg", status=1)
    refused.handled(house.predict(mine / "images", "--out", "out"), "6 written")
    assert {"0000_jpg.png", "0000_webp.png"} < {path.name for path in (tmp_path / "out").glob("*.png")}
    shutil.copy(mine / "images" / "0001.jpg", mine / "images" / "0000_webp.jpg")
    refused(house.predict(mine / "images", "--out", "other"), "Two images would be written to", "0000_webp.png")
    for end in ("jpg", "png"):
        shutil.copy(mine / "masks" / "0001.png", tmp_path / "out" / f"0001.{end}")
    refused(
        ["eval", "--predictions", "out", "--truth", mine / "masks"], "0001.jpg", "0001.png", "the same name", status=1
    )


def test_two_sets_with_the_same_name(refused: Refused, house: House, mine: Path, drawn: Path) -> None:
    command = house.predict(mine / "images", drawn / "test" / "images", "--out", "out")
    refused(command, "2 sources are called images", "--out")


def test_masks_without_any_object_are_kept(refused: Refused, mine: Path) -> None:
    for path in (mine / "masks").iterdir():
        Image.new("L", Image.open(path).size).save(path)
    refused.handled(stage_one(mine), "4 masks without foreground: kept", f"`dsu datasets check {mine}`")
    refused.handled(["train-head", "--epochs", "1", "--views", "1", "--out", "run"])
    refused.handled(["predict", mine / "images", "--head", "run", "--out", "out"])
    refused.handled(["eval", "--predictions", "out", "--truth", mine / "masks", "--all"], "MAE")


@pytest.mark.parametrize(
    "text", ["", "ECSD", "coi10k", "loop", "a" * 300, "../../etc", "file.txt", "mine/images/0000.jpg"]
)
def test_names_that_are_not_data_sets(refused: Refused, mine: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file.txt").write_text("")
    near = {"ECSD": "did you mean 'ECSSD'?", "coi10k": "did you mean 'COD10K'?", "": "empty"}
    near |= dict.fromkeys(("file.txt", "mine/images/0000.jpg"), "is a file")
    refused(stage_one(text), near.get(text, "--data-root"), text)
    refused(["train-head", text, "--end-to-end", *TINY], near.get(text, "--data-root"), text)


def test_an_empty_source_is_refused(refused: Refused, house: House) -> None:
    refused(house.predict(""), "empty", "folder or image files")


def test_a_folder_whose_name_is_not_utf_8(refused: Refused, mine: Path, tmp_path: Path) -> None:
    folder = mine.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    refused(stage_one(folder), "caf\N{REPLACEMENT CHARACTER}", "UTF-8", "rename it")


def test_folders_with_names_that_are_special_elsewhere(
    refused: Refused, house: House, mine: Path, tmp_path: Path
) -> None:
    folder = mine.rename(tmp_path / "[red]x; :car: %s {0}")
    refused.handled(stage_one(folder), folder.name)
    refused.handled(["train-head", "--epochs", "1", "--views", "1", "--out", "run"], folder.name)
    refused.handled(house.predict(folder / "images", "--out", "[blue]"), "written to [blue]")
