"""Stores on S3, tested with a real server: writing, reading and errors."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3 import BUCKET, Proxy, Server

import dsu_cache.storage
from dsu_cache import (
    CacheError,
    CorruptError,
    Fingerprint,
    RemoteError,
    Store,
    audit,
    copy_store,
    discard_refuted,
    mirror_folder,
    orphaned_objects,
    orphans,
    remove_store,
)
from dsu_cache.arrays import Commit
from dsu_cache.files import parse_record, record_bytes
from dsu_cache.remote import Pool, Remote
from dsu_cache.storage import Bucket

from .conftest import SHAPES, Fill, Put, Values

URL = f"s3://{BUCKET}/here"
NAMES = "abcdefghij"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(autouse=True)
def _empty_bucket(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has an empty bucket and its own scratch folder."""
    server.forget()
    server.make_bucket()
    _environment(server, tmp_path / "scratch", monkeypatch)
    yield
    dsu_cache.storage._make_client.cache_clear()


def _environment(server: Server, scratch: Path, monkeypatch: pytest.MonkeyPatch, port: int | None = None) -> None:
    for name, value in server.environment(port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DSU_SCRATCH", str(scratch))
    dsu_cache.storage._make_client.cache_clear()


@pytest.fixture
def make(put: Put, fill: Fill) -> Callable[..., Store]:
    """A function that makes a filled store of ten samples in two arrays, in a folder or below a URL."""

    def make(root: Path | str = URL, names: str = NAMES) -> Store:
        folder = mirror_folder(root) / "DUTS-TR" / "toy"
        store = Store.open(folder) if Store.exists(folder) else Store.create(folder, {"of": "DUTS"}, 4)
        with store.lock():
            put(store, names)
            for name, views in (("pixels", 1), ("V", 2)):
                if name not in store.arrays:
                    store.add_array(name, *SHAPES[name], views, Fingerprint({"is": name}))
                fill(store, name, range(views))
        return store

    return make


def _check(store: Store, values: Values, names: str = NAMES) -> None:
    """Every sample is read with the expected values, and nothing is missing."""
    rows = [store.manifest.row(name) for name in names]
    for name, views in (("pixels", 1), ("V", 2)):
        assert not store.missing(name, range(views))
        for view in range(views):
            read = store.reader([name]).read(rows, [view] * len(rows))[name]
            np.testing.assert_array_equal(read, values(name, rows, view))


def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continue as another machine: with an empty scratch folder."""
    monkeypatch.setenv("DSU_SCRATCH", str(tmp_path / f"scratch-{len(list(tmp_path.iterdir()))}"))


def _open(url: str = URL) -> Store:
    return Store.open(mirror_folder(url) / "DUTS-TR" / "toy")


def _files(store: Path) -> dict[str, bytes]:
    """The files of a store that Zarr reads."""
    paths = [path for path in store.rglob("*") if path.is_file() and (path.name == "zarr.json" or "c" in path.parts)]
    return {str(path.relative_to(store)): path.read_bytes() for path in paths}


# -- writing and reading -----------------------------------------------------------------------------------------


def test_another_machine_reads_the_written_values(
    make: Callable[..., Store], values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    _elsewhere(tmp_path, monkeypatch)
    store = _open()
    _check(store, values)
    assert (dict(store.attributes), store.rows_per_shard, audit(store), orphans(store)) == ({"of": "DUTS"}, 4, [], 0)


def test_push_and_pull_restore_every_byte(
    make: Callable[..., Store], values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, copied = make(tmp_path / "features"), list[int]()
    there = mirror_folder(URL) / "DUTS-TR" / "toy"
    pushed = copy_store(source, there, lambda shards, nbytes: copied.append)
    _check(pushed, values)
    assert len(copied) == 9
    _elsewhere(tmp_path, monkeypatch)
    pulled = copy_store(_open(), tmp_path / "pulled", lambda shards, nbytes: copied.append)
    _check(pulled, values)
    assert _files(tmp_path / "pulled") == _files(source.path)
    assert audit(pulled) == []


def test_only_missing_shards_are_copied(make: Callable[..., Store], values: Values, tmp_path: Path) -> None:
    source, there = make(tmp_path / "features"), mirror_folder(URL) / "DUTS-TR" / "toy"
    todo: list[int] = []

    def before(shards: int, nbytes: int) -> Callable[[int], None]:
        todo.append(shards)
        return lambda nbytes: None

    copy_store(source, there, before)
    copy_store(source, there, before)
    grown = make(tmp_path / "features", NAMES + "kl")
    pushed = copy_store(grown, there, before)
    copy_store(pushed, tmp_path / "back", before)
    copy_store(Store.open(there), tmp_path / "back", before)
    assert todo == [9, 0, 3, 12, 0]
    _check(Store.open(tmp_path / "back"), values, NAMES + "kl")


def test_another_store_is_not_overwritten(make: Callable[..., Store], put: Put, tmp_path: Path) -> None:
    make(tmp_path / "one")
    make(tmp_path / "other", "klmno")
    there = mirror_folder(URL) / "DUTS-TR" / "toy"
    copy_store(Store.open(tmp_path / "one/DUTS-TR/toy"), there, lambda shards, nbytes: lambda nbytes: None)
    with pytest.raises(CacheError, match=r"contains samples that .* lacks"):
        copy_store(Store.open(tmp_path / "other/DUTS-TR/toy"), there, lambda shards, nbytes: lambda nbytes: None)


def test_a_damaged_shard_is_not_copied(make: Callable[..., Store], tmp_path: Path) -> None:
    source = make(tmp_path / "features")
    file = next(path for path in (source.path / "V/c").rglob("*") if path.is_file())
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    there = mirror_folder(URL) / "DUTS-TR" / "toy"
    with pytest.raises(CorruptError, match="does not contain the bytes"):
        copy_store(source, there, lambda shards, nbytes: lambda nbytes: None)
    store = Store.open(there)
    assert len(store.missing("pixels", [0])) + len(store.missing("V", [0, 1])) == 1


# -- several writers ---------------------------------------------------------------------------------------------


def test_the_loser_of_a_race_for_a_generation_assigns_rows_again(
    make: Callable[..., Store], put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines add different samples to the same state: both get separate rows, and nothing is overwritten."""
    ours, here, begun = make(), os.environ["DSU_SCRATCH"], list[Remote]()

    def interrupted(remote: Remote) -> None:
        """Let another machine publish after this one has read everything and before it writes."""
        begin(remote)
        begun.append(remote)
        if len(begun) == 1:
            _elsewhere(tmp_path, monkeypatch)
            theirs = _open()
            with theirs.lock():
                put(theirs, NAMES + "kl")
            monkeypatch.setenv("DSU_SCRATCH", here)

    begin = Remote.begin
    with ours.lock():
        monkeypatch.setattr(Remote, "begin", interrupted)
        put(ours, NAMES + "mn")
        monkeypatch.setattr(Remote, "begin", begin)
    assert [remote is ours.remote for remote in begun] == [True, False, True]
    assert ours.manifest.names == tuple(sorted(NAMES + "mn"))
    assert len(set(ours.manifest.rows.values())) == len(ours.manifest.rows) == 14
    assert {ours.manifest.rows[key] for key in "kl"}.isdisjoint(ours.manifest.rows[key] for key in "mn")


def test_many_simultaneous_writers_lose_nothing(
    make: Callable[..., Store], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes with separate scratch folders add one array each: afterwards all arrays exist."""
    make()
    program = (
        "import sys; from dsu_cache import *; "
        f"store = Store.open(mirror_folder({URL!r}) / 'DUTS-TR' / 'toy'); name = sys.argv[1]\n"
        "with store.lock(): store.add_array(name, (2,), 'uint8', 1, Fingerprint({'is': name}))"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", program, f"extra{number}"],
            env={**os.environ, "DSU_SCRATCH": str(tmp_path / f"own-{number}"), "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for number in range(4)
    ]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    assert set(_open().arrays) == {"pixels", "V", *(f"extra{number}" for number in range(4))}


def test_the_object_of_a_lost_race_is_an_orphan(
    make: Callable[..., Store], values: Values, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines compute the same shard with different last bits: one counts, the other is reported, but not
    removed."""
    store = make()
    before = orphaned_objects(_open())
    row = store.rows_in_shard(0)
    store.stored("V").write(next(iter(sorted(store.stored("V").shards()))), row, values("V", row, 0) + np.float16(1))
    count, nbytes = orphaned_objects(_open())
    assert count == before[0] + 1 and nbytes > before[1]
    assert not _open().missing("V", [0])


def test_writing_equal_content_again_succeeds() -> None:
    bucket = Bucket(URL)
    assert bucket.put_if_absent("x", b"same") and bucket.put_if_absent("x", b"same")
    assert not bucket.put_if_absent("x", b"other")
    assert bucket.put_if_unchanged("x", b"next", b"same") and not bucket.put_if_unchanged("x", b"late", b"same")
    assert bucket.get("x") == b"next"


# -- bytes -------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_in_any_object_is_found(
    make: Callable[..., Store],
    values: Values,
    fill: Fill,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """S3 returns damaged objects without an error: `audit` finds the damage in any object, and it is never read."""
    store = make()
    for key, content in server.objects().items():
        newest = f"here/DUTS-TR/toy/manifest/{store.remote.number:08d}.json"  # type: ignore[union-attr]
        if "/manifest/" in key and key != newest:
            continue
        server.put(key, content[:20] + bytes([content[20] ^ 1]) + content[21:])
        _elsewhere(tmp_path, monkeypatch)
        hurt = _open()
        findings = audit(hurt)
        assert len(findings) >= 1, key
        if "/manifest/" not in key:
            name = findings[0].array or ""
            rows = [hurt.manifest.row(sample) for sample in findings[0].samples]
            with pytest.raises(CorruptError, match=rf"array '{name}', row"):
                hurt.reader([name]).read(rows, [findings[0].shard.view] * len(rows))  # type: ignore[union-attr]
            assert discard_refuted(hurt, findings)
            with hurt.lock():
                fill(hurt, name, range(hurt.arrays[name].views))
            _check(_open(), values)
        else:
            server.put(key, content)


def test_a_damaged_file_in_the_scratch_folder_is_not_read(
    make: Callable[..., Store], values: Values, tmp_path: Path
) -> None:
    make()
    store = _open()
    _check(store, values)
    for file in (tmp_path / "scratch/shards").glob("[0-9a-f]*"):
        content = file.read_bytes()
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    _check(_open(), values)


def test_shards_that_fit_are_fetched_once(
    make: Callable[..., Store], values: Values, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    with Proxy(server) as proxy:
        _environment(server, tmp_path / "scratch", monkeypatch, proxy.port)
        store = _open()
        _check(store, values)
        fetched = proxy.requests
        _check(store, values)
        assert proxy.requests == fetched
        assert len(list((tmp_path / "scratch/shards").glob("[0-9a-f]*"))) == 9


@pytest.mark.parametrize("limit", ["0", "500", "1 KB"])
def test_shards_that_do_not_fit_are_read_chunk_by_chunk(
    make: Callable[..., Store],
    values: Values,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make()
    monkeypatch.setenv("DSU_SCRATCH_LIMIT", limit)
    monkeypatch.setattr("dsu_cache.remote._REPORTED", set())
    with caplog.at_level("INFO", "dsu.cache"):
        _check(_open(), values)
    held = sum(file.stat().st_size for file in (tmp_path / "scratch/shards").glob("[0-9a-f]*"))
    assert held <= {"0": 0, "500": 500, "1 KB": 1000}[limit]
    assert any("samples are read one by one" in message for message in caplog.messages)


def test_the_least_recently_used_shards_are_removed(
    make: Callable[..., Store], values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()
    store.reader(["V"]).read(range(10), [0] * 10)
    old = {file.name for file in (tmp_path / "scratch/shards").glob("[0-9a-f]*")}
    monkeypatch.setenv("DSU_SCRATCH_LIMIT", "1.2 KB")  # enough for all of pixels and a little of V
    store.reader(["pixels"]).read(range(10), [0] * 10)
    left = {file.name: file.stat().st_size for file in (tmp_path / "scratch/shards").glob("[0-9a-f]*")}
    assert {commit.sha256 for commit in store.stored("pixels").known.values()} <= left.keys()  # type: ignore[attr-defined]
    assert old - left.keys() and sum(left.values()) <= 1200


def test_fetching_does_not_count_the_files_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, counts = Pool(6400), list[int]()
    monkeypatch.setattr(Pool, "used", lambda self, real=Pool.used: counts.append(1) or real(self))
    fetched = [pool.fetched(Commit([], 10, f"{number:064x}"), lambda: b"0123456789") for number in range(700)]
    assert [path is not None for path in fetched] == [True] * 640 + [False] * 60, "the limit is kept"
    assert len(counts) <= 64 + 60 + 2


def test_an_invalid_scratch_limit_is_refused(make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    monkeypatch.setenv("DSU_SCRATCH_LIMIT", "much")
    with pytest.raises(CacheError, match="DSU_SCRATCH_LIMIT=much is not a number of bytes"):
        store.reader(["V"])


# -- errors ------------------------------------------------------------------------------------------------------


def test_a_missing_bucket_is_not_an_empty_store(make: Callable[..., Store], server: Server, values: Values) -> None:
    store = make()
    server.forget()
    for act in (
        lambda: mirror_folder(URL),
        _open,
        lambda: Store.exists(store.path),
        lambda: Store.create(store.path, {}),
        lambda: store.reader(["V"]).read([0], [0]),
        lambda: store.set_attributes({}),
        lambda: Bucket(URL).get("x"),
    ):
        with pytest.raises(RemoteError, match=f"there is no bucket s3://{BUCKET} at http"):
            act()


def test_a_missing_object_is_distinguished_from_a_missing_bucket() -> None:
    with pytest.raises(FileNotFoundError, match=f"{URL}/x is missing"):
        Bucket(URL).get("x")
    assert list(Bucket(URL).list()) == []
    with pytest.raises(CacheError, match="there is no store in s3://"):
        Store.open(mirror_folder(URL) / "DUTS-TR" / "toy")


@pytest.mark.parametrize("trouble", ["503", "cut"])
def test_transient_failures_are_retried(
    make: Callable[..., Store],
    values: Values,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    """Every third request fails."""
    with Proxy(server) as proxy:
        _environment(server, tmp_path / "scratch", monkeypatch, proxy.port)
        proxy.trouble, proxy.every = trouble, 3
        make()
        _elsewhere(tmp_path, monkeypatch)
        _check(_open(), values)


@pytest.mark.parametrize(
    ("trouble", "told"),
    [("503", "overloaded: 503"), ("403", "no permission"), ("refused", "can't be reached")],
)
def test_permanent_failures_are_one_sentence_without_keys(
    make: Callable[..., Store],
    values: Values,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
    told: str,
) -> None:
    store = make()
    monkeypatch.setattr(dsu_cache.storage, "RETRIES", 2)
    with Proxy(server) as proxy:
        proxy.trouble = trouble
        _environment(server, tmp_path / "scratch", monkeypatch, 1 if trouble == "refused" else proxy.port)
        acts: list[Callable[[], Any]] = [
            lambda: mirror_folder(URL),
            lambda: Store.open(store.path),
            lambda: store.reader(["V"]).read([0], [0]),
            lambda: store.set_attributes({"other": 1}),
            lambda: audit(store),
        ]
        for act in acts:
            with pytest.raises(RemoteError, match=told) as caught:
                act()
            text = str(caught.value)
            assert "\n" not in text and "neverprinted" not in text and "AKIATEST" not in text
    _environment(server, tmp_path / "scratch", monkeypatch)
    _check(Store.open(store.path), values)
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"neverprinted" not in file.read_bytes()


def test_a_forked_process_is_refused_and_does_not_hang(make: Callable[..., Store]) -> None:
    make()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Bucket(URL).get("x")
        except BaseException as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        assert "start workers with" in pipe.read()


def test_an_older_generation_is_used_if_the_newest_is_damaged(
    make: Callable[..., Store], values: Values, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()
    store.set_attributes({"of": "newer"})
    assert store.remote is not None
    server.put(f"here/DUTS-TR/toy/manifest/{store.remote.number:08d}.json", b"torn")
    _elsewhere(tmp_path, monkeypatch)
    older = _open()
    assert dict(older.attributes) == {"of": "DUTS"}
    assert [str(finding) for finding in audit(older)]
    with pytest.raises(CorruptError, match=r"is damaged .* nothing can be written: copy the store"):
        older.set_attributes({"of": "mended"})
    pulled = copy_store(_open(), tmp_path / "pulled", lambda shards, nbytes: lambda nbytes: None)
    remove_store(older.path)
    pushed = copy_store(pulled, older.path, lambda shards, nbytes: lambda nbytes: None)
    assert audit(pushed) == []
    pushed.set_attributes({"of": "mended"})
    _check(_open(), values)


def test_an_unpublished_change_is_undone(make: Callable[..., Store], server: Server) -> None:
    """If a process is killed after changing the mirror and before publishing, the mirror is rebuilt."""
    store = make()
    assert store.remote is not None
    store.remote.begin()
    (store.path / "V" / "zarr.json").unlink()
    assert set(_open().arrays) == {"pixels", "V"}


def test_a_removed_store_leaves_nothing_and_a_new_one_does_not_reuse_its_objects(
    make: Callable[..., Store], server: Server, values: Values
) -> None:
    store = make()
    before = set(server.objects())
    remove_store(store.path)
    assert not server.objects()
    mirror_folder(URL)
    make()
    shared = {key for key in before & set(server.objects()) if "/manifest/" not in key}
    assert not shared  # a new store has another id
    _check(_open(), values)


def test_foreign_content_in_the_bucket_can_not_write_outside_the_mirror(
    make: Callable[..., Store], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()
    assert store.remote is not None
    record = parse_record(server.objects()[f"here/DUTS-TR/toy/manifest/{store.remote.number:08d}.json"])
    record["metadata"]["../../../../../../stray"] = "{}"
    server.put(f"here/DUTS-TR/toy/manifest/{store.remote.number + 1:08d}.json", record_bytes(record))
    _elsewhere(tmp_path, monkeypatch)
    _open()
    assert not list(tmp_path.rglob("stray"))


def test_a_server_without_conditions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bucket, "put_if_absent", lambda self, key, content: self.put(key, content) or True)
    with pytest.raises(RemoteError, match="two writers would lose each other's samples"):
        Store.create(mirror_folder(URL) / "DUTS-TR" / "toy", {})
