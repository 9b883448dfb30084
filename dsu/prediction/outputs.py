"""Which files predictions become: never an input, never another prediction, never outside of the output folder."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dsu.errors import DsuError, UsageError

__all__ = ["check_outputs", "output_files"]


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
            raise DsuError(f"The prediction of {part!r} would lie outside of {out}: rename it.")
    written = [str(Path(item).with_suffix("")) if stems else item for item in items]
    count = Counter(written)
    # a.jpg and a.png of one folder must not meet in a.png.
    unique = [stem if count[stem] == 1 else item.replace(".", "_") for stem, item in zip(written, items, strict=True)]
    return [out / name / f"{file}.png" for file in unique]


def check_outputs(sets: Sequence[str], files: Sequence[tuple[Path, Path]]) -> None:
    """No prediction may fall on an input or on another one, and no set's record on another's.

    Args:
        sets: names of all sets.
        files: every image and what its mask is to be called.

    Raises `UsageError` naming what would meet.
    """
    for name, count in Counter(sets).items():
        if count > 1:
            raise UsageError(f"{count} of the sources are called {name}: predict them apart, each with its own --out.")
    # realpath, since Path.resolve fails on links that lead round in a circle.
    inputs = {os.path.realpath(image) for image, _ in files}
    outputs: set[str] = set()
    for image, output in files:
        place = os.path.realpath(output)
        if place in inputs:
            raise UsageError(f"The prediction of {image} would be written over an input: give another --out.")
        if place in outputs:
            raise UsageError(f"Two images would be written to {output}: predict them one after the other.")
        outputs.add(place)
