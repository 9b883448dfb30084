"""Which samples are held out of training, by their content and by nothing else."""

import hashlib
from collections.abc import Collection, Mapping

__all__ = ["kfold_split", "train_val_split"]


def train_val_split(contents: Mapping[str, str], fraction: float) -> tuple[list[str], list[str]]:
    """Names to train on and names to validate on, by the hash of each image's content.

    A sample stays on its side when others come or go, and copies of an image, or its tiles, stay together. With a
    `fraction` above 0 at least one sample (the one of the smallest hash) is held out.
    """
    held = [name for name in sorted(contents) if _share(contents[name]) < fraction]
    if fraction > 0 and not held and len(set(contents.values())) > 1:
        first = min(contents.values(), key=_share)
        held = [name for name in sorted(contents) if contents[name] == first]
    return sorted(set(contents) - set(held)), held


def kfold_split(contents: Mapping[str, str], empty: Collection[str], fold: str) -> tuple[list[str], list[str]]:
    """Names to train on and names to validate on, for a part such as `2/5` of a cross-validation.

    Args:
        contents: each sample's content; copies of an image, or its tiles, fall into one part.
        empty: samples without an object; images with one and images with none are dealt out apart, so that every part
            has its share of both.
        fold: number of the part from 1, and of how many.

    Parts differ by at most two images in size; each image is in exactly one.
    """
    part, parts = map(int, fold.split("/"))
    with_object = {content for name, content in contents.items() if name not in empty}
    ordered = [sorted(with_object, key=_share), sorted(set(contents.values()) - with_object, key=_share)]
    held = {content for kind in ordered for content in kind[part - 1 :: parts]}
    names = sorted(contents)
    return [name for name in names if contents[name] not in held], [name for name in names if contents[name] in held]


def _share(content: str) -> float:
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") / 2**64
