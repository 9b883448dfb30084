"""The server's page in a real browser: upload images, show and save masks, by mouse and keyboard."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import load_two_heads, photograph, png

from dsu.pictures import overlay
from dsu.serving.heads import ServedHead
from dsu.settings import ServingSettings

pytestmark = pytest.mark.browser

Browser = Any  # tests/browser/conftest.py's, which has no module name to import it by

PIXELS = """
const canvas = document.querySelectorAll(arguments[0])[arguments[1]], all = canvas.getContext("2d")
  .getImageData(0, 0, canvas.width, canvas.height); return [canvas.width, canvas.height, Array.from(all.data)]
"""


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ServedHead]:
    return load_two_heads(tmp_path_factory.mktemp("served"))


def served(heads: Mapping[str, ServedHead]) -> Iterator[str]:
    """The address of a server in this process."""
    uvicorn = pytest.importorskip("uvicorn")
    from dsu.serving.app import create_app

    app = create_app(heads, ServingSettings(max_megabytes=2))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def one(heads: Mapping[str, ServedHead]) -> Iterator[str]:
    """A server with one head, whose threshold is near the median of its maps."""
    yield from served({"second": replace(heads["second"], threshold=0.75)})


@pytest.fixture(scope="module")
def two(heads: Mapping[str, ServedHead]) -> Iterator[str]:
    yield from served(heads)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Image files; one of them is rotated by EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.png").write_bytes(png(photograph(0)))
    (tmp_path / "turned.jpg").write_bytes(png(photograph(1), "JPEG", exif=exif))
    return [tmp_path / "a.png", tmp_path / "turned.jpg"]


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.02)


def choose(browser: Browser, *files: Path) -> None:
    browser.driver.find_element("id", "files").send_keys("\n".join(map(str, files)))


def computed(browser: Browser) -> bool:
    waiting = (
        "return [...document.querySelectorAll('.waiting')].filter((e) => !e.hidden && e.textContent == 'computing…')"
    )
    return not browser.run(f"{waiting}.length") and browser.texts("#status") == [""]


def pixels(browser: Browser, selector: str, index: int = 0) -> np.ndarray:
    width, height, values = browser.run(PIXELS, selector, index)
    return np.array(values, np.uint8).reshape(height, width, 4)


def slide(browser: Browser, value: float) -> None:
    browser.run(
        "const t = document.getElementById('threshold'); t.value = arguments[0]; t.dispatchEvent(new Event('input'))",
        value,
    )
    time.sleep(0.2)


def press(browser: Browser, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser.driver).send_keys(*keys).perform()


def grey_of(head: ServedHead, image: Image.Image) -> np.ndarray:
    return (head.segmenter.segment([image])[0] * 255).astype(np.uint8)


@pytest.fixture
def saved(browser: Browser, tmp_path: Path) -> Path:
    """The browser's download folder."""
    folder = tmp_path / "saved"
    folder.mkdir()
    behaviour = {"behavior": "allow", "downloadPath": str(folder)}
    browser.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    return folder


@pytest.fixture
def grey(browser: Browser, one: str, heads: Mapping[str, ServedHead], photos: list[Path]) -> np.ndarray:
    """The map (H, W) of the first photograph, which the page with one head shows."""
    browser.look()
    browser.open(one)
    choose(browser, photos[0])
    until(lambda: computed(browser))
    return grey_of(heads["second"], photograph(0))


def test_the_overlay_follows_the_slider(browser: Browser, grey: np.ndarray) -> None:
    """The layer colours the server's map, and the saved overlay looks the same."""
    for threshold, least in ((0.75, 192), (0.8, 204), (0.6, 153)):
        if threshold != 0.75:
            slide(browser, threshold)
        assert browser.texts("#chosen") == [f"{threshold:.2f}"]
        share = 100 * float((grey >= least).mean())
        assert browser.texts(".verdict") == [f"alarm, {share:.{2 if share < 10 else 1}f} %"]
        layer = pixels(browser, ".layer")
        assert layer.shape[:2] == grey.shape
        inside, outside = grey >= least, grey < least
        line = layer[..., 3] == 255
        assert line.mean() < 0.3
        tint = np.full(grey.shape, 0.45 * 255) if threshold != 0.75 else 0.45 * grey
        assert np.abs(layer[..., 3] - tint)[inside & ~line].max() <= 1
        assert layer[..., 3][outside & ~line].max(initial=0) == 0
        # The same as the overlay of `dsu predict`, except along the contour.
        photo = pixels(browser, ".photo")[..., :3].astype(float)
        alpha = layer[..., 3:].astype(float) / 255
        seen = photo * (1 - alpha) + np.array([255, 32, 140]) * alpha
        drawn_grey = grey if threshold == 0.75 else np.where(inside, np.uint8(255), np.uint8(0))
        drawn = np.asarray(overlay(photograph(0), drawn_grey, 0.75 if threshold == 0.75 else 0.5)).astype(float)
        assert np.median(np.abs(seen - drawn)) <= 1 and (np.abs(seen - drawn).max(axis=-1) > 3).mean() < 0.2
    slide(browser, 1)
    assert browser.texts(".verdict") == ["clear"]
    browser.run("document.getElementById('own').click()")
    until(lambda: browser.texts("#chosen") == ["0.75"])


def test_mask_and_image_are_shown(browser: Browser, grey: np.ndarray) -> None:
    browser.run("document.getElementById('view-mask').click()")
    time.sleep(0.2)
    assert np.array_equal(pixels(browser, ".layer")[..., 0], grey)
    slide(browser, 0.8)
    assert np.array_equal(pixels(browser, ".layer")[..., 0] == 255, grey >= 204)
    browser.run("document.getElementById('view-image').click()")
    time.sleep(0.2)
    assert not pixels(browser, ".layer").any()
    assert np.array_equal(pixels(browser, ".photo")[..., :3], np.asarray(photograph(0)))


def test_outputs_of_two_heads_are_next_to_each_other(browser: Browser, two: str, photos: list[Path]) -> None:
    browser.look()
    browser.open(two)
    choose(browser, *photos)
    until(lambda: computed(browser))
    assert browser.texts("#images h2") == ["a.png", "turned.jpg"]
    assert browser.texts(".head") == 2 * ["first", "second"]
    assert browser.texts("#chosen") == ["per head"]
    boxes = browser.run(
        "return [...document.querySelectorAll('.stack')].map((e) => e.getBoundingClientRect()).map((b) => [b.x, b.y])"
    )
    assert boxes[0][1] == boxes[1][1] and boxes[0][0] < boxes[1][0]
    turned = photograph(1)
    assert pixels(browser, ".layer", 2).shape[:2] == turned.size  # upright: width and height are exchanged
    assert browser.complaints() == []


def test_saved_images_are_those_of_the_server(
    browser: Browser, one: str, photos: list[Path], saved: Path, heads: Mapping[str, ServedHead]
) -> None:
    browser.look()
    browser.open(one)
    choose(browser, photos[0])
    until(lambda: computed(browser))
    slide(browser, 0.8)
    for button in ("mask", "overlay", "cutout"):
        browser.run(
            "[...document.querySelectorAll('.saves button')].find((e) => e.textContent == arguments[0]).click()", button
        )
        until(lambda button=button: (saved / f"a-{button}.png").exists())
    grey = grey_of(heads["second"], photograph(0))
    cut = np.where(grey >= 204, 255, 0)
    assert np.array_equal(np.asarray(Image.open(saved / "a-mask.png")), cut)
    assert np.array_equal(np.asarray(Image.open(saved / "a-cutout.png"))[..., 3], cut)
    assert np.array_equal(
        np.asarray(Image.open(saved / "a-overlay.png")), np.asarray(overlay(photograph(0), cut.astype(np.uint8)))
    )
    browser.run("document.getElementById('table').click()")
    until(lambda: (saved / "table.json").exists())
    [row] = json.loads((saved / "table.json").read_text())
    assert (row["head"], row["image"], row["threshold"], row["area"]) == ("second", "a.png", 0.8, int((cut > 0).sum()))


def test_refused_images_have_an_error_in_their_place(browser: Browser, one: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    noise = np.random.default_rng(0).integers(0, 256, (900, 1000, 3), np.uint8)
    (tmp_path / "large.png").write_bytes(png(Image.fromarray(noise)))
    browser.look()
    browser.open(one)
    choose(browser, tmp_path / "text.png", tmp_path / "large.png")
    until(lambda: computed(browser))
    assert browser.texts(".failed .waiting") == [
        "text.png cannot be read as an image (it is not in a known image format): save it again as PNG or JPEG, or "
        "remove it.",
        "The image is larger than 2 MB: send a smaller one.",
    ]
    browser.complaints()  # the answer 415 is one
    browser.run("document.getElementById('clear').click()")
    until(lambda: browser.texts("#images h2") == [])
    assert browser.run("return document.getElementById('controls').hidden")


def test_images_that_the_browser_can_not_show_have_a_mask(browser: Browser, one: str, tmp_path: Path) -> None:
    (tmp_path / "deep.tif").write_bytes(png(photograph(2).convert("L"), "TIFF"))
    browser.look()
    browser.open(one)
    choose(browser, tmp_path / "deep.tif")
    until(lambda: computed(browser))
    assert pixels(browser, ".layer")[..., 3].min() == 255 and browser.texts(".verdict") != [""]


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_images_are_pasted_and_dropped(browser: Browser, one: str, event: str) -> None:
    browser.look()
    browser.open(one)
    data = base64.b64encode(png(photograph(0))).decode()
    browser.run(
        "const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));"
        "const transfer = new DataTransfer(); transfer.items.add(new File([bytes], 'p.png', {type: 'image/png'}));"
        "document.dispatchEvent(arguments[1] == 'paste' ? new ClipboardEvent('paste', {clipboardData: transfer})"
        ": new DragEvent('drop', {dataTransfer: transfer, cancelable: true}))",
        data,
        event,
    )
    until(lambda: browser.texts("#images h2") == ["p.png"] and computed(browser))
    assert browser.complaints() == []


def test_the_keyboard_reaches_everything(browser: Browser, one: str, photos: list[Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.look()
    browser.open(one)
    choose(browser, photos[0])
    until(lambda: computed(browser))
    browser.run("document.getElementById('files').focus()")
    focused = (
        "return document.activeElement.id || document.activeElement.className || document.activeElement.textContent"
    )
    reached = []
    for _ in range(9):
        press(browser, Keys.TAB)
        reached.append(browser.run(focused))
        if reached[-1] == "threshold":
            press(browser, *[Keys.ARROW_RIGHT] * 5)
        if reached[-1] == "view-overlay":
            press(browser, Keys.ARROW_RIGHT)
            assert browser.run("return document.getElementById('view-mask').checked")
    assert reached == ["threshold", "own", "view-overlay", "table", "clear", "remove", "mask", "overlay", "cutout"]
    assert browser.texts("#chosen") == ["0.80"]
    browser.run("document.querySelector('.remove').focus()")
    press(browser, Keys.ENTER)
    until(lambda: browser.texts("#images h2") == [])
    assert browser.run(focused) == "files"


def test_the_page_has_labels_for_screen_readers(browser: Browser, two: str, photos: list[Path]) -> None:
    browser.look()
    browser.open(two)
    choose(browser, photos[0])
    until(lambda: computed(browser))
    nameless = browser.run(
        "return [...document.querySelectorAll('button, input, [role=img]')].filter((e) => !(e.textContent.trim() ||"
        "e.ariaLabel || e.labels?.length)).map((e) => e.outerHTML)"
    )
    assert nameless == []
    labels = browser.run("return [...document.querySelectorAll('.layer')].map((e) => e.ariaLabel)")
    assert labels[1].startswith("a.png by second, overlay: alarm, ") and labels[1].endswith("at threshold 0.25")
    assert browser.run("return document.getElementById('status').getAttribute('role')") == "status"
    assert browser.run("return localStorage.length + sessionStorage.length + document.cookie.length") == 0


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_window_in_light_and_dark_mode(
    browser: Browser, two: str, photos: list[Path], width: int, dark: bool
) -> None:
    browser.look(width=width, dark=dark)
    browser.open(two)
    shade = "dark" if dark else "light"
    browser.photograph(f"serve-empty-{width}-{shade}")
    choose(browser, *photos)
    until(lambda: computed(browser))
    browser.photograph(f"serve-{width}-{shade}")
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 22, 25)" if dark else "rgb(255, 255, 255)")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    small = browser.run(
        "return [...document.querySelectorAll('button, fieldset label')].filter((e) => e.offsetParent &&"
        "e.getBoundingClientRect().height < (innerWidth < 600 ? 38 : 28)).map((e) => e.textContent)"
    )
    assert small == []
    assert browser.complaints() == []
