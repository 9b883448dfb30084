"""For tests of the server: heads, images, and a server in its own process."""

import io
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from loud import loud_network, save_loud_head
from PIL import Image

from dsu.data.synthetic import draw_sample
from dsu.heads.head_file import HEAD_FILE
from dsu.serving.heads import ServedHead, load_heads
from dsu.settings import EncoderWeights, RuntimeSettings

__all__ = ["form", "load_two_heads", "photograph", "png", "serving"]


def load_two_heads(folder: Path) -> Mapping[str, ServedHead]:
    """Two heads: `first`, trained on 12-bit images, and `second`, with threshold 0.25."""
    files = [
        save_loud_head(folder / "first" / HEAD_FILE, loud_network(adapt_last=3), dataset={"depth": [0, 4095]}),
        save_loud_head(folder / "second" / HEAD_FILE, loud_network(seed=2, adapt_last=3), threshold=0.25),
    ]
    return load_heads([file.parent for file in files], RuntimeSettings(device="cpu"), EncoderWeights())


def photograph(seed: int = 0) -> Image.Image:
    """A synthetic RGB image."""
    return Image.fromarray(draw_sample(np.random.default_rng((23, seed)))[0])


def png(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The image encoded as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def form(data: bytes, name: str = "photo.png") -> dict[str, Any]:
    """Arguments with which httpx sends an image as a form."""
    return {"files": {"image": (name, data)}}


@contextmanager
def serving(
    *options: object, program: str = "from dsu_cli.main import run; run()"
) -> Iterator[tuple[int, psutil.Process, "subprocess.Popen[str]"]]:
    """A server on a free port; yields the port and the process (psutil and subprocess)."""
    command = [sys.executable, "-c", program, "serve", "--port", "0", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)", said)
            assert found, said + (process.communicate()[1] if not said else "")
            yield int(found[1]), psutil.Process(process.pid), process
        finally:
            process.kill()
