"""Commands with stores on S3, with a real server that is killed, and a connection that fails."""

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from kills import Forks
from s3 import BUCKET, Proxy, Server
from support import TINY, Dsu

import dsu_cache.storage
from dsu.errors import UsageError
from dsu.features.samples import FeatureDataset
from dsu_cache import Store

ROOT = f"s3://{BUCKET}/root"
OPTIONS = (*TINY, "--features", "V,S1")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def s3(dsu: Dsu, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """An empty bucket, and two samples per shard."""
    server.forget()
    server.make_bucket()
    monkeypatch.setattr(Store.create.__func__, "__defaults__", (2, None))  # type: ignore[attr-defined]
    monkeypatch.setenv("DSU_SCRATCH", str(tmp_path / "scratch"))
    lead(monkeypatch, server.environment())
    return server


def lead(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    dsu_cache.storage._make_client.cache_clear()


def zarr(root: Path | str) -> dict[str, bytes]:
    """The files that Zarr reads below a cache root: sealed metadata and shards."""
    files = [path for path in Path(root).glob("*/*/**/*") if path.is_file()]
    wanted = [path for path in files if path.name == "zarr.json" or "c" in path.parts]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in wanted}


def test_every_command_gives_the_same_results_on_s3_as_in_a_folder(dsu: Dsu, s3: Server, drawn: Path) -> None:
    for root, runs in (("features", "here"), (ROOT, "there")):
        dsu("cache-features", drawn, *OPTIONS, "--cache-root", root, "--quiet")
        dsu("train-head", drawn, "--cache-root", root, "--epochs", 1, "--out", runs, "--quiet")
    assert Path("here/head.safetensors").read_bytes() == Path("there/head.safetensors").read_bytes()
    dsu("cache", "pull", ROOT, "--cache-root", "pulled")
    assert zarr("pulled") == zarr("features")
    assert Path("pulled/shapes-TR/splits.json").read_bytes() == Path("features/shapes-TR/splits.json").read_bytes()
    shown = dsu("cache", "list", "--cache-root", ROOT).output + dsu("cache", "info", "--cache-root", ROOT).output
    assert shown.count("complete") == 4 and f"{ROOT}/shapes-TR/" in shown and "orphaned objects" in shown
    assert "scratch" not in shown
    assert "is intact" in dsu("cache", "verify", "--cache-root", ROOT).output
    assert "already stored" in dsu("cache-features", drawn, *OPTIONS, "--cache-root", ROOT).output
    dsu("predict", drawn, "--head", "there", "--cache-root", ROOT)
    dsu("check-equivalence", drawn, "--cache-root", ROOT, "--steps", 1, "--batch-size", 2)
    assert "freed" in dsu("cache", "remove", drawn, "--cache-root", ROOT, "--yes").output
    assert [key for key in s3.objects() if not key.endswith("splits.json")] == []
    assert "There are no stores" in dsu("cache", "list", "--cache-root", ROOT).output


def test_commands_that_need_a_disk_refuse_s3(dsu: Dsu, s3: Server) -> None:
    output = dsu("bench", "--cache-root", ROOT, *TINY, "--random-weights", exit_code=2).output
    assert "`dsu bench` needs a --cache-root on a disk" in output


def test_a_second_push_copies_only_new_shards(dsu: Dsu, s3: Server, drawn: Path) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V", "--quiet")
    assert "shards" in dsu("cache", "push", drawn, ROOT).output
    assert dsu("cache", "push", ROOT).output.count("nothing was missing") == 2
    dsu("cache-features", drawn, *OPTIONS, "--quiet")
    objects = s3.objects()
    assert "was copied to" in dsu("cache", "push", ROOT).output
    added = [key for key in s3.objects() if key not in objects and "/manifest/" not in key]
    assert added and all("/S1/" in key for key in added)
    dsu("cache", "pull", ROOT, "shapes", "--cache-root", "pulled")
    assert zarr("pulled") == zarr("features")


def test_pushes_and_pulls_take_stores_by_their_folders(dsu: Dsu, s3: Server, drawn: Path) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V", "--quiet")
    [train] = Path("features").glob("shapes-TR/*/")
    test = Path("features/shapes-TE", train.name)
    dsu("cache", "push", test, ROOT)  # below the cache root
    dsu("cache", "push", train, ROOT, "--cache-root", "elsewhere")  # outside of it
    dsu("cache", "pull", ROOT, "--cache-root", "pulled")
    assert zarr("pulled") == zarr("features")
    wanted = {name: content for name, content in zarr("features").items() if name.startswith("shapes-TE/")}
    for folder, name in (("one", f"{ROOT}/shapes-TE/{train.name}"), ("two", f"shapes-TE/{train.name}")):
        dsu("cache", "pull", ROOT, name, "--cache-root", folder)
        assert zarr(folder) == wanted
    output = dsu("cache", "pull", ROOT, train, "--cache-root", "elsewhere", exit_code=2).output
    assert f"{train} is not a store below {ROOT}" in output and not Path("elsewhere").exists()


def test_recorded_splits_are_used_on_another_machine(
    dsu: Dsu, s3: Server, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V", "--cache-root", ROOT, "--quiet")
    dsu("train-head", drawn, "--cache-root", ROOT, "--epochs", 1, "--out", "one", "--quiet")
    dealt = s3.objects()["root/shapes-TR/splits.json"]
    monkeypatch.setenv("DSU_SCRATCH", str(tmp_path / "other machine"))
    dsu("train-head", drawn, "--cache-root", ROOT, "--epochs", 1, "--out", "two", "--quiet")
    [elsewhere] = (tmp_path / "other machine").rglob("splits.json")
    assert elsewhere.read_bytes() == dealt == s3.objects()["root/shapes-TR/splits.json"]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("gone", f"there is no bucket s3://{BUCKET}"),
        ("403", "no permission"),
        ("503", "overloaded: 503"),
        ("refused", "can't be reached"),
    ],
)
def test_permanent_failures_are_one_line(
    dsu: Dsu, s3: Server, drawn: Path, monkeypatch: pytest.MonkeyPatch, what: str, told: str
) -> None:
    dsu("cache-features", drawn, *TINY, "--features", "V", "--quiet")
    dsu("cache", "push", ROOT, "--quiet")
    monkeypatch.setattr(dsu_cache.storage, "RETRIES", 1)
    with Proxy(s3) as proxy:
        proxy.trouble = what if what.isdecimal() else ""
        lead(monkeypatch, s3.environment(1 if what == "refused" else proxy.port))
        if what == "gone":
            s3.forget()
        for words in (
            ["cache", "list", "--cache-root", ROOT],
            ["cache", "push", ROOT],
            ["cache", "pull", ROOT, "--cache-root", "pulled"],
            ["cache-features", drawn, *TINY, "--features", "V", "--cache-root", ROOT],
            ["train-head", drawn, "--cache-root", ROOT],
            ["cache", "verify", "--cache-root", ROOT],
        ):
            output = dsu(*words, exit_code=1).output
            [line] = [line for line in output.splitlines() if line.startswith("error:")]
            assert told in line and "neverprinted" not in output


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_kills_of_the_server_lose_nothing(
    dsu: Dsu,
    s3: Server,
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kills: int,
    record_property: Callable[[str, object], None],
) -> None:
    """In half of the cases it restarts during retries, in the others only after the command has given up."""
    monkeypatch.setattr(dsu_cache.storage, "RETRIES", 3)
    dsu("cache-features", drawn, *OPTIONS, "--quiet")
    wanted, chance = zarr("features"), random.Random(7)
    roots = iter(range(1000))
    died = refused = 0
    while died < kills:
        root = f"{ROOT}/{next(roots)}"
        monkeypatch.setenv("DSU_SCRATCH", str(tmp_path / f"scratch-{root[-3:].strip('/')}"))
        for words in (
            ["cache", "push", root, "--quiet"]
            if chance.random() < 0.5
            else ["cache-features", drawn, *OPTIONS, "--cache-root", root, "--quiet"],
            ["cache", "pull", root, "--cache-root", f"pulled-{died}", "--quiet"],
            ["train-head", drawn, "--cache-root", root, "--epochs", 1, "--out", f"run-{died}", "--quiet"],
        ):
            returns, ended = chance.random() < 0.5, threading.Event()

            def trouble(wait: float, returns: bool, ended: threading.Event) -> None:
                ended.wait(wait)
                s3.kill()
                if not returns:
                    ended.wait(120)
                s3.start()

            thread = threading.Thread(target=trouble, args=(chance.random() * 0.7, returns, ended))
            thread.start()
            result = dsu(*words, exit_code=None)
            ended.set()
            thread.join()
            died += 1
            if result.exit_code:
                refused += 1
                [line] = [line for line in result.output.splitlines() if line.startswith("error:")]
                assert "run the same command again" in line, result.output
                dsu(*words)
        where = next(Path().glob("pulled-*"))
        assert zarr(where) == wanted
        where.rename(f"checked-{died}")
    record_property("kills of the S3 server survived", died)
    assert refused


def test_parts_on_two_machines_fill_one_store(
    dsu: Dsu, s3: Server, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a separate scratch folder, and sees the other's shards only on S3."""
    dsu("cache-features", drawn, *OPTIONS, "--quiet")
    for number in (1, 2):
        monkeypatch.setenv("DSU_SCRATCH", str(tmp_path / f"machine {number}"))
        said = dsu("cache-features", drawn, *OPTIONS, "--cache-root", ROOT, "--part", f"{number}/2").output
        assert ("all parts" in said) == (number == 2), said
    dsu("cache", "pull", ROOT, "--cache-root", "pulled", "--quiet")
    assert zarr("pulled") == zarr("features")


def test_a_damaged_object_is_computed_again(dsu: Dsu, s3: Server, drawn: Path) -> None:
    dsu("cache-features", drawn, *OPTIONS, "--cache-root", ROOT, "--quiet")
    objects = s3.objects()
    hurt = next(key for key in objects if "/shapes-TR/" in key and "/V/" in key)
    s3.put(hurt, bytes([objects[hurt][0] ^ 1]) + objects[hurt][1:])
    said = dsu("cache", "verify", "--cache-root", ROOT, exit_code=1).output
    assert "does not contain the bytes that were written" in said and "1 marked as missing" in said
    dsu("cache-features", drawn, *OPTIONS, "--cache-root", ROOT, "--quiet")
    dsu("cache", "verify", "--cache-root", ROOT)
    assert s3.objects()[hurt] == objects[hurt]


def test_python_reads_a_store_by_its_url(dsu: Dsu, s3: Server, drawn: Path) -> None:
    for root in (ROOT, "features"):
        dsu("cache-features", drawn, *OPTIONS, "--cache-root", root, "--quiet")
    [folder] = Path("features").glob("shapes-TR/*/")
    read = [
        FeatureDataset(store, ("pixels", "V"))
        for store in (folder, f"{ROOT}/shapes-TR/{folder.name}", Path(f"{ROOT}/shapes-TR/{folder.name}"))
    ]
    there, *others = (data.read(data.store.manifest.names, [0] * 12) for data in read)
    for other in others:
        assert all(torch.equal(there.features[name], other.features[name]) for name in there.features)
    with pytest.raises(UsageError, match="There is no store at"):
        FeatureDataset(f"{ROOT}/nothing", ("V",))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [30])
def test_kills_of_commands_lose_nothing(
    dsu: Dsu,
    s3: Server,
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kills: int,
    record_property: Callable[[str, object], None],
) -> None:
    """Commands are killed while they write to S3 or read from it; their finished work counts, and nothing is
    damaged."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    dsu("cache-features", drawn, *OPTIONS, "--quiet")
    wanted, chance, died, number = zarr("features"), random.Random(3), 0, 0
    seconds: dict[str, float] = {}
    with Forks(tmp_path, "small_shards:run") as forks:
        while died < kills:
            number += 1
            root = f"{ROOT}/{number}"
            for words in (
                ["cache", "push", root]
                if chance.random() < 0.5
                else ["cache-features", drawn, *OPTIONS, "--cache-root", root],
                ["cache", "pull", root, "--cache-root", f"pulled-{number}"],
            ):
                kind = str(words[:2])
                for _ in range(3 if kind in seconds else 0):
                    died += forks.run(words, after=chance.random() * seconds[kind]).killed
                whole = forks.run(words)
                assert whole.status == 0, whole.said
                seconds.setdefault(kind, whole.seconds)
            assert zarr(f"pulled-{number}") == wanted
    record_property("kills on the way to S3 survived", died)
