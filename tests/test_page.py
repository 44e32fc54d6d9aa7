"""The page in a real browser without a window, in front of the real program with the lite weights."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from codeformer.imaging.files import decode_image
from tests.shared import read_picture

pytest.importorskip("selenium", reason="needs selenium (requirements-dev.txt)")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from scripts.page_shots import (
    BROWSER,
    DRIVER,
    PORTRAIT,
    resize,
    running_browser,
    running_page,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER or not DRIVER, reason="needs chromium and chromedriver"),
]

PATIENCE_S = 60
DESKTOP, PHONE = (1280, 900), (390, 844)

# Visible elements that stick out of the window, and texts that stick out of their elements.
CUT_OFF = """
const out = [];
const whole = document.documentElement.scrollWidth;
if (whole > innerWidth) out.push(`page: ${whole}`);
for (const one of document.querySelectorAll("body *:not(option, title, script, template)")) {
  if (!one.checkVisibility({visibilityProperty: true}) || getComputedStyle(one).clipPath !== "none") continue;
  if (one.closest(".hidden, thead, .boxes, svg")) continue;
  const place = one.getBoundingClientRect();
  const name = `${one.tagName}.${one.className} ${one.textContent.trim().slice(0, 30)}`;
  if (place.width && (place.right > innerWidth + 1 || place.left < -1)) out.push(`window: ${name}`);
  if (getComputedStyle(one).display === "inline") continue;
  const holdsText = ["BUTTON", "TH", "TD", "LABEL", "P", "H2", "LI"].includes(one.tagName);
  if (holdsText && one.scrollWidth > one.clientWidth + 1) out.push(`text: ${name}`);
}
return out;
"""


class Page:
    """A browser at the page's address.

    Attributes:
        driver: of the browser.
        url: the page's.
    """

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self, size_wh: tuple[int, int] = DESKTOP) -> None:
        resize(self.driver, *size_wh)
        self.driver.get(self.url)

    def all(self, selector: str) -> list[WebElement]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def one(self, selector: str) -> WebElement:
        element: WebElement = self.driver.find_element(By.CSS_SELECTOR, selector)
        return element

    def until(self, holds: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, PATIENCE_S, poll_frequency=0.05).until(lambda _: holds())

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def restored(self, count: int) -> None:
        """Waits until so many photos are through, with or without success."""
        self.until(lambda: len(self.all(".card[aria-busy=false]")) == count)
        self.until(
            lambda: self.script(
                "return [...document.querySelectorAll('.result:not([hidden]) img')]"
                ".every(one => one.complete && one.naturalWidth)"
            )
        )

    def after(self) -> str:
        return str(self.one(".after").get_attribute("src"))

    def addresses(self) -> list[str]:
        """What the browser has asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """Errors of scripts and of the page's policy since the last call."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["source"] in {"javascript", "security"}]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The page's address, and the folder that the program has for temporary files."""
    temporary = tmp_path_factory.mktemp("temporary")
    with running_page(os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}) as url:
        yield url, temporary


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as driver:
        yield driver


@pytest.fixture
def page(browser: Any, address: tuple[str, Path]) -> Iterator[Page]:
    """The page; afterwards, no request has left it and no script has failed."""
    page = Page(browser, address[0])
    page.addresses()
    page.complaints()
    yield page
    asked = page.addresses()
    assert len(asked) > 2
    assert [one for one in asked if not one.startswith((page.url, "data:"))] == []
    assert page.complaints() == []


@pytest.mark.parametrize("size_wh", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_photos_from_upload_to_download(
    page: Page, size_wh: tuple[int, int], tmp_path: Path, address: tuple[str, Path]
) -> None:
    page.open(size_wh)
    assert page.script(CUT_OFF) == []
    bad = tmp_path / "not a picture, but a name as long as names of photos tend to be.jpg"
    bad.write_text("no picture")
    page.one("#photos").send_keys(f"{PORTRAIT}\n{bad}")
    page.restored(2)
    good, failed = page.all(".card")
    assert failed.find_element(By.CSS_SELECTOR, ".status").text.startswith("Not a picture that can be read")
    for selector in ("progress", ".stop", ".result"):
        assert not failed.find_element(By.CSS_SELECTOR, selector).is_displayed()
    assert not good.find_element(By.CSS_SELECTOR, ".state").is_displayed()
    assert "Computed in" in good.find_element(By.CSS_SELECTOR, ".times").text
    assert page.script(CUT_OFF) == []

    # The slider, by keyboard and by dragging in the picture.
    slider, viewer = page.one(".slide input"), page.one(".viewer")
    edge = page.one(".edge")
    middle = edge.rect["x"]
    slider.send_keys(Keys.ARROW_RIGHT * 20)
    assert slider.get_attribute("value") == "70"
    width = viewer.rect["width"]
    assert edge.rect["x"] == pytest.approx(middle + 0.2 * width, abs=2)
    ActionChains(page.driver).move_to_element(viewer).click_and_hold().move_by_offset(
        round(-0.3 * width), 0
    ).release().perform()
    assert float(str(slider.get_attribute("value"))) == pytest.approx(20, abs=2)
    assert page.all(".box.out") == [], "a drag that begins on a face is no click on it"

    # A face is left out by a click and taken back in by keyboard.
    whole = page.after()
    restored = download(page)
    page.one(".box").click()
    page.until(lambda: page.after() != whole)
    assert len(page.all(".box.out")) == 1
    without = page.after()
    original = read_picture(PORTRAIT).astype(int)
    assert abs(download(page) - original).mean() < 2
    assert abs(restored - original).mean() > 2 * abs(download(page) - original).mean()
    page.one(".faces .list input").send_keys(Keys.SPACE)
    page.until(lambda: page.after() not in {whole, without})
    assert page.all(".box.out") == []
    assert (download(page) == restored).all()

    # The strength, without another run of the networks.
    latest = page.after()
    page.one("#strength").send_keys(Keys.HOME)
    page.until(lambda: page.after() != latest)
    page.until(lambda: abs(download(page) - original).mean() < 2)

    good.find_element(By.CSS_SELECTOR, ".remove").click()
    failed.find_element(By.CSS_SELECTOR, ".remove").click()
    assert page.one("#try").is_displayed()
    assert list(address[1].iterdir()) == [], "the program has left files"


def download(page: Page) -> Any:
    link = page.one(".download")
    assert link.get_attribute("download") == "1_restored.jpg"
    reply = requests.get(str(link.get_attribute("href")), timeout=PATIENCE_S)
    return decode_image(reply.content).astype(int)


def test_two_tabs_at_the_same_time(page: Page) -> None:
    page.open()
    first = page.driver.current_window_handle
    page.one("#sample").click()
    page.driver.switch_to.new_window("tab")
    second = page.driver.current_window_handle
    page.open()
    page.one("#sample").click()
    for handle in (first, second):
        page.driver.switch_to.window(handle)
        page.restored(1)
        assert len(page.all(".box")) == 1
    page.driver.switch_to.window(second)
    page.driver.close()
    page.driver.switch_to.window(first)
    # The other tab's photo went with it; this one's is still there.
    before = page.after()
    page.one(".box").click()
    page.until(lambda: page.after() != before)


def test_a_comparison_at_both_widths_and_as_a_file(page: Page, tmp_path: Path) -> None:
    page.open()
    page.one("#tab-restore").send_keys(Keys.ARROW_RIGHT)
    assert page.script("return document.activeElement.id") == "tab-compare"
    page.one("#compare-go").click()
    assert page.one("#compare-state").text == "Choose a photo first."
    page.one("#compare-photo").send_keys(str(PORTRAIT))
    page.one("#compare-clean").send_keys(str(PORTRAIT))
    page.one("[name=fidelities][value='0.0']").send_keys(Keys.SPACE)
    page.one("#price").send_keys("0.81")
    page.one("#compare-go").click()
    page.until(lambda: "Done" in page.one("#compare-state").text)
    text = page.one("#comparison").text
    for expected in (
        "CodeFormer, fidelity 0.5",
        "CodeFormer, fidelity 1",
        "Cost of 1000 photos",
        "PSNR, dB",
        "23.83",
    ):
        assert expected in text
    assert "fidelity 0\n" not in text
    for size_wh in (DESKTOP, PHONE):
        resize(page.driver, *size_wh)
        assert page.script(CUT_OFF) == []

    link = page.one("#compare-state a")
    file = tmp_path / "comparison.html"
    file.write_bytes(requests.get(str(link.get_attribute("href")), timeout=PATIENCE_S).content)
    page.addresses()
    page.driver.get(file.as_uri())
    asked = page.addresses()
    assert [one for one in asked if not one.startswith(("data:", file.as_uri()))] == []
    assert page.script("return [...document.images].every(one => one.complete && one.naturalWidth > 100)")
    assert page.script(CUT_OFF) == []
    bars = page.all("table .bar rect")
    assert len(bars) > 4
    assert all(bar.rect["width"] > 0 for bar in bars)
    # Its style came with it.
    assert page.script("return getComputedStyle(document.querySelector('.grid')).display") == "grid"
    page.open()


def test_everything_has_a_name_and_is_reached_by_keyboard(page: Page) -> None:
    page.open()
    page.one("#sample").send_keys(Keys.ENTER)
    page.restored(1)
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "checkbox", "slider", "combobox", "link", "tab", "image", "progressbar", "tabpanel"}
    found = [node for node in tree if not node["ignored"] and node["role"]["value"] in roles]
    assert len(found) > 10
    assert [node["role"]["value"] for node in found if not node.get("name", {}).get("value")] == []
    alts = [node["name"]["value"] for node in found if node["role"]["value"] == "image"]
    assert {"sample portrait.jpg as it was", "sample portrait.jpg restored"} <= set(alts)

    page.script("const top = document.querySelector('h1'); top.tabIndex = -1; top.focus()")
    reached = []
    for _ in range(30):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        reached.append(
            page.script(
                "const one = document.activeElement;"
                "return one.id || one.className || one.closest('label, details')?.className"
            )
        )
        if reached[-1] == "button primary download":
            break
    assert reached == [
        *("tab-restore", "photos", "restorer", "fidelity", "strength", "more", "again"),
        # Of the photo: the slider, its face, the boxes.
        *("remove", "slide", "check", "check boxes-shown", "button primary download"),
    ]


def test_a_program_that_has_gone_is_told_in_a_sentence(page: Page) -> None:
    page.open()
    conditions = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)
    try:
        page.one("#photos").send_keys(str(PORTRAIT))
        page.restored(1)
        assert page.one(".status").text.startswith("The program does not answer.")
        assert not page.one(".state progress").is_displayed()
    finally:
        online = conditions | {"offline": False, "downloadThroughput": -1, "uploadThroughput": -1}
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", online)
