"""Decide which files in a folder are images, which are masks, and which mask belongs to which image.

Files that `dsu predict` wrote, according to its records, are never taken for images of a data set.
"""

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from dsu.data.images import IMAGE_SUFFIXES, Box
from dsu.errors import DsuError, UsageError

Kind = Literal["train", "test", "all"]

# Usual folder names, as `plain` writes them.
IMAGE_FOLDERS: Final = frozenset(
    {"image", "images", "img", "imgs", "im", "ims", "jpegimages", "photo", "photos", "picture", "pictures"}
)
_MASK_FOLDERS: Final = frozenset(
    {"mask", "masks", "gt", "gts", "gtobject", "groundtruth", "groundtruths", "groundtruthmask", "label", "labels"}
    | {"annotation", "annotations", "seg", "segmentation", "segmentations", "segmentationclass", "pixelwisegtnewpng"}
)
_MASK_ENDING: Final = re.compile(
    r"(?<=.)[-_. ](masks?|gt|ground[-_]?truth|seg|segmentation|labels?|annotation)$", re.IGNORECASE
)
_SIDE_BEGINNING: Final = re.compile(
    r"^(images?|imgs?|photos?|pictures?|masks?|gt|ground[-_]?truth|seg|segmentation|labels?)[-_. ](?=.)", re.IGNORECASE
)
_SIDE_ENDING: Final = re.compile(r"(?<=.)_0000$")
"""The first channel of an image, in nnU-Net's numbering."""
RUN_FILES: Final = ("settings.yaml", "run.json")
"""Files that identify a training run's folder, whose images belong to no data set."""
PREDICTIONS_FILE: Final = "predictions.json"
"""Next to the sets' folders: which head made the predictions, how, and where their ground truth is."""
_SYSTEM_FOLDERS: Final = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})
"""Folders that archivers, network drives and operating systems create."""
_MAX_NAMES: Final = 10
_LOSSY: Final = frozenset({".jpg", ".jpeg", ".jfif", ".webp"})


@dataclass(frozen=True)
class Pair:
    """An image and its mask (None if its split has no masks).

    `name` is the image's path below its split's image folder, without extension, with forward slashes; with extension
    if two images differ in nothing else. It is unique in its split. `box` is a tile's part of the image; None: all of
    it.
    """

    name: str
    image: Path
    mask: Path | None
    box: Box | None = None


@dataclass(frozen=True)
class Split:
    """The images of one split and their masks.

    Attributes:
        name: "DUTS-TR"; for a user's folder its name, with -TR, -TE or -VAL if it has such parts.
        dataset: Its data set, "DUTS".
        kind: Its purpose; "all" if the folder does not say.
        benchmark: Whether it is a published benchmark.
        images: The image folder.
        masks: The mask folder; None if there are no masks.
        pairs: The pairs, sorted by name; masks are None only if `masks` is.
        images_without_mask: Images skipped for lack of a mask, sorted.
        masks_without_image: Masks without an image, sorted.
        official_count: The benchmark's official number of pairs.
        left_out: Number of images excluded by the benchmark's convention (COD10K's without camouflage).
    """

    name: str
    dataset: str
    kind: Kind
    benchmark: bool
    images: Path
    masks: Path | None
    pairs: tuple[Pair, ...]
    images_without_mask: tuple[Path, ...] = ()
    masks_without_image: tuple[Path, ...] = ()
    official_count: int | None = None
    left_out: int = 0


# ---- folders ----


def find_images(source: Path) -> list[Path]:
    """List the images at a path: the file itself, or all below a folder, sorted.

    Raises:
        UsageError: The path does not exist, or the folder has no images.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UsageError(f"{source} does not exist: give an image or a folder of images.")
    images = list_images(source)
    if not images:
        raise UsageError(f"{source} contains no images: give a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files.")
    return images


def list_files(folder: Path) -> Iterator[Path]:
    """All files below a folder, without hidden files and training runs.

    Follows symbolic links, since large data sets use them, but enters no folder twice.

    Raises:
        DsuError: A folder without read permission.
    """
    entered = {os.path.realpath(folder)}
    for where, inner, files in os.walk(folder, followlinks=True, onerror=_raise_unreadable):
        if where != str(folder) and set(RUN_FILES) <= set(files):
            inner.clear()
            continue
        candidates = [(name, os.path.realpath(os.path.join(where, name))) for name in sorted(inner)]
        inner.clear()
        for name, real in candidates:
            if real not in entered and not _is_hidden(name):
                entered.add(real)
                inner.append(name)
        yield from (Path(where, name) for name in files if not _is_hidden(name))


def _raise_unreadable(error: OSError) -> None:
    raise DsuError(
        f"The folder {error.filename} can't be read ({error.strerror}): make it readable, or move it elsewhere."
    ) from error


def list_images(folder: Path) -> list[Path]:
    """All image files below a folder by their extensions, sorted."""
    return sorted(filter(_is_image, list_files(folder)))


def has_images(folder: Path, below: bool = True) -> bool:
    """Whether a folder contains images: directly, or also anywhere below."""
    files = list_files(folder) if below else (entry for entry in folder.iterdir() if entry.is_file())
    return any(map(_is_image, files))


def subfolders(folder: Path) -> list[Path]:
    """List the folders directly below a folder, sorted, without hidden ones."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def find_subfolder(folder: Path, path: str) -> Path | None:
    """Find a folder by its path below another, ignoring case and hyphens; None if there is none."""
    for part in filter(None, path.split("/")):
        matches = [entry for entry in subfolders(folder) if plain(entry.name) == plain(part)]
        if not matches:
            return None
        folder = matches[0]
    return folder


def unwrapped(folder: Path) -> Path:
    """Descend while a folder contains only one folder, as in many unpacked archives."""
    while len(inner := subfolders(folder)) == 1 and not has_images(folder, below=False):
        folder = inner[0]
    return folder


def plain(name: str) -> str:
    """A name without case, hyphens, underscores and the like, for comparison."""
    return re.sub(r"[\W_]", "", name.lower())


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(file.name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_FOLDERS


# ---- images and their masks ----


def image_and_mask_folders(home: Path) -> tuple[Path, Path | None]:
    """Find the image and mask folders below a folder by their usual names.

    Returns:
        The two folders: equal if images and masks are side by side, the second None without masks.

    Raises:
        UsageError: The folder has no images, or the two folders can't be told apart.
    """
    inner = [folder for folder in subfolders(home) if has_images(folder)]
    images = [folder for folder in inner if _has_usual_name(folder, home, IMAGE_FOLDERS)]
    masks = [folder for folder in inner if _has_usual_name(folder, home, _MASK_FOLDERS)]
    images_at_home = has_images(home, below=False)
    if not inner and not images_at_home:
        raise UsageError(f"{home} contains no images: give a folder of images and masks.")
    if len(images) == len(masks) == 1:
        return images[0], masks[0]
    if len(masks) == 1 and not images and images_at_home:
        return home, masks[0]
    if not masks and len(images) <= 1:
        folder = images[0] if images else home
        if _separate_masks(list_images(folder))[1]:
            return folder, folder
        if len(inner) + images_at_home == 1:
            return folder, None
    seen = ", ".join([folder.name for folder in inner[:_MAX_NAMES]] + (["..."] if len(inner) > _MAX_NAMES else []))
    raise UsageError(
        f"{home} contains images in {seen}, and images and masks can't be told apart: use --images SUBFOLDER --masks "
        "SUBFOLDER, or give one of these folders."
    )


def make_split(
    name: str,
    dataset: str,
    kind: Kind,
    images: Path,
    masks: Path | None,
    *,
    only: str = "",
    without: str = "",
) -> Split:
    """Pair the files of an image and a mask folder: equal if they are side by side, None for no masks.

    Args:
        name: The split's.
        dataset: The data set's.
        kind: The split's purpose.
        images: The folder of images.
        masks: The folder of masks.
        only: Skip files whose names do not start with this.
        without: Skip and count images whose names contain this.

    Raises:
        UsageError: There are masks, but none matches an image.
    """
    of_split = [[file for file in files if file.name.startswith(only)] for files in _list_both(images, masks)]
    kept, kept_masks = ([file for file in files if not without or without not in file.name] for files in of_split)
    split = Split(name, dataset, kind, False, images, masks, (), left_out=len(of_split[0]) - len(kept))
    unmasked = _name_images(kept, images)
    if masks is None:
        return replace(split, pairs=tuple(unmasked))
    wanted = [(_full_name(pair.image, images), _stem(pair.image, images)) for pair in unmasked]
    found = _match_files(wanted, _name_masks(kept_masks, masks))
    pairs = [replace(pair, mask=mask) for pair, mask in zip(unmasked, found, strict=True)]
    if not any(found):
        example = f"{_first_name(kept, images)} and {_first_name(kept_masks, masks)}"
        raise UsageError(
            f"no image in {images} has a mask of the same name in {masks} (first files: {example}): name masks like "
            "images, or give other folders with --images SUBFOLDER --masks SUBFOLDER."
        )
    lacking = sorted(pair.image for pair in pairs if not pair.mask)
    predicted = written_below(list_files(images)) if lacking else set()
    return replace(
        split,
        pairs=tuple(pair for pair in pairs if pair.mask),
        images_without_mask=tuple(path for path in lacking if os.path.realpath(path) not in predicted),
        masks_without_image=tuple(sorted(set(kept_masks) - {pair.mask for pair in pairs})),
    )


def _has_usual_name(folder: Path, home: Path, names: frozenset[str]) -> bool:
    """Whether a folder has one of the names, alone or after its parent's (DUTS-TR/DUTS-TR-Image)."""
    return plain(folder.name) in names or plain(folder.name).removeprefix(plain(home.name)) in names


def _list_both(images: Path, masks: Path | None) -> tuple[list[Path], list[Path]]:
    if masks is None:
        return list_images(images), []
    if masks == images:
        return _separate_masks(list_images(images))
    # One folder may be inside the other: a.jpg and masks/a.png.
    inner = masks if masks.is_relative_to(images) else images
    image_files, mask_files = (
        [file for file in list_images(folder) if inner == folder or not file.is_relative_to(inner)]
        for folder in (images, masks)
    )
    return image_files, mask_files


def _separate_masks(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Separate images from masks in one folder.

    `a_mask.png` next to `a.jpg` or `a.png` is a mask (or -gt, _seg, _label, ...), and so is `a.png` next to `a.jpg`. A
    program on Windows may have left `images\\a.jpg` and `masks\\a.png` for folders.
    """
    stems = {file.with_suffix("") for file in files}
    photographs = {file.with_suffix("") for file in files if file.suffix.lower() in _LOSSY}
    images: list[Path] = []
    masks: list[Path] = []
    for file in files:
        stem = file.with_suffix("")
        described = stem.with_name(_MASK_ENDING.sub("", stem.name))
        beside_photograph = stem in photographs and file.suffix.lower() not in _LOSSY
        inside = plain(file.name.partition("\\")[0]) if "\\" in file.name else ""
        is_mask = beside_photograph or (described != stem and described in stems) or inside in _MASK_FOLDERS
        (masks if is_mask else images).append(file)
    return images, masks


def _name_images(images: Sequence[Path], folder: Path) -> list[Pair]:
    """Pairs without masks, sorted by name."""
    full = [_full_name(image, folder) for image in images]
    stems = [_stem(image, folder) for image in images]
    count = Counter(stems)
    names = [stem if count[stem] == 1 else name for stem, name in zip(stems, full, strict=True)]
    if len(set(names)) < len(names):  # a.jpg next to a.png and a.jpg.png
        names = full
    return [Pair(name, image, None) for name, image in sorted(zip(names, images, strict=True))]


def pair_names(
    wanted: Sequence[Sequence[str]], given: Iterable[str], spell: Callable[[str], str] = str
) -> list[str | None]:
    """Match each wanted name with a given one: the rule that pairs images, masks and predictions.

    A given name may be the wanted one with or without its extension (`a.jpg`, `a`), and may end in _mask, _gt and the
    like. Subfolders count; if they differ, the last part is enough if it is unique on both sides, also without prefixes
    (`image_a`, `mask_a`) and suffixes of either side.

    Args:
        wanted: Possible names of each, likeliest first, the one without extension last.
        given: Names without extension; an equal name beats a longer one.
        spell: Formats a given name for messages.

    Raises:
        UsageError: Two given names match one wanted name, as `a_gt` and `a_mask` match `a`.
    """
    given = list(given)
    by_name = {_key(name): name for name in reversed(given)}
    described: dict[str, list[str]] = {}
    for name in given:
        described.setdefault(_MASK_ENDING.sub("", _key(name)), []).append(name)
    found: list[str | None] = []
    for names in wanted:
        keys = [_key(name) for name in names]
        equal = next((by_name[key] for key in keys if key in by_name), None)
        more = next((described[key] for key in keys if key in described), [])
        if equal is None and len(more) > 1:
            raise UsageError(
                f"{' and '.join(map(spell, more))} could all belong to {names[-1]}: keep the right one and move the "
                "others elsewhere."
            )
        found.append(equal or next(iter(more), None))
    for of_wanted, of_given in (
        (_last_part, lambda name: _MASK_ENDING.sub("", _last_part(name))),
        (_bare_name, _bare_name),
    ):
        sought = [of_wanted(names[-1]) for names in wanted]
        spare = _unique({name: of_given(name) for name in given if name not in set(found)})
        count = Counter(sought)
        found = [name or (spare.get(key) if count[key] == 1 else None) for name, key in zip(found, sought, strict=True)]
    return found


def pair_files(wanted: Iterable[str], files: Mapping[str, Path]) -> list[Path | None]:
    """Match each name without extension with a file, by the rule of `pair_names`."""
    return _match_files([(name,) for name in wanted], files)


def _match_files(wanted: Sequence[Sequence[str]], files: Mapping[str, Path]) -> list[Path | None]:
    return [None if name is None else files[name] for name in pair_names(wanted, files, lambda name: files[name].name)]


def _name_masks(masks: Iterable[Path], folder: Path) -> dict[str, Path]:
    """Masks by their paths below a folder, without extension; of two equal names, the lossless file."""
    named: dict[str, Path] = {}
    for mask in sorted(masks, key=lambda mask: (mask.suffix.lower() in _LOSSY, mask)):
        named.setdefault(_stem(mask, folder), mask)
    return named


def named_images(folder: Path) -> dict[str, Path]:
    """All images below a folder by their paths in it, without extension, in order.

    Raises:
        UsageError: A folder that does not exist or has no images.
        DsuError: Two files that differ in extension only.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: give the image folder.")
    named: dict[str, Path] = {}
    for path in find_images(folder):
        if (other := named.setdefault(_stem(path, folder), path)) != path:
            raise DsuError(f"{other} and {path} have the same name: keep only one of them.")
    return named


def _unique(keys: Mapping[str, str]) -> dict[str, str]:
    """Names by their keys, without keys that several share."""
    count = Counter(keys.values())
    return {key: name for name, key in keys.items() if count[key] == 1}


def _key(name: str) -> str:
    """A name for comparison: letters with accents as single characters."""
    return unicodedata.normalize("NFC", name)


def _last_part(name: str) -> str:
    return _key(name).rpartition("/")[2]


def _bare_name(name: str) -> str:
    """The last part of a name, without case, surrounding spaces and image or mask markers."""
    return _SIDE_ENDING.sub("", _MASK_ENDING.sub("", _SIDE_BEGINNING.sub("", _last_part(name).strip()))).casefold()


def _stem(file: Path, folder: Path) -> str:
    """A file's path below a folder, without extension; programs on Windows leave backslashes in names."""
    return file.relative_to(folder).with_suffix("").as_posix().replace("\\", "/")


def _full_name(file: Path, folder: Path) -> str:
    return f"{_stem(file, folder)}{file.suffix}"


def _first_name(files: Sequence[Path], folder: Path) -> str:
    return files[0].relative_to(folder).as_posix() if files else "nothing"


# ---- predictions ----


def written_below(files: Iterable[Path]) -> set[str]:
    """Those of these files that a record lists as predictions: real paths."""
    written = set()
    for record in (path for path in files if path.name == PREDICTIONS_FILE):
        with suppress(
            OSError, ValueError, KeyError, TypeError, AttributeError, DsuError
        ):  # another program's, or damaged
            for name, how in json.loads(record.read_text())["sets"].items():
                files = output_files(record.parent, name, how["names"], stems=how["source"] is None)
                written |= {os.path.realpath(file) for file in files if file.exists()}
    return written


def output_files(out: Path, name: str, items: Sequence[str], *, stems: bool) -> list[Path]:
    """The output PNG of each image of a set, in a folder named after the set.

    Args:
        out: the output folder.
        name: of the set; empty for single image files, whose masks go into `out` itself.
        items: names of the images, with their folders within the set.
        stems: whether to remove extensions such as .jpg from the names.

    Raises `DsuError` for names that lead out of the folder: they may come from a store's or a head's file.
    """
    for part in (name, *items):
        if os.path.isabs(part) or ".." in Path(part).parts:
            raise DsuError(f"The prediction of {part!r} would be outside {out}: rename it.")
    written = [str(Path(item).with_suffix("")) if stems else item for item in items]
    count = Counter(written)
    # a.jpg and a.png of one folder must not both become a.png.
    unique = (stem if count[stem] == 1 else item.replace(".", "_") for stem, item in zip(written, items, strict=True))
    return [out / name / f"{file}.png" for file in unique]
