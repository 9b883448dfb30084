"""The server's answers: the same files as `dsu predict`, and one sentence for every error."""

import builtins
import io
import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import form, photograph, png
from starlette.testclient import TestClient

from dsu.api import predict
from dsu.prediction.segmenter import Segmenter
from dsu.serving.batches import Batcher
from dsu.serving.heads import ServedHead
from dsu.thresholds import level_of

Serve = Callable[..., TestClient]
Heads = Mapping[str, ServedHead]


class Watched:
    """A segmenter that records its batch sizes; before each batch it waits for the event `leave`."""

    def __init__(self, inner: Segmenter, *, held: bool = False) -> None:
        self.inner, self.depth = inner, inner.depth
        self.batches: list[int] = []
        self.leave, self.begun = threading.Event(), threading.Event()
        if not held:
            self.leave.set()

    def segment(self, pictures: Sequence[Image.Image]) -> list[np.ndarray]:
        self.batches.append(len(pictures))
        self.begun.set()
        assert self.leave.wait(20)
        return self.inner.segment(pictures)


def watched(head: ServedHead, **options: Any) -> tuple[ServedHead, Watched]:
    watcher = Watched(head.segmenter, **options)
    return replace(head, segmenter=watcher), watcher  # type: ignore[arg-type]


def photos() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = photograph(2)
    alpha.putalpha(alpha.getchannel("R"))
    return {
        "turned.jpg": png(photograph(0), "JPEG", exif=exif),
        "deep.png": png(Image.fromarray(np.asarray(photograph(1).convert("L")).astype(np.uint16) * 16)),
        "alpha.png": png(alpha),
        "grey.gif": png(photograph(3).convert("L"), "GIF"),
    }


# ---- answers ----


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("kind", ["mask", "overlay", "cutout"])
def test_pictures_and_verdicts_are_those_of_predict(
    serve: Serve, home: Path, tmp_path: Path, kind: str, threshold: float | None
) -> None:
    client, folder = serve(), tmp_path / "photos"
    folder.mkdir()
    for photo, data in photos().items():
        (folder / photo).write_bytes(data)
    query = {} if threshold is None else {"threshold": threshold}
    for head in ("first", "second"):
        outcome = predict(folder, home / head, out=tmp_path / head, kind=kind, device="cpu", batch_size=1, **query)
        rows = {row.image: row for row in outcome.rows.values()}
        for photo, data in photos().items():
            answer = client.post("/predict", params={"kind": kind, "head": head, **query}, **form(data, photo))
            assert answer.status_code == 200 and answer.headers["content-type"] == "image/png", answer.text
            assert answer.content == (tmp_path / head / Path(photo).with_suffix(".png")).read_bytes()
            table = client.post("/predict", params={"kind": "table", "head": head, **query}, **form(data, photo))
            [row] = table.json()
            assert row["seconds"] > 0
            expected = replace(rows[photo], set="", file="", seconds=row["seconds"])
            assert row == json.loads(json.dumps(asdict(expected)))


def test_the_first_head_is_the_default(serve: Serve) -> None:
    client, data = serve(), png(photograph())
    first, second = (client.post("/predict", params={"head": head}, **form(data)) for head in ("first", "second"))
    assert client.post("/predict", **form(data)).content == first.content != second.content


def test_a_map_is_soft_even_if_the_head_binarises_masks(serve: Serve, heads: Heads) -> None:
    data = png(photograph())
    [mask] = heads["second"].segmenter.segment([photograph()])
    own, other = (float(np.quantile(mask, share)) for share in (0.3, 0.6))
    client = serve({"cut": replace(heads["second"], cut=own, threshold=own)})
    cut, soft, anew = (
        np.asarray(Image.open(io.BytesIO(client.post("/predict", params=query, **form(data)).content)))
        for query in ({}, {"kind": "map"}, {"threshold": other})
    )
    assert set(np.unique(cut)) == {0, 255} and len(np.unique(soft)) > 50
    assert np.array_equal(cut > 0, soft >= level_of(own)) and np.array_equal(anew > 0, soft >= level_of(other))
    [facts] = client.get("/version").json()["heads"]
    assert facts["threshold"] == own and facts["cuts"] is True


def test_folders_of_uploaded_names_are_dropped(serve: Serve) -> None:
    for sent, noted in {
        "../../etc/passwd.png": "passwd.png",
        "C:\\photos\\a b.png": "a b.png",
        "Käfer–ß.png": "Käfer–ß.png",
        300 * "x": 120 * "x",
    }.items():
        [row] = serve().post("/predict", params={"kind": "table"}, **form(png(photograph()), sent)).json()
        assert row["image"] == noted


def test_nothing_is_written_to_disk(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send several megabytes: Starlette's own parser would write them to a temporary file."""
    client = serve()

    def refuse(*words: Any, **options: Any) -> None:
        raise AssertionError("a file was opened for writing")

    for name in ("TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile", "mkstemp", "mkdtemp"):
        monkeypatch.setattr(tempfile, name, refuse)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8))
    opened = builtins.open

    def reading(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        assert not set(mode) & set("wax+"), f"{file} was opened for writing"
        return opened(file, mode, *more, **options)

    monkeypatch.setattr(builtins, "open", reading)
    for kind in ("mask", "cutout", "table"):
        assert client.post("/predict", params={"kind": kind}, **form(png(noise))).status_code == 200
    assert client.get("/").headers["cache-control"] == "no-store"


def test_the_page_loads_nothing_else(serve: Serve) -> None:
    answer = serve().get("/")
    assert answer.status_code == 200
    for where in (r"https?:", r"src=", r"@import", r"url\(", r"<link(?! rel=\"icon\" href=\"data:,\")", "localStorage"):
        assert not re.search(where, answer.text), where
    assert "connect-src 'self'" in answer.headers["content-security-policy"]


def test_the_page_escapes_names_of_heads(serve: Serve, heads: Heads) -> None:
    name = "<script>alert(1)</script>"
    client = serve({name: replace(heads["first"], name=name)})
    assert "<script>alert" not in client.get("/").text and "&lt;script&gt;alert(1)" in client.get("/").text
    assert client.post("/predict", params={"head": name}, **form(png(photograph()))).status_code == 200


# ---- errors ----


BIG = png(Image.new("RGB", (1100, 1000)))


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        ({"params": {"kind": "masks"}}, 422, "query.kind must be 'mask', 'map', 'overlay', 'cutout' or 'table', not"),
        ({"params": {"threshold": "half"}}, 422, "query.threshold must be a number, not 'half'"),
        ({"params": {"threshold": "1.5"}}, 422, "query.threshold must be at most 1"),
        ({"params": {"threshold": "nan"}}, 422, "query.threshold must be a finite number"),
        ({"params": {"head": "frist"}}, 422, "not 'frist'; did you mean 'first'?"),
        ({"params": {"treshold": ".3"}}, 422, "query.treshold is not a known field"),
        ({"files": {"picture": ("a.png", b"x")}}, 400, "The form has no field 'image': send one."),
        ({"files": [("image", ("a.png", b"x")), ("image", ("b.png", b"x"))]}, 400, "has 2 fields 'image'"),
        ({"files": None, "data": {"image": "x"}}, 415, "The request is not a form: send multipart/form-data"),
        ({"files": None}, 415, "The request is not a form"),
        (form(BIG), 413, "photo.png has 1100x1000 pixels, but at most 1 million are accepted"),
        (form(bytes(300_000)), 413, "The image is larger than 0.2 MB: send a smaller one."),
        (form(b""), 415, "photo.png cannot be read as an image (it is empty)"),
        (form(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.svg"), 415, "not in a known image format"),
        (form(b"%PDF-1.7", "a.png"), 415, "not in a known image format"),
        (form(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a.eps"), 415, "not in a known image format"),
        (form(png(photograph())[:2000], "cut.png"), 422, "cut.png cannot be read as an image"),
        (form(png(photograph(), "JPEG")[:2000], "cut.jpg"), 422, "cut.jpg cannot be read as an image"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_are_one_sentence(serve: Serve, request_: dict[str, Any], status: int, said: str) -> None:
    client = serve(max_megapixels=1, max_megabytes=0.2)
    answer = client.post("/predict", **form(png(photograph())) | request_)
    assert answer.status_code == status
    assert answer.json()["status"] == status and said in answer.json()["error"]
    assert not answer.json()["error"].endswith("?.")
    assert client.post("/predict", **form(png(photograph()))).status_code == 200


@pytest.mark.parametrize(("path", "status"), [("/nowhere", 404), ("/health", 405), ("/docs", 404), ("/../etc", 404)])
def test_unknown_routes_answer_with_json(serve: Serve, path: str, status: int) -> None:
    answer = serve().post(path)
    assert answer.status_code == status and answer.json()["status"] == status


def test_an_unexpected_exception_gives_status_500_and_the_server_continues(serve: Serve, heads: Heads) -> None:
    head, watcher = watched(heads["first"])
    client = serve({"first": head})
    watcher.inner = None  # type: ignore[assignment]
    answer = client.post("/predict", **form(png(photograph())))
    assert answer.status_code == 500 and "has failed (AttributeError)" in answer.json()["error"]
    watcher.inner = heads["first"].segmenter
    assert client.post("/predict", **form(png(photograph()))).status_code == 200


def test_an_output_that_is_not_finite_gives_status_500(
    serve: Serve, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve()
    monkeypatch.setattr(
        heads["first"].segmenter, "segment", lambda pictures: [np.full(one.size[::-1], np.nan) for one in pictures]
    )
    answer = client.post("/predict", **form(png(photograph())))
    assert answer.status_code == 500 and "output is not finite" in answer.json()["error"]


# ---- concurrent requests ----


def test_waiting_requests_run_in_one_batch_with_the_same_results(serve: Serve, heads: Heads) -> None:
    head, watcher = watched(heads["first"], held=True)
    client = serve({"first": head}, batch_size=4)
    images = [png(photograph(seed).resize((60 + 40 * seed, 90))) for seed in range(9)]
    with ThreadPoolExecutor(9) as clients:
        asked = [clients.submit(client.post, "/predict", **form(data)) for data in images]
        until(lambda: client.get("/health").json()["requests"] == 9)
        watcher.leave.set()
        together = [one.result() for one in asked]
    assert sum(watcher.batches) == 9 and max(watcher.batches) == 4 and len(watcher.batches) <= 4
    for data, answer in zip(images, together, strict=True):
        assert answer.status_code == 200
        alone = client.post("/predict", **form(data))
        grey, own = (np.asarray(Image.open(io.BytesIO(one.content))).astype(int) for one in (answer, alone))
        assert np.abs(grey - own).max() <= 1  # sums in a batch may have another order


def test_a_batch_has_no_more_pixels_than_one_image_may_have(serve: Serve, heads: Heads) -> None:
    (first, watcher), (second, other) = watched(heads["first"], held=True), watched(heads["second"])
    client = serve({"first": first, "second": second}, max_megapixels=1)
    large, small = png(Image.new("RGB", (900, 1000))), png(Image.new("RGB", (100, 100)))
    sent = [("first", large), ("second", small), ("first", large), ("first", small), ("second", small)]
    with ThreadPoolExecutor(6) as clients:
        asked = [clients.submit(client.post, "/predict", **form(small))]
        assert watcher.begun.wait(20)
        for number, (head, data) in enumerate(sent, 2):
            asked.append(clients.submit(client.post, "/predict", params={"head": head}, **form(data)))
            until(lambda number=number: client.get("/health").json()["requests"] == number)
        watcher.leave.set()
        assert {one.result().status_code for one in asked} == {200}
    # Each batch takes the oldest requests for its head that fit.
    assert watcher.batches == [1, 2, 1] and other.batches == [2]


def test_a_damaged_image_does_not_affect_others_in_its_batch(serve: Serve, heads: Heads) -> None:
    head, watcher = watched(heads["first"], held=True)
    client = serve({"first": head})
    data = png(photograph())
    with ThreadPoolExecutor(3) as clients:
        first = clients.submit(client.post, "/predict", **form(data))
        assert watcher.begun.wait(20)
        others = [clients.submit(client.post, "/predict", **form(sent)) for sent in (data[:2000], data)]
        until(lambda: client.get("/health").json()["requests"] == 3)
        watcher.leave.set()
        assert [one.result().status_code for one in (first, *others)] == [200, 422, 200]


def test_a_full_queue_gives_status_503_and_retry_after(serve: Serve, heads: Heads) -> None:
    head, watcher = watched(heads["first"], held=True)
    client = serve({"first": head}, queue=2)
    data = png(photograph())
    with ThreadPoolExecutor(2) as clients:
        waiting = [clients.submit(client.post, "/predict", **form(data)) for _ in range(2)]
        until(lambda: client.get("/health").json()["requests"] == 2)
        refused = client.post("/predict", **form(data))
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert "retry in" in refused.json()["error"]
        watcher.leave.set()
        assert [one.result().status_code for one in waiting] == [200, 200]
    assert client.get("/health").json() == {"status": "ok", "requests": 0}
    assert client.post("/predict", **form(data)).status_code == 200


def test_health_gives_status_503_once_the_thread_has_ended(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()
    monkeypatch.setattr(Batcher, "is_running", False)
    assert client.get("/health").status_code == 503 and "restart it" in client.get("/health").json()["error"]


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait until another thread has made a condition true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never became true"
        time.sleep(0.01)
