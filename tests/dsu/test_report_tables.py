"""Figures side by side: whose, which are best, and as what text."""

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest
from judged import judge

from dsu.evaluation import METRICS, Evaluation
from dsu.paper import IMAGES, published
from dsu.report import as_csv, as_json, as_latex, as_markdown, as_per_image, compare


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return judge(tmp_path_factory.mktemp("first"), ["a", "b", "c"], seed=1)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return judge(tmp_path_factory.mktemp("second"), ["a", "b", "c"], seed=2)


def whole(found: Evaluation, **figures: float) -> Evaluation:
    """As if all of DUTS-TE had been judged."""
    return replace(found, images=IMAGES["DUTS-TE"], metrics=found.metrics | figures)


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_one_run_is_told_to_all_digits(first: Evaluation, second: Evaluation) -> None:
    results = {"run": {"ECSSD": first, "mine/é": second}}
    told: dict[str, dict[str, Any]] = json.loads(as_json(results))
    rows = rows_of(as_csv(results))
    assert list(told) == [row["set"] for row in rows] == ["ECSSD", "mine/é"]
    assert list(rows[0]) == ["set", "images", *METRICS]
    for row, (name, found) in zip(rows, results["run"].items(), strict=True):
        assert list(told[name]) == [*METRICS, "images", "conventions"]
        assert {key: told[name][key] for key in METRICS} == found.metrics
        assert {key: float(row[key]) for key in METRICS} == found.metrics
        assert told[name]["images"] == int(row["images"]) == 3
        assert told[name]["conventions"] == found.conventions
    images = rows_of(as_per_image(results))
    assert list(images[0])[:2] == ["set", "name"]
    assert [(row["set"], row["name"]) for row in images[2:4]] == [("ECSSD", "c"), ("mine/é", "a")]
    assert float(images[-1]["MAE"]) == second.per_image[-1]["MAE"]


def test_several_runs_say_whose_figures_they_are(first: Evaluation, second: Evaluation) -> None:
    results = {"one": {"ECSSD": first}, "two": {"ECSSD": second, "mine": second}}
    assert [(row["run"], row["set"]) for row in rows_of(as_csv(results))] == [
        ("one", "ECSSD"),
        ("two", "ECSSD"),
        ("two", "mine"),
    ]
    told = json.loads(as_json(results))
    assert told["two"]["mine"]["S"] == second.metrics["S"] and set(told["one"]) == {"ECSSD"}
    assert {row["run"] for row in rows_of(as_per_image(results))} == {"one", "two"}


def test_the_papers_rows_come_first(first: Evaluation) -> None:
    results = {"one": {"ECSSD": first}}
    [comparison] = compare(results)
    methods = [row.method for row in published("ECSSD")]
    assert [line.label for line in comparison.lines] == [*methods, "one"]
    rows = rows_of(as_csv(results, with_paper=True))
    assert rows[0]["run"] == "U2Net (paper)" and float(rows[0]["MAE"]) == 0.033 and rows[0]["IoU"] == ""
    told = json.loads(as_json(results, with_paper=True))
    assert told["DSU-Net (paper)"]["ECSSD"] == {"S": 0.953, "E_mean": 0.972, "MAE": 0.018}
    assert told["one"]["ECSSD"]["S"] == first.metrics["S"]


def test_best_is_what_prints_best_and_ties_share_it(first: Evaluation) -> None:
    close = whole(first, S=0.93404, MAE=0.0195, IoU=0.5)
    [comparison] = compare({"run": {"DUTS-TE": close}})
    best = {metric: [line.label for line in comparison.lines if comparison.is_best(line, metric)] for metric in METRICS}
    assert best["S"] == ["SAM2-UNet", "DSU-Net", "run"]
    assert "run" in best["MAE"] and "U2Net" not in best["MAE"]
    assert best["IoU"] == []  # nothing to compare with


def test_part_of_a_set_is_out_of_the_papers_contest(first: Evaluation) -> None:
    part = replace(first, metrics=first.metrics | {"S": 0.999})
    [comparison] = compare({"run": {"DUTS-TE": part}})
    assert [line.label for line in comparison.lines if comparison.is_best(line, "S")] == ["SAM2-UNet", "DSU-Net"]
    assert any("3 of the set's 5,019 images" in note for note in comparison.notes())
    assert any("ICON and EDN" in note for note in comparison.notes())
    [plain] = compare({"run": {"DUTS-TE": replace(whole(first), normalize=False)}})
    assert any("min-max" in note for note in plain.notes())
    [alone] = compare({"run": {"DUTS-TE": part}, "other": {"DUTS-TE": first}}, None)
    assert alone.is_best(alone.lines[0], "S") and not alone.notes()


def test_markdown(first: Evaluation, second: Evaluation) -> None:
    text = as_markdown({"a|b_c": {"DUTS-TE": whole(first, S=0.99)}, "two": {"DUTS-TE": second}}, with_paper=True)
    lines = text.splitlines()
    assert lines[0] == "### DUTS-TE"
    table = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {14}
    [mine] = [line for line in table if "b\\_c" in line]
    assert mine.startswith("| a\\|b\\_c | **0.990** |") and mine.endswith("| 5,019 |")
    assert any(line.startswith("| DSU-Net (paper) | 0.934 | – |") for line in table)
    assert "library: pysodmetrics" in text and "not comparable" in text


def test_latex(first: Evaluation, second: Evaluation) -> None:
    text = as_latex({"a_b & 50%": {"my_set#1": first}, r"c\d~": {"my_set#1": second}}, with_paper=True)
    assert text.startswith("% needs \\usepackage{booktabs}")
    assert r"a\_b \& 50\% & " in text and r"c\textbackslash{}d\textasciitilde{} & " in text
    assert r"\multicolumn{12}{c}{\textit{my\_set\#1}}" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.replace(r"\&", "").count("&") for line in rows} == {11}
    assert text.count(r"\textbf{") >= len(METRICS)
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert rule in text


def test_conventions_that_differ_are_told_apart(first: Evaluation) -> None:
    other = replace(first, conventions=first.conventions | {"map": "value / 255, not normalised"})
    text = as_markdown({"one": {"x": first}, "two": {"x": other}}, with_paper=False)
    assert "x of one: ground truth" in text and "x of two: ground truth" in text
