"""Chromium for tests of the page: the one on this machine, driven by Playwright. What it asks for and complains of is kept."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Locator, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
ANSWERED_BADLY = "Failed to load resource"  # what a browser itself says of each answer that is no 2xx


def missing() -> str:
    """Why there is no browser to test with; empty when there is one."""
    if importlib.util.find_spec("playwright") is None or importlib.util.find_spec("axe_playwright_python") is None:
        return "no browser driver: pip install -c constraints.txt -e '.[e2e]'"
    return "" if chromium() else f"no browser: none of {', '.join(NAMES)} is on the PATH (apt-get install chromium)"


def chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def browsing() -> Iterator[Browser]:
    """A headless browser. While it runs no event loop can be started in this thread: Playwright has one of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium())
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """A page that was opened, and all it did."""

    page: Page
    origin: str
    asked: list[tuple[str, str]] = field(default_factory=list)  # method and URL of every request
    complaints: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)  # what the browser says of answers that are no 2xx

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self.asked.append((request.method, request.url)))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._said)

    def _said(self, message: ConsoleMessage) -> None:
        (self.refusals if message.text.startswith(ANSWERED_BADLY) else self.complaints).append(f"{message.type}: {message.text}")

    @property
    def strays(self) -> list[str]:
        """Requests to anybody but the server."""
        return [url for _, url in self.asked if not url.startswith((f"{self.origin}/", f"blob:{self.origin}/", "data:"))]

    def num_asked(self, method: str, path: str) -> int:
        return self.asked.count((method, self.origin + path))

    def drawn(self, number: int) -> Locator:
        return self.page.locator("#drawn-list button").nth(number)

    def field(self, label: str) -> Locator:
        return self.page.get_by_label(label, exact=True)

    def type(self, *captions: str) -> None:
        """Into the rows of the ranking, from the first one on; rows are added as needed."""
        for number, caption in enumerate(captions, start=1):
            if self.field(f"Caption {number}").count() == 0:
                self.page.get_by_role("button", name="Add a caption").click()
            self.field(f"Caption {number}").fill(caption)

    def rank(self) -> list[tuple[str, float, float]]:
        """Ask, and read the table: caption, score and win probability of each place."""
        self.page.get_by_role("button", name="Rank captions").click()
        return self.ranking()

    def ranking(self) -> list[tuple[str, float, float]]:
        self.page.locator("#result[aria-busy=false] table").wait_for()
        read = (
            "rows => rows.map(row => [row.querySelector('bdi').textContent, ...[...row.querySelectorAll('data')].map(each => +each.value)])"
        )
        found: list[list[Any]] = self.page.locator("table tbody tr").evaluate_all(read)
        return [(caption, score, win) for caption, score, win in found]

    def fault(self) -> str:
        """What the alert says, once it says something."""
        self.page.locator("#faults > *").first.wait_for()
        return self.page.get_by_role("alert").inner_text()


@contextmanager
def visiting(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    """The page in a profile of its own, loaded."""
    context = browser.new_context(**options)
    context.set_default_timeout(60_000)
    try:
        visit = Visit(context.new_page(), url.rstrip("/"))
        visit.page.goto(url)
        visit.page.locator("#drawn-list button").first.wait_for(state="attached")
        visit.page.locator("#model, #key-form").filter(visible=True).first.wait_for()
        yield visit
    finally:
        context.close()
