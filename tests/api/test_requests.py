"""From bodies to validated requests: every wrong shape has its status, code and place, and no text of the client comes back."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from app.settings import Settings
from tests.fakes import Served, expected_scores, picture, serving

pytestmark = pytest.mark.anyio

PICTURE = picture()
IMAGE = base64.b64encode(PICTURE).decode()
SECRET = "Sesame-Caption-4711 <b>"
ROUTES = ("/score", "/compare", "/rank")


async def post(served: Served, route: str, body: Any) -> Any:
    """`body` as it is when bytes, else as JSON that may hold lone surrogates."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await served.client.post(route, content=content, headers={"Content-Type": "application/json"})


def score_with(**fields: Any) -> dict[str, Any]:
    body = {"image": IMAGE, "captions": ["fine", SECRET], **fields}
    return {name: value for name, value in body.items() if value is not ...}


GROUP = {"image": IMAGE, "captions": ["fine"]}

# name: (route, body, status, code, field)
FAULTS: dict[str, tuple[str, Any, int, str, str | None]] = {
    "a list": ("/score", [SECRET], 422, "invalid_request", None),
    "a text": ("/score", SECRET, 422, "invalid_request", None),
    "null": ("/score", None, 422, "invalid_request", None),
    "a number": ("/score", 4711, 422, "invalid_request", None),
    "empty": ("/score", {}, 422, "invalid_request", None),
    "no captions": ("/score", score_with(captions=...), 422, "invalid_request", None),
    "null captions": ("/score", score_with(captions=None), 422, "invalid_request", None),
    "a text for captions": ("/score", score_with(captions=SECRET), 422, "invalid_request", "captions"),
    "an object for captions": ("/score", score_with(captions={"0": SECRET}), 422, "invalid_request", "captions"),
    "no caption at all": ("/score", score_with(captions=[]), 422, "empty_batch", "captions"),
    "null caption": ("/score", score_with(captions=[SECRET, None]), 422, "invalid_request", "captions[1]"),
    "number caption": ("/score", score_with(captions=[SECRET, 4711]), 422, "invalid_request", "captions[1]"),
    "bool caption": ("/score", score_with(captions=[True]), 422, "invalid_request", "captions[0]"),
    "list caption": ("/score", score_with(captions=[[SECRET]]), 422, "invalid_request", "captions[0]"),
    "huge number caption": ("/score", score_with(captions=[10**18]), 422, "invalid_request", "captions[0]"),
    "number caption of 4000 digits": ("/score", score_with(captions=[10**4000]), 400, "invalid_json", None),
    "surrogate caption": ("/score", score_with(captions=["fine", "\ud800"]), 422, "invalid_unicode", "captions[1]"),
    "surrogate pair the wrong way": ("/score", score_with(captions=["\udc00\ud800"]), 422, "invalid_unicode", "captions[0]"),
    "surrogate prompt": ("/score", score_with(prompt=SECRET + "\udfff"), 422, "invalid_unicode", "prompt"),
    "surrogate image": ("/score", score_with(image="\ud800"), 422, "invalid_unicode", "image"),
    "surrogate fingerprint": ("/score", score_with(expect_fingerprint="\ud800"), 422, "invalid_unicode", "expect_fingerprint"),
    "surrogate option": ("/score", score_with(on_item_error="\ud800"), 422, "invalid_unicode", "on_item_error"),
    "surrogate key": ("/score", {**score_with(), "\ud800": 1}, 422, "invalid_unicode", None),
    "number prompt": ("/score", score_with(prompt=4711), 422, "invalid_request", "prompt"),
    "number image": ("/score", score_with(image=4711), 422, "invalid_request", "image"),
    "image list": ("/score", score_with(image=[IMAGE]), 422, "invalid_request", "image"),
    "text for a number": ("/score", score_with(timeout_ms="4711"), 422, "invalid_request", "timeout_ms"),
    "float for a number": ("/score", score_with(timeout_ms=4711.0), 422, "invalid_request", "timeout_ms"),
    "true for a number": ("/score", score_with(timeout_ms=True), 422, "invalid_request", "timeout_ms"),
    "no time": ("/score", score_with(timeout_ms=0), 422, "invalid_request", "timeout_ms"),
    "negative time": ("/score", score_with(timeout_ms=-4711), 422, "invalid_request", "timeout_ms"),
    "time over the cap": ("/score", score_with(timeout_ms=Settings().max_timeout_ms + 1), 422, "invalid_request", "timeout_ms"),
    "time beyond 64 bits": ("/score", score_with(timeout_ms=10**18), 422, "invalid_request", "timeout_ms"),
    "time of 4000 digits": ("/score", score_with(timeout_ms=10**4000), 400, "invalid_json", None),
    "overflowing time": ("/score", json.dumps(score_with(timeout_ms=1)).encode()[:-2] + b"1e999}", 422, "invalid_request", "timeout_ms"),
    "1 for true": ("/score", score_with(explain=1), 422, "invalid_request", "explain"),
    "yes for true": ("/score", score_with(explain="yes"), 422, "invalid_request", "explain"),
    "unknown policy": ("/score", score_with(on_item_error=SECRET), 422, "invalid_request", "on_item_error"),
    "null policy": ("/score", score_with(on_item_error=None), 422, "invalid_request", "on_item_error"),
    "number fingerprint": ("/score", score_with(expect_fingerprint=4711), 422, "invalid_request", "expect_fingerprint"),
    "typo": ("/score", score_with(caption_s=[SECRET]), 422, "unknown_field", "caption_s"),
    "unknown field with an odd name": ("/score", {**score_with(), SECRET: 1}, 422, "unknown_field", None),
    "unknown field with a long name": ("/score", {**score_with(), "a" * 41: 1}, 422, "unknown_field", None),
    "captions and groups": ("/score", score_with(groups=[GROUP]), 422, "invalid_request", None),
    "groups and an image": ("/score", {"groups": [GROUP], "image": IMAGE}, 422, "invalid_request", None),
    "groups and a prompt": ("/score", {"groups": [GROUP], "prompt": SECRET}, 422, "invalid_request", None),
    "no group": ("/score", {"groups": []}, 422, "empty_batch", "groups"),
    "an object for groups": ("/score", {"groups": {"0": GROUP}}, 422, "invalid_request", "groups"),
    "a text as a group": ("/score", {"groups": [GROUP, SECRET]}, 422, "invalid_request", "groups[1]"),
    "a group without captions": ("/score", {"groups": [GROUP, {"image": IMAGE}]}, 422, "missing_field", "groups[1].captions"),
    "an empty group": ("/score", {"groups": [{**GROUP, "captions": []}]}, 422, "empty_batch", "groups[0].captions"),
    "an option inside a group": ("/score", {"groups": [{**GROUP, "explain": True}]}, 422, "unknown_field", "groups[0].explain"),
    "a number as id": ("/score", {"groups": [{**GROUP, "id": 4711}]}, 422, "invalid_request", "groups[0].id"),
    "a long id": ("/score", {"groups": [{**GROUP, "id": "i" * 257}]}, 422, "invalid_request", "groups[0].id"),
    "equal ids": ("/score", {"groups": [{**GROUP, "id": SECRET}, {**GROUP, "id": SECRET}]}, 422, "duplicate_id", None),
    "compare without b": ("/compare", {"image": IMAGE, "a": SECRET}, 422, "missing_field", "b"),
    "compare a list": ("/compare", {"image": IMAGE, "a": [SECRET], "b": "x"}, 422, "invalid_request", "a"),
    "compare null": ("/compare", {"image": IMAGE, "a": None, "b": "x"}, 422, "invalid_request", "a"),
    "compare captions": ("/compare", {"image": IMAGE, "a": "x", "b": "y", "captions": [SECRET]}, 422, "unknown_field", "captions"),
    "rank groups": ("/rank", {"groups": [GROUP], "captions": ["x"]}, 422, "unknown_field", "groups"),
    "rank nothing": ("/rank", {"image": IMAGE, "captions": []}, 422, "empty_batch", "captions"),
    "rank explain": ("/rank", {"image": IMAGE, "captions": ["x"], "explain": True}, 422, "unknown_field", "explain"),
    "a pin in the address": ("/score?expect_fingerprint=4711", score_with(), 422, "unknown_field", "expect_fingerprint"),
    "a model in the address": ("/rank?model=demo", {"image": IMAGE, "captions": ["x"]}, 422, "unknown_field", "model"),
    "a time in the address": ("/compare?timeout_ms=4711", {"image": IMAGE, "a": "x", "b": "y"}, 422, "unknown_field", "timeout_ms"),
    "an odd address": ("/score?%3Cb%3E=Sesame", score_with(), 422, "unknown_field", None),
    "a self-test of two models": ("/selftest?model=demo&model=Sesame", {}, 422, "duplicate_parameter", "model"),
    "a self-test with an option": ("/selftest?modle=Sesame", {}, 422, "unknown_field", "modle"),
    "257 captions": ("/score", score_with(captions=["x"] * 257), 413, "too_many_items", "captions"),
    "257 captions in groups": ("/score", {"groups": [{**GROUP, "captions": ["x"] * 129}] * 2}, 413, "too_many_items", "captions"),
    "17 groups": ("/score", {"groups": [GROUP] * 17}, 413, "too_many_items", "groups"),
    "a caption too large": ("/score", score_with(captions=["x", "y" * 8193]), 413, "caption_too_large", "captions[1]"),
    "a caption too large in bytes": ("/rank", {"image": IMAGE, "captions": ["é" * 4097]}, 413, "caption_too_large", "captions[0]"),
    "a prompt too large": ("/score", score_with(prompt=SECRET * 1000), 413, "prompt_too_large", "prompt"),
    "a caption too large in a group": (
        *("/score", {"groups": [GROUP, {**GROUP, "captions": ["y" * 8193]}]}, 413, "caption_too_large", "groups[1].captions[0]"),
    ),
    "a path": ("/score", score_with(image="/etc/passwd"), 422, "bad_base64", "image"),
    "a file URL": ("/score", score_with(image="file:///etc/passwd"), 422, "url_scheme_not_allowed", "image"),
    "a web address": ("/score", score_with(image="http://169.254.169.254/latest"), 403, "url_not_allowed", "image"),
}  # fmt: skip
FORBIDDEN_FIELDS = ("temperature", "template", "chat_template", "dtype", "max_pixels", "adapter", "images", "processor_kwargs")
FOREIGN_FIELDS = ("image_index", "ids", "priority")  # of other APIs: groups carry their own image and their own id, and nobody goes first


@pytest.mark.parametrize("name", FAULTS)
async def test_faults(application: Served, name: str) -> None:
    route, body, status, code, field = FAULTS[name]
    answer = await post(application, route, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error.get("field")) == (status, code, field)
    assert error["retryable"] is False
    assert "Retry-After" not in answer.headers
    told = answer.text.replace(error["request_id"], "")  # random digits, which may be any
    assert "Sesame" not in told
    assert "4711" not in told
    assert application.scorer.batches == []


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", [*FORBIDDEN_FIELDS, *FOREIGN_FIELDS])
async def test_nothing_that_belongs_to_the_artifact_is_a_parameter(application: Served, route: str, name: str) -> None:
    body = {"image": IMAGE, "a": "x", "b": "y"} if route == "/compare" else {"image": IMAGE, "captions": ["x"]}
    error = (await post(application, route, {**body, name: 1})).json()["error"]
    assert (error["code"], error["field"]) == ("unknown_field", name)


@pytest.mark.parametrize(
    ("bound", "body"),
    [
        ({"max_captions": 2}, score_with()),
        ({"max_groups": 2}, {"groups": [GROUP] * 2}),
        ({"max_caption_bytes": 16}, score_with(captions=["x" * 16])),
        ({"max_prompt_bytes": 16}, score_with(prompt="é" * 8)),
        ({"max_timeout_ms": 10_000}, score_with(timeout_ms=10_000)),
        ({"max_image_bytes": max(1024, len(PICTURE))}, score_with()),
    ],
)
async def test_what_is_exactly_at_a_limit_is_scored(bound: dict[str, Any], body: dict[str, Any]) -> None:
    async with serving(**bound) as served:
        assert (await post(served, "/score", body)).status_code == 200


BOUND = b"--bound\r\n"


def form(*parts: tuple[str, bytes]) -> bytes:
    """A multipart body; the first of a pair is the part's parameters."""
    return (
        b"".join(b"--bound\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (name.encode(), data) for name, data in parts)
        + b"--bound--\r\n"
    )


FILE = ('name="image"; filename="cartoon.png"', PICTURE)
CAPTION = ('name="caption"', b"fine")

FORM_FAULTS: dict[str, tuple[str, bytes, int, str, str | None]] = {
    "two images": ("/score", form(FILE, FILE, CAPTION), 422, "duplicate_part", "image"),
    "a file and an id": ("/score", form(FILE, ('name="image"', b"sha256:" + b"0" * 64), CAPTION), 422, "duplicate_part", "image"),
    "an id and a file": ("/score", form(('name="image"', b"sha256:" + b"0" * 64), FILE, CAPTION), 422, "duplicate_part", "image"),
    "two prompts": ("/score", form(FILE, ('name="prompt"', b"x"), ('name="prompt"', b"y"), CAPTION), 422, "duplicate_part", "prompt"),
    "two a": ("/compare", form(FILE, ('name="a"', b"x"), ('name="a"', b"y"), ('name="b"', b"z")), 422, "duplicate_part", "a"),
    "captions, then caption": ("/score", form(FILE, ('name="captions"', b"x"), CAPTION), 422, "unknown_field", "captions"),
    "caption, then captions": ("/score", form(FILE, CAPTION, ('name="captions"', b"x")), 422, "unknown_field", "captions"),
    "groups": ("/score", form(FILE, ('name="groups"', b"[]")), 422, "unknown_field", "groups"),
    "a JSON part": ("/score", form(FILE, CAPTION, ('name="request"', b"{}")), 422, "unknown_field", "request"),
    "an unknown file": ("/score", form(FILE, CAPTION, ('name="extra"; filename="x"', b"x")), 422, "unknown_field", "extra"),
    "an unknown picture": ("/score", form(('name="file"; filename="x.png"', PICTURE), CAPTION), 422, "unknown_field", "file"),
    "an unknown picture, twice": ("/rank", form(*[('name="file"; filename="x.png"', PICTURE)] * 2, CAPTION), 422, "unknown_field", "file"),
    "an unknown text that is not UTF-8": ("/score", form(FILE, CAPTION, ('name="file"', b"\xff")), 422, "invalid_unicode", "file"),
    "a picture as a caption": (*("/score", form(FILE, ('name="caption"; filename="x.png"', PICTURE)), 422, "invalid_unicode", "caption"),),
    "an option of another route": ("/rank", form(FILE, CAPTION, ('name="explain"', b"true")), 422, "unknown_field", "explain"),
    "an empty name": ("/score", form(FILE, CAPTION, ('name=""', b"x")), 422, "unknown_field", None),
    "an odd name": ("/score", form(FILE, CAPTION, ('name="Sesame <b>"', b"x")), 422, "unknown_field", None),
    "an odd name twice": ("/score", form(FILE, ('name="Sesame <b>"', b"x"), ('name="Sesame <b>"', b"x")), 422, "duplicate_part", None),
    "no caption": ("/score", form(FILE), 422, "invalid_request", None),
    "no b": ("/compare", form(FILE, ('name="a"', b"Sesame")), 422, "missing_field", "b"),
    "caption for compare": ("/compare", form(FILE, ('name="a"', b"x"), ('name="b"', b"y"), CAPTION), 422, "unknown_field", "captions"),
    "a caption that is not UTF-8": ("/score", form(FILE, ('name="caption"', b"Sesame \xff")), 422, "invalid_unicode", "caption"),
    "a prompt that is not UTF-8": ("/score", form(FILE, CAPTION, ('name="prompt"', b"\xed\xa0\x80")), 422, "invalid_unicode", "prompt"),
    "time as words": ("/score", form(FILE, CAPTION, ('name="timeout_ms"', b"soon")), 422, "invalid_request", "timeout_ms"),
    "no time": ("/score", form(FILE, CAPTION, ('name="timeout_ms"', b"0")), 422, "invalid_request", "timeout_ms"),
    "negative time": ("/score", form(FILE, CAPTION, ('name="timeout_ms"', b"-1")), 422, "invalid_request", "timeout_ms"),
    "time of 5000 digits": ("/score", form(FILE, CAPTION, ('name="timeout_ms"', b"9" * 5000)), 422, "invalid_request", "timeout_ms"),
    "time in Arabic digits": ("/score", form(FILE, CAPTION, ('name="timeout_ms"', "٣".encode())), 422, "invalid_request", "timeout_ms"),
    "true in capitals": ("/score", form(FILE, CAPTION, ('name="explain"', b"TRUE")), 422, "invalid_request", "explain"),
    "an unknown policy": ("/score", form(FILE, CAPTION, ('name="on_item_error"', b"Sesame")), 422, "invalid_request", "on_item_error"),
    "an empty file": ("/score", form(('name="image"; filename="x.png"', b""), CAPTION), 422, "image_decode_failed", "image"),
    "a page as a file": ("/score", form(('name="image"; filename="x.png"', b"<html>Sesame"), CAPTION), 422, "image_decode_failed", "image"),
    "257 captions": ("/score", form(FILE, *[CAPTION] * 257), 413, "too_many_items", "captions"),
    "4300 parts": ("/score", form(FILE, *[CAPTION] * 4300), 400, "multipart_invalid", None),
    "no final boundary": ("/score", form(FILE, CAPTION)[:-10], 400, "multipart_invalid", None),
}


@pytest.mark.parametrize("name", FORM_FAULTS)
async def test_form_faults(application: Served, name: str) -> None:
    route, body, status, code, field = FORM_FAULTS[name]
    headers = {"Content-Type": "multipart/form-data; boundary=bound"}
    answer = await application.client.post(route, content=body, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error.get("field")) == (status, code, field)
    assert "Sesame" not in answer.text
    assert application.scorer.batches == []


@pytest.mark.parametrize(("method", "route"), [*(("POST", route) for route in ROUTES), ("PUT", "/images")])
async def test_an_unknown_file_is_told_what_the_image_is_called(application: Served, method: str, route: str) -> None:
    """`curl -F file=@cartoon.png` is a common mistake; it must not read as a fault of the picture."""
    headers = {"Content-Type": "multipart/form-data; boundary=bound"}
    content = form(('name="file"; filename="x.png"', PICTURE))
    answer = await application.client.request(method, route, content=content, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["field"]) == (422, "unknown_field", "file")
    assert "the part named image" in error["message"]


async def test_parts_may_be_as_many_as_captions_and_a_few_more() -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=bound"}
    async with serving(max_captions=4) as served:
        bodies = [form(FILE, *[CAPTION] * number) for number in (4, 5, 19, 20)]
        answers = [await served.client.post("/score", content=body, headers=headers) for body in bodies]
    codes = [answer.json().get("error", {}).get("code") for answer in answers]
    assert codes == [None, "too_many_items", "too_many_items", "multipart_invalid"]


async def test_captions_of_a_form_are_scored_byte_for_byte(application: Served) -> None:
    captions = ["", " ", "line\r\nbreak", "é 🐧", "--bound", "1", "true", "null"]
    parts = [FILE, *[('name="caption"', caption.encode()) for caption in captions]]
    headers = {"Content-Type": 'Multipart/Form-Data; boundary="bound"'}
    answer = await application.client.post("/score", content=form(*parts), headers=headers)
    assert answer.json()["scores"] == expected_scores(PICTURE, captions)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "kind",
    [
        None,
        "",
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "application/jsonx",
        "application/json-seq",
        "image/png",
        ";",
    ],
)
async def test_other_media_types_are_415(application: Served, route: str, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    answer = await application.client.post(route, content=json.dumps(score_with()).encode(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON ", "application/json; charset=utf-8", "application/json;charset=x"])
async def test_json_by_any_spelling(application: Served, kind: str) -> None:
    answer = await application.client.post("/score", content=json.dumps(score_with()).encode(), headers={"Content-Type": kind})
    assert answer.status_code == 200


@pytest.mark.parametrize("route", [*ROUTES, "/images"])
async def test_compression_and_size_are_checked_on_every_route_with_a_body(route: str) -> None:
    async with serving(max_body_bytes=4096, max_image_bytes=1024) as served:
        method = "PUT" if route == "/images" else "POST"
        headers = {"Content-Type": "application/json"}
        large = await served.client.request(method, route, content=b" " * 4097, headers=headers)
        assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
        assert large.headers["Connection"] == "close"
        assert "Retry-After" not in large.headers
        packed = await served.client.request(method, route, content=b"x", headers={**headers, "Content-Encoding": "gzip"})
        assert (packed.status_code, packed.json()["error"]["code"]) == (415, "unsupported_media_type")
