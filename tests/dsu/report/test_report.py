"""The report's page: it has the evaluation's figures, is self-contained, and escapes all names."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import ODD_NAMES, draw_evaluation
from PIL import Image

from dsu.errors import UsageError
from dsu.evaluation.evaluate import Evaluation
from dsu.evaluation.thresholds import Thresholds
from dsu.metrics.figures import METRICS, PER_IMAGE, SPOILT, metric_of
from dsu.metrics.image_level import ImageLevel
from dsu.metrics.paper import IMAGES, ablations, published
from dsu.metrics.thresholds import AtThreshold
from dsu.progress import SILENT
from dsu.report import page as page_module
from dsu.report.page import FALSE_NEGATIVE, FALSE_POSITIVE, draw_panels, histogram, write_report

VOID = {"meta", "link", "img", "input", "br"}
# HTML allows these elements without an end tag.
OPTIONAL = {"li", "tr", "td", "th", "tbody", "thead", "dt", "dd", "p", "option"}


class Page(HTMLParser):
    """Parses tags with their attributes, the text of table cells, and the data block."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.unclosed: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.exact: list[float] = []
        self._raw = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        if tag not in VOID | OPTIONAL:
            self.unclosed.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag == "td" and "title" in named:
            self.exact.append(float(named["title"] or "nan"))

    def handle_endtag(self, tag: str) -> None:
        if tag not in OPTIONAL:
            assert self.unclosed.pop() == tag
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()

    @property
    def data(self) -> Any:
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.DOTALL)
        assert found
        return json.loads(found[1])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return draw_evaluation(tmp_path_factory.mktemp("odd"), ODD_NAMES)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return draw_evaluation(tmp_path_factory.mktemp("other"), ["a", "b"], seed=5)


def written(path: Path, results: dict[str, dict[str, Evaluation]]) -> Page:
    write_report(path, results)
    page = Page(path)
    assert not page.unclosed
    return page


def test_the_page_is_self_contained(found: Evaluation, tmp_path: Path) -> None:
    page = written(tmp_path / "new" / "report.html", {"run": {"shapes": found}})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    assert not re.search(r"https?://|@import|url\(", page.source)
    assert "default-src 'none'" in page.source
    assert sum(tag == "svg" for tag, _ in page.tags) == 2 + len(PER_IMAGE)
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert (
        {f"#{attributes['id']}" for tag, attributes in page.tags if tag == "section"}
        >= links
        == {
            "#set-0",
            "#gallery",
            "#conventions",
        }
    )


def test_the_page_has_the_figures_of_the_evaluation(found: Evaluation, other: Evaluation, tmp_path: Path) -> None:
    page = written(tmp_path / "report.html", {"run": {"shapes": found, "others": other}})
    assert page.exact == [*found.metrics.values(), *other.metrics.values()]
    groups = page.data["groups"]
    assert [(group["set"], group["run"]) for group in groups] == [("shapes", "run"), ("others", "run")]
    for group, evaluation in zip(groups, (found, other), strict=True):
        assert group["names"] == [row["name"] for row in evaluation.per_image]
        for metric in PER_IMAGE:
            assert group["scores"][metric] == pytest.approx([row[metric] for row in evaluation.per_image], abs=5e-7)
    assert [metric["key"] for metric in page.data["metrics"]] == list(PER_IMAGE)
    for convention, meaning in found.conventions.items():
        assert convention in page.texts and meaning in page.texts
    means = [f"mean {np.mean([row['S'] for row in evaluation.per_image]):.3f}" for evaluation in (found, other)]
    assert all(any(mean in text for text in page.texts) for mean in means)


def test_the_page_explains_bold_scores_if_there_are_any(found: Evaluation, other: Evaluation, tmp_path: Path) -> None:
    """Runs over different images have no best score."""
    for runs, any_best in (
        ({"run": {"shapes": found}}, False),
        ({"run": {"shapes": found}, "again": {"shapes": found}}, True),
        ({"run": {"shapes": found}, "again": {"shapes": other}}, False),
    ):
        source = written(tmp_path / "report.html", runs).source
        assert ("Bold marks" in source) == any_best


def test_the_page_has_the_papers_rows(found: Evaluation, tmp_path: Path) -> None:
    sets = {"DUTS-TE": replace(found, images=IMAGES["DUTS-TE"]), "CAMO-TE": found, "mine": found}
    page = written(tmp_path / "report.html", {"run": sets})
    for name in sets:
        for row in (*published(name), *ablations(name)):
            printed = [f"{row.figures[metric]:.3f}" for metric in METRICS if metric in row.figures]
            assert any(cells[1:] == printed and cells[0].startswith(row.method) for cells in page.rows), row
    assert sum(cells[:1] == ["run"] for cells in page.rows) == 4  # two sets, each with the paper's rows and ablations
    assert any("6 of the set's 250 images" in text for text in page.texts)
    assert not any("of the set's 5,019" in text for text in page.texts)


def test_few_images_come_first_and_their_histograms_are_folded(
    found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def order(page: Page) -> list[str | None]:
        return [attributes["id"] for tag, attributes in page.tags if tag == "section"]

    few = written(tmp_path / "few.html", {"run": {"shapes": found}})
    assert order(few) == ["overview", "gallery", "set-0", "conventions"] and ("details", {}) in few.tags
    monkeypatch.setattr(page_module, "INLINE_PICTURES", 3)
    many = written(tmp_path / "many.html", {"run": {"shapes": found}})
    assert order(many) == ["overview", "set-0", "gallery", "conventions"] and ("details", {"open": None}) in many.tags


def test_conventions_appear_once_or_per_method_if_they_differ(found: Evaluation, tmp_path: Path) -> None:
    other = replace(found, conventions=found.conventions | {"map": "value / 255"})
    page = written(tmp_path / "report.html", {"Ours": {"s": found, "t": found}, "Theirs": {"s": other}})
    told = [text.strip() for text in page.texts]
    assert all(page.source.count(f"<dt>{what}<dd>") == 1 for what in found.conventions)
    assert f"s of Ours, t of Ours: {found.conventions['map']}; s of Theirs: value / 255" in told


def test_what_limits_the_scores_is_said_below_them(found: Evaluation, other: Evaluation, tmp_path: Path) -> None:
    said = {"encoders": "random weights", "share": "validation share, which chose the weights"}
    mine = replace(found, conventions=found.conventions | said, trained_on=1)
    runs = {"run": {"mine-VAL": mine}, "again": {"mine-VAL": other}}
    overview = written(tmp_path / "report.html", runs).source.split("</section>")[0]
    for words in ("mine-VAL: validation share, which chose the weights.", "Encoders of random", "run: trained on 1 of"):
        assert words in overview
    assert "evaluated on different images" in overview


def test_thresholds_and_calibration_are_shown_for_all_runs_that_have_them(found: Evaluation, tmp_path: Path) -> None:
    at = AtThreshold(found=3, missed=1, false_alarms=1, silent=1, precision=0.5, recall=0.5, dice=0.25)
    level = ImageLevel((0.9, 0.8, 0.7, 0.6, 0.6, 0.1), (False, False, False, False, True, True))
    validation = replace(found, image_level=level)
    bins = [(0.1, 0.6, 3, 1), (0.7, 0.9, 3, 3)]
    proposed = Thresholds("mine-VAL", {"mine-VAL": validation}, [("balanced", 0.65, {"mine-VAL": at})], bins, ("late",))
    path = tmp_path / "report.html"
    write_report(path, {"First": {"s": found}, "Second": {"s": found}}, {"Second": proposed})
    page = Page(path)
    assert not page.unclosed and ["0.65", "balanced", "3/4, 1/2, 0.250"] in page.rows
    text = " ".join(" ".join(page.texts).split())
    assert "Second: proposed from mine-VAL only; not tested on other images" in text and "Not evaluated on late" in text
    assert "mine-VAL: 0.10 to 0.60: 1 of 3, 0.70 to 0.90: 3 of 3" in text and "Calibration" in text
    [line] = [named for tag, named in page.tags if tag == "polyline"][:1]
    assert line["class"] == "line run-1" and len((line["points"] or "").split()) == 2
    assert "thresholds" in [named.get("id") for tag, named in page.tags if tag == "section"]


def test_no_name_breaks_the_page(found: Evaluation, tmp_path: Path) -> None:
    tags = [tag for tag, _ in written(tmp_path / "plain.html", {"r": {"s": found}}).tags]
    page = written(tmp_path / "<b> & 100%#.html", {"<script>r": {"</section><i>&amp;": found}, "$data": {"'\"": found}})
    assert page.data["groups"][0]["names"] == list(ODD_NAMES)
    assert page.data["groups"][0]["run"] == "<script>r"
    assert sum(tag == "script" for tag, _ in page.tags) == tags.count("script") == 2
    assert not {"b", "i"} & ({tag for tag, _ in page.tags} - {"i"})
    assert sum(tag == "img" for tag, _ in page.tags) == 0
    assert "</section><i>&amp;" in page.texts and "$data" in "".join(page.texts)


def test_many_images_are_stored_next_to_the_page(
    found: Evaluation, other: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "INLINE_PICTURES", 3)
    path, folder = tmp_path / "a b%.html", tmp_path / "a b%_files"
    page = written(path, {"run": {"shapes": found}})
    sources = [strip[0] for strip in page.data["groups"][0]["strips"]]
    assert all(source.startswith("a%20b%25_files/") for source in sources)
    assert {path.name for path in folder.iterdir()} == {source.split("/")[1] for source in sources}
    source, width, height, panels = page.data["groups"][0]["strips"][0]
    with Image.open(folder / source.split("/")[1]) as strip:
        assert strip.size == (panels * width + (panels - 1) * 8, height) == (184, 30)

    (folder / "notes.txt").write_text("mine")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    written(path, {"run": {"shapes": found}})
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times, "what is drawn is not drawn again"
    written(path, {"run": {"others": other}})
    assert [path.name for path in folder.iterdir()] == ["notes.txt"], "what no page shows goes; the rest is not ours"


def test_an_interruption_keeps_the_earlier_page(
    found: Evaluation, other: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "INLINE_PICTURES", 1)
    before = written(tmp_path / "report.html", {"run": {"s": other}})

    class Impatient:
        say = staticmethod(SILENT.say)
        note = staticmethod(lambda text: None)

        @contextmanager
        def task(self, label: str, total: int, unit: str = "images") -> Iterator["Impatient"]:
            yield self

        def advance(self, units: int = 1) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path / "report.html", {"run": {"s": found}}, progress=Impatient())
    assert (tmp_path / "report.html").read_text("utf-8") == before.source
    for strip in before.data["groups"][0]["strips"]:
        assert (tmp_path / strip[0]).exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_missing_and_unreadable_images_leave_three_panels(found: Evaluation, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    cases = (replace(found.pairs[0], image=None), replace(found.pairs[1], image=broken), *found.pairs[2:])
    said: list[str] = []

    class Listener:
        say = staticmethod(said.append)
        task = staticmethod(SILENT.task)

    write_report(tmp_path / "report.html", {"run": {"s": replace(found, pairs=cases)}}, progress=Listener())
    strips = Page(tmp_path / "report.html").data["groups"][0]["strips"]
    assert [strip[3] for strip in strips] == [3, 3, 4, 4, 4, 4]
    [complaint] = said
    assert "broken.jpg" in complaint


def test_images_without_an_object_have_their_own_section(found: Evaluation, tmp_path: Path) -> None:
    assert "Images without an object" not in written(tmp_path / "plain.html", {"run": {"s": found}}).source
    level = ImageLevel((*found.image_level.responses, 0.7, 0.1), (*found.image_level.empty, True, True))
    mixed = replace(found, images=8, image_level=level)
    page = written(tmp_path / "mixed.html", {"run": {"mixed": mixed, "plain": found}})
    assert page.source.count("<h3>Images without an object</h3>") == 1
    assert ["run", "0.500", "0.000", "1.000", "2"] in page.rows
    spoilt = [f"{found.metrics[metric_of(name)[0]]:.3f}" for name in SPOILT]
    assert ["run", *spoilt, "6"] in page.rows
    assert sum(tag == "svg" for tag, _ in page.tags) == 2 * (2 + len(PER_IMAGE)) + 1 + 2  # responses, and their legend


def test_counts_of_one_image_are_singular(tmp_path: Path) -> None:
    page = written(tmp_path / "report.html", {"run": {"s": draw_evaluation(tmp_path, ["only"])}})
    assert "1 image" in page.texts and "1 images" not in page.source


@pytest.mark.parametrize(("values", "bins"), [(1, 5), (39, 5), (115, 10), (1000, 20), (5019, 25), (10**6, 25)])
def test_few_scores_have_few_bins_that_end_at_ticks(values: int, bins: int) -> None:
    chart = histogram({0: np.full(values, 0.5)}, "S", 1.0, "Number of images by S")
    edges = {float(corner.split(",")[0]) for corner in chart.shapes[0].split()}
    ticks = {round(float(chart.across(value)), 1) for value, _ in chart.x.ticks()}
    assert len(edges) == bins + 1 and len(ticks) == 6 and ticks <= edges


def test_pages_need_the_extension_html(tmp_path: Path, found: Evaluation) -> None:
    with pytest.raises(UsageError, match=r"ends in \.html"):
        write_report(tmp_path / "report.pdf", {"run": {"s": found}})
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        write_report(tmp_path / "folder.html", {"run": {"s": found}})


def near(pixel: Any, colour: tuple[int, int, int], within: int = 3) -> bool:
    return all(abs(int(a) - b) <= within for a, b in zip(pixel, colour, strict=True))


def test_errors_are_coloured_by_kind() -> None:
    truth, prediction = np.zeros((60, 80), np.uint8), np.zeros((60, 80), np.uint8)
    truth[:, :40] = 255
    prediction[:, 20:60] = 200
    white = Image.new("RGB", (80, 60), (255, 255, 255))
    image, wanted, shown, errors = (
        np.asarray(panel) for panel in draw_panels(truth, prediction, white, normalize=False)
    )
    assert image.shape == wanted.shape == shown.shape == errors.shape == (60, 80, 3)
    assert near(errors[30, 10], FALSE_NEGATIVE) and near(errors[30, 50], FALSE_POSITIVE)
    assert near(errors[30, 30], (255, 255, 255)) and near(errors[30, 70], (85, 85, 85))
    assert shown[30, 30, 0] == 200 and wanted[30, 10, 0] == 255


def test_predictions_are_shown_as_evaluated() -> None:
    truth = np.zeros((8, 8), np.uint8)
    faint = truth.copy()
    faint[0, 0] = 1
    stretched, plain = (draw_panels(truth, faint, None, normalize=switch) for switch in (True, False))
    assert np.asarray(stretched[1]).max() == 255 and np.asarray(plain[1]).max() == 1
    assert near(np.asarray(stretched[2])[0, 0], FALSE_POSITIVE) and not near(np.asarray(plain[2])[0, 0], FALSE_POSITIVE)
    black = draw_panels(truth, truth, None, normalize=True)
    assert len(black) == 3 and np.asarray(black[1]).max() == 0


def test_thin_errors_stay_visible() -> None:
    truth = np.zeros((1000, 1600), np.uint8)
    prediction = truth.copy()
    prediction[:, 801] = 255
    errors = np.asarray(draw_panels(truth, prediction, None, normalize=True)[-1]).astype(int)
    assert errors.shape == (200, 320, 3)
    assert errors[100, 160, 0] > errors[100, 158, 0] + 20


def test_images_with_extreme_shapes_are_drawn(tmp_path: Path) -> None:
    for shape in ((1, 3000), (3000, 1), (1, 1)):
        truth = np.full(shape, 255, np.uint8)
        assert all(min(panel.size) >= 1 for panel in draw_panels(truth, truth, None, normalize=True))
