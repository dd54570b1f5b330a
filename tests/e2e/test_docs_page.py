"""The page of the API in a real browser: every route of the description, from this server alone, behind a key or not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.e2e.browser import ANSWERED_BADLY, browsing, missing
from tests.wire.server import Wire, wire

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(missing()), reason=missing())]

KEY = "correct-horse-battery-staple"
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
OPEN_ALL = "for (const box of document.querySelectorAll('#routes details')) box.open = true"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as running:
        yield running


@pytest.fixture(scope="module")
def server() -> Iterator[Wire]:
    with wire() as served:
        yield served


@contextmanager
def opened(browser: Browser, server: Wire, path: str = "/docs", **options: Any) -> Iterator[Page]:
    """The page, loaded; no script fails, no policy is broken, and nobody but the server is asked."""
    context = browser.new_context(**options)
    page, complaints, asked = context.new_page(), list[str](), list[str]()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(url_of(server) + path)
        page.locator("#routes[aria-busy=false]").wait_for()
        yield page
    finally:
        context.close()
    assert [text for text in complaints if not text.startswith(ANSWERED_BADLY)] == []
    assert [url for url in asked if not url.startswith((url_of(server), "data:"))] == []


def url_of(server: Wire) -> str:
    return "http://{}:{}".format(*server.address)


def described(server: Wire, **headers: str) -> dict[str, Any]:
    said: dict[str, Any] = httpx.get(f"{url_of(server)}/openapi.json", headers=headers).json()
    return said


def test_every_route_is_shown_with_all_that_is_said_of_it(browser: Browser, server: Wire) -> None:
    routes = [(method, path, route) for path, item in described(server)["paths"].items() for method, route in item.items()]
    with opened(browser, server) as page:
        page.evaluate(OPEN_ALL)
        boxes = page.locator("#routes details")
        assert boxes.count() == len(routes)
        for method, path, route in routes:
            said = boxes.filter(has=page.locator(f"summary:has(code:text-is('{path}')):has(span:text-is('{method.upper()}'))")).inner_text()
            assert route["summary"] in said
            assert set(route["responses"]) <= set(said.split())
            assert all(parameter["name"] in said for parameter in route.get("parameters", []))
            assert all(f"Body, {kind}" in said for kind in route.get("requestBody", {}).get("content", {}))
            assert f"curl -sS {url_of(server)}" in said


def test_bodies_and_answers_are_told_field_by_field(browser: Browser, server: Wire) -> None:
    schemas = described(server)["components"]["schemas"]
    with opened(browser, server, "/docs#post-rank") as page:
        shown = page.locator("#post-rank").inner_text()
        assert page.locator("#post-rank").evaluate("box => box.open")
        for field in (*schemas["RankRequest"]["properties"], *schemas["RankAnswer"]["properties"], *schemas["RankedCaption"]["properties"]):
            assert field in shown
        assert "It says it is here about the iceberg." in shown
        needed = page.locator("#post-rank dt:has(.needed) > code").all_inner_texts()
        assert set(schemas["RankRequest"]["required"]) <= set(needed)


def test_a_line_of_curl_works_as_it_is(browser: Browser, server: Wire) -> None:
    with opened(browser, server) as page:
        page.evaluate(OPEN_ALL)
        lines = {
            name: str(page.get_by_label(f"curl for {name}", exact=True).text_content())
            for name in ("GET /info", "POST /selftest", "POST /rank")
        }
    said = {
        name: json.loads(subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True).stdout)
        for name, line in lines.items()
    }
    assert said["GET /info"]["model"]["fingerprint"]
    assert "error" not in said["POST /selftest"] or said["POST /selftest"]["error"]["code"] != "method_not_allowed"
    assert said["POST /rank"]["error"]["code"] == "image_unknown"


def test_behind_a_key_the_page_asks_for_it(browser: Browser) -> None:
    with wire(api_key=KEY) as served, opened(browser, served) as page:
        key = page.get_by_label("This server asks for a key")
        key.wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        assert page.locator("#routes details").count() == 0
        for wrong, said in (("schlüssel mit ü", "printable ASCII"), ("a-key-that-nobody-has", "does not know this key")):
            key.fill(wrong)
            key.press("Enter")
            page.get_by_role("alert").filter(has_text=said).wait_for()
        key.fill(KEY)
        key.press("Enter")
        page.locator("#routes details").first.wait_for()
        assert not key.is_visible()
        assert page.get_by_role("alert").count() == 0
        assert "Bearer $PUNCHLINE_API_KEY" in str(page.get_by_label("curl for GET /info", exact=True).text_content())
        assert KEY not in page.evaluate(
            "document.documentElement.outerHTML + location + JSON.stringify({...localStorage, ...sessionStorage})"
        )


def test_a_server_that_does_not_answer_is_asked_again(browser: Browser, server: Wire) -> None:
    with opened(browser, server) as page:
        page.route("**/openapi.json", lambda route: route.fulfill(body='{"paths": null}', content_type="application/json"))
        page.reload()
        page.get_by_role("alert").filter(has_text="is not what was asked for").wait_for()
        page.unroute("**/openapi.json")
        page.get_by_role("button", name="Try again").click()
        page.locator("#routes details").first.wait_for()
        assert page.get_by_role("alert").count() == 0


def test_what_is_described_is_text_and_nothing_else(browser: Browser, server: Wire) -> None:
    nasty = "<img src=x onerror=\"document.title='pwned'\">"
    route = {"summary": nasty, "description": f"`{nasty}`", "tags": [nasty], "responses": {"200": {"description": nasty}}}
    body = json.dumps({"info": {"title": nasty}, "paths": {f"/{nasty}": {"get": route}}})
    with opened(browser, server) as page:
        page.route("**/openapi.json", lambda asked: asked.fulfill(body=body, content_type="application/json"))
        page.reload()
        page.locator("#routes details").first.wait_for()
        assert page.locator("#routes img").count() == 0
        assert page.title() == "API · Punchline"


LOOKS = {"light": {"color_scheme": "light"}, "dark": {"color_scheme": "dark"}, "dark phone": {**PHONE, "color_scheme": "dark"}}


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_nothing_and_nothing_scrolls_sideways(browser: Browser, server: Wire, look: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with opened(browser, server, **LOOKS[look]) as page:
        for state in ("closed", "open"):
            assert [each["id"] for each in Axe().run(page).response["violations"]] == [], state
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), state
            page.evaluate(OPEN_ALL)


def test_a_route_opens_by_keyboard(browser: Browser, server: Wire) -> None:
    with opened(browser, server) as page:
        page.locator("#post-score summary").focus()
        page.keyboard.press("Enter")
        page.get_by_label("curl for POST /score", exact=True).wait_for()
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_the_playground_leads_here(browser: Browser, server: Wire) -> None:
    with opened(browser, server) as page:
        page.get_by_role("link", name="Playground").click()
        page.get_by_role("link", name="API description").click()
        page.locator("#routes details").first.wait_for()
