"""Tables of figures: names of runs, best values, and output formats."""

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest
from evaluations import draw_evaluation

from dsu.evaluation.evaluate import Evaluation
from dsu.metrics.figures import FIGURES, IMAGE_LEVEL, METRICS, OBJECT
from dsu.metrics.image_level import ImageLevel
from dsu.metrics.paper import IMAGES, published
from dsu.report.tables import as_csv, as_json, as_latex, as_markdown, as_per_image, compare


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return draw_evaluation(tmp_path_factory.mktemp("first"), ["a", "b", "c"], seed=1)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return draw_evaluation(tmp_path_factory.mktemp("second"), ["a", "b", "c"], seed=2)


def whole(found: Evaluation, **figures: float) -> Evaluation:
    """An evaluation that claims to cover all of DUTS-TE."""
    return replace(found, images=IMAGES["DUTS-TE"], metrics=found.metrics | figures)


def with_empties(found: Evaluation, *responses: float) -> Evaluation:
    """An evaluation with additional images without an object, which have these responses."""
    level = found.image_level
    more = ImageLevel((*level.responses, *responses), (*level.empty, *(True for _ in responses)))
    return replace(found, images=len(more.empty), image_level=more, metrics=found.metrics | {"IoU": 0.25})


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_one_run_is_shown_with_all_digits(first: Evaluation, second: Evaluation) -> None:
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


def test_tables_of_several_runs_name_the_runs(first: Evaluation, second: Evaluation) -> None:
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


def test_the_best_figures_are_marked_including_ties(first: Evaluation) -> None:
    close = whole(first, S=0.93404, MAE=0.0195, IoU=0.5)
    [comparison] = compare({"run": {"DUTS-TE": close}})
    best = {metric: [line.label for line in comparison.lines if comparison.is_best(line, metric)] for metric in METRICS}
    assert best["S"] == ["SAM2-UNet", "DSU-Net", "run"]
    assert "run" in best["MAE"] and "U2Net" not in best["MAE"]
    assert best["IoU"] == []  # nothing to compare with


def test_parts_of_sets_are_not_ranked_with_the_paper(first: Evaluation) -> None:
    part = replace(first, metrics=first.metrics | {"S": 0.999})
    [comparison] = compare({"run": {"DUTS-TE": part}})
    assert [line.label for line in comparison.lines if comparison.is_best(line, "S")] == ["SAM2-UNet", "DSU-Net"]
    assert any("3 of the set's 5,019 images" in note for note in comparison.notes())
    assert any("ICON and EDN" in note for note in comparison.notes())
    [plain] = compare({"run": {"DUTS-TE": replace(whole(first), normalize=False)}})
    assert any("min-max" in note for note in plain.notes())
    [alone] = compare({"run": {"DUTS-TE": part}, "other": {"DUTS-TE": whole(first)}}, None)
    assert alone.is_best(alone.lines[0], "S"), "without the paper's rows there is nothing to be out of"
    [note] = alone.notes()
    assert note == "run: not comparable with the paper, evaluated on 3 of the set's 5,019 images."
    assert note in as_markdown({"run": {"DUTS-TE": part}}, with_paper=False).replace("\\", "")


def test_markdown(first: Evaluation, second: Evaluation) -> None:
    text = as_markdown({"a|b_c": {"DUTS-TE": whole(first, S=0.99)}, "two": {"DUTS-TE": second}}, with_paper=True)
    lines = text.splitlines()
    assert lines[0] == "### DUTS-TE"
    table = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {14}
    [mine] = [line for line in table if "b\\_c" in line]
    assert mine.startswith("| a\\|b\\_c | **0.990** |") and mine.endswith("| 5,019 |")
    assert any(line.startswith("| DSU-Net (paper) | 0.934 | – |") for line in table)
    assert "Maps: min-max normalised, image by image." in text and "not comparable" in text
    assert "pysodmetrics" not in text


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


def test_different_conventions_are_listed_separately(first: Evaluation) -> None:
    other = replace(first, conventions=first.conventions | {"map": "value / 255, not normalised"})
    results = {"one": {"x": first}, "two": {"x": other}}
    text = as_markdown(results, with_paper=False, conventions=True)
    assert text.count("library: pysodmetrics") == text.count("ground truth:") == 1, "what is the same is said once"
    assert "map: x of one: min-max normalised, image by image; x of two: value / 255, not normalised" in text
    short = as_markdown(results, with_paper=False)
    assert "Maps: x of one min-max normalised, image by image; x of two value / 255, not normalised." in short


def test_figures_can_be_selected_and_ordered_in_every_format(first: Evaluation) -> None:
    results, chosen = {"run": {"x": first}}, ["MAE", "S"]
    assert list(rows_of(as_csv(results, metrics=chosen))[0]) == ["set", "images", "MAE", "S"]
    assert list(json.loads(as_json(results, metrics=chosen))["x"]) == ["MAE", "S", "images", "conventions"]
    markdown = as_markdown(results, with_paper=False, metrics=chosen)
    assert "|  | MAE ↓ | S ↑ | images |" in markdown and "IoU" not in markdown
    assert r" & $\mathrm{MAE}\downarrow$ & $S_\alpha\uparrow$ \\" in as_latex(results, with_paper=False, metrics=chosen)


def test_images_without_an_object_are_shown_if_there_are_any(first: Evaluation, second: Evaluation) -> None:
    results = {"run": {"tiles": with_empties(first, 0.6, 0.1), "plain": second}}
    rows = rows_of(as_csv(results))
    assert list(rows[0]) == ["set", "images", *METRICS, "images_without_object", *IMAGE_LEVEL, *OBJECT]
    assert (rows[0]["images_without_object"], rows[1]["images_without_object"]) == ("2", "0")
    assert (rows[0]["false_alarms"], rows[1]["false_alarms"]) == ("0.5", "")
    assert float(rows[0]["IoU_object"]) == first.metrics["IoU"] and float(rows[0]["IoU"]) == 0.25
    told = json.loads(as_json(results))
    assert list(told["tiles"]) == [*METRICS, *IMAGE_LEVEL, *OBJECT, "images", "images_without_object", "conventions"]
    assert list(told["plain"]) == [*METRICS, "images", "conventions"]
    markdown = as_markdown(results, with_paper=True)
    assert markdown.count("| false alarms ↓ | misses ↓ | AUROC ↑ |") == 1
    assert f"| run | 0.500 | 0.000 | 1.000 | {first.metrics['F_adaptive']:.3f} |" in markdown


def test_undefined_figures_are_dashes_with_a_reason(first: Evaluation) -> None:
    level = ImageLevel((1.0, 0.0), (True, True))
    results = {"run": {"clean": replace(first, images=2, image_level=level, object_metrics={})}}
    told = json.loads(as_json(results))["clean"]
    assert told["AUROC"] is None and told["IoU_object"] is None and told["false_alarms"] == 0.5
    markdown = as_markdown(results, with_paper=False, metrics=["S", "false_alarms", "AUROC"])
    assert "AUROC undefined, because no image has an object" in markdown
    plain = as_markdown({"run": {"x": first}}, with_paper=False, metrics=["S", "AUROC", "misses"])
    assert "AUROC undefined, because every image has an object" in plain and "misses undefined" not in plain


def test_normalised_maps_have_a_remark_on_empty_images(first: Evaluation) -> None:
    level = ImageLevel((1.0, 254 / 255), (False, True))
    [as_predicted] = compare({"run": {"x": replace(first, images=2, image_level=level, normalize=False)}})
    [note] = as_predicted.notes()
    assert "every map reaches the full range" in note
    [when_evaluated] = compare({"run": {"x": with_empties(first, 0.2)}})
    [note] = when_evaluated.notes()
    assert "--normalize none" in note and when_evaluated.notes(["AUROC"]) == []


def test_a_part_of_an_own_set_is_marked(first: Evaluation) -> None:
    part = {"run": {"tiles": replace(first, missing=2), "ECSSD": replace(first, missing=997)}}
    assert [comparison.notes() for comparison in compare(part, None)] == [
        ["run: evaluated on 3 of the set's 5 images."],
        ["run: not comparable with the paper, evaluated on 3 of the set's 1,000 images."],
    ]
    told = json.loads(as_json(part))
    assert told["tiles"]["missing"] == 2 and "missing" not in json.loads(as_json({"run": {"x": first}}))["x"]


def test_latex_tables_have_no_unnecessary_columns(first: Evaluation) -> None:
    clean = replace(first, image_level=ImageLevel((1.0,), (False,)))
    text = as_latex({"run": {"x": clean}}, with_paper=False, metrics=["S", "AUROC", "false_alarms", "IoU_object"])
    assert r"\begin{tabular}{l*{2}{c}}" in text and "% run: AUROC, false alarms undefined" in text
    assert r"$\mathrm{IoU}|_{\mathrm{object}}\uparrow$" in text
    mixed = as_latex({"run": {"x": with_empties(first, 0.2)}}, with_paper=False, metrics=FIGURES)
    assert f"l*{{{len(FIGURES)}}}{{c}}" in mixed and r"\mathrm{false\ alarms}\downarrow" in mixed
