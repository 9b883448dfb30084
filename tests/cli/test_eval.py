"""`dsu eval`: several runs, text in several forms, and the page."""

import csv
import io
import json
from pathlib import Path

import pytest
from judged import draw_cases
from support import Dsu


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Predictions of two runs, `a/predictions` and worse `b/predictions`; images and masks are in `drawn/`."""
    names = ["0", "1", "2", "3"]
    for run, cases in (("a", draw_cases(tmp_path / "drawn", names)), ("b", draw_cases(tmp_path / "x", names, seed=9))):
        folder = tmp_path / run / "predictions"
        folder.mkdir(parents=True)
        for case in cases:
            case.prediction.rename(folder / case.prediction.name)
    return tmp_path


def test_runs_side_by_side(dsu: Dsu, runs: Path) -> None:
    both = ("--predictions", runs / "a/predictions", "--predictions", runs / "b/predictions", "--truth", runs / "drawn")
    said = dsu("eval", *both).stdout
    assert "a" in said.split() and "b" in said.split() and "MAE ↓" in said
    rows = list(csv.DictReader(io.StringIO(dsu("eval", *both, "--format", "csv").stdout)))
    assert [(row["run"], row["set"], row["images"]) for row in rows] == [
        ("a", "drawn", "4"),
        ("b", "drawn", "4"),
    ]
    assert float(rows[0]["MAE"]) < float(rows[1]["MAE"])
    told = json.loads(dsu("eval", "ECSSD", *both, "--format", "json", "--published").stdout)
    assert {"a", "b", "DSU-Net (paper)"} < set(told) and told["a"]["ECSSD"]["MAE"] == float(rows[0]["MAE"])


def test_standard_output_is_the_text_alone(dsu: Dsu, runs: Path) -> None:
    one = ("eval", "CAMO", "--predictions", runs / "a/predictions", "--truth", runs / "drawn", "--published")
    latex = dsu(*one, "--format", "latex").stdout
    assert latex.startswith("% needs") and latex.endswith("\\end{tabular}\n") and "FEDER" in latex
    markdown = dsu(*one, "--format", "markdown").stdout
    assert markdown.startswith("### CAMO\n") and "| FEDER (paper) | 0.836 |" in markdown
    assert "of the set's 250 images" in markdown
    table = dsu(*one).stdout
    assert "FEDER" in table and "paper" in table and "alpha 0.5" in table


def test_files_and_formats_are_one(dsu: Dsu, runs: Path) -> None:
    one = ("eval", "--predictions", runs / "a/predictions", "--truth", runs / "drawn")
    for form in ("csv", "json"):
        said = dsu(*one, "--format", form, f"--{form}", f"figures.{form}").stdout
        assert (runs / f"figures.{form}").read_text() == said


def test_the_page_is_written_with_the_images_that_are_found(dsu: Dsu, runs: Path) -> None:
    both = ("--predictions", runs / "a/predictions", "--predictions", runs / "b/predictions", "--truth", runs / "drawn")
    said = dsu("eval", *both, "--report", "out/page.html").output
    assert "out/page.html" in said and "drawing: 8 pictures" in said
    text = (runs / "out/page.html").read_text()
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [(group["run"], len(group["names"])) for group in data["groups"]] == [("a", 4), ("b", 4)]
    assert {strip[3] for group in data["groups"] for strip in group["strips"]} == {4}
    masks = runs / "drawn" / "masks"
    plain = ("eval", "--predictions", runs / "a/predictions", "--truth", masks, "--report", "out/page.html")
    dsu(*plain)
    assert ",3]" in (runs / "out/page.html").read_text()
    dsu(*plain, "--images", runs / "drawn" / "images")
    assert ",4]" in (runs / "out/page.html").read_text()


def test_what_cannot_be_told_is_refused_before_the_work(dsu: Dsu, runs: Path) -> None:
    one = ("eval", "--predictions", runs / "a/predictions", "--truth", runs / "drawn")
    assert "--format can't be html: give table, markdown" in dsu(*one, "--format", "html", exit_code=2).output
    said = dsu(*one, "--report", "page.pdf", exit_code=2).output
    assert "ends in .html" in said and "judging" not in said
    twice = dsu(*one, "--predictions", runs / "b" / ".." / "a" / "predictions", exit_code=2).output
    assert "2 times" in twice


def test_runs_are_called_by_what_tells_them_apart(dsu: Dsu, runs: Path) -> None:
    (runs / "x" / "a").mkdir()
    (runs / "b" / "predictions").rename(runs / "x" / "a" / "predictions")
    both = ("eval", "--predictions", "a", "--predictions", "x/a", "--truth", runs / "drawn", "--format", "json")
    assert set(json.loads(dsu(*both).stdout)) == {"a", "x/a"}
    alone = ("eval", "--predictions", "a", "--truth", runs / "drawn", "--format", "json")
    assert set(json.loads(dsu(*alone).stdout)) == {"predictions"}  # the set's, as ever: that of the folder of maps


def test_a_part_of_a_benchmark_is_said_not_to_compare_with_the_paper(dsu: Dsu, runs: Path) -> None:
    said = dsu("eval", "CAMO", "--predictions", runs / "a/predictions", "--truth", runs / "drawn").output
    assert "not comparable with the paper, judged on 4 of the set's 250 images" in said, said
