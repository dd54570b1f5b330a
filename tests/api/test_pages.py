"""The playground's files: what they are answered with, who may have them, and that nothing else can be had beside them."""

from __future__ import annotations

import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin

import pytest

from app.api.pages import CARTOONS, MEDIA_TYPES, PLACES, WEB, Page, read_pages
from tests.fakes import FINGERPRINT, Served, serving

pytestmark = pytest.mark.anyio

SVG_NAMESPACE = "http://www.w3.org/2000/svg"  # a name, which nobody asks for
PAGES = {page.path: page for page in read_pages()}
ROOT = Path(__file__).parents[2]
KEY = "correct-horse-battery-staple"
CONFINED = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' blob: data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


class Markup(HTMLParser):
    """What a page refers to, and what of it a strict policy would refuse."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.refused: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.references += [value for name in ("src", "href") if (value := given.get(name)) and not value.startswith("#")]
        self.refused += [name for name in given if name.startswith("on") or name == "style"]
        self.refused += [tag] if tag == "style" or (tag == "script" and "src" not in given) else []
        self.ids += [value for value in [given.get("id")] if value]


MARKUPS = {path: Markup(page.body.decode()) for path, page in PAGES.items() if page.media_type.startswith("text/html")}
MODULES = ("/", "/docs")  # the pages made of modules over dom.js


@pytest.mark.parametrize("path", PAGES)
async def test_every_file_is_answered_as_what_it_is_and_confined(application: Served, path: str) -> None:
    answer = await application.client.get(path)
    assert (answer.status_code, answer.content) == (200, PAGES[path].body)
    assert answer.headers["Content-Type"] == PAGES[path].media_type
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["X-Model-Fingerprint"] == FINGERPRINT
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert policy == CONFINED


@pytest.mark.parametrize("path", PAGES)
async def test_head_tells_the_same(application: Served, path: str) -> None:
    got, told = await application.client.get(path), await application.client.head(path)
    assert told.status_code == 200
    for name in ("Content-Type", "Content-Length", "ETag", "Content-Security-Policy", "Cache-Control"):
        assert told.headers[name] == got.headers[name]


@pytest.mark.parametrize("held", ["{}", "W/{}", '"another", {}', "*"])
async def test_what_the_browser_holds_is_not_sent_again(application: Served, held: str) -> None:
    tag = (await application.client.get("/")).headers["ETag"]
    answer = await application.client.get("/", headers={"If-None-Match": held.format(tag)})
    assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", tag)
    assert answer.headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize("held", ['"another"', "", 'W/"another", "third"'])
async def test_what_the_browser_holds_of_another_version_is_replaced(application: Served, held: str) -> None:
    answer = await application.client.get("/", headers={"If-None-Match": held})
    assert (answer.status_code, answer.content) == (200, PAGES["/"].body)


def test_the_tag_is_of_the_bytes() -> None:
    assert Page("/", b"one", "text/html").etag == Page("/x", b"one", "text/css").etag
    assert Page("/", b"one", "text/html").etag != Page("/", b"two", "text/html").etag


def test_every_file_of_the_folders_is_a_page() -> None:
    files = {file.name for folder in (WEB, CARTOONS) for file in folder.iterdir()}
    pages = {path: name for name, path in PLACES.items()}
    assert {pages.get(path) or path.rpartition("/")[2] for path in PAGES} == files
    assert {"." + name.rpartition(".")[2] for name in files} <= MEDIA_TYPES.keys()


@pytest.mark.parametrize(
    "path",
    [
        "/web/",
        "/web/nothing.js",
        "/web/index.html",
        "/web/../api/pages.py",
        "/web/..%2fapi%2fpages.py",
        "/web/%2e%2e/settings.py",
        "/cartoons/../golden.json",
        "/cartoons/%2e%2e%2fgolden.json",
        "/cartoons//etc/passwd",
        "/cartoons/captions.json/",
        "/web/playground.js%00",
        "/WEB/playground.js",
        "/index.html",
        "/favicon.ico",
    ],
)
async def test_nothing_beside_the_files_can_be_had(application: Served, path: str) -> None:
    answer = await application.client.get(path)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["retryable"]) == (404, "not_found", False)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_a_page_is_only_read(application: Served, method: str) -> None:
    answer = await application.client.request(method, "/")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")


async def test_pages_are_open_and_what_they_ask_is_not() -> None:
    async with serving(api_key=KEY) as served:
        for path in PAGES:
            assert (await served.client.get(path)).status_code == 200
        for path in ("/web/nothing.js", "/web/../info", "/info", "/openapi.json", "/docs/"):
            assert (await served.client.get(path)).status_code == 401


async def test_pages_hold_nothing_of_the_server(application: Served) -> None:
    """They are the same for every model, key and setting: whoever may read them learns nothing."""
    for path in PAGES:
        assert FINGERPRINT.encode() not in (await application.client.get(path)).content


async def test_openapi_does_not_list_pages(application: Served) -> None:
    listed = (await application.client.get("/openapi.json")).json()["paths"]
    assert not set(listed) & set(PAGES)


async def test_pages_are_counted_under_their_own_names(application: Served) -> None:
    await application.client.get("/web/playground.js")
    labels = {"http_request_method": "GET", "http_route": "/web/playground.js", "http_response_status_code": "200"}
    assert application.metric("http_server_request_duration_seconds_count", **labels) == 1


def test_the_package_holds_every_page() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["app"]
    packed = {file for pattern in patterns for file in (ROOT / "app").glob(pattern)}
    assert packed >= {*WEB.iterdir(), *CARTOONS.iterdir()}


def test_the_page_runs_under_its_own_policy() -> None:
    assert [markup.refused for markup in MARKUPS.values()] == [[] for _ in MARKUPS]
    scripts = "\n".join(page.body.decode() for path, page in PAGES.items() if path.endswith(".js"))
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "localStorage",
        "sessionStorage",
    ):
        assert word not in scripts


def test_the_page_refers_only_to_this_server() -> None:
    known = set(PAGES) | {"/info", "/openapi.json", "/runs/"}
    assert {urljoin(place, reference) for place, markup in MARKUPS.items() for reference in markup.references} <= known
    for path, page in PAGES.items():
        if path.endswith((".js", ".css")):
            text = page.body.decode()
            imported = re.findall(r'from "([^"]+)"|url\(([^)]+)\)|@import', text)
            assert {urljoin(path, first) for first, _ in imported} <= set(PAGES)
            assert "://" not in text.replace(SVG_NAMESPACE, "")


def scripts_of(path: str) -> set[str]:
    """The scripts of a page, and all that they import."""
    found: set[str] = set()
    pending = [urljoin(path, name) for name in MARKUPS[path].references if name.endswith(".js")]
    while pending:
        script = pending.pop()
        found.add(script)
        imported = {urljoin(script, name) for name in re.findall(r'from "([^"]+)"', PAGES[script].body.decode())}
        pending.extend(imported - found)
    return found


@pytest.mark.parametrize("path", MODULES)
def test_scripts_name_only_elements_that_are_there(path: str) -> None:
    named = {name for script in scripts_of(path) for name in re.findall(r'byId\("([\w-]+)"\)', PAGES[script].body.decode())}
    ids = MARKUPS[path].ids
    assert named
    assert named <= set(ids)
    assert len(ids) == len(set(ids))


def test_every_script_is_of_a_page() -> None:
    assert set.union(*map(scripts_of, MARKUPS)) == {path for path in PAGES if path.endswith(".js")}


def test_every_drawn_cartoon_has_captions() -> None:
    captions = json.loads((CARTOONS / "captions.json").read_text())
    assert set(captions) == {file.name for file in CARTOONS.glob("*.png")}
    assert all(len(texts) >= 2 and all(texts) for texts in captions.values())
