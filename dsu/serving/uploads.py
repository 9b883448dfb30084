"""Receive a request's image from a streamed form: in memory only, and never more bytes than the limit."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from dsu.data.images import UnreadableImage, image_size
from dsu.settings import ServingSettings

FIELD: Final = "image"

_FORM_OVERHEAD: Final = 1 << 16
"""Maximum bytes of a form in addition to its image: headers and other fields."""

_LONGEST_NAME: Final = 120


class RequestError(Exception):
    """A request that gets an error response: its status, a message of one sentence, and additional headers."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


@dataclass(frozen=True)
class Upload:
    """An uploaded image file, not yet decoded.

    Attributes:
        name: the file's name without folders, for messages and tables.
        data: the file's bytes.
        pixels: number of pixels according to the file's header.
    """

    name: str
    data: bytes
    pixels: int


async def receive_image(request: Request, limits: ServingSettings) -> Upload:
    """Receive the image of a form, and check its size without decoding it.

    Raises `RequestError` if the request has no valid form with one image, or exceeds a limit.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise RequestError(415, f"The request is not a form: send multipart/form-data with a field {FIELD!r}.")
    limit = int(limits.max_megabytes * 1e6)
    too_large = RequestError(413, f"The image is larger than {limits.max_megabytes:g} MB: send a smaller one.")
    if int(request.headers.get("content-length", 0)) > limit + _FORM_OVERHEAD:
        raise too_large
    try:
        form, received = _FormReader(options[b"boundary"]), 0
        async with asyncio.timeout(limits.upload_seconds):
            async for chunk in request.stream():
                received += len(chunk)
                if received > limit + _FORM_OVERHEAD:
                    raise too_large
                form.parser.write(chunk)
    except TimeoutError as error:
        raise RequestError(
            408,
            f"The request did not arrive in {limits.upload_seconds:g} seconds: send a smaller image, or use a faster "
            "connection.",
            {"Connection": "close"},
        ) from error
    except (FormParserError, ClientDisconnect) as error:
        raise RequestError(400, "The form is damaged: send it again.") from error
    if not form.complete:
        raise RequestError(400, "The form is incomplete: send it again.")
    if form.images != 1:
        found = f"{form.images} fields" if form.images else "no field"
        raise RequestError(400, f"The form has {found} {FIELD!r}: send one.")
    if len(form.content) > limit:
        raise too_large
    data = bytes(form.content)
    try:
        width, height = await asyncio.to_thread(image_size, Path(form.name), data)
    except UnreadableImage as error:
        raise RequestError(415, str(error)) from error
    if width * height > limits.max_megapixels * 1e6:
        raise RequestError(
            413,
            f"{form.name} has {width}x{height} pixels, but at most {limits.max_megapixels:g} million are accepted: "
            "send a smaller one.",
        )
    return Upload(form.name, data, width * height)


class _FormReader:
    """Parses a form in chunks; keeps the bytes and the file name of the field `image`, and drops all other fields."""

    def __init__(self, boundary: bytes) -> None:
        self.content, self.name, self.images, self.complete = bytearray(), "", 0, False
        self._header, self._value, self._taken = b"", b"", False
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_header,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header_end,
                "on_part_data": self._on_data,
                "on_end": self._on_end,
            },
        )

    def _begin(self) -> None:
        self._header, self._value, self._taken = b"", b"", False

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            if options.get(b"name") == FIELD.encode():
                self.images, self._taken = self.images + 1, True
                self.name = _printable_name(options.get(b"filename", b""))
        self._header, self._value = b"", b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._taken:
            self.content += data[start:end]

    def _on_end(self) -> None:
        self.complete = True


def _printable_name(name: bytes) -> str:
    """A file's name without folders and unprintable characters."""
    last = PurePosixPath(name.decode("utf-8", "replace").replace("\\", "/")).name
    return "".join(letter for letter in last if letter.isprintable())[:_LONGEST_NAME] or FIELD
