"""Takes the README's pictures of the page: docs/page_desktop.jpg and docs/page_phone.jpg.

It starts `codeformer demo` with the lite weights, and a chromium without a window that restores data/1.jpg.
"""

import argparse
import base64
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT: Final = Path(__file__).resolve().parent.parent
PORTRAIT: Final = ROOT / "data" / "1.jpg"
BROWSER: Final = shutil.which("chromium")
DRIVER: Final = shutil.which("chromedriver")
_QUALITY: Final = 82
_PATIENCE_S: Final = 120
_RESTORED: Final = """
const pictures = [...document.querySelectorAll('.result:not([hidden]) img')];
return pictures.length > 0 && pictures.every(one => one.complete && one.naturalWidth);
"""


def main() -> None:
    """Writes both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs", metavar="DIR")
    options = parser.parse_args()
    with running_page() as url, running_browser() as driver:
        for name, width, height, scale, shown in (
            ("page_desktop", 1280, 900, 1.0, "body"),
            ("page_phone", 390, 844, 1.5, ".card"),
        ):
            resize(driver, width, height, scale)
            driver.get(url)
            driver.find_element(By.ID, "photos").send_keys(str(PORTRAIT))
            WebDriverWait(driver, _PATIENCE_S).until(lambda driver: driver.execute_script(_RESTORED))
            place = driver.find_element(By.CSS_SELECTOR, shown).rect
            picture = driver.execute_cdp_cmd(
                "Page.captureScreenshot",
                {"format": "jpeg", "quality": _QUALITY, "captureBeyondViewport": True}
                | {"clip": {**place, "scale": 1}},
            )
            path = options.output / f"{name}.jpg"
            path.write_bytes(base64.b64decode(picture["data"]))
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


@contextlib.contextmanager
def running_page(environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Runs `codeformer demo` with the lite weights on a free port; gives the page's address."""
    command = [sys.executable, "-m", "codeformer", "demo", "--port", "0", "--weights", "lite"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)  # noqa: S603
    try:
        line = process.stdout.readline() if process.stdout else ""
        address = re.search(r"http://127\.0\.0\.1:\d+", line)
        if address is None:
            raise SystemExit(f"expected the address of the page, got {line!r}.")
        yield address[0]
    finally:
        process.terminate()
        process.wait()
        if process.stdout:
            process.stdout.close()


@contextlib.contextmanager
def running_browser() -> Iterator[Any]:
    """Runs chromium without a window, with logs of its requests and errors."""
    if BROWSER is None or DRIVER is None:
        raise SystemExit("expected chromium and chromedriver; Debian: sudo apt install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    # Its sandbox refuses to run as root.
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def resize(driver: Any, width: int, height: int, scale: float = 1.0) -> None:
    """Gives the page's window a size in px, as on a phone if it is narrow."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


if __name__ == "__main__":
    main()
