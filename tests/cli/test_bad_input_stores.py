"""Bad stores and runs: errors name the damage and the remedy."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from house import House, stage_one
from PIL import Image
from rubbish import Refused, run_code, truncate
from support import TINY, Dsu

# ---- stores ----


def test_training_without_any_store(refused: Refused) -> None:
    refused(["train-head"], "training features", "below features", "dsu cache-features")
    refused(["train-head", "DUTS", "--cache-root", "x"], "of DUTS", "below x", "dsu cache-features DUTS")


def test_stale_arrays_are_refused_with_the_differing_field(refused: Refused, house: House) -> None:
    roots = ("--cache-root", house.features)
    for options, field in (
        (("--feature-dtype", "float32"), "V: type is 'float16' in the store, but 'float32' is needed"),
        (("--precision", "bf16"), "V: precision is 'fp32' in the store, but 'bf16' is needed"),
        (("--foreground", 255), "mask: mask_format is"),
    ):
        refused(stage_one(house.data, *roots, *options), field, "--rebuild", "--cache-root", status=1)
    refused(house.train("--precision", "bf16"), "V: precision is 'fp32'", status=1)


def test_a_damaged_store_is_named(refused: Refused, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    for text in ("{ not JSON", '{"zarr_format": 3}', ""):
        (mine.store / "zarr.json").write_text(text)
        for command in (mine.train(), stage_one(mine.data, "--cache-root", mine.features)):
            refused(command, mine.store, "again", status=1)


@pytest.mark.parametrize("damage", ["array", "manifest", "attributes"])
def test_a_store_with_a_damaged_part_is_named(refused: Refused, house: House, tmp_path: Path, damage: str) -> None:
    mine = house.copied(tmp_path)
    if damage == "array":
        (mine.store / "V" / "zarr.json").write_text("{ not JSON")
    elif damage == "manifest":
        for path in (mine.store / "manifest").glob("0*.json"):
            truncate(path)
    else:
        content = json.loads((mine.store / "zarr.json").read_text())
        content["attributes"]["attributes"] = {"source": {}, "config": {}}
        (mine.store / "zarr.json").write_text(json.dumps(content))
    refused(mine.train(), mine.store, status=1)


def test_a_store_of_a_newer_version(refused: Refused, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    content = json.loads((mine.store / "zarr.json").read_text())
    content["attributes"]["store"]["format"] = 99
    (mine.store / "zarr.json").write_text(json.dumps(content))
    equivalence = ["check-equivalence", mine.data, "--cache-root", mine.features]
    for command in (mine.train(), stage_one(mine.data, "--cache-root", mine.features), equivalence):
        refused(command, mine.store, "99", "version", status=1)


def _change_attributes(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a store's attributes, with valid checksums."""
    from dsu_cache import Store

    opened = Store.open(store)
    attributes = json.loads(json.dumps(opened.attributes))
    change(attributes)
    with opened.lock():
        opened.set_attributes(attributes)


def test_a_store_whose_data_set_leads_elsewhere(refused: Refused, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    _change_attributes(mine.store, lambda attributes: attributes["source"].update(split="../../evil"))
    refused(["train-head", "--cache-root", mine.features, "--epochs", "1"], "'../../evil-", "--out", status=1)


def test_a_store_whose_samples_lead_elsewhere(refused: Refused, house: House, tmp_path: Path) -> None:
    from dsu_cache import Manifest, Store

    mine = house.copied(tmp_path)
    [path] = (mine.features / "shapes-TE").iterdir()
    _change_attributes(path, lambda attributes: attributes["source"].update(reference=str(tmp_path / "gone")))
    store = Store.open(path)
    with store.lock():
        entries = {f"../../../{name}": entry for name, entry in store.manifest.entries.items()}
        store.set_manifest(Manifest(entries, store.manifest.rows, store.manifest.next_row))
    refused(mine.predict("shapes-TE", "--out", "out"), "'../../../0000'", "would be outside out", status=1)


@pytest.mark.parametrize(
    ("part", "changes"), [("hiera", {"num_heads": 0}), ("dino", {"patch_size": "wide"}), ("hiera", {"name": "../x"})]
)
def test_a_store_with_foreign_encoders(
    refused: Refused, house: House, tmp_path: Path, part: str, changes: dict[str, object]
) -> None:
    mine = house.copied(tmp_path)
    _change_attributes(mine.store, lambda attributes: attributes["config"][part].update(changes))
    refused(mine.train(), mine.store, "was not written by this dsu", "remove it", status=1)


def _shard(store: Path, name: str) -> Path:
    return next(path for path in sorted((store / name / "c" / "0" / "0").rglob("*")) if path.is_file())


@pytest.mark.parametrize("name", ["V", "pixels", "mask"])
def test_a_shard_that_was_deleted(dsu: Dsu, refused: Refused, house: House, tmp_path: Path, name: str) -> None:
    mine = house.copied(tmp_path)
    _shard(mine.store, name).unlink()
    error = refused(mine.train(), name, "dsu cache-features", status=1 if name != "V" else 2)
    assert "every sample" not in error
    dsu("cache-features", mine.data, *TINY, "--features", "V", "--cache-root", mine.features)
    if name == "V":
        dsu(*mine.train())


@pytest.mark.parametrize("name", ["V", "mask"])
def test_a_flipped_bit_is_named_with_its_sample(refused: Refused, house: House, tmp_path: Path, name: str) -> None:
    mine = house.copied(tmp_path)
    shard = _shard(mine.store, name)
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    refused(mine.train("--views", "1"), f"'{name}'", "'0000'", shard, "dsu cache-features", status=1)


def test_a_store_that_another_process_writes(refused: Refused, house: House, tmp_path: Path) -> None:
    from dsu_cache import Store

    mine = house.copied(tmp_path)
    with Store.open(mine.store).lock():
        refused(stage_one(mine.data, "--cache-root", mine.features), mine.store, "wait until it ends", status=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_named_with_their_sample(
    refused: Refused, mine: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    from dsu.network.network import DSUNet

    encode = DSUNet.encode

    def overflowing(self: DSUNet, *arguments: Any) -> dict[str, torch.Tensor]:
        found = encode(self, *arguments)
        found["V"][:] = value
        return found

    monkeypatch.setattr(DSUNet, "encode", overflowing)
    refused(stage_one(mine), "V of 0000", "not finite as float16", "--feature-dtype float32", status=1)


def test_a_disk_that_is_too_small(refused: Refused, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(stage_one(drawn), "0.0 GB free", "--features V", "--views none", "--compressor", "--cache-root", status=1)


def test_a_disk_that_fills_up(refused: Refused, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsu_cache import Store

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "write_shard", full)
    refused(stage_one(drawn), "features/shapes-TR", "No space left on device", "free some space", status=1)


def test_a_cache_root_that_cannot_be_written(refused: Refused, drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(stage_one(drawn, "--cache-root", "file"), "file/shapes-TR", "is writable", status=1)


def test_an_image_that_changed_since_it_was_cached(dsu: Dsu, refused: Refused, mine: Path) -> None:
    dsu(*stage_one(mine))
    image = mine / "images" / "0001.jpg"
    Image.open(image).rotate(180).save(image)
    refused(["train-head"], "1 changed (0001)", f"dsu cache-features {mine}", status=1)
    image.write_bytes(b"")
    refused(["train-head"], "0001", f"dsu cache-features {mine}", status=1)


def test_check_equivalence_needs_the_images_of_the_store(refused: Refused, mine: Path, tmp_path: Path) -> None:
    refused.handled(stage_one(mine), count=0)
    command = ["check-equivalence", "--views", "1", "--steps", "1"]
    (tmp_path / "file").write_text("")
    refused([*command, "--json", "file/x.json"], "folder file can't be created (a file has that name)", status=1)
    image, mask = mine / "images" / "0001.jpg", mine / "masks" / "0002.png"
    contents = image.read_bytes(), mask.read_bytes()
    for path in (image, mask):
        truncate(path)
        refused(command, path.stem, f"dsu cache-features {mine}", status=1)
        image.write_bytes(contents[0])
        mask.write_bytes(contents[1])
    image.unlink()
    refused(command, "0001", f"dsu cache-features {mine}", status=1)


def test_a_missing_data_set_is_reported(dsu: Dsu, refused: Refused, mine: Path) -> None:
    dsu(*stage_one(mine))
    shutil.rmtree(mine)
    said = dsu("train-head", "--epochs", "1", "--views", "1").output
    assert f"The images of mine are no longer at {mine}" in said
    assert "1 written" in dsu("predict").output, "the store holds what was held out"
    refused(["check-equivalence", "--views", "1"], mine, status=1)
    refused(["train-head", "--end-to-end"], mine, "new location", status=1)


# ---- runs ----


def test_resuming_a_missing_run(refused: Refused, house: House, tmp_path: Path) -> None:
    refused(house.train("--resume"), "no unfinished run", "runs/", "--out")
    refused(house.train("--resume", "--out", "nowhere"), "nowhere", "--resume")
    assert not (tmp_path / "nowhere").exists()


def test_resuming_with_other_settings(refused: Refused, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    command = ["train-head", "--cache-root", mine.features, "--out", mine.run, "--resume"]
    refused([*command, "--lr", "0.5", "--epochs", "1"], "lr 0.001 -> 0.5", mine.run, "--out")


def test_a_folder_that_contains_a_run(refused: Refused, house: House) -> None:
    refused(house.train("--out", house.run), house.run, "--resume", "--overwrite")


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("checkpoint.pt", lambda path: path.write_text("words"), ("damaged", "again", "--overwrite")),
        ("checkpoint.pt", truncate, ("damaged", "again", "--overwrite")),
        ("checkpoint.pt", run_code, ("damaged", "again", "--overwrite")),
        ("checkpoint.pt", lambda path: torch.save({"head": {}}, path), ("damaged", "again", "--overwrite")),
        ("checkpoint.pt", lambda path: path.unlink(), ("There is no checkpoint.pt", "--overwrite")),
        ("settings.yaml", lambda path: path.write_text("epochs: ["), ("settings.yaml", "again")),
        ("settings.yaml", lambda path: path.write_text("words"), ("settings.yaml", "again")),
        ("settings.yaml", lambda path: path.unlink(), ("settings.yaml", "again")),
    ],
)
def test_a_run_that_was_damaged(
    refused: Refused, house: House, tmp_path: Path, name: str, spoil: Callable[[Path], Any], words: Sequence[str]
) -> None:
    mine = house.copied(tmp_path)
    spoil(mine.run / name)
    command = ["train-head", "--cache-root", mine.features, "--out", mine.run, "--resume", "--epochs", "1"]
    refused(command, mine.run, *words, status=1)
    assert not (mine.run / "ran").exists()


def test_a_run_folder_that_cannot_be_written(refused: Refused, house: House, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(house.train("--out", "file"), "file", status=1)


def test_a_loss_that_is_not_finite_names_the_batch(refused: Refused, house: House) -> None:
    command = ["train-head", "--cache-root", house.features, "--epochs", "9", "--lr", "1e30", "--batch-size", "2"]
    refused(command, "loss is not finite", "in the batch of 00", "--lr", "checkpoint", status=1)
