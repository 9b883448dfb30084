"""Looking into folders: images by their endings, subfolders by tolerant names, links and archives' wrappings."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from dsu.data.images import IMAGE_SUFFIXES
from dsu.errors import UsageError

__all__ = [
    "find_images",
    "find_subfolder",
    "has_images",
    "list_files",
    "list_images",
    "plain",
    "subfolders",
    "unwrapped",
]


def find_images(source: Path) -> list[Path]:
    """List the images that a user means by a file (that file) or a folder (all below it, sorted).

    Raises:
        UsageError: Nothing is there, or a folder without images.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UsageError(f"{source} does not exist: give an image or a folder of images.")
    images = list_images(source)
    if not images:
        raise UsageError(f"{source} holds no images: give a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files.")
    return images


def list_files(folder: Path) -> Iterator[Path]:
    """All files below a folder; hidden ones are passed over.

    Symbolic links are followed, since large data sets live behind them, but no folder is entered twice.
    """
    entered = {os.path.realpath(folder)}
    for where, inner, files in os.walk(folder, followlinks=True):
        candidates = [(name, os.path.realpath(os.path.join(where, name))) for name in sorted(inner)]
        inner.clear()
        for name, real in candidates:
            if real not in entered and not _is_hidden(name):
                entered.add(real)
                inner.append(name)
        yield from (Path(where, name) for name in files if not _is_hidden(name))


def list_images(folder: Path) -> list[Path]:
    """All image files below a folder by their endings, sorted."""
    return sorted(filter(_is_image, list_files(folder)))


def has_images(folder: Path, below: bool = True) -> bool:
    """Whether images lie in a folder: right in it, or also anywhere below."""
    files = list_files(folder) if below else (entry for entry in folder.iterdir() if entry.is_file())
    return any(map(_is_image, files))


def subfolders(folder: Path) -> list[Path]:
    """List the folders right below a folder, sorted; hidden ones are passed over."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def find_subfolder(folder: Path, path: str) -> Path | None:
    """Find a folder by its path below another, neither case nor hyphens mattering; None if there is none."""
    for part in filter(None, path.split("/")):
        matches = [entry for entry in subfolders(folder) if plain(entry.name) == plain(part)]
        if not matches:
            return None
        folder = matches[0]
    return folder


def unwrapped(folder: Path) -> Path:
    """Go down while a folder holds nothing but one folder, as unpacked archives often do."""
    while len(inner := subfolders(folder)) == 1 and not has_images(folder, below=False):
        folder = inner[0]
    return folder


def plain(name: str) -> str:
    """A name without case, hyphens, underscores and the like: what names are compared by."""
    return re.sub(r"[\W_]", "", name.lower())


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(file.name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
