"""`dsu cache`, and the promise behind it: nothing that is not as it was written is ever read silently."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import TINY, Dsu

from dsu.architecture import build_architecture
from dsu.batches import StoredSamples
from dsu.encoders.weights import EncoderWeights
from dsu.errors import DsuError
from dsu.extraction import cache_features
from dsu.extraction_plan import ExtractionSettings
from dsu.stores import available_points, check_samples, find_store
from dsu.verification import Verification, verify_store
from dsu_cache import CacheError, Store

FLIPS = int(os.environ.get("DSU_FLIPS", "200"))

LOCKS = ("lock", "readers")
"""The only files of a store that are not checked: nothing reads them, they name for people who holds the store."""

READS = ("pixels", "V", "S3")


@dataclass(frozen=True)
class Cached:
    """Images of one's own and their features."""

    images: Path
    root: Path

    @property
    def store(self) -> Path:
        [store] = self.root.glob("*/*")
        return store

    def files(self) -> list[Path]:
        return sorted(p for p in self.store.rglob("*") if p.is_file() and p.name not in LOCKS)

    def copied(self, to: Path) -> "Cached":
        shutil.copytree(self.root, to / "features")
        return Cached(self.images, to / "features")

    def command(self, *more: object) -> list[object]:
        """The command that made it."""
        return ["cache-features", self.images, *TINY, "--levels", "V,S3", "--cache-root", self.root, *more]


@pytest.fixture(scope="module")
def cached(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Cached:
    home = tmp_path_factory.mktemp("cached")
    for inner in ("images", "masks"):
        (home / "tiles" / inner).mkdir(parents=True)
        for path in sorted((drawn / "train" / inner).iterdir())[:5]:
            shutil.copy(path, home / "tiles" / inner)
    cache_features(
        str(home / "tiles"),
        build_architecture("toy", hiera_size=128, dino_size=126),
        ExtractionSettings(levels=("V", "S3")),
        EncoderWeights(),
        data_root=home,
        cache_root=home / "features",
        device="cpu",
    )
    return Cached(home / "tiles", home / "features")


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def shard(cached: Cached, array: str, view: int = 0) -> Path:
    [path] = (path for path in (cached.store / array / "c" / "0" / str(view)).rglob("*") if path.is_file())
    return path


def data_files(root: Path) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in root.glob("*/*/*/c/**/*") if path.is_file()]
    return {str(path.relative_to(root)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


# ---- damage ----


def read_as_training_does(cached: Cached) -> None:
    """Find the store, compare it with the images and read every sample in every view; training does the same."""
    store, source = find_store(cached.root, str(cached.images), ("train", "all"))
    if not set(READS) <= available_points(store, 1) or "V" not in available_points(store, 4):
        raise DsuError("not complete: training starts from another point, or not at all")
    if not store.views_complete("mask"):
        raise DsuError("not complete: training refuses")
    names = sorted(check_samples(store, source))
    samples = StoredSamples(store, names, ("pixels", "V"))
    for view in range(4):
        samples.fetch(names, [view] * len(names))
    StoredSamples(store, names, ("S3",), masks=False).fetch(names, [0] * len(names))


def complaint(cached: Cached) -> str | None:
    """What training says of a store, or None if it reads it."""
    try:
        read_as_training_does(cached)
    except (DsuError, CacheError) as error:
        return str(error)
    return None


def names_file(found: Verification, file: Path) -> bool:
    """Whether a verification names a file, or the shard of a marker."""
    below = file.relative_to(found.path)
    if found.unopenable is not None:
        return below.parts[0] in found.unopenable
    marker = f"{below.parts[1]}/{below.name}" if below.parts[0] == "commits" and len(below.parts) == 3 else None
    shards = {f"{f.array}/{f.shard.view}.{f.shard.shard}.json" for f in found.findings if f.shard}
    return below in {f.file for f in found.findings} or marker in shards


def detected(cached: Cached, file: Path) -> bool:
    """Whether both verify and training find that a file is not as it was written."""
    found = verify_store(cached.store, mark=False)
    said = complaint(cached)
    named = said is not None and ("/c/" not in str(file) or not file.exists() or "'000" in said or "complete" in said)
    return not found.passed and names_file(found, file) and named


def test_a_bit_flipped_anywhere_is_found_by_verify_and_by_training(
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
def test_every_file_once_cut_or_lost_is_found_by_verify_and_by_training(
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


def test_verify_names_damage_with_its_samples_and_only_that_is_computed_again(
    dsu: Dsu, cached: Cached, tmp_path: Path
) -> None:
    mine = cached.copied(tmp_path)
    whole = data_files(mine.root)
    flip(shard(mine, "V", 2), 500)
    shard(mine, "pixels").unlink()
    said = dsu("cache", "verify", "--cache-root", mine.root, "--keep", exit_code=1).output
    assert "V/c/0/2" in said and "damaged 1 sample (0000)" in said and "pixels/c/0/0" in said
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
    assert "is whole" in dsu("cache", "verify", "--cache-root", mine.root).output


@pytest.mark.parametrize("array", ["V", "S3", "mask"])
def test_an_array_whose_metadata_is_damaged_is_computed_again_alone(
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


def test_a_store_damaged_beyond_mending_is_said_to_be_and_can_be_made_anew(
    dsu: Dsu, cached: Cached, tmp_path: Path
) -> None:
    mine = cached.copied(tmp_path)
    (mine.store / "zarr.json").unlink()
    for command in (
        ["train-head", mine.images, "--cache-root", mine.root],
        ["cache", "verify", "--cache-root", mine.root],
    ):
        said = dsu(*command, exit_code=1).output
        assert "damaged beyond mending (zarr.json is missing)" in said and "dsu cache remove" in said
    assert "damaged" in dsu("cache", "list", "--cache-root", mine.root).output
    dsu("cache", "remove", mine.store, "--cache-root", mine.root, "--yes")
    dsu(*mine.command())
    assert verify_store(mine.store).passed


def test_an_image_changed_behind_its_size_and_time_is_found_and_its_row_alone_computed(
    dsu: Dsu, cached: Cached, tmp_path: Path
) -> None:
    shutil.copytree(cached.images, tmp_path / "mine")
    mine = Cached(tmp_path / "mine", tmp_path / "features")
    dsu(*mine.command())
    image = sorted((mine.images / "images").iterdir())[1]
    stat = image.stat()
    flip(image, stat.st_size - 3)  # behind the last coefficient: it still decodes
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


# ---- info, list, remove ----


def test_info_and_list_say_what_there_is(dsu: Dsu, cached: Cached, tmp_path: Path) -> None:
    mine = cached.copied(tmp_path)
    roots = ("--cache-root", mine.root)
    said = dsu("cache", "info", "tiles", *roots).output
    for words in (
        "complete",
        "5 of tiles",
        str(mine.images),
        "random weights",
        "sha256",
        "4x4x48",
        "float16",
        "4 of 4",
    ):
        assert words in said
    [state] = json.loads(dsu("cache", "info", mine.store, *roots, "--json", "--quiet").output)
    assert state["complete"] and state["samples"] == 5 and state["random"] is True and state["orphaned_rows"] == 0
    arrays = {array["name"]: array for array in state["arrays"]}
    assert arrays["V"]["views"] == [0, 1, 2, 3] and arrays["S3"]["views"] == [0] and arrays["mask"]["dtype"] == "uint8"
    assert state["nbytes"] == sum(path.stat().st_size for path in mine.store.rglob("*") if path.is_file())
    shard(mine, "V", 1).unlink()
    said = dsu("cache", "info", *roots).output
    assert "3 of 4" in said and "1 shards: 5 samples" in said
    assert "5 samples incomplete" in dsu("cache", "list", *roots).output
    [state] = json.loads(dsu("cache", "list", *roots, "--json").output)
    assert not state["complete"]
    [result] = json.loads(dsu("cache", "verify", *roots, "--json", "--quiet", exit_code=1).stdout)
    assert not result["passed"] and result["findings"][0]["samples"] == ["0000", "0001", "0002", "0003", "0004"]
    assert "no store of DUTS" in dsu("cache", "info", "DUTS", *roots, exit_code=2).output
    assert "no stores below" in dsu("cache", "list", "--cache-root", "elsewhere").output


def test_drift_of_versions_is_said(dsu: Dsu, cached: Cached, tmp_path: Path) -> None:
    from dsu_cache.metadata import read_metadata, write_metadata

    mine = cached.copied(tmp_path)
    document = read_metadata(mine.store / "V")
    document["attributes"]["fingerprint"]["recorded"]["torch"] = "1.0"
    write_metadata(mine.store / "V", document)
    assert "torch was 1.0, is" in dsu("cache", "info", "--cache-root", mine.root).output


def test_remove_takes_the_store_and_nothing_else(dsu: Dsu, cached: Cached, tmp_path: Path) -> None:
    mine = cached.copied(tmp_path)
    roots = ("--cache-root", mine.root)
    (mine.root / "note.txt").write_text("mine")
    dsu("cache", "remove", "tiles", *roots, exit_code=1)  # no one is there to say yes
    assert verify_store(mine.store).passed
    assert "freed" in dsu("cache", "remove", "tiles", *roots, "--yes").output
    assert [path.name for path in mine.root.iterdir()] == ["note.txt"]
    assert len(list(mine.images.rglob("*.png"))) == 5
    assert "no store of tiles" in dsu("cache", "remove", "tiles", *roots, "--yes", exit_code=2).output


def test_remove_refuses_what_is_elsewhere_linked_no_store_or_more_than_a_store(
    dsu: Dsu, cached: Cached, tmp_path: Path
) -> None:
    mine = cached.copied(tmp_path)
    inside = tmp_path / "inside"
    (inside / "photos" / "holiday").mkdir(parents=True)
    (inside / "photos" / "holiday" / "a.jpg").write_text("mine")
    (inside / "linked").symlink_to(mine.store.parent)
    (inside / "tiles").mkdir()
    (inside / "tiles" / "one").symlink_to(mine.store)
    roots = ("--cache-root", inside, "--yes")
    before = data_files(mine.root)
    for name, status in (
        ("photos", 2),
        (inside / "photos" / "holiday", 2),
        (mine.store, 2),
        (inside / ".." / "features" / "tiles" / mine.store.name, 2),
        ("linked", 2),
        (inside / "tiles" / "one", 2),
        (tmp_path, 2),
    ):
        assert "error:" in dsu("cache", "remove", name, *roots, exit_code=status).output
    (mine.store / "notes.txt").write_text("mine")
    said = dsu("cache", "remove", "tiles", "--cache-root", mine.root, "--yes", exit_code=1).output
    assert "notes.txt" in said
    assert data_files(mine.root) == before and (inside / "photos" / "holiday" / "a.jpg").exists()


def test_an_interrupted_removal_can_be_finished(dsu: Dsu, cached: Cached, tmp_path: Path) -> None:
    mine = cached.copied(tmp_path)
    (mine.store / "zarr.json").unlink()
    shutil.rmtree(mine.store / "S3")
    dsu("cache", "remove", "tiles", "--cache-root", mine.root, "--yes")
    assert not list(mine.root.iterdir())


# ---- two commands on one store ----

HOLD = """
import sys
from dsu_cache import Store
store = Store.open(sys.argv[1])
if sys.argv[2] == "write":
    with store.lock():
        print("held", flush=True)
        sys.stdin.read()
else:
    reader = store.reader(["V"])
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(store: Path, how: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes to a store, or reads from it; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


def test_a_store_that_is_being_written_is_neither_written_nor_read_nor_removed(
    dsu: Dsu, cached: Cached, tmp_path: Path
) -> None:
    mine = cached.copied(tmp_path)
    roots = ("--cache-root", mine.root)
    with held(mine.store, "write") as other:
        for command in (
            mine.command(),
            mine.command("--rebuild"),
            ["train-head", mine.images, *roots],
            ["cache", "remove", "tiles", *roots, "--yes"],
        ):
            said = dsu(*command, exit_code=1).output
            assert f"being written by process {other.pid} on " in said and " since 2" in said
            assert f"(-c {mine.store} write)" in said and "wait until it ends, or stop it" in said
        assert "being written" in dsu("cache", "list", *roots).output
    assert (mine.store / "manifest" / "lock").read_text(), "the dead process left its lock's text"
    assert "all there" in dsu(*mine.command()).output


def test_a_store_that_is_being_read_is_neither_rebuilt_nor_removed(dsu: Dsu, cached: Cached, tmp_path: Path) -> None:
    mine = cached.copied(tmp_path)
    with held(mine.store, "read") as other:
        for command in (
            mine.command("--stored", "float32", "--rebuild"),
            ["cache", "remove", "tiles", "--cache-root", mine.root, "--yes"],
        ):
            said = dsu(*command, exit_code=1).output
            assert f"being read by process {other.pid} on " in said
        assert "all there" in dsu(*mine.command()).output  # what readers do not notice goes on
        assert complaint(mine) is None
    dsu(*mine.command("--stored", "float32", "--rebuild"))


def test_predictions_do_not_read_a_store_that_is_being_written(dsu: Dsu, cached: Cached, tmp_path: Path) -> None:
    mine = cached.copied(tmp_path)
    roots = ("--cache-root", mine.root)
    dsu("train-head", mine.images, *roots, "--epochs", "1", "--val-fraction", "0.4", "--out", "run")
    with held(mine.store, "write") as other:
        said = dsu("predict", "--head", "run", *roots, exit_code=1).output
        assert f"being written by process {other.pid}" in said
    assert "written to" in dsu("predict", "--head", "run", *roots).output


def test_a_reader_opened_before_a_rebuild_is_told(cached: Cached, tmp_path: Path, dsu: Dsu) -> None:
    mine = cached.copied(tmp_path)
    store = Store.open(mine.store)
    dsu(*mine.command("--stored", "float32", "--rebuild"))
    with pytest.raises(CacheError, match="made anew since it was opened"):
        store.reader(["V"])
