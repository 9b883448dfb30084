"""Where a data set was found, stored as plain values, which are validated when they are read."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from dsu.data.datasets import Paths, SourceFolder
from dsu.data.masks import MaskFormat
from dsu.data.tiles import Tiling

FIELDS = {
    "split": "own",
    "dataset": "own",
    "kind": "all",
    "benchmark": False,
    "reference": "/a b/own",
    "data_root": "/",
}


def test_a_source_survives_json() -> None:
    mask_format = MaskFormat((1, 2), labels=False, white=255)
    source = SourceFolder(**FIELDS, images="pics", masks="maps", tile=64, overlap=8, mask_format=mask_format.to_json())
    again = SourceFolder(**json.loads(json.dumps(vars(source))))
    assert again == source
    assert again.parsed_mask_format == mask_format and again.tiling == Tiling(64, 8) and again.untiled.tiling is None


def test_the_arguments_of_the_command_are_complete_and_quoted() -> None:
    source = SourceFolder(
        **FIELDS, images="my pics", masks="maps", tile=64, overlap=8, mask_format=MaskFormat((3,)).to_json()
    )
    assert shlex.split(source.arguments) == [
        *("/a b/own", "--images", "my pics", "--masks", "maps"),
        *("--tile", "64", "--overlap", "8", "--foreground", "3"),
    ]
    assert SourceFolder(**{**FIELDS, "reference": "DUTS"}).arguments == "DUTS"


@pytest.mark.parametrize(
    "field",
    [
        {"mask_format": {}},
        {"mask_format": "x"},
        {"mask_format": 3},
        {"mask_format": {"foreground": 1}},
        {"tile": "64"},
        {"tile": True},
    ],
)
def test_invalid_values_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        SourceFolder(**{**FIELDS, **field})


def test_a_tiled_split_is_found_again(drawn: Path) -> None:
    from dsu.data.datasets import find_dataset

    [split] = find_dataset(drawn / "train", Paths(drawn))
    source = SourceFolder.of(split, str(drawn / "train"), Paths(drawn), Tiling(40, 8))
    found = source.find()
    assert found is not None and found.name == "train-tiles-40-8" and len(found.pairs) > len(split.pairs)
    assert source.untiled.find() == split
