"""A headless Chromium with its driver, if the machine has them."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Browser:
    """A browser for tests: a thin layer over selenium's driver."""

    driver: Any
    pictures: Path

    def look(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Set the window's size in CSS pixels, and the preferred colour scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        preference = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})

    def open(self, page: Path | str) -> None:
        self.complaints()
        self.driver.get(page.as_uri() if isinstance(page, Path) else page)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector: str) -> list[str]:
        found = self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)
        return [str(text) for text in found]

    def complaints(self) -> list[str]:
        """The console's messages since the last call: errors and warnings."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def photograph(self, name: str) -> Path:
        """The window as a PNG, in the folder that DSU_SCREENSHOTS names, if any."""
        path = self.pictures / f"{name}.png"
        self.driver.save_screenshot(str(path))
        return path


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    programs = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    program, driver_program = next(filter(None, programs), None), shutil.which("chromedriver")
    if program is None or driver_program is None:
        pytest.skip("there is no Chromium with chromedriver on this machine")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    os.environ.setdefault("SE_AVOID_STATS", "true")  # or selenium reports its use over the network
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # No sandbox: in a container Chromium has no right to make one, and it opens our own files only.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    named = os.environ.get("DSU_SCREENSHOTS")
    pictures = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    pictures.mkdir(parents=True, exist_ok=True)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_program))
    try:
        yield Browser(driver, pictures)
    finally:
        driver.quit()
