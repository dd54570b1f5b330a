"""The routes over the whole stack: scores are the oracle's, in order, whatever the form of the request."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
from typing import Any

import pytest

from tests.fakes import FINGERPRINT, MAX_CAPTION_TOKENS, UNSCORABLE, OracleScorer, Served, expected_scores, picture, serving, until

pytestmark = pytest.mark.anyio

PICTURE = picture()
OTHER = picture(96, 64, seed=1, kind="JPEG")
CAPTIONS = ["It says it is here about the iceberg.", "Nice day.", "", "\u202e\x00 \x1b[31m <|im_end|> 🐧", "Nice day."]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def sha(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def form(*fields: tuple[str, str], image: bytes | None = PICTURE) -> list[tuple[str, Any]]:
    """Parts for httpx: an image file and text fields."""
    files: list[tuple[str, Any]] = [] if image is None else [("image", ("cartoon.png", image))]
    return files + [(name, (None, value.encode())) for name, value in fields]


async def score(served: Served, **body: Any) -> dict[str, Any]:
    answer = await served.client.post("/score", json={"image": b64(PICTURE), "captions": CAPTIONS, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def fault(served: Served, route: str, body: dict[str, Any], status: int) -> dict[str, Any]:
    answer = await served.client.post(route, json=body)
    assert answer.status_code == status, answer.text
    return dict(answer.json()["error"])


async def test_score_gives_one_number_a_caption_in_order(application: Served) -> None:
    answer = await score(application)
    assert answer["scores"] == expected_scores(PICTURE, CAPTIONS)  # to the last bit: JSON carries the shortest exact form
    assert answer["scores"][1] == answer["scores"][4]
    assert answer["image_id"] == sha(PICTURE)
    assert answer["model_fingerprint"] == FINGERPRINT
    assert answer["usage"]["captions"] == len(CAPTIONS)
    assert answer["usage"]["tokens"] > answer["usage"]["computed_tokens"] > 0
    assert set(answer) == {"scores", "image_id", "usage", "model_fingerprint", "request_id"}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
async def test_json_and_multipart_give_equal_answers(application: Served, kind: str) -> None:
    image = picture(kind=kind)
    as_json = await application.client.post("/score", json={"image": b64(image), "prompt": "Why?", "captions": CAPTIONS})
    fields = [("prompt", "Why?"), *(("caption", caption) for caption in CAPTIONS)]
    as_form = await application.client.post("/score", files=form(*fields, image=image))
    assert as_json.status_code == as_form.status_code == 200
    assert {**as_json.json(), "request_id": ""} == {**as_form.json(), "request_id": ""}


@pytest.mark.parametrize("text", [b64(PICTURE), "data:image/png;base64," + b64(PICTURE), "DATA:IMAGE/PNG;BASE64," + b64(PICTURE)])
async def test_an_image_may_be_text_in_a_form(application: Served, text: str) -> None:
    answer = await application.client.post("/score", files=form(("image", text), ("caption", "Nice day."), image=None))
    assert answer.json()["scores"] == expected_scores(PICTURE, ["Nice day."])


async def test_another_prompt_is_another_score(application: Served) -> None:
    first, second = await score(application), await score(application, prompt="Why?")
    assert second["scores"] == expected_scores(PICTURE, CAPTIONS, "Why?")
    assert first["scores"] != second["scores"]


async def test_groups_keep_their_order_their_ids_and_their_images(application: Served) -> None:
    groups = [
        {"id": "b", "image": b64(OTHER), "captions": CAPTIONS[:2]},
        {"image": b64(PICTURE), "captions": CAPTIONS[1:]},
        {"id": "a", "image": b64(PICTURE), "prompt": "Why?", "captions": ["x"]},
    ]
    answer = (await application.client.post("/score", json={"groups": groups})).json()
    found = answer["groups"]
    assert [group.get("id") for group in found] == ["b", None, "a"]
    assert [group["image_id"] for group in found] == [sha(OTHER), sha(PICTURE), sha(PICTURE)]
    assert found[0]["scores"] == expected_scores(OTHER, CAPTIONS[:2])
    assert found[1]["scores"] == expected_scores(PICTURE, CAPTIONS[1:])
    assert found[2]["scores"] == expected_scores(PICTURE, ["x"], "Why?")
    assert set(answer) == {"groups", "model_fingerprint", "request_id"}


async def test_a_group_larger_than_a_batch_is_split_and_put_together() -> None:
    async with serving(max_batch_tokens=128) as served:
        captions = [f"caption number {index:02d}, at some length" for index in range(40)]
        assert (await score(served, captions=captions))["scores"] == expected_scores(PICTURE, captions)
        assert len(served.scorer.batches) > 1


async def test_sixty_four_callers_with_one_request_id_get_their_own_scores(application: Served) -> None:
    async def one(number: int) -> tuple[list[float], list[float]]:
        captions = [f"caption {number}", "the same"]
        body = {"image": b64(PICTURE), "captions": captions}
        answer = await application.client.post("/score", json=body, headers={"X-Request-Id": "forked-seed"})
        return answer.json()["scores"], expected_scores(PICTURE, captions)

    for found, expected in await asyncio.gather(*(one(number) for number in range(64))):
        assert found == expected


async def test_compare_prefers_the_higher_score(application: Served) -> None:
    a, b = expected_scores(PICTURE, CAPTIONS[:2])
    answer = (await application.client.post("/compare", json={"image": b64(PICTURE), "a": CAPTIONS[0], "b": CAPTIONS[1]})).json()
    assert answer["preferred"] == ("a" if a > b else "b")
    assert answer["scores"] == {"a": a, "b": b}
    assert answer["margin"] == a - b
    assert answer["probability_a"] == pytest.approx(1 / (1 + math.exp(b - a)))


@pytest.mark.parametrize("pair", [(0, 1), (1, 3), (2, 0)])
async def test_compare_swapped_is_exactly_mirrored(application: Served, pair: tuple[int, int]) -> None:
    first, second = (CAPTIONS[index] for index in pair)
    one = (await application.client.post("/compare", json={"image": b64(PICTURE), "a": first, "b": second})).json()
    two = (await application.client.post("/compare", files=form(("a", second), ("b", first)))).json()
    assert one["margin"] == -two["margin"]
    assert one["probability_a"] == 1 - two["probability_a"]
    assert 1 - one["probability_a"] == two["probability_a"]
    assert {one["preferred"], two["preferred"]} == {"a", "b"}
    assert (one["scores"]["a"], one["scores"]["b"]) == (two["scores"]["b"], two["scores"]["a"])


async def test_compare_of_equal_captions_is_a_tie(application: Served) -> None:
    answer = (await application.client.post("/compare", json={"image": b64(PICTURE), "a": "same", "b": "same"})).json()
    assert (answer["preferred"], answer["probability_a"], answer["margin"]) == ("tie", 0.5, 0.0)


async def test_rank_sorts_best_first_and_marks_ties(application: Served) -> None:
    scores = expected_scores(PICTURE, CAPTIONS)
    answer = (await application.client.post("/rank", json={"image": b64(PICTURE), "captions": CAPTIONS})).json()
    ranking = answer["ranking"]
    assert [place["score"] for place in ranking] == sorted(scores, reverse=True)
    assert all(place["caption"] == CAPTIONS[place["index"]] and place["score"] == scores[place["index"]] for place in ranking)
    tied = [place for place in ranking if place["tied"]]
    assert [place["index"] for place in tied] == [1, 4]
    assert tied[0]["rank"] == tied[1]["rank"]
    assert {place["rank"] for place in ranking} == {1, 2, 3, 4, 5} - {tied[0]["rank"] + 1}
    assert ranking[0]["win_probability"] == 0.5
    as_form = await application.client.post("/rank", files=form(*(("caption", caption) for caption in CAPTIONS)))
    assert as_form.json()["ranking"] == ranking


@pytest.mark.parametrize("way", ["raw", "raw png", "urlencoded label", "multipart"])
async def test_an_image_sent_once_is_named_by_id(application: Served, way: str) -> None:
    kinds = {"raw": "application/octet-stream", "raw png": "image/png", "urlencoded label": "application/x-www-form-urlencoded"}
    sent = (
        await application.client.put("/images", files=form())
        if way == "multipart"
        else await application.client.put("/images", content=PICTURE, headers={"Content-Type": kinds[way]})
    )
    assert sent.status_code == 200
    assert {**sent.json(), "request_id": ""} == {"image_id": sha(PICTURE), "width": 64, "height": 48, "tokens": 4, "request_id": ""}
    assert (await score(application, image=sha(PICTURE)))["scores"] == expected_scores(PICTURE, CAPTIONS)


async def test_an_image_once_scored_is_known_by_its_id(application: Served) -> None:
    await score(application)
    assert (await score(application, image=sha(PICTURE)))["scores"] == expected_scores(PICTURE, CAPTIONS)


async def test_an_unknown_image_is_404_and_says_where(application: Served) -> None:
    error = await fault(application, "/score", {"image": sha(OTHER), "captions": ["x"]}, 404)
    assert (error["code"], error["retryable"], error["field"]) == ("image_unknown", False, "image")
    groups = [{"image": b64(PICTURE), "captions": ["x"]}, {"image": sha(OTHER), "captions": ["x"]}]
    assert (await fault(application, "/score", {"groups": groups}, 404))["field"] == "groups[1].image"
    assert application.scorer.batches == []


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", PICTURE[:100]])
async def test_put_refuses_what_is_no_image(application: Served, content: bytes) -> None:
    answer = await application.client.put("/images", content=content, headers={"Content-Type": "image/png"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "image_decode_failed")


async def test_put_takes_no_parameters(application: Served) -> None:
    error = (await application.client.put("/images", params={"model": "demo"}, content=PICTURE)).json()["error"]
    assert (error["code"], error["field"]) == ("unknown_field", "model")


@pytest.mark.parametrize(
    "files",
    [form(("image", "text"), image=None), form(("caption", "x")), form(("note", "x")), form(("image", "again"))],
    ids=["image as text", "caption too", "unknown part", "image twice"],
)
async def test_put_as_a_form_takes_one_file_and_nothing_else(application: Served, files: list[tuple[str, Any]]) -> None:
    answer = await application.client.put("/images", files=files)
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] in {"invalid_request", "duplicate_part"}


BAD = f"this one {UNSCORABLE}"
LONG = "x" * (MAX_CAPTION_TOKENS + 1)


async def test_one_bad_caption_fails_the_request_by_default(application: Served) -> None:
    error = await fault(application, "/score", {"image": b64(PICTURE), "captions": ["fine", LONG, BAD]}, 422)
    assert (error["code"], error["field"], error["index"], error["retryable"]) == ("caption_too_long", "captions[1]", 1, False)
    groups = [{"image": b64(PICTURE), "captions": ["fine"]}, {"image": b64(PICTURE), "captions": ["fine", BAD]}]
    error = await fault(application, "/score", {"groups": groups, "on_item_error": "fail"}, 422)
    assert (error["code"], error["field"], error["index"]) == ("caption_rejected", "groups[1].captions[1]", 1)
    assert application.scorer.batches == []


async def test_one_bad_caption_is_null_when_asked(application: Served) -> None:
    answer = await score(application, captions=["fine", LONG, "also fine", BAD], on_item_error="null")
    good = expected_scores(PICTURE, ["fine", "also fine"])
    assert answer["scores"] == [good[0], None, good[1], None]
    assert [error and error["code"] for error in answer["errors"]] == [None, "caption_too_long", None, "caption_rejected"]
    nothing = await score(application, captions=[BAD, LONG], on_item_error="null")
    assert nothing["scores"] == [None, None]
    assert nothing["usage"] == {"captions": 2, "tokens": 0, "computed_tokens": 0, "cached_tokens": 0}


@pytest.mark.parametrize("route", ["/compare", "/rank"])
async def test_compare_and_rank_have_no_null(application: Served, route: str) -> None:
    texts: dict[str, Any] = {"a": "fine", "b": BAD} if route == "/compare" else {"captions": ["fine", BAD]}
    error = await fault(application, route, {"image": b64(PICTURE), **texts}, 422)
    place = ("b", None) if route == "/compare" else ("captions[1]", 1)
    assert (error["code"], error["field"], error.get("index")) == ("caption_rejected", *place)
    assert (await fault(application, route, {"image": b64(PICTURE), **texts, "on_item_error": "null"}, 422))["code"] == "unknown_field"


@pytest.mark.parametrize("route", ["/score", "/rank", "/compare"])
@pytest.mark.parametrize("expected", ["", "0" * 64, FINGERPRINT[:-1], FINGERPRINT.upper(), "é"])
async def test_another_model_than_expected_is_412(application: Served, route: str, expected: str) -> None:
    texts: dict[str, Any] = {"a": "x", "b": "y"} if route == "/compare" else {"captions": ["x"]}
    body = {"image": b64(PICTURE), "expect_fingerprint": expected, **texts}
    error = await fault(application, route, body, 412)
    assert (error["code"], error["field"], error["retryable"]) == ("model_changed", "expect_fingerprint", False)
    assert application.scorer.batches == []
    body["expect_fingerprint"] = FINGERPRINT
    assert (await application.client.post(route, json=body)).status_code == 200


async def test_a_deadline_that_passes_is_503_with_retry_after() -> None:
    scorer = OracleScorer()
    scorer.gate.clear()
    async with serving(scorer=scorer) as served:
        body = {"image": b64(PICTURE), "captions": ["x"], "timeout_ms": 50}
        for answer in (
            await served.client.post("/score", json=body),
            await served.client.post("/score", files=form(("caption", "x"), ("timeout_ms", "50"))),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deadline_exceeded")
            assert answer.json()["error"]["retryable"] is True
            assert int(answer.headers["Retry-After"]) >= 1
        scorer.gate.set()
        assert (await score(served))["scores"] == expected_scores(PICTURE, CAPTIONS)


async def test_a_full_queue_is_503_with_a_whole_number_of_seconds() -> None:
    scorer = OracleScorer()
    scorer.gate.clear()
    async with serving(scorer=scorer, max_queue_items=8, max_captions=8) as served:
        first = asyncio.create_task(score(served, captions=["x"] * 8))
        await until(lambda: served.metric("reward_queue_items") == 8)
        answer = await served.client.post("/score", json={"image": b64(PICTURE), "captions": ["y"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert answer.headers["Retry-After"].isdecimal()
        assert 1 <= int(answer.headers["Retry-After"]) <= 30
        scorer.gate.set()
        assert (await first)["scores"] == expected_scores(PICTURE, ["x"] * 8)
        assert (await score(served, captions=["y"]))["scores"] == expected_scores(PICTURE, ["y"])


async def test_explain_shows_what_the_model_sees(application: Served) -> None:
    answer = await score(application, captions=["one", "three"], explain=True)
    shown = answer["explain"]
    assert [chat[-len(text) :] for chat, text in zip(shown["chats"], ["one", "three"], strict=True)] == ["one", "three"]
    assert shown["pooled_index"] == [count - 1 for count in shown["tokens"]]
    assert (shown["image_tokens"], shown["image_grid"]) == (4, [1, 2, 2])
    groups = [{"image": b64(OTHER), "captions": ["one"]}]
    answer = (await application.client.post("/score", json={"groups": groups, "explain": True})).json()
    assert answer["groups"][0]["explain"]["image_grid"] == [1, 2, 3]
    form_answer = await application.client.post("/score", files=form(("caption", "one"), ("explain", "true")))
    assert form_answer.json()["explain"]["image_grid"] == [1, 2, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
async def test_a_score_that_is_not_finite_never_leaves(value: float) -> None:
    async with serving(scorer=OracleScorer(lambda group, row: value)) as served:
        for on_item_error in ("fail", "null"):
            body = {"image": b64(PICTURE), "captions": ["x", "y"], "on_item_error": on_item_error}
            answer = await served.client.post("/score", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "nonfinite_score")
            assert "nan" not in answer.text.lower().replace("not finite", "")
            assert "inf" not in answer.text.lower().replace("not finite", "")
        assert served.metric("reward_nonfinite_total") > 0


async def test_margins_that_overflow_are_an_error_and_not_infinity() -> None:
    scorer = OracleScorer(lambda group, row: 1.7e308 if row[-2] == ord("a") else -1.7e308)
    async with serving(scorer=scorer) as served:
        answer = await served.client.post("/compare", json={"image": b64(PICTURE), "a": "a", "b": "b"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")


async def test_a_scorer_that_fails_is_500_without_its_text() -> None:
    def explode(group: Any, row: Any) -> float:
        raise RuntimeError("secret tensor at 0x7f00dead")

    async with serving(scorer=OracleScorer(explode)) as served:
        answer = await served.client.post("/score", json={"image": b64(PICTURE), "captions": ["x"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "scoring_failed")
        assert answer.json()["error"]["retryable"] is True
        assert not any(word in answer.text for word in ("secret", "0x", "Traceback", "RuntimeError"))
        assert (await served.client.get("/livez")).status_code == 200


@pytest.mark.parametrize(("takes_images", "image"), [(True, None), (False, b64(PICTURE))])
async def test_an_image_must_fit_the_model(takes_images: bool, image: str | None) -> None:
    async with serving(takes_images=takes_images) as served:
        error = await fault(served, "/score", {"image": image, "captions": ["x"]}, 422)
        assert (error["code"], error["field"]) == ("invalid_request", "image")


async def test_a_text_only_model_scores_without_an_image() -> None:
    async with serving(takes_images=False) as served:
        answer = (await served.client.post("/score", json={"captions": ["x", "y"]})).json()
        assert answer["scores"] == expected_scores(None, ["x", "y"])
        assert answer["image_id"] is None


async def test_state_routes(application: Served) -> None:
    client = application.client
    assert (await client.get("/livez")).json() == {"status": "alive"}
    assert (await client.get("/readyz")).json() == {"status": "ready"}
    assert (await client.get("/info")).json()["model"]["fingerprint"] == FINGERPRINT
    assert [(await client.head(path)).status_code for path in ("/livez", "/readyz")] == [200, 200]
    application.state.ready = application.state.alive = False
    assert [(await client.head(path)).status_code for path in ("/livez", "/readyz")] == [503, 503]
    for path in ("/livez", "/readyz"):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert answer.headers["Retry-After"].isdecimal()


async def test_selftest_reports_and_its_status_says_the_same(application: Served) -> None:
    passed = await application.client.post("/selftest")
    assert (passed.status_code, passed.json()["passed"], passed.json()["model_fingerprint"]) == (200, True, FINGERPRINT)
    application.state.report = type(application.state.report)(False, "golden", 2, 0.5, 1e-4, "2 golden scores, largest difference 0.5")
    failed = await application.client.post("/selftest")
    assert (failed.status_code, failed.json()["passed"], failed.json()["max_error"]) == (500, False, 0.5)
