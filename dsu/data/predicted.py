"""What `dsu predict` wrote, by its records: it is never taken for anyone's images."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from dsu.errors import DsuError

__all__ = ["RECORD_FILE", "output_files", "written_below"]

RECORD_FILE: Final = "predictions.json"
"""Beside the sets' folders: which head made them, how, and where their ground truth is."""


def written_below(files: Iterable[Path]) -> set[str]:
    """What is written by the records among these files: real paths."""
    written = set()
    for record in (path for path in files if path.name == RECORD_FILE):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, DsuError):  # another program's, damaged
            for name, how in json.loads(record.read_text())["sets"].items():
                files = output_files(record.parent, name, how["names"], stems=how["source"] is None)
                written |= {os.path.realpath(file) for file in files if file.exists()}
    return written


def output_files(out: Path, name: str, items: Sequence[str], *, stems: bool) -> list[Path]:
    """The PNG of each image of a set, in a folder called like the set.

    Args:
        out: the output folder.
        name: of the set; images given alone have none, and their masks lie in `out` itself.
        items: names of the images, with their folders inside the set.
        stems: whether the names end in .jpg and the like, which goes.

    Raises `DsuError` for names that lead out of the folder: they may come out of a store's or a head's file.
    """
    for part in (name, *items):
        if os.path.isabs(part) or ".." in Path(part).parts:
            raise DsuError(f"The prediction of {part!r} would be outside {out}: rename it.")
    written = [str(Path(item).with_suffix("")) if stems else item for item in items]
    count = Counter(written)
    # a.jpg and a.png of one folder must not meet in a.png.
    unique = [stem if count[stem] == 1 else item.replace(".", "_") for stem, item in zip(written, items, strict=True)]
    return [out / name / f"{file}.png" for file in unique]
