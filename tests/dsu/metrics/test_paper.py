import json
import os
from pathlib import Path
from typing import Any

import pytest

from dsu.metrics.paper import IMAGES, TABLES, PublishedRow, ablations, published

COLUMNS = {"S": "S", "F": "F_adaptive", "E": "E_mean", "MAE": "MAE"}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    root = os.environ.get("DSU_TEST_DATA")
    if not root:
        pytest.skip("DSU_TEST_DATA is not set")
    read: dict[str, Any] = json.loads((Path(root) / "paper_results.json").read_text())
    return read


def as_json(rows: tuple[PublishedRow, ...]) -> dict[str, dict[str, float]]:
    return {row.method: dict(row.figures) for row in rows}


def renamed(methods: dict[str, dict[str, list[float]]], metrics: list[str]) -> dict[str, dict[str, Any]]:
    """The file's method -> set -> figures, as set -> method -> figures with our names."""
    columns = [COLUMNS[metric] for metric in metrics]
    sets = {name for by_set in methods.values() for name in by_set}
    return {
        name: {method: dict(zip(columns, by_set[name], strict=True)) for method, by_set in methods.items()}
        for name in sets
    }


@pytest.mark.data
@pytest.mark.parametrize("kind", ["salient", "camouflaged"])
def test_benchmarks_equal_the_reference_file(results: dict[str, Any], kind: str) -> None:
    expected = renamed(results[kind]["methods"], results[kind]["metrics"])
    assert {name: as_json(published(name)) for name in expected} == expected
    printed = {name for table in TABLES if not table.ablation for name in table.sets}
    assert {name if name in printed else f"{name}-TE" for name in expected} <= printed


@pytest.mark.data
def test_ablations_equal_the_reference_file(results: dict[str, Any]) -> None:
    ablation = results["ablation"]
    for name in ("DUTS-TE", "DUT-OMRON", "CAMO", "COD10K"):
        kind = "metrics_salient" if name.startswith("DUT") else "metrics_camouflaged"
        variants = {variant: {name: by_set[name]} for variant, by_set in ablation["variants"].items()}
        assert as_json(ablations(name)) == renamed(variants, ablation[kind])[name]
    assert sum(len(table.sets) for table in TABLES if table.ablation) == 4


@pytest.mark.data
def test_counts_equal_the_reference_file(results: dict[str, Any]) -> None:
    assert dict(IMAGES) == results["images"]


def test_every_set_of_the_paper_has_a_count() -> None:
    assert {name for table in TABLES for name in table.sets} <= set(IMAGES)


def test_six_figures_are_approximate() -> None:
    approximate = [
        (name, row.method)
        for table in TABLES
        if not table.ablation
        for name in table.sets
        for row in published(name)
        if row.approximate
    ]
    assert approximate == [(name, m) for name in ("DUTS-TE", "DUT-OMRON", "HKU-IS") for m in ("ICON", "EDN")]


def test_the_papers_short_names_are_test_sets() -> None:
    assert published("CAMO") == published("CAMO-TE") != ()
    assert ablations("COD10K") == ablations("COD10K-TE") != ()


def test_the_whole_network_is_the_same_in_both_tables() -> None:
    for name in ("DUTS-TE", "DUT-OMRON", "CAMO", "COD10K"):
        assert published(name)[-1] == ablations(name)[-1]


def test_other_data_has_no_rows() -> None:
    assert published("MyParts") == ablations("ECSSD") == ()
