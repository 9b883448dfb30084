"""The report's page in a real browser: sorting, filtering, keyboard, no console messages, and fast loading."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import ODD_NAMES, draw_cases, draw_evaluation
from PIL import Image

from dsu.evaluation.evaluate import Evaluation, evaluate
from dsu.report.page import write_report

pytestmark = pytest.mark.browser

Browser = Any  # tests/browser/conftest.py's, which has no module name to import it by
NAMES = [*ODD_NAMES, *(f"img_{index:03}" for index in range(60))]

# Pictures out of sight are not loaded before they are scrolled to.
IN_SIGHT_AND_LOADED = (
    "return [...document.images].filter((image) => { const box = image.getBoundingClientRect();"
    "return box.top < innerHeight && box.bottom > 0 }).every((image) => image.complete && image.naturalWidth)"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return draw_evaluation(tmp_path_factory.mktemp("found"), NAMES, size=(120, 90))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return draw_evaluation(tmp_path_factory.mktemp("other"), NAMES[:20], size=(90, 120), seed=7)


@pytest.fixture(scope="module")
def page(found: Evaluation, other: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, {"first": {"DUTS-TE": found, "mine": other}, "second": {"DUTS-TE": other}})
    return path


@pytest.fixture
def at_page(browser: Browser, page: Path) -> Browser:
    browser.look()
    browser.open(page)
    return browser


def until(condition: Callable[[], object], seconds: float = 5) -> None:
    """Wait for what a browser does in its own time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.02)


def choose(browser: Browser, select: str, value: str) -> None:
    browser.run(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))",
        select,
        value,
    )


def shown(browser: Browser) -> list[str]:
    return list(browser.texts("#cards .name"))


def by_score(found: Evaluation, metric: str, *, reverse: bool) -> list[str]:
    rows = sorted(found.per_image, key=lambda row: float(row[metric]), reverse=reverse)
    return [str(row["name"]) for row in rows]


def press(browser: Browser, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser.driver).send_keys(*keys).perform()


def test_images_are_sorted_by_any_metric(at_page: Browser, found: Evaluation) -> None:
    assert shown(at_page) == by_score(found, "S", reverse=False)[:48]
    choose(at_page, "metric", "MAE")
    assert shown(at_page) == by_score(found, "MAE", reverse=True)[:48]
    choose(at_page, "order", "best")
    assert shown(at_page) == by_score(found, "MAE", reverse=False)[:48]
    worst = min(float(row["MAE"]) for row in found.per_image)
    assert at_page.texts("#cards .score b")[0] == f"{worst:.3f}"
    choose(at_page, "order", "name")
    assert shown(at_page)[-2:] != [] and "img_000" in shown(at_page)
    at_page.run("document.getElementById('next-page').click()")
    assert len(shown(at_page)) == len(NAMES) - 48 and at_page.texts("#page") == ["2 of 2"]
    assert at_page.complaints() == []


def test_filters_by_name_set_and_run(at_page: Browser, other: Evaluation) -> None:
    field = at_page.driver.find_element("id", "filter")
    field.send_keys("IMG_00")
    assert set(shown(at_page)) == {f"img_{index:03}" for index in range(10)}
    assert at_page.texts("#count") == [f"10 of {len(NAMES)} images"]
    field.clear()
    field.send_keys("<SCRIPT>")
    assert shown(at_page) == ["<script>alert(1)"]
    field.clear()
    field.send_keys("nowhere")
    assert shown(at_page) == []
    field.clear()
    field.send_keys(" ")
    choose(at_page, "run", "second")
    assert shown(at_page) == by_score(other, "S", reverse=False)
    choose(at_page, "set", "mine")
    assert at_page.texts("#count") == ["20 images"]
    assert at_page.run("return document.getElementById('run').closest('label').hidden")
    assert at_page.complaints() == []


def test_the_keyboard_opens_moves_and_closes(at_page: Browser, found: Evaluation) -> None:
    from selenium.webdriver.common.keys import Keys

    worst = by_score(found, "S", reverse=False)
    at_page.run("document.getElementById('filter').focus()")
    press(at_page, Keys.TAB)
    press(at_page, Keys.ENTER)
    assert at_page.run("return document.getElementById('lightbox').open")
    assert at_page.texts("#lightbox-name") == worst[:1]
    press(at_page, Keys.ARROW_LEFT)
    assert at_page.texts("#lightbox-name") == worst[:1]
    press(at_page, *[Keys.ARROW_RIGHT] * 50)
    assert at_page.texts("#lightbox-name") == worst[50:51]
    assert at_page.texts("#lightbox-place") == [f"51 of {len(NAMES)}"]
    assert at_page.texts("#lightbox-panels figcaption") == ["image", "ground truth", "prediction", "errors"]
    score = next(float(row["S"]) for row in found.per_image if row["name"] == worst[50])
    assert at_page.texts("#lightbox-scores dd")[0] == f"{score:.3f}"
    press(at_page, *[Keys.ARROW_RIGHT] * 14)
    at_page.run("document.getElementById('lightbox-next').focus()")
    press(at_page, Keys.ENTER)
    assert at_page.texts("#lightbox-name") == worst[-1:]
    press(at_page, *[Keys.ARROW_LEFT] * 15)
    assert at_page.texts("#lightbox-name") == worst[50:51]
    press(at_page, Keys.ESCAPE)
    assert not at_page.run("return document.getElementById('lightbox').open")
    until(lambda: at_page.run("return document.activeElement.querySelector('.name')?.textContent") == worst[50])
    assert at_page.complaints() == []


def test_a_panel_shows_its_part_of_the_strip(browser: Browser, tmp_path: Path) -> None:
    """Image, ground truth, prediction and errors of one image, with panels of distinct colours."""
    found = draw_evaluation(tmp_path, ["only"], size=(200, 100))
    for path, grey in ((found.pairs[0].truth, 255), (found.pairs[0].prediction, 0)):
        Image.fromarray(np.full((100, 200), grey, np.uint8)).save(path)
    assert found.pairs[0].image is not None
    Image.new("RGB", (200, 100), (200, 30, 30)).save(found.pairs[0].image)
    write_report(tmp_path / "report.html", {"run": {"set": found}})
    browser.look()
    browser.open(tmp_path / "report.html")
    browser.run("document.querySelector('#cards button').click()")
    until(lambda: browser.run(IN_SIGHT_AND_LOADED))
    picture = np.asarray(Image.open(browser.photograph("panels")).convert("RGB")).astype(int)
    boxes = browser.run(
        "return [...document.querySelectorAll('#lightbox-panels img')].map((i) => {"
        "const b = i.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]})"
    )
    expected = [(200, 30, 30), (255, 255, 255), (0, 0, 0), (0, 114, 178)]
    for (x, y, width, height), colour in zip(boxes, expected, strict=True):
        assert width == pytest.approx(2 * height, rel=0.01)
        for share in (0.02, 0.5, 0.98):
            pixel = picture[int(y + height / 2), int(x + share * width)]
            assert np.abs(pixel - colour).max() < 25, (colour, share, pixel)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_window_in_light_and_dark_mode(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.look(width=width, dark=dark)
    browser.open(page)
    shade = "dark" if dark else "light"
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 22, 25)" if dark else "rgb(255, 255, 255)")
    for section in ("overview", "set-0", "gallery"):
        browser.run(f"document.getElementById('{section}').scrollIntoView({{behavior: 'instant'}})")
        until(lambda: browser.run(IN_SIGHT_AND_LOADED))
        browser.photograph(f"{section}-{width}-{shade}")
    # Wide tables scroll inside their own box; the page itself never does.
    assert browser.run("return document.documentElement.scrollWidth") <= width
    browser.run("document.querySelector('#cards button').click()")
    until(lambda: browser.run(IN_SIGHT_AND_LOADED))
    browser.photograph(f"lightbox-{width}-{shade}")
    assert browser.run("return document.getElementById('lightbox').scrollWidth") <= width
    assert browser.complaints() == []


def test_all_controls_have_accessible_names(at_page: Browser) -> None:
    nameless = at_page.run(
        "return [...document.querySelectorAll('button, select, input, a')].filter((e) =>"
        "!(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map((e) => e.outerHTML)"
    )
    assert nameless == []
    at_page.run("document.querySelector('#cards button').click()")
    alts = at_page.run("return [...document.querySelectorAll('#lightbox img')].map((image) => image.alt)")
    assert [alt.rsplit(": ", 1)[1] for alt in alts] == ["image", "ground truth", "prediction", "errors"]


def test_images_without_an_object_can_be_selected(browser: Browser, tmp_path: Path) -> None:
    cases = draw_cases(tmp_path, ["a", "b", "c"])
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(cases[1].truth)
    for name, chosen in (("mixed", cases), ("plain", cases[::2])):
        write_report(tmp_path / f"{name}.html", {"run": {"set": evaluate(chosen, workers=1)}})
    browser.look()
    browser.open(tmp_path / "mixed.html")
    choose(browser, "kind", "without an object")
    assert shown(browser) == ["b"] and browser.texts("#count") == ["1 of 3 images"]
    choose(browser, "kind", "with an object")
    assert sorted(shown(browser)) == ["a", "c"]
    browser.open(tmp_path / "plain.html")
    assert browser.run("return document.getElementById('kind').closest('label').hidden")
    assert browser.complaints() == []


def test_every_column_has_its_heading(at_page: Browser) -> None:
    assert at_page.texts("#cards li:first-child .heading") == ["image", "ground truth", "prediction", "errors"]
    apart = at_page.run(
        "return [...document.querySelectorAll('#cards li:first-child .column')].map((column) => {"
        "const [heading, panel] = [...column.children].map((e) => e.getBoundingClientRect());"
        "return Math.abs(heading.x - panel.x) + Math.max(0, heading.bottom - panel.y)})"
    )
    assert apart == [0, 0, 0, 0], "above its own picture"


@pytest.mark.slow
def test_a_page_with_five_thousand_images_loads_in_seconds(browser: Browser, tmp_path: Path) -> None:
    """The size of DUTS-TE. Bounds are generous, for busy machines; the figures are printed."""
    found = draw_evaluation(tmp_path, [f"ILSVRC2012_test_{index:08}" for index in range(5019)], size=(32, 24))
    page = tmp_path / "report.html"
    started = time.perf_counter()
    write_report(page, {"run": {"DUTS-TE": found}})
    written = time.perf_counter() - started
    browser.look()
    browser.open(page)
    until(lambda: browser.run("return performance.getEntriesByType('navigation')[0].loadEventEnd > 0"))
    opened = browser.run("return performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
    assert browser.texts("#count") == ["5,019 images"]
    resorted = browser.run(
        "const start = performance.now(); const s = document.getElementById('metric'); s.value = 'MAE';"
        "s.dispatchEvent(new Event('change')); document.body.offsetHeight; return performance.now() - start"
    )
    frames = browser.driver.execute_async_script(
        "const done = arguments[0]; const times = []; let last = performance.now(); scrollTo(0, 0);"
        "function step(now) { times.push(now - last); last = now; scrollBy({top: 60, behavior: 'instant'});"
        "const left = document.documentElement.scrollHeight - innerHeight - scrollY;"
        "left > 2 && times.length < 600 ? requestAnimationFrame(step) : done(times.slice(1)); }"
        "requestAnimationFrame(step);"
    )
    size = page.stat().st_size / 1e6
    print(
        f"5,019 images: written in {written:.1f} s, page {size:.2f} MB, opened in {opened:.2f} s, sorted in "
        f"{resorted:.0f} ms, scrolled at {np.median(frames):.0f} ms a frame (95 %: {np.percentile(frames, 95):.0f} ms)"
    )
    assert size < 2
    assert opened < 6
    assert resorted < 1500
    assert np.percentile(frames, 95) < 250
    assert browser.complaints() == []
