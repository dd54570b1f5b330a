"""The playground in a real browser: what it shows is what the API says, whoever sits before it and whatever goes wrong."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from app.api.pages import CARTOONS
from tests.e2e.browser import Visit, browsing, missing, visiting
from tests.e2e.server import Server
from tests.fakes import UNSCORABLE, OracleScorer, expected_scores, picture
from tests.wire.server import Wire, eventually, wire

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(missing()), reason=missing())]

KEY = "correct-horse-battery-staple"
PICTURE = picture()
SUGGESTED: dict[str, list[str]] = json.loads((CARTOONS / "captions.json").read_text())
CAPTIONS = ["It says it is here about the iceberg.", "Nice day.", "Nobody asked."]
TWO = {"image": base64.b64encode(PICTURE).decode(), "captions": ["a", "b"]}
NASTY = [
    "it's \"quoted\" and $HOME and `id` and $(id) and !! and \\ and 'more'",
    "@/etc/passwd; type=text/plain",
    "two\nlines, a tab\tand a penguin 🐧",
    "<img src=x onerror=\"document.title='pwned'\">",
]
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
NO_CLIPBOARD = "Object.defineProperty(navigator, 'clipboard', { value: undefined })"
GIVE = """([kind, name, bytes]) => {
  const files = new DataTransfer();
  files.items.add(new File([Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0))], name, { type: "image/png" }));
  const event = kind === "drop"
    ? new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true })
    : new ClipboardEvent("paste", { clipboardData: files, bubbles: true, cancelable: true });
  document.getElementById(kind === "drop" ? "drop" : "captions").dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as running:
        yield running


@pytest.fixture(scope="module")
def oracle() -> Iterator[Wire]:
    """The real HTTP stack over scores nobody could guess."""
    with wire() as served:
        yield served


@pytest.fixture
def visit(browser: Browser, oracle: Wire) -> Iterator[Visit]:
    with quiet(browser, url_of(oracle)) as opened:
        yield opened


@contextmanager
def quiet(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    """A visit in which no script fails, no policy is broken and nobody else is asked."""
    with visiting(browser, url, **options) as visit:
        yield visit
    assert visit.complaints == []
    assert visit.strays == []


def url_of(served: Wire) -> str:
    host, port = served.address
    return f"http://{host}:{port}/"


def give(visit: Visit, kind: str, data: bytes = PICTURE, name: str = "cartoon.png") -> None:
    """A file dropped on the page, or a picture pasted into it."""
    visit.page.evaluate(GIVE, [kind, name, base64.b64encode(data).decode()])
    visit.page.get_by_text(name, exact=True).wait_for()


def ranked(image: bytes | None, captions: list[str], prompt: str | None = None) -> list[tuple[str, float]]:
    """What the oracle says, best first."""
    return sorted(zip(captions, expected_scores(image, captions, prompt), strict=True), key=lambda pair: -pair[1])


def shown(visit: Visit) -> list[tuple[str, float]]:
    return [(caption, score) for caption, score, _ in visit.rank()]


# What it is for


def test_a_drawn_cartoon_and_typed_captions_are_ranked_as_the_api_ranks_them(browser: Browser, server: Server) -> None:
    captions = ["The penguin brought an umbrella to the office.", "Nice day.", "Only a ghost would ask for a raise.", "A penguin."]
    image = base64.b64encode((CARTOONS / "penguin-office.png").read_bytes()).decode()
    with quiet(browser, server.url) as visit:
        visit.page.get_by_role("button", name="penguin, office").click()
        visit.type(*captions)
        found = visit.rank()
        said = httpx.post(f"{server.url}/rank", json={"image": image, "captions": captions}).json()["ranking"]
        assert [caption for caption, _, _ in found] == [place["caption"] for place in said]
        for (_, score, win), place in zip(found, said, strict=True):
            assert score == pytest.approx(place["score"], abs=1e-4)
            assert win == pytest.approx(place["win_probability"], abs=1e-4)
        assert visit.page.locator("#verdict").inner_text() == f"Best of 4: “{said[0]['caption']}”"
        texts = [row.split("\n")[-1].split("\t") for row in visit.page.locator("tbody tr").all_inner_texts()]
        assert all(f"{place['score']:.3f}".replace("-", "−") in " ".join(text) for place, text in zip(said, texts, strict=True))
        assert visit.refusals == []


def test_a_drawn_cartoon_brings_its_captions_where_nobody_typed_any(visit: Visit) -> None:
    for number, (name, captions) in enumerate(SUGGESTED.items()):
        visit.drawn(number).click()
        visit.page.get_by_text(name, exact=True).wait_for()
        assert typed(visit) == captions
    visit.field("Caption 1").fill("My own.")
    visit.drawn(0).click()
    visit.page.get_by_text(next(iter(SUGGESTED)), exact=True).wait_for()
    assert typed(visit) == ["My own.", *captions[1:]]
    visit.page.get_by_role("button", name="Add the cartoon’s own").click()
    assert typed(visit) == ["My own.", *captions[1:], *next(iter(SUGGESTED.values()))]
    assert not visit.page.get_by_role("button", name="Add the cartoon’s own").is_visible()


def typed(visit: Visit) -> list[str]:
    return [str(text) for text in visit.page.locator("#rows textarea").evaluate_all("all => all.map(each => each.value)")]


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_picture_is_dropped_or_pasted(visit: Visit, kind: str) -> None:
    give(visit, kind)
    visit.type(*CAPTIONS)
    assert shown(visit) == ranked(PICTURE, CAPTIONS)


def test_a_picture_is_chosen_as_a_file_and_sent_once(visit: Visit, tmp_path: Path) -> None:
    file = tmp_path / "mine & yours.png"
    file.write_bytes(PICTURE)
    visit.page.set_input_files("#file", file)
    for captions in (CAPTIONS, CAPTIONS[::-1], CAPTIONS[:2]):
        visit.type(*captions, *[""] * (3 - len(captions)))
        assert shown(visit) == ranked(PICTURE, captions)
    assert visit.num_asked("PUT", "/images") == 1


def test_two_are_compared_side_by_side(visit: Visit, oracle: Wire) -> None:
    give(visit, "drop")
    visit.type(*CAPTIONS)
    visit.page.get_by_text("Compare two").click()
    assert [visit.field(f"Caption {letter}").input_value() for letter in "AB"] == CAPTIONS[:2]
    for one, other in (CAPTIONS[:2], CAPTIONS[1::-1], ["same", "same"]):
        visit.field("Caption A").fill(one)
        visit.field("Caption B").fill(other)
        visit.page.get_by_role("button", name="Compare").click()
        visit.page.locator(f"#result[aria-busy=false] .side[data-side=a] >> text='{one}'").wait_for()
        body = {"image": base64.b64encode(PICTURE).decode(), "a": one, "b": other}
        said = httpx.post(f"{url_of(oracle)}compare", json=body).json()
        for side, probability in (("a", said["probability_a"]), ("b", 1 - said["probability_a"])):
            values = visit.page.locator(f".side[data-side={side}] data").evaluate_all("all => all.map(each => +each.value)")
            assert values == [probability, said["scores"][side]]
        best = visit.page.locator(".side.best h3").all_inner_texts()
        assert [text[0].lower() for text in best] == ([] if said["preferred"] == "tie" else [said["preferred"]])


def test_equal_scores_share_a_place(visit: Visit) -> None:
    give(visit, "drop")
    visit.type("Same.", "Same.", "Nice day.")
    visit.rank()
    assert sum("tied" in text for text in visit.page.locator("td.rank").all_inner_texts()) == 2


def test_scores_that_differ_look_different(browser: Browser) -> None:
    values = {"a": -0.00034, "b": -0.00012, "c": 0.00012, "d": -0.7}
    with wire(scorer=OracleScorer(lambda _, row: values[chr(row[-2])])) as served, quiet(browser, url_of(served)) as visit:
        give(visit, "drop")
        visit.type("a", "b")
        visit.rank()
        assert visit.page.locator("td.score data").all_inner_texts() == ["−0.0001", "−0.0003"]
        visit.type("a", "b", "c", "d")
        visit.rank()
        assert visit.page.locator("td.score data").all_inner_texts() == ["0.0001", "−0.0001", "−0.0003", "−0.7000"]
        visit.type("b", "", "", "")
        visit.rank()
        assert visit.page.locator("td.score data").all_inner_texts() == ["0.000"]
        visit.page.get_by_text("Compare two").click()
        visit.field("Caption A").fill("a")
        visit.field("Caption B").fill("b")
        visit.page.get_by_role("button", name="Compare").click()
        visit.page.locator(".sides").wait_for()
        assert visit.page.locator(".side dd:has(data)").all_inner_texts()[1::2] == ["−0.0003", "−0.0001"]
        assert "Margin −0.0002:" in visit.page.locator("#answer").inner_text()


def test_the_prompt_counts(visit: Visit) -> None:
    give(visit, "drop")
    visit.type(*CAPTIONS)
    visit.page.get_by_text("Prompt", exact=True).click()
    visit.page.get_by_label("What the captions answer").fill("Why?")
    assert shown(visit) == ranked(PICTURE, CAPTIONS, "Why?")
    assert "--form-string prompt='Why?'" in visit.page.locator("#curl").inner_text()


def test_model_and_fingerprint_are_shown(browser: Browser, server: Server) -> None:
    card = httpx.get(f"{server.url}/info").json()["model"]
    with quiet(browser, server.url) as visit:
        shown = visit.page.locator("#model").inner_text()
        assert "demo" in shown
        assert card["fingerprint"][:12] in shown
        assert visit.page.locator("#about").inner_text() == card["description"]


def test_a_text_only_model_has_no_place_for_pictures(browser: Browser) -> None:
    with wire(takes_images=False) as served, quiet(browser, url_of(served)) as visit:
        assert not visit.page.locator("#picture").is_visible()
        visit.type(*CAPTIONS)
        assert shown(visit) == ranked(None, CAPTIONS)
        assert "image" not in visit.page.locator("#curl").inner_text()


# The line for the shell


@pytest.mark.parametrize("shell", [["bash", "--norc", "--noediting", "-i"], ["sh"]], ids=["bash as typed", "sh"])
def test_the_copied_line_gives_what_is_shown(browser: Browser, oracle: Wire, shell: list[str]) -> None:
    """Typed into an interactive shell, so that `!` is looked at as well."""
    with quiet(browser, url_of(oracle), permissions=["clipboard-read", "clipboard-write"]) as visit:
        give(visit, "drop")
        visit.type(*NASTY)
        shown = visit.rank()
        visit.page.get_by_role("button", name="Copy", exact=True).click()
        visit.page.get_by_text("The line was copied.").wait_for()
        line = visit.page.evaluate("navigator.clipboard.readText()")
    assert line == visit_text(line)
    done = subprocess.run(shell, input=f"{line}\n", capture_output=True, text=True, timeout=60, check=False)
    said = json.loads(done.stdout)["ranking"]
    assert [(place["caption"], place["score"], place["win_probability"]) for place in said] == shown


def visit_text(line: str) -> str:
    """A line for the shell starts with its command and holds no key."""
    assert line.startswith("curl -sS http://127.0.0.1:")
    assert KEY not in line
    return line


def test_a_comparison_has_its_line(visit: Visit) -> None:
    give(visit, "drop")
    visit.page.get_by_text("Compare two").click()
    visit.field("Caption A").fill(NASTY[0])
    visit.field("Caption B").fill(NASTY[2])
    visit.page.get_by_role("button", name="Compare").click()
    visit.page.locator(".sides").wait_for()
    line = visit.page.locator("#curl").text_content()
    done = subprocess.run(["bash", "-c", str(line)], capture_output=True, text=True, timeout=60, check=True)
    shown = visit.page.locator(".side dl data").evaluate_all("all => all.map(each => +each.value)")
    said = json.loads(done.stdout)
    assert [shown[1], shown[3]] == [said["scores"]["a"], said["scores"]["b"]]


def test_copying_works_where_the_browser_has_no_clipboard_for_pages(browser: Browser, oracle: Wire) -> None:
    """As over http:// from another machine."""
    with quiet(browser, url_of(oracle)) as visit:
        visit.page.evaluate(NO_CLIPBOARD)
        give(visit, "drop")
        visit.type("Nice day.")
        visit.rank()
        visit.page.get_by_role("button", name="Copy", exact=True).click()
        visit.page.get_by_text("The line was copied.").wait_for()
        visit.page.get_by_text("Prompt", exact=True).click()
        visit.page.get_by_label("What the captions answer").focus()
        visit.page.keyboard.press("Control+v")
        assert visit.page.get_by_label("What the captions answer").input_value() == visit.page.locator("#curl").text_content()


# Keys


def test_a_key_is_asked_for_tried_and_never_written(browser: Browser) -> None:
    with wire(api_key=KEY) as served, quiet(browser, url_of(served)) as visit:
        key = visit.page.get_by_label("This server asks for a key")
        key.wait_for()
        assert visit.page.evaluate("document.activeElement.id") == "key"
        assert key.get_attribute("type") == "password"
        key.fill("a-key-that-nobody-has")
        key.press("Enter")
        assert "does not know this one" in visit.fault()
        key.fill(KEY)
        key.press("Enter")
        visit.page.locator("#model").wait_for()
        assert not key.is_visible()
        assert visit.page.get_by_role("link", name="Model card").count() == 0
        give(visit, "drop")
        visit.type(*CAPTIONS)
        assert shown(visit) == ranked(PICTURE, CAPTIONS)
        line = str(visit.page.locator("#curl").text_content())
        assert '-H "Authorization: Bearer $PUNCHLINE_API_KEY"' in line
        assert KEY not in visit.page.evaluate(
            "document.documentElement.outerHTML + location + JSON.stringify({...localStorage, ...sessionStorage})"
        )
        variables = {"PATH": "/usr/bin:/bin", "PUNCHLINE_API_KEY": KEY}
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True, env=variables)
        assert [place["caption"] for place in json.loads(done.stdout)["ranking"]] == [caption for caption, _ in ranked(PICTURE, CAPTIONS)]


def test_what_waits_for_the_key_outlives_a_wrong_one(browser: Browser) -> None:
    """What was asked before any key was given goes on with the right one."""
    with wire(api_key=KEY) as served, quiet(browser, url_of(served)) as visit:
        give(visit, "drop")
        visit.type(*CAPTIONS)
        visit.page.get_by_role("button", name="Rank captions").click()
        visit.page.locator("#result[aria-busy=false]").wait_for()
        key = visit.page.get_by_label("This server asks for a key")
        for attempt in ("a-key-that-nobody-has", KEY):
            key.fill(attempt)
            key.press("Enter")
            visit.page.locator("#model" if attempt == KEY else "#faults > *").first.wait_for()
        assert [caption for caption, _, _ in visit.ranking()] == [caption for caption, _ in ranked(PICTURE, CAPTIONS)]
        assert visit.page.get_by_role("alert").inner_text() == ""


def test_a_key_that_no_header_can_carry_is_refused_here(browser: Browser) -> None:
    with wire(api_key=KEY) as served, quiet(browser, url_of(served)) as visit:
        visit.page.get_by_label("This server asks for a key").fill("schlüssel mit ü")
        visit.page.get_by_role("button", name="Use it").click()
        assert "printable ASCII" in visit.fault()
        assert visit.page.locator("#key").get_attribute("aria-invalid") == "true"


# Faults


def test_a_file_that_is_no_picture_is_said_so(visit: Visit) -> None:
    give(visit, "drop", b"no picture at all", "letter.png")
    assert "The cartoon: The image could not be read. PNG, JPEG and WebP pictures work." in visit.fault()
    assert "image_decode_failed" in visit.fault()
    assert described_fault(visit, "#file").startswith("The image could not be read")
    assert not visit.page.locator("#preview").is_visible()
    give(visit, "drop")
    visit.type("Nice day.")
    assert shown(visit) == ranked(PICTURE, ["Nice day."])
    assert visit.page.locator("[aria-invalid]").count() == 0


def test_a_link_dropped_here_does_not_lead_away(visit: Visit) -> None:
    visit.type("Nice day.")
    visit.page.evaluate(
        """() => {
          const dataTransfer = new DataTransfer();
          dataTransfer.setData("text/uri-list", "http://127.0.0.1:9/cartoon.png");
          document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
        }"""
    )
    assert visit.fault() == "The cartoon: That was no file; save the picture first, then drop it here."
    assert visit.field("Caption 1").input_value() == "Nice day."


def test_a_picture_too_large_is_not_even_sent(browser: Browser) -> None:
    with wire(max_image_bytes=1024) as served, quiet(browser, url_of(served)) as visit:
        give(visit, "drop", PICTURE + b"\0" * 1024)
        assert "a picture may have 1,024 bytes" in visit.fault().replace("A picture", "a picture")
        assert visit.num_asked("PUT", "/images") == 0


@pytest.mark.parametrize(("text", "message"), [("long " * 20, "longer than 80 tokens"), (UNSCORABLE, "cannot be scored")])
def test_the_caption_at_fault_is_marked(visit: Visit, text: str, message: str) -> None:
    """By the row on the page, not by its place in the request: empty rows are not sent."""
    give(visit, "drop")
    visit.type("Nice day.", "", text, "Nobody asked.")
    visit.page.get_by_role("button", name="Rank captions").click()
    assert visit.fault().startswith("Caption 3: The caption")
    assert message in visit.fault()
    assert visit.page.locator("[aria-invalid=true]").count() == 1
    assert message in described_fault(visit, "[aria-invalid=true]")
    assert visit.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Caption 3"
    visit.field("Caption 3").fill("Shorter.")
    assert visit.page.locator("[aria-invalid=true]").count() == 0
    assert shown(visit) == ranked(PICTURE, ["Nice day.", "Shorter.", "Nobody asked."])
    assert visit.page.get_by_role("alert").inner_text() == ""


def test_of_a_pair_the_one_at_fault_is_marked(visit: Visit) -> None:
    give(visit, "drop")
    visit.page.get_by_text("Compare two").click()
    visit.field("Caption A").fill("Nice day.")
    visit.field("Caption B").fill("long " * 20)
    visit.page.get_by_role("button", name="Compare").click()
    assert visit.fault().startswith("Caption B: ")
    assert visit.field("Caption B").get_attribute("aria-invalid") == "true"


def described_fault(visit: Visit, selector: str) -> str:
    """What a screen reader reads beside a field."""
    read = "field => field.getAttribute('aria-describedby').split(' ').map(id => document.getElementById(id).textContent).join(' ')"
    return str(visit.page.locator(selector).evaluate(read)).strip()


def test_what_is_missing_is_asked_for_without_the_server(visit: Visit) -> None:
    before = len(visit.asked)
    visit.page.get_by_role("button", name="Rank captions").click()
    assert visit.fault() == "The cartoon: Choose one first."
    assert len(visit.asked) == before
    give(visit, "drop")
    visit.page.get_by_role("button", name="Rank captions").click()
    assert visit.fault() == "Caption 1: Type something here first."
    visit.page.get_by_text("Compare two").click()
    visit.field("Caption A").fill("Nice day.")
    visit.page.get_by_role("button", name="Compare").click()
    assert visit.fault() == "Caption B: Type something here first."


def test_a_server_that_is_gone_is_said_so(browser: Browser) -> None:
    with wire() as served, quiet(browser, url_of(served)) as visit:
        give(visit, "drop")
        visit.type(*CAPTIONS)
        visit.rank()
        served.server.should_exit = True
        eventually(lambda: not is_listening(served), "the server is gone")
        visit.page.get_by_role("button", name="Rank captions").click()
        assert "The server did not answer" in visit.fault()
        assert visit.page.get_by_role("button", name="Try again").is_visible()


def is_listening(served: Wire) -> bool:
    try:
        httpx.get(url_of(served) + "livez", timeout=5)
    except httpx.TransportError:
        return False
    return True


def test_trying_again_goes_on_where_it_stopped(visit: Visit) -> None:
    give(visit, "drop")
    visit.type(*CAPTIONS)
    visit.rank()
    visit.page.context.set_offline(True)
    visit.page.get_by_role("button", name="Rank captions").click()
    assert "The server did not answer" in visit.fault()
    visit.page.context.set_offline(False)
    visit.page.get_by_role("button", name="Try again").click()
    visit.page.locator("#faults:empty").wait_for(state="attached")
    assert [caption for caption, _, _ in visit.ranking()] == [caption for caption, _ in ranked(PICTURE, CAPTIONS)]


def test_a_picture_sent_again_leaves_no_fault_behind(visit: Visit) -> None:
    visit.page.context.set_offline(True)
    give(visit, "drop")
    assert "The server did not answer" in visit.fault()
    visit.page.context.set_offline(False)
    visit.page.get_by_role("button", name="Try again").click()
    visit.page.locator("#preview[title*=pixels]").wait_for()
    assert visit.page.get_by_role("alert").inner_text() == ""
    assert visit.page.locator("[aria-invalid]").count() == 0


def test_one_button_brings_back_all_that_failed(visit: Visit) -> None:
    failing = ("**/info", "**/cartoons/captions.json")
    for address in failing:
        visit.page.route(address, lambda route: route.abort())
    visit.page.reload()
    eventually_shown(visit, "#faults > *", 2)
    said = visit.page.get_by_role("alert").inner_text()
    assert "The model: The server did not answer" in said
    assert "The drawn cartoons: The server did not answer" in said
    visit.page.unroute(failing[0])
    visit.page.get_by_role("button", name="Try again").first.click()
    visit.page.locator("#model").wait_for()
    eventually_shown(visit, "#faults > *", 1)
    visit.page.unroute(failing[1])
    visit.page.get_by_role("button", name="Try again").click()
    visit.drawn(0).wait_for()
    assert visit.page.get_by_role("alert").inner_text() == ""


def eventually_shown(visit: Visit, selector: str, num: int) -> None:
    visit.page.wait_for_function("([selector, num]) => document.querySelectorAll(selector).length === num", arg=[selector, num])


STRANGE = ["null", "[]", "{}", '{"ranking": []}', '{"ranking": [{"rank": 1, "index": 0, "caption": "a", "score": null}], "usage": {}}']


@pytest.mark.parametrize("body", STRANGE)
def test_an_answer_that_is_none_is_said_so(visit: Visit, body: str) -> None:
    give(visit, "drop")
    visit.type(*CAPTIONS)
    visit.page.route("**/rank", lambda route: route.fulfill(body=body, content_type="application/json"))
    visit.page.get_by_role("button", name="Rank captions").click()
    assert "is not what was asked for" in visit.fault()
    assert "unreadable_answer" in visit.fault()
    visit.page.unroute("**/rank")
    visit.page.get_by_role("button", name="Try again").click()
    assert [caption for caption, _, _ in visit.ranking()] == [caption for caption, _ in ranked(PICTURE, CAPTIONS)]


@pytest.mark.parametrize("path", ["info", "images", "cartoons/captions.json"])
def test_any_answer_that_is_none_is_said_so(visit: Visit, path: str) -> None:
    visit.page.route(f"**/{path}", lambda route: route.fulfill(body='{"a": [1]}', content_type="application/json"))
    visit.page.reload()
    visit.page.wait_for_load_state("networkidle")
    give(visit, "drop")
    assert "unreadable_answer" in visit.fault()


def test_a_server_with_too_much_to_do_is_said_so_with_its_wait(browser: Browser) -> None:
    scorer = OracleScorer()
    with wire(scorer=scorer, max_queue_items=2, max_captions=2) as served, quiet(browser, url_of(served)) as visit:
        give(visit, "drop")
        visit.page.locator("#preview[title*=pixels]").wait_for()  # the picture on its way holds a place of the queue itself
        visit.type("Nice day.", "Nobody asked.")
        scorer.gate.clear()
        other = threading.Thread(target=httpx.post, args=(f"{url_of(served)}score",), kwargs={"json": TWO, "timeout": 60})
        other.start()
        eventually(lambda: served.served.metric("reward_queue_items") == 2, "somebody else fills the queue")
        visit.page.get_by_role("button", name="Rank captions").click()
        said = visit.fault()
        scorer.gate.set()
        other.join()
        assert "overloaded" in said
        assert "The server asks to wait" in said
        visit.page.get_by_role("button", name="Try again").click()
        assert len(visit.ranking()) == 2


def test_a_late_answer_can_be_waited_for_longer(browser: Browser) -> None:
    scorer = OracleScorer()
    with wire(scorer=scorer, default_timeout_ms=200) as served, quiet(browser, url_of(served)) as visit:
        give(visit, "drop")
        visit.type(*CAPTIONS)
        scorer.gate.clear()
        visit.page.get_by_role("button", name="Rank captions").click()
        assert "deadline_exceeded" in visit.fault()
        visit.page.get_by_role("button", name="Try again, for up to 120 s").click()
        visit.page.locator("#result[aria-busy=true]").wait_for()
        scorer.gate.set()
        assert [caption for caption, _, _ in visit.ranking()] == [caption for caption, _ in ranked(PICTURE, CAPTIONS)]
        assert "--form-string timeout_ms=120000" in str(visit.page.locator("#curl").text_content())


def test_a_picture_the_server_forgot_is_sent_again(browser: Browser) -> None:
    other = picture(seed=1)
    with wire(image_store_bytes=max(len(PICTURE), len(other)), pixel_cache_bytes=0) as served, quiet(browser, url_of(served)) as visit:
        give(visit, "drop")
        visit.type(*CAPTIONS)
        visit.rank()
        assert httpx.put(f"{url_of(served)}images", content=other).status_code == 200
        assert shown(visit) == ranked(PICTURE, CAPTIONS)
        assert visit.num_asked("PUT", "/images") == 2


# Meanwhile


def test_while_it_runs_it_is_busy_and_an_answer_to_what_changed_is_dropped(browser: Browser) -> None:
    scorer = OracleScorer()
    with wire(scorer=scorer) as served, quiet(browser, url_of(served)) as visit:
        give(visit, "drop")
        visit.type(*CAPTIONS)
        scorer.gate.clear()
        visit.page.get_by_role("button", name="Rank captions").click()
        asking = visit.page.get_by_role("button", name="Ranking…")
        assert asking.get_attribute("aria-disabled") == "true"
        assert visit.page.locator("#result").get_attribute("aria-busy") == "true"
        asking.click(force=True)
        assert visit.num_asked("POST", "/rank") == 1
        visit.field("Caption 1").fill("Changed meanwhile.")
        assert visit.page.locator("#result").get_attribute("aria-busy") == "false"
        scorer.gate.set()
        visit.page.wait_for_timeout(300)
        assert visit.page.locator("table").count() == 0
        assert shown(visit) == ranked(PICTURE, ["Changed meanwhile.", *CAPTIONS[1:]])


def test_what_is_shown_of_before_says_so(visit: Visit) -> None:
    give(visit, "drop")
    visit.type(*CAPTIONS)
    visit.rank()
    note = visit.page.get_by_text("You have changed something since.")
    assert not note.is_visible()
    visit.field("Caption 2").fill("Another.")
    assert note.is_visible()
    visit.rank()
    assert not note.is_visible()


def test_the_cartoon_clicked_last_is_the_one_that_counts(visit: Visit) -> None:
    first, second = list(SUGGESTED)[:2]
    visit.page.route(f"**/cartoons/{first}", late)
    visit.drawn(0).click()
    visit.drawn(1).click()
    visit.page.get_by_text(second, exact=True).wait_for()
    visit.page.wait_for_timeout(LATE_MS * 2)
    assert visit.page.locator("#drop-text strong").inner_text() == second
    assert typed(visit) == SUGGESTED[second]
    assert visit.page.locator("[aria-pressed=true]").get_attribute("data-name") == second


def test_a_file_dropped_while_a_cartoon_comes_is_kept(visit: Visit) -> None:
    first = next(iter(SUGGESTED))
    visit.page.route(f"**/cartoons/{first}", late)
    visit.drawn(0).click()
    give(visit, "drop")
    visit.page.wait_for_timeout(LATE_MS * 2)
    assert visit.page.locator("#drop-text strong").inner_text() == "cartoon.png"
    visit.type(*CAPTIONS)
    assert shown(visit) == ranked(PICTURE, CAPTIONS)


LATE_MS = 700


def late(route: Route) -> None:
    """Answers only after a while, without holding up other routes."""
    route.request.frame.page.wait_for_timeout(LATE_MS)
    route.continue_()


def test_what_takes_too_long_can_be_cancelled(browser: Browser) -> None:
    scorer = OracleScorer()
    with wire(scorer=scorer) as served, quiet(browser, url_of(served)) as visit:
        cancel = visit.page.get_by_role("button", name="Cancel")
        give(visit, "drop")
        visit.type(*CAPTIONS)
        assert not cancel.is_visible()
        before = visit.rank()
        scorer.gate.clear()
        visit.field("Caption 1").fill("Another.")
        visit.page.get_by_role("button", name="Rank captions").press("Enter")
        cancel.wait_for()
        visit.page.keyboard.press("Tab")
        assert visit.page.evaluate("document.activeElement.id") == "cancel"
        visit.page.keyboard.press("Enter")
        assert visit.page.locator("#result").get_attribute("aria-busy") == "false"
        assert visit.page.evaluate("document.activeElement.textContent") == "Rank captions"
        assert not cancel.is_visible()
        assert visit.ranking() == before
        scorer.gate.set()
        assert shown(visit) == ranked(PICTURE, ["Another.", *CAPTIONS[1:]])
        assert not visit.page.get_by_role("alert").inner_text()


def test_a_picture_that_never_arrives_can_be_cancelled_and_is_sent_anew(visit: Visit) -> None:
    visit.page.route("**/images", lambda _: None)
    give(visit, "drop")
    visit.type(*CAPTIONS)
    visit.page.get_by_role("button", name="Rank captions").click()
    visit.page.get_by_role("button", name="Cancel").click()
    visit.page.unroute("**/images")
    assert shown(visit) == ranked(PICTURE, CAPTIONS)


# Whoever sits before it


def test_captions_are_text_and_nothing_else(visit: Visit) -> None:
    give(visit, "drop")
    visit.type(*NASTY)
    assert [caption for caption, _, _ in visit.rank()] == [caption for caption, _ in ranked(PICTURE, NASTY)]
    assert visit.page.title() == "Punchline playground"
    assert visit.page.locator("#answer img, #verdict img").count() == 0


def test_from_loading_to_a_ranking_by_keyboard_alone(browser: Browser, server: Server) -> None:
    with quiet(browser, server.url) as visit:
        rank_by_keyboard(visit)
        captions = [*SUGGESTED["octopus-moon.png"][:3], "Typed\nby hand.", "And a fifth."]
        image = base64.b64encode((CARTOONS / "octopus-moon.png").read_bytes()).decode()
        said = httpx.post(f"{server.url}/rank", json={"image": image, "captions": captions}).json()["ranking"]
        assert [caption for caption, _, _ in visit.ranking()] == [place["caption"] for place in said]
        walk(visit, "#curl")


def rank_by_keyboard(visit: Visit) -> None:
    keyboard = visit.page.keyboard
    walk(visit, "[data-name='octopus-moon.png']")
    keyboard.press("Enter")
    visit.page.get_by_text("octopus-moon.png", exact=True).wait_for()
    walk(visit, "[aria-label='Caption 4']")
    keyboard.press("Control+a")
    keyboard.type("Typed")
    keyboard.press("Shift+Enter")
    keyboard.type("by hand.")
    keyboard.press("Enter")
    assert visit.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Caption 5"
    keyboard.type("And a fifth.")
    keyboard.press("Control+Enter")


def walk(visit: Visit, selector: str) -> None:
    """By Tab to an element; wherever the focus rests on the way it can be seen."""
    for _ in range(60):
        visit.page.keyboard.press("Tab")
        seen = """() => {
          const visible = (node) => node && getComputedStyle(node).outlineStyle !== "none";
          const focused = document.activeElement;
          return visible(focused) || visible(focused.closest(".drop")) || visible(focused.nextElementSibling);
        }"""
        assert visit.page.evaluate(seen), visit.page.evaluate("document.activeElement.outerHTML")
        if visit.page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} was never reached")


def test_modes_change_by_arrow_keys(visit: Visit) -> None:
    visit.page.locator("#mode-rank").focus()
    visit.page.keyboard.press("ArrowRight")
    assert visit.field("Caption A").is_visible()
    assert not visit.page.locator("#rows").is_visible()


def test_rows_come_and_go(visit: Visit) -> None:
    visit.type("one", "two", "three")
    visit.page.get_by_role("button", name="Remove caption 2").click()
    assert visit.page.evaluate("document.activeElement.value") == "three"
    visit.page.keyboard.press("Control+a")
    visit.page.keyboard.press("Backspace")
    visit.page.keyboard.press("Backspace")
    assert visit.page.evaluate("document.activeElement.value") == "one"
    assert visit.page.locator("#rows textarea").count() == 1
    visit.page.evaluate("document.activeElement.select()")
    paste(visit, "a list\n\n  of three\r\nlines\n")
    assert typed(visit) == ["a list", "of three", "lines"]
    names = visit.page.locator("#rows textarea").evaluate_all("all => all.map(each => each.getAttribute('aria-label'))")
    assert names == ["Caption 1", "Caption 2", "Caption 3"]


def paste(visit: Visit, text: str) -> None:
    """Into the field that has the focus."""
    visit.page.evaluate(
        """(text) => {
          const clipboardData = new DataTransfer();
          clipboardData.setData("text/plain", text);
          document.activeElement.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
        }""",
        text,
    )


def test_a_long_list_is_pasted_at_once_and_one_too_long_is_refused(browser: Browser) -> None:
    """Rows are named once each, however many come together."""
    with wire(max_captions=2000, max_queue_items=4096) as served, quiet(browser, url_of(served)) as visit:
        visit.page.evaluate(
            """() => {
              window.numNamed = 0;
              const watched = { attributeFilter: ["aria-label"], subtree: true };
              new MutationObserver((records) => (window.numNamed += records.length)).observe(document.getElementById("rows"), watched);
            }"""
        )
        visit.type("typed before", "and this")
        visit.field("Caption 3").focus()
        paste(visit, "\n".join(f"line {number}" for number in range(1999)))
        assert visit.fault() == "Caption 3: That would be 2,001 captions, and this server takes 2,000 at a time; nothing was added."
        assert typed(visit) == ["typed before", "and this", ""]
        paste(visit, "\n".join(f"line {number}" for number in range(1998)))
        assert visit.page.get_by_role("alert").inner_text() == ""
        assert len(typed(visit)) == 2000
        assert visit.field("Caption 2000").input_value() == "line 1997"
        assert visit.page.evaluate("window.numNamed") <= 2 * 2003
        visit.page.get_by_role("button", name="Add a caption").click()
        assert "That would be 2,001 captions" in visit.fault()
        assert len(typed(visit)) == 2000


LOOKS = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": PHONE,
    "dark phone": {**PHONE, "color_scheme": "dark"},
}


@pytest.mark.parametrize("look", LOOKS)
def test_an_accessibility_checker_finds_nothing(browser: Browser, oracle: Wire, look: str) -> None:
    """In every state of the page."""
    with quiet(browser, url_of(oracle), **LOOKS[look]) as visit:
        for state in states(visit):
            assert violations(visit) == [], state


def states(visit: Visit) -> Iterator[str]:
    yield "empty"
    give(visit, "drop")
    visit.type(*CAPTIONS, "Nice day.")
    visit.page.get_by_text("Prompt", exact=True).click()
    visit.rank()
    yield "ranked"
    visit.field("Caption 2").fill("long " * 20)
    visit.page.get_by_role("button", name="Rank captions").click()
    visit.fault()
    yield "refused"
    visit.page.get_by_text("Compare two").click()
    visit.field("Caption B").fill("Nobody asked.")
    visit.page.get_by_role("button", name="Compare").click()
    visit.page.locator(".sides").wait_for()
    yield "compared"


def violations(visit: Visit) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    said = Axe().run(visit.page, options={"resultTypes": ["violations", "incomplete"]}).response
    unsure = [each for each in said["incomplete"] if each["id"] == "color-contrast"]  # colours it could not tell
    return [f"{each['id']}: {[node['html'] for node in each['nodes']]}" for each in said["violations"] + unsure]


def test_the_checker_would_notice(visit: Visit) -> None:
    """Planted: a field without a name, text too pale to read, a picture without words."""
    visit.page.evaluate(
        """() => {
          document.querySelector("#rows textarea").removeAttribute("aria-label");
          document.getElementById("drawn-title").style.color = "#bbb";
          document.querySelector("#drawn-list img").removeAttribute("alt");
        }"""
    )
    assert {each.partition(":")[0] for each in violations(visit)} >= {"label", "color-contrast", "image-alt"}


def test_the_key_form_passes_the_checker_too(browser: Browser) -> None:
    with wire(api_key=KEY) as served, quiet(browser, url_of(served)) as visit:
        visit.page.get_by_label("This server asks for a key").fill("wrong")
        visit.page.keyboard.press("Enter")
        visit.fault()
        assert violations(visit) == []


def test_a_phone_scrolls_one_way_and_its_targets_are_large(browser: Browser, oracle: Wire) -> None:
    """44 pixels, but for links in a line of text."""
    small = """() => [...document.querySelectorAll("button, summary, textarea, label[for^=mode], input[type=file], footer a")]
      .filter((node) => node.checkVisibility())
      .map((node) => [node.outerHTML.slice(0, 60), node.getBoundingClientRect()])
      .filter(([, box]) => box.height < 43.9 || box.width < 43.9)
      .map(([name]) => name)"""
    with quiet(browser, url_of(oracle), **PHONE) as visit:
        for state in states(visit):
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360, state
            assert visit.page.evaluate(small) == [], state


def test_a_word_without_an_end_breaks_and_a_crowd_of_captions_fits(browser: Browser, oracle: Wire) -> None:
    with quiet(browser, url_of(oracle), **PHONE) as visit:
        give(visit, "drop", name="a" * 120 + ".png")
        visit.type("w" * 79, *(f"caption {number}" for number in range(12)))
        assert len(visit.rank()) == 13
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_dark_is_dark_and_light_is_light(browser: Browser, oracle: Wire) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        with quiet(browser, url_of(oracle), color_scheme=scheme) as visit:
            found = visit.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
            grounds[scheme] = sum(found) / 3
    assert grounds["light"] > 220
    assert grounds["dark"] < 40


def test_who_wants_no_motion_gets_none(browser: Browser) -> None:
    scorer = OracleScorer()
    with wire(scorer=scorer) as served:
        for motion, animation in (("reduce", "none"), ("no-preference", "waiting")):
            with quiet(browser, url_of(served), reduced_motion=motion) as visit:
                give(visit, "drop")
                visit.type("Nice day.")
                scorer.gate.clear()
                visit.page.get_by_role("button", name="Rank captions").click()
                visit.page.locator("#result[aria-busy=true]").wait_for()
                assert visit.page.evaluate("getComputedStyle(document.getElementById('result')).animationName") == animation
                scorer.gate.set()
                visit.ranking()


def test_a_screen_reader_finds_its_way(visit: Visit) -> None:
    """Landmarks, headings, a table with headers, and two lines that speak up: the verdict and the fault."""
    give(visit, "drop")
    visit.type(*CAPTIONS)
    best = visit.rank()[0][0]
    for role in ("banner", "main", "contentinfo", "navigation", "table", "alert"):
        assert visit.page.get_by_role(role).count() == 1, role
    assert visit.page.get_by_role("status").first.inner_text() == f"Best of 3: “{best}”"
    assert visit.page.get_by_role("columnheader").all_inner_texts() == ["Rank", "Caption", "Score", "Against the best"]
    assert visit.page.get_by_role("rowheader").count() == 3
    assert visit.page.get_by_role("radio").count() == 2
    assert visit.page.get_by_role("heading", level=1).inner_text() == "Punchline"


def test_nobody_else_is_asked_and_nothing_is_complained_of(browser: Browser, server: Server) -> None:
    with quiet(browser, server.url) as visit:
        for number in range(3):
            visit.drawn(number).click()
            visit.rank()
        visit.page.get_by_text("Compare two").click()
        visit.page.get_by_role("button", name="Compare").click()
        visit.page.locator(".sides").wait_for()
        assert visit.refusals == []
        paths = {url.removeprefix(visit.origin) for _, url in visit.asked if url.startswith("http")}
        assert {"/", "/info", "/images", "/rank", "/compare", "/web/playground.js", "/cartoons/captions.json"} <= paths
        answer = visit.page.reload()
        assert answer is not None
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_the_policy_holds_in_the_browser(visit: Visit) -> None:
    """A script that came in through a hole would be refused, and could send nothing away."""
    refused = """async () => {
      const broken = new Promise((resolve) => document.addEventListener("securitypolicyviolation", resolve));
      document.body.append(Object.assign(document.createElement("script"), { textContent: "document.title = 'pwned'" }));
      return [(await broken).effectiveDirective, document.title];
    }"""
    assert visit.page.evaluate(refused) == ["script-src-elem", "Punchline playground"]
    assert len(visit.complaints) == 1
    visit.complaints.clear()
