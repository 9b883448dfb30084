"""`dsu cache`: listing and removing stores, and simultaneous use."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from cached import Cached, complaint, data_files, shard
from PIL import Image
from support import TINY, Dsu

from dsu.features.maintenance import describe_stores, verify_store
from dsu_cache import CacheError, Store
from dsu_cli import console
from dsu_cli.cache import stores_table

# ---- info, list, remove ----


def test_info_and_list_describe_stores(dsu: Dsu, cached: Cached, tmp_path: Path) -> None:
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
    assert "lacks" not in said and all(len(line.rstrip()) < 120 for line in said.splitlines() if "sha256" in line)
    [state] = json.loads(dsu("cache", "info", mine.store, *roots, "--json", "--quiet").output)
    assert state["complete"] and state["samples"] == 5 and state["random"] is True and state["orphaned_rows"] == 0
    arrays = {array["name"]: array for array in state["arrays"]}
    assert arrays["V"]["views"] == [0, 1, 2, 3] and arrays["S3"]["views"] == [0] and arrays["mask"]["dtype"] == "uint8"
    assert state["nbytes"] == sum(path.stat().st_size for path in mine.store.rglob("*") if path.is_file())
    lost = shard(mine, "V", 1)
    lost.with_name(f"{lost.name}.1.partial").write_bytes(lost.read_bytes()[:-1])
    lost.unlink()
    said = dsu("cache", "info", *roots).output
    assert "3 of 4" in said and "1 shard: 5 samples" in said
    assert "5 samples incomplete" in dsu("cache", "list", *roots).output
    [state] = json.loads(dsu("cache", "list", *roots, "--json").output)
    assert not state["complete"]
    assert state["nbytes"] == sum(path.stat().st_size for path in mine.store.rglob("*") if path.is_file())
    [result] = json.loads(dsu("cache", "verify", *roots, "--json", "--quiet", exit_code=1).stdout)
    assert not result["passed"] and result["findings"][0]["samples"] == ["0000", "0001", "0002", "0003", "0004"]
    assert "no store of DUTS" in dsu("cache", "info", "DUTS", *roots, exit_code=2).output


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (200, ["a-rather-long-name-of-a-data-set"]),
        (80, ["a-rather-long-", "name-of-a-data-set"]),
        (40, ["a-rather-long-", "name-of-a-data-set"]),
    ],
)
def test_a_long_name_is_not_truncated_and_breaks_at_hyphens(
    cached: Cached, monkeypatch: pytest.MonkeyPatch, width: int, parts: list[str]
) -> None:
    """The column of arrays shrinks first."""
    [state] = describe_stores((), cached.root)
    monkeypatch.setattr(console.out, "width", width)
    with console.out.capture() as printed:
        console.out.print(stores_table([replace(state, split="".join(parts))]))
    said = [line[: len(parts[-1]) + 1].strip() for line in printed.get().splitlines()[1:]]
    assert [line for line in said if line and line in "".join(parts)] == parts


def test_without_stores_all_commands_say_so_and_a_name_is_refused(dsu: Dsu) -> None:
    for command in ("list", "info", "verify"):
        said = dsu("cache", command, "--cache-root", "elsewhere").output
        assert said == "There are no stores below elsewhere: create them with `dsu cache-features`.\n"
        assert json.loads(dsu("cache", command, "--json", "--quiet").stdout) == []
    for command in ("info", "verify"):
        assert "no store of DUTS" in dsu("cache", command, "DUTS", exit_code=2).output


def test_an_empty_name_selects_no_store(dsu: Dsu, cached: Cached, tmp_path: Path) -> None:
    mine = cached.copied(tmp_path)
    (mine.store / "zarr.json").unlink()  # a damaged store is only identified by its folder's name
    assert "There is no store of" in dsu("cache", "remove", "", "--yes", "--cache-root", mine.root, exit_code=2).output
    assert mine.store.is_dir()


def test_verify_reports_what_it_has_read(dsu: Dsu, cached: Cached, tmp_path: Path) -> None:
    mine = cached.copied(tmp_path)
    assert "of features, images and masks read." in dsu("cache", "verify", "--cache-root", mine.root).output
    shard(mine, "V", 1).unlink()
    assert "5 samples" in dsu("cache", "verify", "--cache-root", mine.root, exit_code=1).output


def test_verify_does_not_ask_for_what_stage_one_leaves_out(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    folder, roots = tmp_path / "own", ("--cache-root", tmp_path / "features")
    shutil.copytree(drawn / "train", folder)
    first = min((folder / "masks").iterdir())
    Image.new("L", (10, 90), 255).save(first)
    left_out = dsu("cache-features", folder, *TINY, "--features", "V", *roots, exit_code=1).output
    assert f"{first.name} cannot be read (its 10x90 pixels have another aspect ratio" in left_out
    assert "is intact" in dsu("cache", "verify", *roots).output


def test_drift_of_versions_is_reported(dsu: Dsu, cached: Cached, tmp_path: Path) -> None:
    from dsu_cache.files import read_metadata, write_metadata

    mine = cached.copied(tmp_path)
    document = read_metadata(mine.store / "V")
    document["attributes"]["fingerprint"]["recorded"]["torch"] = "1.0"
    write_metadata(mine.store / "V", document)
    assert "torch was 1.0, is" in dsu("cache", "info", "--cache-root", mine.root).output


def test_remove_removes_only_the_store(dsu: Dsu, cached: Cached, tmp_path: Path) -> None:
    mine = cached.copied(tmp_path)
    roots = ("--cache-root", mine.root)
    (mine.root / "note.txt").write_text("mine")
    dsu("cache", "remove", "tiles", *roots, exit_code=1)  # nobody confirms
    assert verify_store(mine.store).passed
    assert "freed" in dsu("cache", "remove", "tiles", *roots, "--yes").output
    assert [path.name for path in mine.root.iterdir()] == ["note.txt"]
    assert len(list(mine.images.rglob("*.png"))) == 5
    assert "no store of tiles" in dsu("cache", "remove", "tiles", *roots, "--yes", exit_code=2).output


def test_remove_refuses_other_folders_links_and_stores_with_other_files(
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
    """Start another process that writes to a store, or reads from it; it is killed at the end."""
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


def test_a_store_that_is_being_written_can_not_be_written_read_or_removed(
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
    assert "already stored" in dsu(*mine.command()).output


def test_a_store_that_is_being_read_can_not_be_rebuilt_or_removed(dsu: Dsu, cached: Cached, tmp_path: Path) -> None:
    mine = cached.copied(tmp_path)
    with held(mine.store, "read") as other:
        for command in (
            mine.command("--feature-dtype", "float32", "--rebuild"),
            ["cache", "remove", "tiles", "--cache-root", mine.root, "--yes"],
        ):
            said = dsu(*command, exit_code=1).output
            assert f"being read by process {other.pid} on " in said
        assert "already stored" in dsu(*mine.command()).output  # commands that do not affect readers still work
        assert complaint(mine) is None
    dsu(*mine.command("--feature-dtype", "float32", "--rebuild"))


def test_predictions_do_not_read_a_store_that_is_being_written(dsu: Dsu, cached: Cached, tmp_path: Path) -> None:
    mine = cached.copied(tmp_path)
    roots = ("--cache-root", mine.root)
    dsu("train-head", mine.images, *roots, "--epochs", "1", "--val-fraction", "0.4", "--out", "run")
    with held(mine.store, "write") as other:
        said = dsu("predict", "--head", "run", *roots, exit_code=1).output
        assert f"being written by process {other.pid}" in said
    assert "written to" in dsu("predict", "--head", "run", *roots).output


def test_a_store_opened_before_a_rebuild_can_not_be_read(cached: Cached, tmp_path: Path, dsu: Dsu) -> None:
    mine = cached.copied(tmp_path)
    store = Store.open(mine.store)
    dsu(*mine.command("--feature-dtype", "float32", "--rebuild"))
    with pytest.raises(CacheError, match="rebuilt since it was opened"):
        store.reader(["V"])
