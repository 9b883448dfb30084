"""Damaged data is never read silently, and only damaged data is computed again."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cached import Cached, complaint, data_files, flip, shard
from support import Dsu

from dsu.features.maintenance import Verification, verify_store

FLIPS = int(os.environ.get("DSU_FLIPS", "200"))

# ---- damage ----


def names_file(found: Verification, file: Path) -> bool:
    """Whether a verification names a file, or the shard of a marker."""
    below = file.relative_to(found.path)
    if found.unopenable is not None:
        return below.parts[0] in found.unopenable
    marker = f"{below.parts[1]}/{below.name}" if below.parts[0] == "commits" and len(below.parts) == 3 else None
    shards = {f"{f.array}/{f.shard.view}.{f.shard.shard}.json" for f in found.findings if f.shard}
    return below in {f.file for f in found.findings} or marker in shards


def detected(cached: Cached, file: Path) -> bool:
    """Whether both verify and training detect a damaged file."""
    found = verify_store(cached.store, mark=False)
    said = complaint(cached)
    named = said is not None and ("/c/" not in str(file) or not file.exists() or "'000" in said or "complete" in said)
    return not found.passed and names_file(found, file) and named


def test_any_flipped_bit_is_detected_by_verify_and_training(
    cached: Cached, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    mine = cached.copied(tmp_path)
    assert complaint(mine) is None and verify_store(mine.store).passed
    chance, files, found = random.Random(7), mine.files(), 0
    for _ in range(FLIPS):
        file = chance.choice(files)
        at, bit = chance.randrange(file.stat().st_size), chance.randrange(8)
        flip(file, at, bit)
        assert detected(mine, file), (file, at, bit)
        found += 1
        flip(file, at, bit)
    record_property("flipped bits detected", found)
    assert found == FLIPS and complaint(mine) is None and verify_store(mine.store).passed


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_any_truncated_or_deleted_file_is_detected_by_verify_and_training(
    cached: Cached, tmp_path: Path, damage: str, record_property: Callable[[str, object], None]
) -> None:
    mine = cached.copied(tmp_path)
    chance, files = random.Random(8), mine.files()
    for file in files:
        content = file.read_bytes()
        if damage == "deleted":
            file.unlink()
        else:
            file.write_bytes(content[: chance.randrange(len(content))])
        assert detected(mine, file), file
        file.write_bytes(content)
    record_property(f"{damage} files detected", len(files))
    assert complaint(mine) is None and verify_store(mine.store).passed


def test_verify_names_damage_with_its_samples_and_only_damaged_shards_are_computed_again(
    dsu: Dsu, cached: Cached, tmp_path: Path
) -> None:
    mine = cached.copied(tmp_path)
    whole = data_files(mine.root)
    flip(shard(mine, "V", 2), 500)
    shard(mine, "pixels").unlink()
    said = dsu("cache", "verify", "--cache-root", mine.root, "--keep", exit_code=1).output
    assert "V/c/0/2" in said and "1 sample (0000) damaged" in said and "pixels/c/0/0" in said
    assert "nothing was marked as missing (--keep" in said
    said = dsu("cache", "verify", "tiles", "--cache-root", mine.root, exit_code=1).output
    assert "5 samples (0000, 0001, 0002, 0003, 0004) lost" in said and "2 marked as missing" in said
    assert "5 samples incomplete" in dsu("cache", "list", "--cache-root", mine.root).output
    dsu("train-head", mine.images, "--cache-root", mine.root, "--epochs", "1", exit_code=None)
    assert not (tmp_path / "runs").exists(), "training began on a damaged store"
    dsu(*mine.command())
    mended = data_files(mine.root)
    assert {name: content for name, (_, content) in mended.items()} == {n: content for n, (_, content) in whole.items()}
    computed = {name for name, (time, _) in mended.items() if time != whole[name][0]}
    assert {name.split("/")[2] for name in computed} == {"V", "pixels"} and len(computed) == 2
    assert "is intact" in dsu("cache", "verify", "--cache-root", mine.root).output


@pytest.mark.parametrize("array", ["V", "S3", "mask"])
def test_only_an_array_with_damaged_metadata_is_computed_again(
    dsu: Dsu, cached: Cached, tmp_path: Path, array: str
) -> None:
    mine = cached.copied(tmp_path)
    whole = data_files(mine.root)
    flip(mine.store / array / "zarr.json", 700)
    assert f"{array}/zarr.json is damaged" in dsu("cache", "info", "--cache-root", mine.root).output
    said = dsu("train-head", mine.images, "--cache-root", mine.root, exit_code=1).output
    assert f"{array}/zarr.json is damaged" in said and "dsu cache-features" in said
    dsu(*mine.command())
    mended = data_files(mine.root)
    assert {name: content for name, (_, content) in mended.items()} == {n: content for n, (_, content) in whole.items()}
    assert {name.split("/")[2] for name in mended if mended[name][0] != whole[name][0]} == {array}
    assert complaint(mine) is None


def test_a_store_that_is_damaged_beyond_repair_is_reported_and_can_be_replaced(
    dsu: Dsu, cached: Cached, tmp_path: Path
) -> None:
    mine = cached.copied(tmp_path)
    (mine.store / "zarr.json").unlink()
    for command in (
        ["train-head", mine.images, "--cache-root", mine.root],
        ["cache", "verify", "--cache-root", mine.root],
    ):
        said = dsu(*command, exit_code=1).output
        assert "damaged beyond repair (zarr.json is missing)" in said and "dsu cache remove" in said
    assert "damaged" in dsu("cache", "list", "--cache-root", mine.root).output
    dsu("cache", "remove", mine.store, "--cache-root", mine.root, "--yes")
    dsu(*mine.command())
    assert verify_store(mine.store).passed


def test_a_change_of_an_image_with_the_same_size_and_time_is_found_by_verify(
    dsu: Dsu, cached: Cached, tmp_path: Path
) -> None:
    shutil.copytree(cached.images, tmp_path / "mine")
    mine = Cached(tmp_path / "mine", tmp_path / "features")
    dsu(*mine.command())
    image = sorted((mine.images / "images").iterdir())[1]
    stat = image.stat()
    flip(image, stat.st_size - 3)  # after the last coefficient, so it still decodes
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert complaint(mine) is None, "size and time are the same: only verify can know"
    assert f"1 sample ({image.stem}) changed" in dsu("cache", "verify", exit_code=1).output
    said = dsu("train-head", mine.images, "--epochs", "1", exit_code=1).output
    assert f"1 changed ({image.stem})" in said
    assert "4 views" in dsu(*mine.command()).output  # of one image
    assert "1 orphaned" not in dsu("cache", "verify").output
    assert "orphaned rows  1" in dsu("cache", "info").output
    added = mine.images / "images" / f"added{image.suffix}"
    shutil.copy(image, added)
    shutil.copy(mine.images / "masks" / f"{image.stem}.png", mine.images / "masks" / "added.png")
    assert "1 sample (added) new" in dsu("cache", "verify", exit_code=1).output
    shutil.rmtree(mine.images)
    assert "were not compared" in dsu("cache", "verify").output
