"""Several models behind the routes: who is asked answers, signs and is counted; who is not served is 404 before any work."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from dataclasses import replace
from typing import Any

import pytest

from app.tallies import Expected
from tests.fakes import picture, serving
from tests.several import Several, fingerprint_of, serving_several

pytestmark = pytest.mark.anyio
MODELS = ("first", "second", "org/third")
PICTURES = [picture(seed=seed) for seed in range(3)]
CAPTIONS = ("", "an iceberg", "the penguin", "nobody told the octopus", "an iceberg, they said", "é ü", "a" * 40)


def as_text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def body(image: bytes, captions: list[str], model: str | None = None, **more: Any) -> dict[str, Any]:
    return {"image": as_text(image), "captions": captions, **({} if model is None else {"model": model}), **more}


@pytest.mark.parametrize("model", [None, *MODELS])
async def test_the_model_that_is_named_scores_and_signs(model: str | None) -> None:
    name = model or MODELS[0]
    async with serving_several(MODELS) as served:
        answer = await served.client.post("/score", json=body(PICTURES[0], ["a", "b"], model))
        assert answer.json()["scores"] == served.wanted(name, PICTURES[0], ["a", "b"])
        assert answer.json()["model_fingerprint"] == answer.headers["x-model-fingerprint"] == fingerprint_of(name)
        assert [len(scorer.batches) for scorer in served.scorers.values()] == [int(each == name) for each in MODELS]


async def test_every_route_and_form_takes_a_model() -> None:
    async with serving_several(MODELS) as served:
        wanted = served.wanted("second", PICTURES[0], ["a", "b"])
        pair = {"image": as_text(PICTURES[0]), "model": "second", "a": "a", "b": "b"}
        compared = (await served.client.post("/compare", json=pair)).json()
        assert [compared["scores"][name] for name in "ab"] == wanted
        ranked = (await served.client.post("/rank", json=body(PICTURES[0], ["a", "b"], "second"))).json()
        assert sorted(each["score"] for each in ranked["ranking"]) == sorted(wanted)
        groups = [{"image": as_text(image), "captions": ["a", "b"]} for image in PICTURES]
        scored = (await served.client.post("/score", json={"model": "second", "groups": groups})).json()
        assert [group["scores"] for group in scored["groups"]] == [served.wanted("second", image, ["a", "b"]) for image in PICTURES]
        parts = [
            ("image", ("a.png", PICTURES[0])),
            *((name, (None, text)) for name, text in (("caption", "a"), ("caption", "b"), ("model", "second"))),
        ]
        assert (await served.client.post("/score", files=parts)).json()["scores"] == wanted


REQUESTS: dict[str, dict[str, Any]] = {
    "/score": {"captions": ["a"], "image": as_text(PICTURES[0])},
    "/rank": {"captions": ["a"], "image": as_text(PICTURES[0])},
    "/compare": {"a": "a", "b": "b", "image": as_text(PICTURES[0])},
    "/rm": {"prompt": "p", "response": "a", "label": {"image": as_text(PICTURES[0])}},
    "/v1/score": {"text_1": {"content": [{"image_url": as_text(PICTURES[0])}]}, "text_2": "a"},
}


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("name", ["fourth", "", "First", "second ", "third"])
async def test_an_unknown_name_is_404_before_any_work(path: str, name: str) -> None:
    own = path in ("/score", "/rank", "/compare")
    async with serving_several(MODELS) as served:
        asked = REQUESTS[path] | ({"model": name} if own else {})
        answer = await served.client.post(path, json=asked, params={} if own else {"model": name})
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["code"], error["field"], error["retryable"]) == ("model_unknown", "model", False)
        assert not name or name == "third" or name not in error["message"]
        assert [scorer.num_begun for scorer in served.scorers.values()] == [0, 0, 0]
        assert served.metric("reward_cache_entries") == served.metric("reward_queue_items") == 0
        assert served.metric("reward_items_total", outcome="client_error") == served.metric("reward_items_received_total")
        assert all(served.metric("reward_items_received_total", model=model) == 0 for model in MODELS)


async def test_one_model_too_is_asked_by_its_name_or_by_none() -> None:
    async with serving() as served:
        assert (await served.client.post("/score", json=body(PICTURES[0], ["a"], "fake"))).status_code == 200
        assert (await served.client.post("/score", json=body(PICTURES[0], ["a"], "other"))).status_code == 404


async def test_a_pinned_fingerprint_is_that_of_the_model_asked() -> None:
    async with serving_several(MODELS) as served:
        for model in MODELS:
            for pinned in MODELS:
                asked = body(PICTURES[0], ["a"], model, expect_fingerprint=fingerprint_of(pinned))
                answer = await served.client.post("/score", json=asked)
                assert answer.status_code == (200 if model == pinned else 412)
                assert answer.headers["x-model-fingerprint"] == fingerprint_of(model)


async def test_models_are_listed_with_their_fingerprints() -> None:
    async with serving_several(MODELS) as served:
        told = (await served.client.get("/v1/models")).json()
        assert [(each["id"], each["fingerprint"]) for each in told["data"]] == [(name, fingerprint_of(name)) for name in MODELS]


DIALECTS: dict[str, dict[str, Any]] = {
    "/classify": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": as_text(PICTURES[0])}, {"text": "p"}]},
            {"role": "assistant", "content": "a"},
        ]
    },
    "/v1/score": {"text_1": {"content": [{"image_url": as_text(PICTURES[0])}, {"text": "p"}]}, "text_2": "a"},
    "/rerank": {"query": {"content": [{"image_url": as_text(PICTURES[0])}, {"text": "p"}]}, "documents": ["a"]},
}


def score_in(path: str, told: Any) -> float:
    found = {
        "/classify": lambda: told["data"][0]["probs"][0],
        "/v1/score": lambda: told["data"][0]["score"],
        "/rerank": lambda: told["results"][0]["relevance_score"],
    }
    return float(found[path]())


@pytest.mark.parametrize("path", DIALECTS)
async def test_the_model_of_another_systems_body_must_be_served_where_several_are(path: str) -> None:
    async with serving_several(MODELS) as served:
        (wanted,) = served.wanted("second", PICTURES[0], ["a"], "p")
        named = await served.client.post(path, json=DIALECTS[path] | {"model": "second"})
        assert (named.status_code, named.json().get("model", "second")) == (200, "second")
        assert score_in(path, named.json()) == wanted
        absent = await served.client.post(path, json=DIALECTS[path])
        assert score_in(path, absent.json()) == served.wanted("first", PICTURES[0], ["a"], "p")[0]
        assert absent.headers["x-model-fingerprint"] == fingerprint_of("first")
        unknown = await served.client.post(path, json=DIALECTS[path] | {"model": "gpt-4"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_unknown")
        addressed = await served.client.post(path, json=DIALECTS[path], params={"model": "second"})
        assert score_in(path, addressed.json()) == wanted
        torn = await served.client.post(path, json=DIALECTS[path] | {"model": "first"}, params={"model": "second"})
        assert (torn.status_code, torn.json()["error"]["field"]) == (422, "model")


async def test_of_one_model_any_name_is_accepted_in_another_systems_body() -> None:
    async with serving() as served:
        for path, asked in DIALECTS.items():
            assert (await served.client.post(path, json=asked | {"model": "whatever they write"})).status_code == 200


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/rm", {"prompt": "p", "response": "a", "label": {"image": as_text(PICTURES[0])}}),
        ("/get_reward", {"query": ["pa"], "prompts": ["p"], "labels": [json.dumps({"image": as_text(PICTURES[0])})]}),
        ("/predict", {"inputs": [["p", "a"]]}),
    ],
)
async def test_trainers_without_a_field_name_it_in_the_address(path: str, asked: dict[str, Any]) -> None:
    async with serving_several(MODELS, blind=MODELS if path == "/predict" else ()) as served:
        answer = await served.client.post(path, json=asked, params={"model": "org/third"})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-model-fingerprint"] == fingerprint_of("org/third")
        assert [len(scorer.batches) for scorer in served.scorers.values()] == [0, 0, 1]


async def test_a_picture_sent_once_is_known_to_all_and_its_pixels_are_each_models_own() -> None:
    async with serving_several(MODELS, blind=["first"]) as served:
        stored = (await served.client.put("/images", content=PICTURES[0])).json()
        for model in ("second", "org/third"):
            asked = {"image": stored["image_id"], "captions": ["a"], "model": model}
            assert (await served.client.post("/score", json=asked)).json()["scores"] == served.wanted(model, PICTURES[0], ["a"])
            assert served.metric("reward_cache_entries", model=model, cache="pixels") == 1
        assert served.metric("reward_cache_entries", model="", cache="images") == 1
        assert served.metric("reward_cache_entries", model="first", cache="pixels") == 0


async def test_captions_scores_and_tokens_are_counted_to_their_model() -> None:
    async with serving_several(MODELS) as served:
        for number, model in enumerate(MODELS, start=1):
            for _ in range(number):
                await served.client.post("/score", json=body(PICTURES[0], ["a", "b"], model))
        await served.client.post("/score", json=body(PICTURES[0], ["a"], "second", timeout_ms=10**9))
        for number, model in enumerate(MODELS, start=1):
            assert served.metric("reward_items_total", model=model, outcome="scored") == 2 * number
            assert served.metric("reward_score_count", model=model) == 2 * number
            assert served.metric("reward_group_score_stddev_count", model=model) == number
            assert served.metric("reward_tokens_total", model=model, kind="requested") > 0
            assert served.metric("reward_nonfinite_total", model=model) == 0
        assert served.metric("reward_items_total", model="second", outcome="client_error") == 1
        assert served.metric("reward_active_items") == 0


async def test_a_selftest_is_of_all_models_or_of_the_one_named() -> None:
    async with serving_several(MODELS) as served:
        told = await served.client.post("/selftest")
        assert (told.status_code, told.json()["passed"], set(told.json()["models"])) == (200, True, set(MODELS))
        served.reports["second"] = replace(served.reports["second"], passed=False, message="wrong")
        told = await served.client.post("/selftest")
        assert (told.status_code, told.json()["passed"], told.json()["message"]) == (500, False, "wrong")
        assert told.json()["model_fingerprint"] == told.headers["x-model-fingerprint"] == fingerprint_of("second")
        assert [each["passed"] for each in told.json()["models"].values()] == [True, False, True]
        one = await served.client.post("/selftest", params={"model": "org/third"})
        assert (one.status_code, one.json()["passed"], "models" in one.json()) == (200, True, False)
        assert one.json()["model_fingerprint"] == fingerprint_of("org/third")
        assert (await served.client.post("/selftest", params={"model": "fourth"})).status_code == 404


async def test_a_run_that_asks_two_models_is_watched_as_two() -> None:
    about = {"first": Expected(0.5, 0.3), "org/third": Expected(2.5 + 30, 1.0)}
    async with serving_several(MODELS, expected=about) as served:
        for model in MODELS:
            await served.client.post("/score", json=body(PICTURES[0], ["a", "b"], model, run_id="run-7"))
        kept = (await served.client.get("/runs")).json()["runs"]
        assert {each["id"]: each["captions"] for each in kept} == {"run-7": 2, "run-7~second": 2, "run-7~org~third": 2}
        for name, expected in (("run-7", about["first"]), ("run-7~second", None), ("run-7~org~third", about["org/third"])):
            told = (await served.client.get(f"/runs/{name}/statistics")).json()
            assert told["expected"] == (None if expected is None else {"mean": expected.mean, "std": expected.std})
            assert (await served.client.get(f"/runs/{name}")).status_code == 200


async def ask_at_random(served: Several, chance: random.Random) -> None:
    model, image = chance.choice(MODELS), chance.choice(PICTURES)
    captions, prompt = chance.choices(CAPTIONS, k=chance.randint(1, 5)), chance.choice([None, "Be kind.", "Say something."])
    await asyncio.sleep(chance.random() * 0.01)
    asked = body(image, captions, model, **({} if prompt is None else {"prompt": prompt}))
    answer = await served.client.post("/score", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["scores"] == served.wanted(model, image, captions, prompt)
    assert answer.headers["x-model-fingerprint"] == fingerprint_of(model)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_batch_tokens", [96, 400, 8192])
async def test_concurrent_requests_never_get_another_models_scores(seed: int, max_batch_tokens: int) -> None:
    """200 at once with few pictures, prompts and captions, so that models are asked about the same and share their batches."""
    chance = random.Random(seed)
    async with serving_several(MODELS, max_batch_tokens=max_batch_tokens) as served:
        await asyncio.gather(*(ask_at_random(served, random.Random(chance.random())) for _ in range(200)))
        if max_batch_tokens == 8192:
            assert served.metric("reward_batches_total", outcome="ok") < sum(len(scorer.batches) for scorer in served.scorers.values())
