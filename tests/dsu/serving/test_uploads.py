"""Streamed requests: complete in any chunks, and rejected at the limits."""

import asyncio
import io
import itertools
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from fastapi import Request
from hypothesis import given, settings, strategies as st
from PIL import Image
from served import form, photograph, png
from starlette.testclient import TestClient

from dsu.serving.uploads import RequestError, Upload, receive_image
from dsu.settings import ServingSettings

Serve = Callable[..., TestClient]
PHOTO = png(photograph())
BOUNDARY = "7MA4YWxk"


def body(data: bytes = PHOTO, name: str = "photo.png", before: bytes = b"", after: bytes = b"") -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
    return before + head + data + f"\r\n--{BOUNDARY}".encode() + (after or b"--\r\n")


def received(
    chunks: Iterable[bytes | float], kind: str = f"multipart/form-data; boundary={BOUNDARY}", **limits: float
) -> Upload:
    """The upload received from a request in these chunks; a number is a pause in seconds."""
    pieces = iter(chunks)

    async def receive() -> dict[str, Any]:
        for piece in pieces:
            if isinstance(piece, bytes):
                return {"type": "http.request", "body": piece, "more_body": True}
            await asyncio.sleep(piece)
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind.encode())]}
    return asyncio.run(receive_image(Request(scope, receive), ServingSettings.model_validate(limits)))


@settings(max_examples=50)
@given(st.lists(st.integers(1, len(body())), max_size=30))
def test_a_form_is_read_in_any_chunks(cuts: list[int]) -> None:
    whole = body()
    places = [0, *sorted(cuts), len(whole)]
    upload = received(whole[a:b] for a, b in itertools.pairwise(places))
    assert upload == Upload("photo.png", PHOTO, photograph().width * photograph().height)


def test_byte_by_byte() -> None:
    assert received(body()[at : at + 1] for at in range(len(body()))).data == PHOTO


def test_other_fields_are_ignored() -> None:
    other = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="note"\r\n\r\nimage\r\n'.encode()
    after = f'\r\nContent-Disposition: form-data; name="more"\r\n\r\nx\r\n--{BOUNDARY}--\r\n'.encode()
    assert received([body(before=other, after=after)]).data == PHOTO


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"", 400, "incomplete"),
        (b"no form", 400, "damaged"),
        (body()[:-40], 400, "incomplete"),
        (body()[:60], 400, "incomplete"),
        (b"--" + BOUNDARY.encode() + b"\r\nX: " + 60_000 * b"x", 400, "damaged"),
        (
            100 * (b"--" + BOUNDARY.encode() + b"\r\nA: b\r\n\r\n\r\n") + b"--" + BOUNDARY.encode() + b"--",
            400,
            "has no field 'image'",
        ),
    ],
    ids=["nothing", "text", "no end", "no image", "a long header", "many fields"],
)
def test_damaged_forms(content: bytes, status: int, said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        received([content])
    assert refused.value.status == status


@pytest.mark.parametrize("kind", ["", "image/png", "multipart/form-data", "multipart/mixed; boundary=a"])
def test_requests_without_a_form(kind: str) -> None:
    with pytest.raises(RequestError, match="not a form") as refused:
        received([body()], kind)
    assert refused.value.status == 415


def test_a_very_long_boundary_is_refused() -> None:
    with pytest.raises(RequestError, match="damaged"):
        received([body()], f"multipart/form-data; boundary={400 * 'x'}")


@pytest.mark.parametrize("field", ["image", "other"])
def test_a_gigabyte_is_refused_at_the_limit(field: str) -> None:
    """In any field: bytes are counted before they are parsed."""
    sent = 0

    def gigabyte() -> Iterator[bytes]:
        nonlocal sent
        yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n'.encode()
        block = bytes(1 << 20)
        for _ in range(1024):
            sent += len(block)
            yield block

    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="larger than 3 MB") as refused:
            received(gigabyte(), max_megabytes=3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.value.status == 413
    assert sent <= 5 << 20 and peak < 12e6


def test_a_content_length_above_the_limit_is_refused_unread() -> None:
    scope = {
        "type": "http",
        "method": "POST",
        "headers": [
            (b"content-type", b"multipart/form-data; boundary=a"),
            (b"content-length", b"1000000000"),
        ],
    }

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was asked for")

    with pytest.raises(RequestError, match="larger than 20 MB"):
        asyncio.run(receive_image(Request(scope, receive), ServingSettings()))


def test_a_slow_upload_times_out() -> None:
    def trickle() -> Iterator[bytes | float]:
        for at in range(len(body())):
            yield body()[at : at + 1]
            yield 0.01

    with pytest.raises(RequestError, match=r"did not arrive in 0.2 seconds") as refused:
        received(trickle(), upload_seconds=0.2)
    assert refused.value.status == 408 and refused.value.headers == {"Connection": "close"}


# ---- malicious images ----


def claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims this size; its data is one compressed megabyte of zeros."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20), 9))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(30_000, 30_000), (100_000, 600), (2**31 - 1, 2**31 - 1)], ids=str)
def test_a_decompression_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RequestError) as refused:
            received([body(claiming(*size))])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.value.status in (413, 415) and peak < 3e6


def test_a_compressed_text_chunk_of_200_mb(serve: Serve) -> None:
    """A zTXt chunk of 200 kB that expands to 200 MB: Pillow's limits hold, with or without an error."""
    text = b"Comment\0\0" + zlib.compress(bytes(200 << 20), 9)
    chunk = len(text).to_bytes(4, "big") + b"zTXt" + text + zlib.crc32(b"zTXt" + text).to_bytes(4, "big")
    data = PHOTO[:33] + chunk + PHOTO[33:]
    assert serve().post("/predict", **form(data)).status_code in (200, 415, 422)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000", "JPEG"])
def test_truncated_and_damaged_images_never_give_status_500(serve: Serve, kind: str) -> None:
    client, data = serve(), png(photograph(), kind)
    for cut in (10, 40, len(data) // 2, len(data) - 3):
        broken = bytearray(data)
        broken[cut // 2] ^= 255
        for sent in (data[:cut], bytes(broken)):
            answer = client.post("/predict", params={"kind": "cutout"}, **form(sent))
            assert answer.status_code in (200, 413, 415, 422), answer.text
            assert answer.status_code == 200 or "photo.png" in answer.json()["error"]


def test_only_the_first_frame_is_used(serve: Serve) -> None:
    frames = [Image.new("RGB", (300, 200), (index % 256, 0, 0)) for index in range(300)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    answer = serve().post("/predict", **form(buffer.getvalue()))
    assert Image.open(io.BytesIO(answer.content)).size == (300, 200)


# ---- disconnects ----


def test_a_request_is_cancelled_when_its_client_disconnects(serve: Serve) -> None:
    """The ASGI server reports the disconnect while the request waits."""
    app: Any = serve().app
    sent: list[dict[str, Any]] = []
    messages = [{"type": "http.request", "body": body(), "more_body": False}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/predict",
        "raw_path": b"/predict",
        "query_string": b"",
        "headers": [(b"content-type", f"multipart/form-data; boundary={BOUNDARY}".encode())],
    }
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 400
