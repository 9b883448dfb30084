"""Heads that tests serve, a server in a process of its own, and photographs that are sent there."""

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
    """Of one network with two outputs: `first`, which was trained on images of 12 bits, and `second` at 0.25."""
    files = [
        save_loud_head(folder / "first" / HEAD_FILE, loud_network(adapt_last=3), dataset={"depth": [0, 4095]}),
        save_loud_head(folder / "second" / HEAD_FILE, loud_network(seed=2, adapt_last=3), threshold=0.25),
    ]
    return load_heads([file.parent for file in files], RuntimeSettings(device="cpu"), EncoderWeights())


def photograph(seed: int = 0) -> Image.Image:
    """A drawn RGB image."""
    return Image.fromarray(draw_sample(np.random.default_rng((23, seed)))[0])


def png(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image's file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def form(data: bytes, name: str = "photo.png") -> dict[str, Any]:
    """What httpx sends an image by."""
    return {"files": {"image": (name, data)}}


@contextmanager
def serving(
    *options: object, program: str = "from dsu_cli.main import run; run()"
) -> Iterator[tuple[int, psutil.Process, "subprocess.Popen[str]"]]:
    """A server on a free port: the port, the process as psutil and as subprocess have it."""
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
