"""The page of a training run in a real browser: it draws what the server says, says what is unknown, and asks nobody else."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from app.api.pages import WEB
from app.tallies import Expected
from tests.e2e.browser import ANSWERED_BADLY, browsing, missing
from tests.e2e.drawings import check
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
def opened(browser: Browser, server: Wire, run_id: str, script: str = "", **options: Any) -> Iterator[Page]:
    """The page, loaded; no script fails, no policy is broken, and nobody but the server is asked. `script`: in place of run.js."""
    context = browser.new_context(**options)
    if script:
        context.route("**/web/run.js", lambda route: route.fulfill(body=script, content_type="text/javascript"))
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
    assert "hacking" not in page.locator("#headline").inner_text(), "a sign may have another cause"
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
        assert "Scores grow with length: r = 1.00 within groups" in headline(page, "to look at")
        assert page.title() == "hacked · Punchline"
        plots = page.locator("figure svg[role=img]")
        assert plots.count() == 6
        labels = [plots.nth(place).get_attribute("aria-label") or "" for place in range(6)]
        assert all(len(label) > 30 for label in labels)
        assert [text.split("\n")[0] for text in page.locator("figcaption").all_inner_texts()] == PLOTS
        assert page.locator("svg .bar").count() > 1
        assert page.locator("svg path.line").count() >= 6
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), "nothing scrolls sideways"


def feed_all(server: Wire, run_id: str, num_groups: int = 60) -> dict[str, Any]:
    """Groups of which a fifth have no spread and a third a caption met before. Returns the numbers."""
    source = random.Random(7)
    with httpx.Client(base_url=url_of(server), headers={"X-Run-Id": run_id}) as client:
        for number in range(num_groups):
            texts = [f"{number} {each} ".ljust(source.randrange(8, 60), "x") for each in range(5)]
            texts = texts[:1] * 5 if number % 5 == 1 else texts
            texts[0] = "again" if number % 3 == 0 else texts[0]
            client.post("/score", json={"image": IMAGE, "captions": texts}).raise_for_status()
        found: dict[str, Any] = client.get(f"/runs/{run_id}/statistics").json()
    return found


@pytest.fixture(scope="module")
def various() -> Iterator[tuple[Wire, dict[str, Any]]]:
    """Scores that go with length, and others; every figure of the run differs from the rest, from 0 and from a half."""
    with wire(scorer=OracleScorer(lambda group, row: len(row) / 10 + sum(row) % 7 / 3), expected=Expected(2.5, 1.25)) as served:
        yield served, feed_all(served, "various")


@pytest.mark.parametrize("options", [{}, PHONE], ids=["wide", "phone"])
def test_every_figure_bar_and_point_is_what_the_server_says(
    browser: Browser, various: tuple[Wire, dict[str, Any]], options: dict[str, Any]
) -> None:
    server, run = various
    with opened(browser, server, "various", **options) as page:
        headline(page, "to look at")
        check(page, run)


PLANTED = {
    "shares tenfold": ("last.flat_share)", "10 * last.flat_share)"),
    "the deviation for the mean": ('["mean score", number(last.mean)', '["mean score", number(last.std)'),
    "the rest of the flat groups": ("lately ${percent(run.recent.flat_share)}", "lately ${percent(1 - run.recent.flat_share)}"),
    "another line of flat groups": ("[place], point[field]]", "[place], 1 - point[field]]"),
    "drift times minus seven": ("`${signed(last.drift)} σ`", "`${signed(-7 * last.drift)} σ`"),
    "the highest for the mean": ("[xs[index], point.mean]", "[xs[index], -point.max]"),
    "counts for densities": ("bin.count / total / (bin.high - bin.low)", "bin.count / total"),
    "a limit elsewhere": ("plane.level(limit, ", "plane.level(limit / 2, "),
    "captions that start late": ("sum += point.captions", "sum += point.groups"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_page_that_draws_something_else_is_seen(browser: Browser, various: tuple[Wire, dict[str, Any]], fault: str) -> None:
    (right, wrong), source = PLANTED[fault], (WEB / "run.js").read_text()
    assert source.count(right) == 1
    with opened(browser, various[0], "various", script=source.replace(right, wrong)) as page:
        headline(page, "to look at")
        with pytest.raises(AssertionError):
            check(page, various[1])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, lengthy: Wire, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    feed(lengthy, "read", 40)
    with opened(browser, lengthy, "read", color_scheme=scheme, bypass_csp=True) as page:
        headline(page, "to look at")
        assert Axe().run(page).response["violations"] == []


def test_new_scores_appear_without_a_reload(browser: Browser, lengthy: Wire) -> None:
    feed(lengthy, "grows", 3)
    with opened(browser, lengthy, "grows") as page:
        headline(page, "Too early to tell")
        page.evaluate("window.isTheSame = true")
        feed(lengthy, "grows", 20)
        headline(page, "to look at")
        assert page.evaluate("window.isTheSame")
        assert "92 captions in 23 groups" in page.locator("#facts").inner_text()


def test_what_is_under_the_pointer_is_told(browser: Browser, lengthy: Wire) -> None:
    feed(lengthy, "pointed", 40)
    with opened(browser, lengthy, "pointed") as page:
        headline(page, "to look at")
        page.locator("figure svg").nth(3).hover(position={"x": 150, "y": 80})
        page.locator("figcaption span", has_text="after ").wait_for()
        assert "r = +1.0" in page.locator("figcaption span", has_text="after ").inner_text()


def test_a_reading_stays_while_the_run_goes_on(browser: Browser, lengthy: Wire) -> None:
    feed(lengthy, "watched", 40)
    with opened(browser, lengthy, "watched") as page:
        headline(page, "to look at")
        page.locator("figure svg").nth(1).hover(position={"x": 150, "y": 80})
        reading = page.locator("figcaption span").nth(1)
        page.locator("figcaption span", has_text="after ").wait_for()
        feed(lengthy, "watched", 20)
        page.locator("#facts", has_text="240 captions").wait_for()
        assert reading.inner_text().startswith("after ")
        assert page.locator("svg .guide[visibility=visible]").count() == 1


def test_arrow_keys_read_the_plots_aloud(browser: Browser, lengthy: Wire) -> None:
    feed(lengthy, "keyed", 40)
    with opened(browser, lengthy, "keyed") as page:
        headline(page, "to look at")
        plot, note = page.locator("figure svg").nth(3), page.locator("figcaption span").nth(3)
        plot.focus()
        for key, start in (("ArrowLeft", "after 160:"), ("ArrowLeft", "after 144:"), ("Home", "after 16:"), ("ArrowRight", "after 32:")):
            page.keyboard.press(key)
            assert note.inner_text().startswith(start)
        assert note.get_attribute("aria-live") == "polite"
        feed(lengthy, "keyed", 20)
        page.locator("#facts", has_text="240 captions").wait_for()
        assert note.inner_text().startswith("after 32:")
        assert plot.evaluate("plot => plot === document.activeElement")
        page.keyboard.press("Escape")
        assert note.inner_text().startswith("lately")


def test_scores_left_out_are_told_while_captions_stand_still(browser: Browser) -> None:
    with wire(scorer=OracleScorer(lambda group, row: 1e300 if len(row) > 50 else 1.0)) as served:
        feed(served, "odd", 2, same=True)
        with opened(browser, served, "odd") as page:
            headline(page, "Too early")
            with httpx.Client(base_url=url_of(served), headers={"X-Run-Id": "odd"}) as client:
                client.post("/score", json={"image": IMAGE, "captions": ["x" * 60] * 3}).raise_for_status()
            page.locator("#notes", has_text="3 scores beyond float32").wait_for()


def test_marks_of_a_narrow_run_are_told_apart(browser: Browser) -> None:
    with wire(scorer=OracleScorer(lambda group, row: 4321.0 + len(row) / 1000)) as served:
        feed(served, "narrow", 20)
        with opened(browser, served, "narrow") as page:
            headline(page, "to look at")
            for kind in ("x", "y"):
                marks = page.locator("figure").nth(int(kind == "y")).locator(f"text.{kind}").all_text_contents()
                assert len(set(marks)) == len(marks) > 1
            assert page.evaluate("[...document.querySelectorAll('text.y')].every((mark) => mark.getBBox().x > 0)"), "no mark is cut"


@pytest.mark.parametrize("odd", ["https:evil.example", "-x", "a%20b", "x" * 65])
def test_what_is_no_id_is_said_to_be_none_and_asks_nobody(browser: Browser, lengthy: Wire, odd: str) -> None:
    with opened(browser, lengthy, odd) as page:
        headline(page, "No run has such an id")
        page.wait_for_load_state("networkidle")
        names = page.evaluate("performance.getEntriesByType('resource').map((entry) => [entry.initiatorType, entry.name])")
        assert [name for kind, name in names if kind == "fetch"] == []


def test_runs_are_listed_and_lead_to_their_pages(browser: Browser) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with wire(scorer=OracleScorer(lambda group, row: len(row) / 10)) as served, opened(browser, served, "", bypass_csp=True) as page:
        page.locator("#headline", has_text="No run yet").wait_for()
        feed(served, "first", 3)
        feed(served, "second", 20)
        page.locator("#headline", has_text="2 runs are kept").wait_for()
        cells = [row.split("\t") for row in page.locator("tbody tr").all_inner_texts()]
        assert [(row[0], row[1], row[-1]) for row in cells] == [("second", "80", "length"), ("first", "12", "none")]
        assert Axe().run(page).response["violations"] == []
        page.set_viewport_size(PHONE["viewport"])
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        page.get_by_role("link", name="second").click()
        headline(page, "One sign to look at")


def test_behind_a_key_the_list_asks_for_it(browser: Browser) -> None:
    with wire(api_key=KEY) as served:
        feed(served, "secret", 2, key=KEY)
        with opened(browser, served, "") as page:
            page.locator("#headline", has_text="behind the server's key").wait_for()
            assert "secret" not in page.content()
            page.get_by_label("This server asks for its API key").fill(KEY)
            page.get_by_role("button", name="Show the runs").click()
            page.get_by_role("link", name="secret").wait_for()


def test_captions_sent_one_at_a_time_are_drawn_as_groups(browser: Browser, lengthy: Wire) -> None:
    with httpx.Client(base_url=url_of(lengthy), headers={"X-Run-Id": "alone"}) as client:
        for number in range(8):
            body = {"image": IMAGE, "prompt": f"Prompt {number % 2}", "captions": [f"{number}".ljust(8 + 3 * number, "x")]}
            client.post("/score", json=body).raise_for_status()
    with opened(browser, lengthy, "alone") as page:
        headline(page, "Too early")
        assert "8 captions in 2 groups" in page.locator("#facts").inner_text()
        assert "2 of the groups came one caption at a time and may still grow" in page.locator("#notes").inner_text()
        assert page.locator("svg text.unknown").count() == 0


def test_a_run_nobody_has_named_is_waited_for(browser: Browser, lengthy: Wire) -> None:
    with opened(browser, lengthy, "later") as page:
        headline(page, "No scores of this run yet")
        feed(lengthy, "later", 2)
        headline(page, "Too early to tell")


def test_what_is_unknown_is_said_to_be_unknown(browser: Browser) -> None:
    with wire(scorer=OracleScorer(lambda group, row: 1.5)) as served:
        feed(served, "flat", 30, same=True)
        with opened(browser, served, "flat") as page:
            said = headline(page, "to look at")
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
            headline(page, "No sign")
            assert page.locator("#unlock").is_hidden()
            assert page.locator("figure").count() == 6
            assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
