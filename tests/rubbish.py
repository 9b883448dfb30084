"""Bad input for commands: files that are not images, and unusual images, by name; and checks of errors."""

import io
import os
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from PIL import Image
from support import Dsu

__all__ = ["ODD", "UNREADABLE", "Code", "Refused", "picture", "run_code", "truncate"]


class Code:
    """An object that creates a file called `ran` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._path.with_name("ran")),)


def run_code(path: Path) -> None:
    """A pickle that runs code when it is loaded."""
    path.write_bytes(pickle.dumps({"model": Code(path)}))


def truncate(path: Path) -> None:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """A disc on noise."""
    rng = np.random.default_rng(width + height)
    y, x = np.mgrid[:height, :width]
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2
    pixels = rng.integers(0, 90, (height, width, 3)).astype(np.uint8)
    pixels[disc] += 150
    return Image.fromarray(pixels).convert(mode)


def _bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _cut(kind: str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes((whole := _bytes(picture(200, 150), kind))[: len(whole) // 2])


def _text(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def _corrupt(path: Path) -> None:
    content = bytearray(_bytes(picture(), "PNG"))
    content[content.index(b"IDAT") + 40] ^= 0xFF
    path.write_bytes(content)


def _claiming(width: int, height: int) -> Callable[[Path], object]:
    """A PNG of a few bytes whose header claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 1000)), chunk(b"IEND", b""))
    return lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(5 << 30)


UNREADABLE: Final[dict[str, tuple[Callable[[Path], object], str]]] = {
    "cut.jpg": (_cut("JPEG"), "truncated"),
    "cut.png": (_cut("PNG"), "truncated"),
    "cut.webp": (_cut("WEBP"), ""),
    "cut.tif": (lambda path: path.write_bytes(_bytes(picture(), "TIFF")[:300]), ""),
    "cut.gif": (_cut("GIF"), ""),
    "cut.bmp": (_cut("BMP"), "truncated"),
    "header.jpg": (lambda path: path.write_bytes(_bytes(picture(), "JPEG")[:4]), ""),
    "corrupt.png": (_corrupt, "broken"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "empty"),
    "empty.png": (lambda path: path.write_bytes(b""), "empty"),
    "text.jpg": (_text("not an image"), "known image format"),
    "page.png": (_text("<html><body>404 Not Found</body></html>"), "known image format"),
    "drawing.png": (_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), "known image format"),
    "script.png": (_text("%!PS-Adobe-3.0 EPSF-3.0\n(ran) (w) file\n"), "known image format"),
    "pickle.jpg": (lambda path: path.write_bytes(pickle.dumps(Code(path))), "known image format"),
    "archive.jpg": (lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 50), "known image format"),
    "bomb.png": (_claiming(100_000, 100_000), "pixels"),
    "largebomb.png": (_claiming(25_000, 25_000), "25000x25000 pixels are more than 500,000,000"),
    "norows.png": (_claiming(20, 0), ""),
    "sparse.jpg": (_sparse, "5.4 GB are more than any image needs"),
    "itself.jpg": (lambda path: path.symlink_to(path), "symbolic links"),
    "dangling.jpg": (lambda path: path.symlink_to(path.with_name("nowhere")), "No such file"),
    "pipe.jpg": (os.mkfifo, "not a regular file"),
    "device.jpg": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    os.fsdecode(b"latin-\xe9.jpg"): (lambda path: path.write_bytes(_bytes(picture(), "JPEG")), "not valid UTF-8"),
}
"""Files that cannot be read as images, by name: a function that makes the file, and a part of its error message."""


def _saved(image: Image.Image, kind: str = "PNG", **options: Any) -> tuple[Callable[[Path], object], tuple[int, int]]:
    return lambda path: path.write_bytes(_bytes(image, kind, **options)), image.size


def _turned() -> tuple[Callable[[Path], object], tuple[int, int]]:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    return _saved(picture(40, 30), "JPEG", exif=exif)[0], (30, 40)


def _deep() -> Image.Image:
    return Image.fromarray(np.asarray(picture(mode="L")).astype(np.uint16) * 257)


def _frames() -> dict[str, Any]:
    return {"save_all": True, "append_images": [picture(40, 30, "L").convert("RGB")], "duration": 50}


ODD: Final[dict[str, tuple[Callable[[Path], object], tuple[int, int]]]] = {
    "point.png": _saved(picture(1, 1)),
    "ribbon.png": _saved(picture(20_000, 10)),
    "pole.png": _saved(picture(3, 900)),
    "deep.png": _saved(_deep()),
    "float.tif": _saved(Image.fromarray(np.asarray(picture(mode="L")).astype(np.float32) / 255), "TIFF"),
    "bits.png": _saved(picture(mode="1")),
    "palette.png": _saved(picture().quantize(7)),
    "seethrough.png": _saved(picture().quantize(7), transparency=b"\0\xff\0"),
    "cmyk.jpg": _saved(picture(mode="CMYK"), "JPEG"),
    "cmyktoo.tif": _saved(picture(mode="CMYK"), "TIFF"),
    "alpha.png": _saved(picture(mode="RGBA")),
    "greyalpha.png": _saved(picture(mode="LA")),
    "turned.jpg": _turned(),
    "moving.gif": _saved(picture(), "GIF", **_frames()),
    "movingtoo.png": _saved(picture(), "PNG", **_frames()),
    "movingthree.webp": _saved(picture(), "WEBP", **_frames()),
    "CAPITALS.JPG": _saved(picture(), "JPEG"),
    "größe-écran-画像-🚗.png": _saved(picture()),
    "with some  spaces.png": _saved(picture()),
    "[bold]a :car: %s {0}.png": _saved(picture()),
    "line\nfeed\t\x1b[31m.png": _saved(picture()),
    "-rf.png": _saved(picture()),
    "$(touch ran).png": _saved(picture()),
    "dots...png": _saved(picture()),
    "n" * 251 + ".png": _saved(picture()),
}
"""Unusual but valid images, by name: a function that makes the file, and the image's upright size."""

_OUTPUTS: Final = {
    "cache-features": {"--cache-root": "features"},
    "train-head": {"--out": "runs"},
    "predict": {"--out": "runs"},
    "eval": {"--predictions": "runs", "--json": ".", "--csv": ".", "--per-image": "."},
    "check-equivalence": {"--json": "."},
    "import-checkpoint": {"-o": "head.safetensors"},
    "export-checkpoint": {"-o": "checkpoint.pth"},
}
"""Options that name a command's outputs, with their defaults ("." for none)."""


class Refused:
    """Runs `dsu ...` on bad input, and checks its messages, and that it writes only its outputs.

    Args:
        dsu: the command.
        node: the test, whose properties count inputs for the summary.
        watched: folders in which only the command's outputs may change.
    """

    def __init__(self, dsu: Dsu, node: pytest.Item, watched: Sequence[Path]) -> None:
        self._dsu, self._node, self._watched = dsu, node, watched

    def __call__(self, arguments: Sequence[object], *words: object, status: int = 2, count: int = 1) -> str:
        """Check the exit status, and that the text after `error:` contains all `words`; returns this text."""
        said = self.handled(arguments, status=status, count=count)
        assert "error:" in said, said
        error = said[said.index("error:") :]
        assert [str(word) for word in words if str(word) not in error] == [], error
        return error

    def handled(self, arguments: Sequence[object], *words: object, status: int = 0, count: int = 1) -> str:
        """Check the exit status, and that the output contains all `words`; returns the output."""
        outputs = _outputs(list(map(str, arguments)))
        before = dict(self._seen(outputs))
        said = " ".join(self._dsu(*arguments, exit_code=status).output.split())
        assert [str(word) for word in words if str(word) not in said] == [], said
        after = dict(self._seen(outputs))
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        elsewhere = [path for path in changed if "splits.json" not in path]  # training records each sample's share
        assert elsewhere == [], elsewhere
        self._node.user_properties.append(("bad inputs refused or handled", count))
        return said

    def _seen(self, outputs: Sequence[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """All files except outputs, with size and time, and all folders; those of the parent only by name."""
        for folder in self._watched:
            yield from ((entry.path, ()) for entry in os.scandir(folder.parent))
            for where, inner, files in os.walk(folder):
                inner[:] = [name for name in inner if os.path.join(where, name) not in outputs]
                yield from ((os.path.join(where, name), (0,)) for name in inner)
                for name in files:
                    if name in ("lock", "readers") and os.path.basename(where) == "manifest":
                        continue  # a store's locks, which readers take
                    path = os.path.join(where, name)
                    if path not in outputs:
                        found = os.lstat(path)
                        yield path, (found.st_size, found.st_mtime_ns)


def _outputs(words: Sequence[str]) -> list[str]:
    """Absolute paths that a command line is allowed to write."""
    found = []
    for option, default in _OUTPUTS.get(words[0], {}).items():
        given = words[words.index(option) + 1] if option in words[:-1] else default
        if given != ".":
            found.append(os.path.abspath(given))
    if words[0] == "predict" and "--head" in words and "--out" not in words:
        head = words[words.index("--head") + 1]
        found.append(
            os.path.abspath(os.path.join(head if os.path.isdir(head) else os.path.dirname(head), "predictions"))
        )
    return found
