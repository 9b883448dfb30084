"""A few synthetic images, and the results of stage one, stage two and prediction for them."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest
from support import TINY

__all__ = ["WIDE", "House", "build_house", "stage_one"]

WIDE: Final = ("--features", "V", "--views", "1")
"""Options of the fastest stage one."""


def stage_one(folder: Path | str, *more: object) -> list[object]:
    """`cache-features` with as little work as possible."""
    return ["cache-features", folder, *TINY, *WIDE, *more]


@dataclass(frozen=True)
class House:
    """Data, store and run, made once; tests that damage something damage a copy."""

    data: Path
    features: Path
    run: Path

    @property
    def store(self) -> Path:
        [folder] = (entry for entry in (self.features / "shapes-TR").iterdir() if entry.is_dir())
        return folder

    @property
    def predictions(self) -> Path:
        return self.run / "predictions"

    def copied(self, to: Path) -> "House":
        """A copy in another folder, to be damaged."""
        shutil.copytree(self.features, to / "features")
        shutil.copytree(self.run, to / "run")
        return replace(self, features=to / "features", run=to / "run")

    def train(self, *more: object) -> list[object]:
        """`train-head` on the store."""
        return ["train-head", self.data, "--cache-root", self.features, "--epochs", "1", *more]

    def predict(self, *more: object) -> list[object]:
        """`predict` with the head."""
        return ["predict", *more, "--head", self.run, "--cache-root", self.features]


def build_house(drawn: Path, home: Path) -> House:
    """Build the house with the commands, without the `dsu` fixture, which exists for one test only."""
    from dsu_cli.main import run

    for part, count in (("train", 5), ("test", 2)):
        for inner in ("images", "masks"):
            (home / "shapes" / part / inner).mkdir(parents=True)
            for path in sorted((drawn / part / inner).iterdir())[:count]:
                shutil.copy(path, home / "shapes" / part / inner)
    made = House(home / "shapes", home / "features", home / "run")
    roots = ("--cache-root", made.features, "--quiet")
    commands: list[Sequence[object]] = [
        ("cache-features", made.data, *TINY, "--features", "V", *roots),
        ("train-head", "--epochs", "1", "--out", made.run, *roots),
        ("predict", "--head", made.run, *roots),
    ]
    for command in commands:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["dsu", *map(str, command)])
            with pytest.raises(SystemExit) as left:
                run()
        assert not left.value.code
    return made
