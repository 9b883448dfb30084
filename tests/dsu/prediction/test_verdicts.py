"""The table of verdicts: components and their boxes, both files, and reading rows again."""

import csv
import io
import json
from pathlib import Path

import numpy as np

from dsu.prediction.verdicts import VerdictRow, find_verdict, read_table, summary, table_text, write_table

ROW = VerdictRow("", "tile.jpg", "no mask", seconds=0.25, file="tile.png")


def test_components_are_counted_with_boxes_largest_first() -> None:
    grey = np.zeros((20, 30), np.uint8)
    grey[2:4, 3:7] = 200
    grey[4, 7] = 130  # touches the box above at a corner: one component
    grey[10:19, 20:29] = 127  # just below one half
    grey[0, 29] = 255
    row = find_verdict(ROW, grey, 0.5)
    assert (row.verdict, row.response, row.area, row.components) == ("alarm", 1.0, 10, 2)
    assert row.boxes == [(3, 2, 8, 5), (29, 0, 30, 1)] and row.share == round(10 / 600, 6)
    lower = find_verdict(ROW, grey, 0.49)
    assert lower.boxes is not None and lower.boxes[0] == (20, 10, 29, 19) and lower.components == 3
    clear = find_verdict(ROW, grey // 2, 0.5)
    assert (clear.verdict, clear.area, clear.components, clear.boxes) == ("clear", 0, 0, [])
    assert row.seconds == 0.25, "what was known stays"


def test_all_components_of_noise_are_counted_but_few_have_boxes() -> None:
    grey = np.zeros((40, 40), np.uint8)
    grey[::2, ::2] = 255
    row = find_verdict(ROW, grey, 0.5)
    assert row.components == 400 and row.boxes is not None and len(row.boxes) == 50


def test_another_threshold_changes_the_verdict_and_unknown_fields_are_empty() -> None:
    row = find_verdict(ROW, np.full((4, 4), 100, np.uint8), 0.5)
    assert row.verdict == "clear"
    other = row.at(0.39)
    assert (other.verdict, other.threshold, other.area, other.boxes) == ("alarm", 0.39, None, None)


def test_both_files_have_the_same_rows(tmp_path: Path) -> None:
    found = find_verdict(ROW, np.full((4, 4), 200, np.uint8), 0.5)
    broken = VerdictRow("set", "b, c.jpg", "no mask", file="set/b, c.png", problem='"b, c.jpg" can\'t be read.')
    write_table(tmp_path, {row.file: row for row in (found, broken)})
    assert read_table(tmp_path) == {"tile.png": found, "set/b, c.png": broken}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [row["image"] for row in rows] == ["b, c.jpg", "tile.jpg"]
    assert rows[1]["boxes"] == "0 0 4 4" and rows[1]["area"] == "16" and rows[0]["problem"] == broken.problem
    assert json.loads(table_text([found], ".json"))[0]["boxes"] == [[0, 0, 4, 4]]
    assert summary([found, broken]) == "1 alarm, 0 clear at threshold 0.5, 1 without a mask" and summary([]) == ""


def test_a_damaged_table_counts_as_missing(tmp_path: Path) -> None:
    assert read_table(tmp_path) == {}
    for text in ("{", "[1]", "{}", '[{"file": "a.png"}]', json.dumps([{**vars(ROW), "response": "high"}])):
        (tmp_path / "table.json").write_text(text)
        assert read_table(tmp_path) == {}, text
