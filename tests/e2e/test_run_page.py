"""The page of a training run in a real browser: it draws what the server says, says what is unknown, and asks nobody else."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from app.tallies import Expected
from tests.e2e.browser import ANSWERED_BADLY, browsing, missing
from tests.fakes import OracleScorer, picture
from tests.wire.server import Wire, wire

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(missing()), reason=missing())]

KEY = "correct-horse-battery-staple"
IMAGE = base64.b64encode(picture()).decode()
PLOTS = ["Scores", "Mean score", "Groups without spread", "Score against length", "Captions word for word again", "Drift from validation"]
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as running:
        yield running


@contextmanager
def opened(browser: Browser, server: Wire, run_id: str, **options: Any) -> Iterator[Page]:
    """The page, loaded; no script fails, no policy is broken, and nobody but the server is asked."""
    context = browser.new_context(**options)
    page, complaints, asked = context.new_page(), list[str](), list[str]()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(f"{url_of(server)}/runs/{run_id}")
        yield page
    finally:
        context.close()
    assert [text for text in complaints if not text.startswith(ANSWERED_BADLY)] == []
    assert [url for url in asked if not url.startswith((url_of(server), "data:"))] == []


def url_of(server: Wire) -> str:
    return "http://{}:{}".format(*server.address)


def feed(server: Wire, run_id: str, num_groups: int, *, same: bool = False, key: str = "") -> None:
    """Groups of four captions, long and short, or all the same."""
    source = random.Random(num_groups)
    headers = {"X-Run-Id": run_id, **({"Authorization": f"Bearer {key}"} if key else {})}
    with httpx.Client(base_url=url_of(server), headers=headers) as client:
        for number in range(num_groups):
            texts = ["same"] * 4 if same else [f"{number} ".ljust(source.randrange(6, 60), "x") for _ in range(4)]
            client.post("/score", json={"image": IMAGE, "captions": texts}).raise_for_status()


def headline(page: Page, start: str) -> str:
    page.locator("#headline", has_text=start).wait_for()
    return page.locator("#verdict").inner_text()


@pytest.fixture(scope="module")
def lengthy() -> Iterator[Wire]:
    """Scores that are the length, of an artifact whose validation data had such scores."""
    with wire(scorer=OracleScorer(lambda group, row: len(row) / 10), expected=Expected(5.0, 4.0)) as served:
        yield served


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE], ids=["light", "dark", "phone"])
def test_a_hacked_run_is_called_so_and_drawn(browser: Browser, lengthy: Wire, options: dict[str, Any]) -> None:
    feed(lengthy, "hacked", 40)
    with opened(browser, lengthy, "hacked", **options) as page:
        assert "Scores grow with length: r = 1.00 within groups" in headline(page, "Looks like reward hacking")
        assert page.title() == "hacked · Punchline"
        plots = page.locator("figure svg[role=img]")
        assert plots.count() == 6
        labels = [plots.nth(place).get_attribute("aria-label") or "" for place in range(6)]
        assert all(len(label) > 30 for label in labels)
        assert [text.split("\n")[0] for text in page.locator("figcaption").all_inner_texts()] == PLOTS
        assert page.locator("svg .bar").count() > 1
        assert page.locator("svg path.line").count() >= 6
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), "nothing scrolls sideways"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, lengthy: Wire, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    feed(lengthy, "read", 40)
    with opened(browser, lengthy, "read", color_scheme=scheme, bypass_csp=True) as page:
        headline(page, "Looks like")
        assert Axe().run(page).response["violations"] == []


def test_new_scores_appear_without_a_reload(browser: Browser, lengthy: Wire) -> None:
    feed(lengthy, "grows", 3)
    with opened(browser, lengthy, "grows") as page:
        headline(page, "Too early to tell")
        page.evaluate("window.isTheSame = true")
        feed(lengthy, "grows", 20)
        headline(page, "Looks like reward hacking")
        assert page.evaluate("window.isTheSame")
        assert "92 captions in 23 groups" in page.locator("#facts").inner_text()


def test_what_is_under_the_pointer_is_told(browser: Browser, lengthy: Wire) -> None:
    feed(lengthy, "pointed", 40)
    with opened(browser, lengthy, "pointed") as page:
        headline(page, "Looks like")
        page.locator("figure svg").nth(3).hover(position={"x": 150, "y": 80})
        page.locator("figcaption span", has_text="after ").wait_for()
        assert "r = +1.0" in page.locator("figcaption span", has_text="after ").inner_text()


def test_a_run_nobody_has_named_is_waited_for(browser: Browser, lengthy: Wire) -> None:
    with opened(browser, lengthy, "later") as page:
        headline(page, "No scores of this run yet")
        feed(lengthy, "later", 2)
        headline(page, "Too early to tell")


def test_what_is_unknown_is_said_to_be_unknown(browser: Browser) -> None:
    with wire(scorer=OracleScorer(lambda group, row: 1.5)) as served:
        feed(served, "flat", 30, same=True)
        with opened(browser, served, "flat") as page:
            said = headline(page, "Looks like reward hacking")
            assert "100 % of groups have no spread" in said
            assert "of captions have a twin in their group" in said
            assert page.locator("svg text.unknown").count() == 2
            figures = dict(zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True))
            assert {figures["drift"], figures["score against length, r"], figures["beyond ± 3 σ"]} == {"unknown"}
            assert "drift is unknown" in page.locator("#notes").inner_text()


def test_behind_a_key_the_page_asks_for_it_and_shows_nothing_before(browser: Browser) -> None:
    with wire(api_key=KEY) as served:
        feed(served, "secret", 20, key=KEY)
        with opened(browser, served, "secret") as page:
            headline(page, "The numbers are behind the server's key")
            assert page.locator("figure").count() == 0
            page.get_by_label("This server asks for its API key").fill("a-wrong-key-of-some-length")
            page.get_by_role("button", name="Show the run").click()
            headline(page, "That key does not open this server")
            page.get_by_label("This server asks for its API key").fill(KEY)
            page.get_by_role("button", name="Show the run").click()
            headline(page, "Nothing looks like")
            assert page.locator("#unlock").is_hidden()
            assert page.locator("figure").count() == 6
            assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
