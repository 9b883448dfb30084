"""Stage one on several processes: the same stores, byte for byte, however the shards are divided."""

import os
import shlex
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from cached import LOCKS
from support import TINY, Dsu
from torchrun import HOUSE, WAYS, follow, lines, said, shown, torchrun

from dsu.features.stores import FeatureStore
from dsu.runtime import computing_threads
from dsu_cache import Store, locked

OPTIONS = (*TINY, "--features", "V,S1", "--level-views", "flips")
SMALL = (str(HOUSE / "tests" / "small_shards.py"),)
THREADS = 2
"""The number of threads of the first process; torchrun gives each process one."""


@pytest.fixture
def many(dsu: Dsu, monkeypatch: pytest.MonkeyPatch) -> Dsu:
    """`dsu` with two samples per shard: six shards for training and three for testing."""
    monkeypatch.setattr(Store.create.__func__, "__defaults__", (2, None))  # type: ignore[attr-defined]
    return dsu


@pytest.fixture
def one(many: Dsu, drawn: Path) -> dict[str, bytes]:
    """The stores of a single process, in `one`."""
    with computing_threads(THREADS):
        many("cache-features", drawn, *OPTIONS, "--cache-root", "one", "--quiet")
    return contents(Path("one"))


def contents(root: Path) -> dict[str, bytes]:
    """The content of every file below stores, by path, without the locks."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name not in LOCKS]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def begun(root: str, *lost: int) -> None:
    """Make a copy of `one` without some shards."""
    shutil.copytree("one", root)
    for number in lost:
        for marker in Path(root).glob(f"*/*/commits/*/*.{number}.json"):
            marker.unlink()


def differing(root: str, wanted: dict[str, bytes]) -> list[str]:
    found = contents(Path(root))
    return sorted({*found, *wanted} - {name for name in found if found[name] == wanted.get(name)})


def test_two_processes_make_the_stores_of_one(many: Dsu, one: dict[str, bytes], drawn: Path) -> None:
    """From scratch, and continued after a process with another number of threads."""
    command = ["cache-features", str(drawn), *OPTIONS]
    process = torchrun([*command, "--cache-root", "two"], program=SMALL, threads=THREADS)
    text = said(process)
    assert process.returncode == 0, text
    assert not differing("two", one)
    for once in ("encoding shapes-TR: 48 views", "encoding shapes-TE: 5 views", "Next: ", "split ", "to write"):
        assert text.count(once) == 1, text
    begun("rest", 1, 2, 5)
    process = torchrun([*command, "--cache-root", "rest"], program=SMALL)
    text = said(process)
    assert process.returncode == 0 and "other version" not in text, text
    assert not differing("rest", one)


@pytest.mark.slow
def test_four_processes_make_the_stores_of_one(many: Dsu, one: dict[str, bytes], drawn: Path) -> None:
    command = ["cache-features", str(drawn), *OPTIONS]
    text = said(torchrun([*command, "--cache-root", "four"], 4, program=SMALL, threads=THREADS))
    assert not differing("four", one), text


def test_parts_make_the_stores_of_one_in_any_order_and_the_last_says_so(
    many: Dsu, one: dict[str, bytes], drawn: Path
) -> None:
    with computing_threads(THREADS):
        first = many("cache-features", drawn, *OPTIONS, "--cache-root", "parts", "--part", "3/3").output
    assert "encoding shapes-TR, part 3/3: 16 views" in first
    assert "Part 3/3 is stored in parts; the other parts have 6 shards left to write." in first
    before = contents(Path("parts"))
    again = many("cache-features", drawn, *OPTIONS, "--cache-root", "parts", "--part", "3/3").output
    assert "the other parts have 6 shards" in again and contents(Path("parts")) == before
    with computing_threads(1):
        many("cache-features", drawn, *OPTIONS, "--cache-root", "parts", "--part", "1/3")
        last = many("cache-features", drawn, *OPTIONS, "--cache-root", "parts", "--part", "2/3").output
    assert "Stored in parts; all parts are complete. Next: `dsu train-head`" in last
    assert "other version" not in last
    assert not differing("parts", one)
    assert not list(Path("parts").glob(".*")), "a lock was left"


def test_any_number_of_processes_can_finish_the_stores_that_parts_have_begun(
    many: Dsu, one: dict[str, bytes], drawn: Path
) -> None:
    with computing_threads(THREADS):
        many("cache-features", drawn, *OPTIONS, "--cache-root", "rest", "--part", "1/2")
    with computing_threads(1):
        text = many("cache-features", drawn, *OPTIONS, "--cache-root", "rest", "--part", "3/5").output
        assert "shapes-TR: encoded with 2 threads, like the rest of its store, not with 1." in text
        many("cache-features", drawn, *OPTIONS, "--cache-root", "rest")
    assert not differing("rest", one)


def test_while_parts_write_others_use_their_plan_and_change_nothing(
    many: Dsu, one: dict[str, bytes], drawn: Path
) -> None:
    begun("features", 0, 1)
    stores = [FeatureStore.open(path) for path in Path("features").glob("*/*")]
    with ExitStack() as held:
        for store in stores:
            held.enter_context(store.lock((1, "2 parts")))
        text = many("cache-features", drawn, *OPTIONS, "--part", "2/2").output
        assert "Part 2/2 is stored in features; the other parts have 2 shards left to write." in text
        for command in (
            ("cache-features", drawn, *OPTIONS),
            ("cache-features", drawn, *OPTIONS, "--views", "none", "--features", "V,S1,S2", "--part", "2/2"),
            ("cache", "remove", "shapes", "--yes"),
            ("train-head", "--epochs", 1),
        ):
            output = many(*command, exit_code=1).output
            assert f"is being written by process {os.getpid()} on " in output, output
        assert "being written" in many("cache", "list").output
    many("cache-features", drawn, *OPTIONS, "--part", "1/2")
    assert not differing("features", one)


def test_parts_that_would_write_shards_twice_are_refused(
    many: Dsu, one: dict[str, bytes], drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsu.features.extraction._MAX_WAIT_SECONDS", 0.0)
    begun("features", 0, 1)
    store = FeatureStore.open(next(Path("features").glob("shapes-TR/*")))
    for share, wanted, reason in (
        ((1, "2 parts"), "1/2", "is being written as 1 of 2 parts by process"),
        ((1, "2 parts"), "1/3", "is being written in another division by process"),
        ((1, "8 processes"), "1/8", "is being written in another division by process"),
        (None, "1/2", "is being written by process"),
    ):
        with store.lock(share):
            output = many("cache-features", drawn, *OPTIONS, "--part", wanted, exit_code=1).output
        assert reason in output, output


def when_waiting(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
    """Do something as soon as stage one waits for a lock."""
    clock = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: then()})
    monkeypatch.setattr("dsu.features.extraction.time", clock)


def test_a_part_waits_while_another_reads_the_images_and_says_so(
    many: Dsu, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "features" / f".shapes-TR-{'hiera-toy-128+dino-toy-126'}.lock"
    lock.parent.mkdir()
    with ExitStack() as held:
        held.enter_context(locked(lock, "it is being looked at"))
        when_waiting(monkeypatch, held.close)
        text = many("cache-features", drawn, *OPTIONS, "--part", "1/2").output
    assert "waiting (0:00 of at most 1:00:00): the images of features/shapes-TR" in text
    assert f"are being scanned by process {os.getpid()} on" in text


def test_a_part_that_waited_for_the_same_part_writes_only_the_rest(
    many: Dsu, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many("cache-features", drawn, *OPTIONS, "--quiet")
    begun = contents(Path("features"))
    for marker in Path("features").glob("*/*/commits/*/*.0.json"):
        marker.rename(marker.with_suffix(".away"))
    store = FeatureStore.open(next(Path("features").glob("shapes-TR/*")))

    def finish() -> None:
        for marker in store.path.glob("commits/*/*.away"):
            marker.rename(marker.with_suffix(".json"))
        held.close()

    with ExitStack() as held:
        held.enter_context(store.lock((1, "2 parts")))
        when_waiting(monkeypatch, finish)
        text = many("cache-features", drawn, *OPTIONS, "--part", "1/2").output
    assert "is being written as 1 of 2 parts by process" in text and "all parts" in text
    for away in Path("features").glob("*/*/commits/*/*.away"):
        away.unlink()
    assert contents(Path("features")) == begun


def test_if_one_process_fails_all_end_with_one_line(many: Dsu, drawn: Path, tmp_path: Path) -> None:
    """A folder can't be written into, which the process with its shard notices."""
    many("cache-features", drawn, *OPTIONS, "--part", "1/6")
    [array] = Path("features").glob("shapes-TR/*/V")
    (array / "c").rename(array / "kept")
    (array / "c").touch()
    process = torchrun(["cache-features", str(drawn), *OPTIONS])
    text = said(process)
    assert process.returncode != 0
    [line] = lines(text, "error:")
    assert "The features can't be written to" in line and "run the same command again" in line
    (array / "c").unlink()
    (array / "kept").rename(array / "c")
    many("cache-features", drawn, *OPTIONS)


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b", "1/2/3", "-1/2"])
def test_an_invalid_part_is_refused(dsu: Dsu, drawn: Path, part: str) -> None:
    assert (
        "a part and the number of parts, such as 3/16"
        in dsu("cache-features", drawn, "--part", part, exit_code=2).output
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_lines_of_the_documentation_make_the_store_of_one(dsu: Dsu, drawn: Path, way: str) -> None:
    dsu("cache-features", drawn, *OPTIONS, "--cache-root", "one", "--quiet")
    line = shown("cache-features", way).replace("DUTS", f"{shlex.quote(str(drawn))} {' '.join(OPTIONS)}")
    texts = follow(line)
    assert not differing("features", contents(Path("one"))), texts
