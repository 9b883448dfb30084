"""`dsu eval`: several runs, output formats, and the page."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluations import draw_cases
from house import House
from PIL import Image
from rubbish import Refused
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


def test_several_runs_in_one_table(dsu: Dsu, runs: Path) -> None:
    both = ("--predictions", runs / "a/predictions", "--predictions", runs / "b/predictions", "--truth", runs / "drawn")
    said = dsu("eval", *both).stdout
    assert "a" in said.split() and "b" in said.split() and "MAE ↓" in said
    stretched = dsu("eval", *both, "--format", "csv", "--normalize", "minmax").stdout
    rows = list(csv.DictReader(io.StringIO(stretched)))
    assert [(row["run"], row["set"], row["images"]) for row in rows] == [
        ("a", "drawn", "4"),
        ("b", "drawn", "4"),
    ]
    assert float(rows[0]["MAE"]) < float(rows[1]["MAE"])
    told = json.loads(dsu("eval", "ECSSD", *both, "--format", "json", "--published").stdout)
    assert {"a", "b", "DSU-Net (paper)"} < set(told) and told["a"]["ECSSD"]["MAE"] == float(rows[0]["MAE"])


def test_standard_output_has_only_the_text(dsu: Dsu, runs: Path) -> None:
    one = ("eval", "CAMO", "--predictions", runs / "a/predictions", "--truth", runs / "drawn", "--published")
    latex = dsu(*one, "--format", "latex").stdout
    assert latex.startswith("% needs") and latex.endswith("\\end{tabular}\n") and "FEDER" in latex
    markdown = dsu(*one, "--format", "markdown").stdout
    assert markdown.startswith("### CAMO\n") and "| FEDER (paper) | 0.836 |" in markdown
    assert "of the set's 250 images" in markdown
    table = dsu(*one).stdout
    assert "FEDER" in table and "paper" in table and "alpha 0.5" not in table
    assert "Maps: min-max normalised" in table and "--conventions" in table
    assert "alpha 0.5" in dsu(*one, "--conventions").stdout


def test_files_and_standard_output_have_the_same_formats(dsu: Dsu, runs: Path) -> None:
    one = ("eval", "--predictions", runs / "a/predictions", "--truth", runs / "drawn")
    for form in ("csv", "json"):
        said = dsu(*one, "--format", form, f"--{form}", f"figures.{form}").stdout
        assert (runs / f"figures.{form}").read_text() == said


def test_the_page_contains_available_images(dsu: Dsu, runs: Path) -> None:
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


def test_invalid_requests_are_refused_before_the_evaluation(dsu: Dsu, runs: Path) -> None:
    one = ("eval", "--predictions", runs / "a/predictions", "--truth", runs / "drawn")
    assert "--format can't be html: give table, markdown" in dsu(*one, "--format", "html", exit_code=2).output
    said = dsu(*one, "--report", "page.pdf", exit_code=2).output
    assert "ends in .html" in said and "evaluating" not in said
    twice = dsu(*one, "--predictions", runs / "b" / ".." / "a" / "predictions", exit_code=2).output
    assert "2 times" in twice


def test_runs_have_distinct_names(dsu: Dsu, runs: Path) -> None:
    (runs / "x" / "a").mkdir()
    (runs / "b" / "predictions").rename(runs / "x" / "a" / "predictions")
    both = ("eval", "--predictions", "a", "--predictions", "x/a", "--truth", runs / "drawn", "--format", "json")
    assert set(json.loads(dsu(*both).stdout)) == {"a", "x/a"}
    alone = ("eval", "--predictions", "a", "--truth", runs / "drawn", "--format", "json")
    assert set(json.loads(dsu(*alone).stdout)) == {
        "predictions"
    }  # a flat folder of maps is a set with the folder's name


def test_a_part_of_a_benchmark_is_marked_as_not_comparable(dsu: Dsu, runs: Path) -> None:
    said = dsu("eval", "CAMO", "--predictions", runs / "a/predictions", "--truth", runs / "drawn").output
    assert "not comparable with the paper, evaluated on 4 of the set's 250 images" in said, said
    markdown = dsu("eval", "CAMO", "--predictions", "a", "--truth", "drawn", "--format", "markdown").stdout
    assert "evaluated on 4 of the set's 250 images" in markdown and "paper)" not in markdown


def test_figures_can_be_selected(dsu: Dsu, refused: Refused, runs: Path) -> None:
    one = ("eval", "--predictions", "a", "--truth", "drawn")
    table = dsu(*one, "--metrics", "MAE, S").stdout.splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["MAE", "S", "images"]
    assert dsu(*one, "--metrics", "S,MAE", "--format", "csv").stdout.splitlines()[0] == "set,images,S,MAE"
    error = refused([*one, "--metrics", "S,Dise"], "--metrics can't be Dise", "F_adaptive", "false_alarms", "'Dice'?")
    assert "evaluating" not in error


def test_runs_can_be_named(dsu: Dsu, refused: Refused, runs: Path) -> None:
    (runs / "lr=0.1").symlink_to(runs / "b", target_is_directory=True)
    both = ("eval", "--truth", "drawn", "--format", "json", "--predictions")
    assert set(json.loads(dsu(*both, "Ours=a", "--predictions", "b").stdout)) == {"Ours", "b"}
    assert set(json.loads(dsu(*both, "Ours=a", "--predictions", "lr=0.1").stdout)) == {"Ours", "b"}
    refused([*both, "b=a", "--predictions", "b"], "name b twice", "NAME=FOLDER")
    refused([*both, "=a"], "'=a'", "NAME=FOLDER")


def test_the_formatted_table_can_be_written_to_a_file(dsu: Dsu, refused: Refused, runs: Path) -> None:
    one = ("eval", "--predictions", "a", "--truth", "drawn")
    for form, name in (("latex", "t.tex"), ("markdown", "t.md"), ("csv", "t.csv"), ("json", "t.json")):
        said = dsu(*one, "--out", name)
        assert "MAE ↓" in said.stdout and f"Written: {name}" in said.output
        assert (runs / name).read_text() == dsu(*one, "--format", form).stdout
    dsu(*one, "--out", "t.txt")
    assert (runs / "t.txt").read_text() == dsu(*one).stdout
    dsu(*one, "--format", "markdown", "--out", "table")
    assert (runs / "table").read_text() == (runs / "t.md").read_text()
    refused([*one, "--out", "table.doc"], "--out table.doc", ".tex", "--format")


def test_scores_are_printed_even_if_a_file_cannot_be_written(
    dsu: Dsu, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    said = dsu("eval", "--predictions", "a", "--truth", "drawn", "--json", "m.json", exit_code=1)
    assert "MAE ↓" in said.stdout and "m.json can't be written (No space left" in said.output


def test_misspelt_paths_create_no_folders(dsu: Dsu, refused: Refused, runs: Path) -> None:
    one = ["eval", "--predictions", "a", "--truth", "drawn"]
    for option, name in (("--report", "no/y/page.html"), ("--json", "no/y/m.json"), ("--per-image", "drawn/z/w/m.csv")):
        refused([*one, option, name], f"{option} can't be {name}", "there is no folder")
    (runs / "file").write_text("")
    said = refused([*one, "--csv", "file/m.csv"], "folder file can't be created", status=1)
    assert "evaluating" not in said
    refused([*one, "--csv", "drawn"], "drawn is a folder")
    assert not (runs / "no").exists() and not (runs / "drawn" / "z").exists()
    assert "new/page.html (the folder new is new)" in dsu(*one, "--report", "new/page.html").output


def test_images_without_an_object_have_their_own_figures(dsu: Dsu, runs: Path) -> None:
    """Two of four images have no object; one of their maps is empty, and the other is not."""
    for name, peak in (("0", 50), ("1", 250)):
        for path, pixels in ((f"drawn/masks/{name}.png", [0]), (f"a/predictions/{name}.png", [0, peak])):
            Image.fromarray(np.resize(pixels, (30, 40)).astype(np.uint8)).save(runs / path)
    one = ("eval", "--predictions", "a", "--truth", "drawn", "--normalize", "none")
    rows = [line.split() for line in dsu(*one, "--per-image", "images.csv").stdout.splitlines()]
    for row in (
        ["images", "without", "an", "object", "2"],
        ["false", "alarms", "↓", "0.5000"],
        ["misses", "↓", "0.0000"],
        ["AUROC", "↑", "0.5000"],
        ["images", "with", "an", "object", "2"],
    ):
        assert row in rows, row
    figures = {row[0]: float(row[-1]) for row in rows if row[1:2] == ["↑"] or row[1:4] == ["with", "an", "object"]}
    assert "IoU" in figures and "normalised" not in " ".join(map(" ".join, rows[1:]))
    assert [row["empty"] for row in csv.DictReader((runs / "images.csv").open())] == ["True", "True", "False", "False"]
    told = json.loads(dsu(*one, "--format", "json").stdout)["predictions"]
    assert told["IoU_object"] == pytest.approx(2 * told["IoU"]) and told["images_without_object"] == 2


def test_errors_name_the_run_if_the_newest_has_no_predictions(
    dsu: Dsu, refused: Refused, house: House, tmp_path: Path
) -> None:
    """The newest run has no predictions, or only of a photograph: the error names an older run."""
    older, newer = tmp_path / "runs" / "older", tmp_path / "runs" / "newer"
    shutil.copytree(house.run, older)
    newer.mkdir()
    shutil.copyfile(house.run / "head.safetensors", newer / "head.safetensors")
    refused(["eval"], "newest run, runs/newer, has no predictions yet", "dsu predict", "--predictions runs/older")
    photo = sorted((house.data / "test" / "images").iterdir())[0]
    dsu("predict", photo, "--head", newer)
    refused(["eval"], "runs/newer/predictions", "no known ground truth", "--predictions runs/older")
    assert "shapes-TE" in dsu("eval", "--predictions", "runs/older").stdout


def test_photographs_predicted_next_to_a_set_are_left_out(dsu: Dsu, house: House, tmp_path: Path) -> None:
    mine = house.copied(tmp_path)
    shutil.copytree(mine.run, tmp_path / "runs" / "one")
    photo = sorted((house.data / "test" / "images").iterdir())[0]
    shutil.copytree(photo.parent, tmp_path / "photos")
    dsu("predict", photo, tmp_path / "photos", "--head", "runs/one")
    said = dsu("eval")
    assert "shapes-TE" in said.stdout and "photos" not in said.stdout
    left_out = next(line for line in said.output.splitlines() if line.startswith("left out"))
    assert "photos (2 images)" in left_out and "files given one by one (1 image)" in left_out
