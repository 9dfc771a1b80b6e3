"""A headless Chromium for tests of pages: a size, settings, scripts, keys, the console."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --lang=en-US"
)


def missing(what: str) -> None:
    """Skip, or under CI=1, where a browser has to be, fail."""
    message = f"{what}; on Debian: apt-get install chromium chromium-driver, and pip install '.[dev]'"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


class Browser:
    def __init__(self, driver, keys, script: Path):
        self.driver, self.keys, self.script = driver, keys, script.read_text()

    def open(self, page: Path, size: tuple[int, int], **settings) -> None:
        """`page` afresh, with `settings` in its address; then `script`."""
        self.media()
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get("about:blank")
        address = "&".join(f"{name}={value}" for name, value in settings.items())
        self.driver.get(f"{page.as_uri()}#{address}")
        self.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": self.script})

    def media(self, **features: str) -> None:
        """What the system prefers: prefers_color_scheme="dark" and the like; nothing resets."""
        found = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": found})

    def run(self, expression: str, *arguments):
        """The value of a JavaScript expression; `arguments[0]` and so on are Python's."""
        return json.loads(
            self.driver.execute_script(f"return JSON.stringify({expression} ?? null)", *arguments)
        )

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.driver.find_elements("css selector", selector)]

    def attribute(self, selector: str, name: str) -> str:
        return self.find(selector).get_attribute(name)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def type(self, selector: str, text: str) -> None:
        """Replace what a field holds."""
        field = self.find(selector)
        field.send_keys(self.keys.CONTROL, "a")
        field.send_keys(text or self.keys.BACKSPACE)

    def choose(self, selector: str, text: str) -> None:
        self.find(selector).send_keys(text)

    def focus(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0]).focus()", selector)

    def press(self, *names: str) -> None:
        """Keys by selenium's names, to whatever has the focus."""
        for name in names:
            self.driver.switch_to.active_element.send_keys(getattr(self.keys, name))

    def console(self) -> list[str]:
        """What the browser complained of since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@contextmanager
def browser(profile: Path, script: Path):
    """A running browser with an empty `profile` folder."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing(f"no {'chromium' if chromium is None else 'chromedriver'} on the PATH")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
        from selenium.webdriver.common.keys import Keys
    except ImportError:
        missing("no selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "localhost,127.0.0.1")  # selenium talks to chromedriver over the loopback
        running = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Browser(running, Keys, script)
    finally:
        running.quit()
