"""A headless Chromium that opens pages as files, and knows what they asked of the network."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
    "--hide-scrollbars",
)
# What Chromium asks for of its own accord is no request of a page.
_LOCAL = ("file:", "data:", "chrome:", "about:")


class Browser:
    """One window.

    Args:
        driver: of selenium.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Show a page.

        Args:
            scheme: the user's: "light" or "dark".
        """
        self.size(width, height)
        self.prefer(scheme)
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(path.as_uri())

    def size(self, width: int, height: int) -> None:
        """Of what is seen of the page, in CSS pixels."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def prefer(self, scheme: str, media: str = "") -> None:
        """Set the user's colour scheme.

        Args:
            media: "print" for a page as it is printed.
        """
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body returns on the page."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        """The first element that a CSS selector finds."""
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        """All of them."""
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def mouse(self, kind: str, x: float, y: float, **details: Any) -> None:
        """An event of the mouse, as the system would send it; at a point of the window."""
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, **details})

    def keys(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        chain = ActionChains(self.driver, duration=0)
        for key in keys:
            chain.send_keys(key)
        chain.perform()

    def console(self) -> list[str]:
        """Errors and warnings since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that the page has asked the network for."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith(_LOCAL)]

    def picture_down_to(self, selector: str, scale: float = 1.0) -> bytes:
        """A picture (PNG) of the page from its top to the end of an element.

        Args:
            scale: pixels of the picture per CSS pixel.
        """
        width, end = self.run(
            "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [innerWidth, box.bottom + scrollY]",
            selector,
        )
        clip = {"x": 0, "y": 0, "width": width, "height": round(end) + 12, "scale": scale}
        answer = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        return base64.b64decode(answer["data"])


@contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    """A Chromium of its own, gone at the end. Skips the test where there is none, unless one is demanded.

    Args:
        directory: an empty one, for its profile.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver_path = shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        webdriver = None
    missing = [
        name
        for name, found in (("chromium", chromium), ("chromedriver", driver_path), ("selenium", webdriver))
        if not found
    ]
    if missing:
        reason = f"{', '.join(missing)} not found: install chromium, chromium-driver and test/requirements-test.txt"
        if os.environ.get("WARMSTART_REQUIRE_CHROMIUM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (*_OPTIONS, f"--user-data-dir={directory}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
