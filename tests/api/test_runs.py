"""Runs through the whole stack: however a run is named, its scores are counted once; the page is public, the numbers are not."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from app.api.schemas import RunAnswer, RunsAnswer
from app.tallies import Expected
from tests.fakes import UNSCORABLE, OracleScorer, Served, expected_scores, picture, serving

pytestmark = pytest.mark.anyio

PICTURE = picture()
IMAGE = base64.b64encode(PICTURE).decode()
CAPTIONS = ["It says it is here about the iceberg.", "Nice day.", "Nice day."]
KEY = "correct-horse-battery-staple"


async def numbers(served: Served, run_id: str) -> dict[str, Any]:
    answer = await served.client.get(f"/runs/{run_id}/statistics")
    assert answer.status_code == 200, answer.text
    return RunAnswer.model_validate(answer.json()).model_dump()


def form(**fields: str) -> list[tuple[str, Any]]:
    return [("image", ("c.png", PICTURE)), *((name, (None, value)) for name, value in fields.items())]


BODY: dict[str, Any] = {"image": IMAGE, "captions": CAPTIONS}
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "header": ("/score", {"json": BODY, "headers": {"X-Run-Id": "grpo-7"}}),
    "header in blanks": ("/score", {"json": BODY, "headers": {"X-Run-Id": " grpo-7\t "}}),
    "field": ("/score", {"json": {**BODY, "run_id": "grpo-7"}}),
    "both": ("/score", {"json": {**BODY, "run_id": "grpo-7"}, "headers": {"X-Run-Id": "grpo-7"}}),
    "header twice": ("/score", {"json": BODY, "headers": [("X-Run-Id", "grpo-7"), ("X-Run-Id", "grpo-7")]}),
    "groups": ("/score", {"json": {"groups": [BODY]}, "headers": {"X-Run-Id": "grpo-7"}}),
    "rank": ("/rank", {"json": {**BODY, "run_id": "grpo-7"}}),
    "form": ("/score", {"files": [*form(run_id="grpo-7"), *(("caption", (None, text)) for text in CAPTIONS)]}),
    "form and header": (
        "/rank",
        {"files": [*form(), *(("caption", (None, text)) for text in CAPTIONS)], "headers": {"X-Run-Id": "grpo-7"}},
    ),
}


@pytest.mark.parametrize("way", NAMED)
async def test_a_run_named_in_any_way_has_the_scores(application: Served, way: str) -> None:
    path, arguments = NAMED[way]
    assert (await application.client.post(path, **arguments)).status_code == 200
    found, scores = await numbers(application, "grpo-7"), expected_scores(PICTURE, CAPTIONS)
    assert (found["total"]["captions"], found["total"]["groups"]) == (3, 1)
    assert found["total"]["mean"] == pytest.approx(sum(scores) / 3)
    assert (found["total"]["min"], found["total"]["max"]) == (min(scores), max(scores))
    assert found["total"]["duplicate_share"] == pytest.approx(2 / 3)
    assert found["recent"] == found["total"]
    assert sum(found["histogram"]["counts"]) == 3
    assert application.metric("reward_run_score_count", run="grpo-7") == 3


@pytest.mark.parametrize("as_form", [False, True])
async def test_a_pair_is_a_group_of_two(application: Served, as_form: bool) -> None:
    body = {"a": CAPTIONS[0], "b": CAPTIONS[1], "run_id": "pairs"}
    arguments: dict[str, Any] = {"files": form(**body)} if as_form else {"json": {"image": IMAGE, **body}}
    assert (await application.client.post("/compare", **arguments)).status_code == 200
    assert (await numbers(application, "pairs"))["total"]["compared_groups"] == 1


async def test_captions_sent_one_at_a_time_are_the_group_of_their_picture_and_prompt(application: Served) -> None:
    known = (await application.client.put("/images", content=PICTURE)).json()["image_id"]
    for image in (IMAGE, known):
        for text in CAPTIONS:
            answer = await application.client.post("/score", json={"image": image, "captions": [text], "run_id": "alone"})
            assert answer.status_code == 200, answer.text
    found = await numbers(application, "alone")
    assert (found["total"]["groups"], found["total"]["compared_groups"], found["total"]["captions"], found["open_groups"]) == (1, 1, 6, 1)
    assert (found["total"]["duplicate_share"], found["total"]["repeat_share"]) == (1.0, 0.0)
    assert application.metric("reward_run_score_count", run="alone") == 6


async def test_every_group_counts_by_itself_and_what_has_no_score_does_not(application: Served) -> None:
    groups = [{"image": IMAGE, "captions": CAPTIONS}, {"image": IMAGE, "captions": ["x", UNSCORABLE]}]
    answer = await application.client.post("/score", json={"groups": groups, "on_item_error": "null", "run_id": "r"})
    assert answer.status_code == 200
    total = (await numbers(application, "r"))["total"]
    assert (total["groups"], total["captions"], total["compared_groups"]) == (2, 4, 1)


async def test_what_failed_or_names_no_run_is_in_none(application: Served) -> None:
    await application.client.post("/score", json=BODY)
    await application.client.post("/score", json={**BODY, "captions": [UNSCORABLE], "run_id": "r"})
    await application.client.post("/score", json={**BODY, "expect_fingerprint": "0" * 64, "run_id": "r"})
    await application.client.post("/score", json={**BODY, "captions": [], "run_id": "r"})
    assert (await application.client.get("/runs")).json() == {"runs": []}
    assert (await application.client.get("/runs/r/statistics")).status_code == 404


ODD = [
    "",
    " ",
    ".",
    "..",
    "../x",
    "a/b",
    "a b",
    "-x",
    "_x",
    "ünï",
    "a\u0301",
    "a%2Fb",
    "a\x00b",
    "a\r\nX-Evil: 1",
    "x" * 65,
    "x" * 10_000,
    "a,b",
    "<b>",
    '"',
]


@pytest.mark.parametrize("odd", ODD)
async def test_an_odd_run_id_is_refused_and_not_echoed(application: Served, odd: str) -> None:
    answers = [
        await application.client.post("/score", json={**BODY, "run_id": odd}),
        await application.client.post("/score", files=[*form(run_id=odd), ("caption", (None, "x"))]),
        await application.client.post("/score", json=BODY, headers={b"X-Run-Id": odd.encode()}),
        await application.client.post("/compare", json={"image": IMAGE, "a": "x", "b": "y"}, headers={b"X-Run-Id": odd.encode()}),
        await application.client.post("/rank", json=BODY, headers={b"X-Run-Id": odd.encode()}),
    ]
    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["field"], error["retryable"]) == (422, "invalid_request", "run_id", False)
        assert len(odd) < 5 or odd not in answer.text
    assert application.scorer.batches == []
    assert (await application.client.get("/runs")).json() == {"runs": []}


@pytest.mark.parametrize("given", ["a", "A.b_c-9", "x" * 64, "0", "a.json", "statistics"])
async def test_a_plain_run_id_is_kept_as_it_is(application: Served, given: str) -> None:
    assert (await application.client.post("/score", json=BODY, headers={"X-Run-Id": given})).status_code == 200
    assert (await numbers(application, given))["id"] == given
    assert (await application.client.get(f"/runs/{given}")).headers["Content-Type"].startswith("text/html")


@pytest.mark.parametrize(
    ("field", "headers"), [("a", [("X-Run-Id", "b")]), (None, [("X-Run-Id", "a"), ("X-Run-Id", "b")]), ("a", [("X-Run-Id", "A")])]
)
async def test_two_different_runs_are_refused(application: Served, field: str | None, headers: Any) -> None:
    body = BODY if field is None else {**BODY, "run_id": field}
    answer = await application.client.post("/score", json=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["message"]) == (422, "the request names two training runs")


async def test_a_refused_run_id_keeps_the_accounts_in_order(application: Served) -> None:
    await application.client.post("/score", json=BODY, headers={"X-Run-Id": "a b"})
    assert application.metric("reward_items_received_total") == 3
    assert application.metric("reward_items_total", outcome="client_error") == 3


async def test_runs_are_listed_the_last_one_first(application: Served) -> None:
    for name in ("one", "two", "one"):
        await application.client.post("/score", json=BODY, headers={"X-Run-Id": name})
    found = RunsAnswer.model_validate((await application.client.get("/runs")).json()).runs
    assert [(run.id, run.groups, run.captions, run.findings) for run in found] == [("one", 2, 6, []), ("two", 1, 3, [])]


async def test_more_runs_than_are_kept_make_room_for_each_other() -> None:
    async with serving(max_runs=3) as served:
        for number in range(20):
            await served.client.post("/score", json=BODY, headers={"X-Run-Id": f"run-{number}"})
        assert [run["id"] for run in (await served.client.get("/runs")).json()["runs"]] == ["run-19", "run-18", "run-17"]
        shown = (await served.client.get("/metrics")).text
        assert served.metric("reward_runs_forgotten_total") == 17
        assert 'run="run-16"' not in shown
        assert shown.count('reward_run_score_count{run="') == 3
        gone = await served.client.get("/runs/run-0/statistics")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


async def test_hacking_shows_on_the_page_and_in_the_metrics() -> None:
    """Scores that are the length, far above what the artifact knows."""
    scorer = OracleScorer(lambda group, row: float(len(row)))
    async with serving(scorer=scorer, expected=Expected(0.0, 4.0)) as served:
        for number in range(20):
            body = {"image": IMAGE, "captions": [f"{number:03d}" + "x" * length for length in range(4)], "run_id": "hacked"}
            assert (await served.client.post("/score", json=body)).status_code == 200
        found = await numbers(served, "hacked")
        assert {finding["code"] for finding in found["findings"]} >= {"length", "drift", "outside"}
        assert served.metric("reward_run_length_correlation", run="hacked") == pytest.approx(1)
        assert served.metric("reward_run_drift_sigmas", run="hacked") > 3
        assert served.metric("reward_run_outside_captions_total", run="hacked") == 80
        assert (await served.client.get("/runs")).json()["runs"][0]["findings"] == [finding["code"] for finding in found["findings"]]


async def test_huge_scores_are_answered_and_left_out() -> None:
    async with serving(scorer=OracleScorer(lambda group, row: 1e300)) as served:
        answer = await served.client.post("/score", json={**BODY, "run_id": "r"})
        assert answer.json()["scores"] == [1e300] * 3
        found = await numbers(served, "r")
        assert (found["unusable_scores"], found["total"]["captions"], found["total"]["mean"]) == (3, 0, None)
        assert (await served.client.get("/runs")).status_code == 200


async def test_scores_that_float32_holds_are_finite_everywhere() -> None:
    async with serving(scorer=OracleScorer(lambda group, row: 1e30 * (len(row) % 3)), expected=Expected(0.0, 1e-3)) as served:
        for _ in range(20):
            await served.client.post("/score", json={**BODY, "run_id": "r"})
        json.dumps(await numbers(served, "r"), allow_nan=False)
        assert (await served.client.get("/metrics")).status_code == 200


FILES = {
    "/runs/": "text/html; charset=utf-8",
    "/runs/anything": "text/html; charset=utf-8",
    "/web/runs.js": "text/javascript; charset=utf-8",
    "/web/words.js": "text/javascript; charset=utf-8",
    "/web/polling.js": "text/javascript; charset=utf-8",
    "/web/run.js": "text/javascript; charset=utf-8",
    "/web/run.css": "text/css; charset=utf-8",
}


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("key", [None, KEY])
async def test_the_page_is_public_and_shut_in(path: str, key: str | None) -> None:
    async with serving(api_key=key) as served:
        answer = await served.client.get(path)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, FILES[path])
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "anything" not in answer.text, "the page says nothing of the run that is asked for"
    assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in answer.text
    assert "innerHTML" not in answer.text
    assert " style=" not in answer.text
    assert " onload=" not in answer.text


@pytest.mark.parametrize("path", ["/runs", "/runs/r/statistics", "/runs/nobody/statistics", "/runs/r/", "/runs/r/x", "/runs/../score"])
async def test_numbers_are_behind_the_key(path: str) -> None:
    async with serving(api_key=KEY) as served:
        key = {"Authorization": f"Bearer {KEY}"}
        await served.client.post("/score", json={**BODY, "run_id": "r"}, headers=key)
        assert (await served.client.get(path)).status_code == 401
        assert (await served.client.get(path, headers=key)).status_code in {200, 404, 405}


@pytest.mark.parametrize("path", ["/runs/a/b", "/runs//statistics", "/web/run.py", "/web/../main.py", "/web/", "/runs/r/statistics/"])
async def test_other_paths_are_404(application: Served, path: str) -> None:
    answer = await application.client.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_metrics_name_the_route_and_not_the_run(application: Served) -> None:
    for name in ("one", "two", "three"):
        await application.client.get(f"/runs/{name}")
        await application.client.get(f"/runs/{name}/statistics")
    shown = (await application.client.get("/metrics")).text
    assert 'http_route="/runs/{run_id}"' in shown
    assert 'http_route="/runs/{run_id}/statistics"' in shown
    assert "two" not in shown


async def test_of_scores_on_both_sides_of_0_the_sum_is_exposed() -> None:
    """A histogram with buckets below 0 has none, and the alert on a shift of the mean needs one."""
    async with serving(scorer=OracleScorer(lambda group, row: 40.0 - len(row))) as served:
        answer = await served.client.post("/score", json={**BODY, "captions": ["x" * length for length in range(1, 40, 7)]})
        magnitudes = [served.metric("reward_score_magnitude_total", sign=sign) for sign in ("positive", "negative")]
        assert min(magnitudes) > 0
        assert magnitudes[0] - magnitudes[1] == pytest.approx(sum(answer.json()["scores"]))
        shown = (await served.client.get("/metrics")).text
        assert "reward_score_sum" not in shown


QUERIES = {"query": ["Write: " + caption for caption in CAPTIONS], "prompts": ["Write: "] * 3, "labels": [{"image": IMAGE}] * 3}


@pytest.mark.parametrize(
    ("path", "headers"), [("/get_reward?run_id=r", {}), ("/get_reward", {"X-Run-Id": "r"}), ("/get_reward?run_id=r", {"X-Run-Id": "r"})]
)
async def test_scores_asked_for_in_another_systems_words_are_the_runs_as_well(
    application: Served, path: str, headers: dict[str, str]
) -> None:
    answer = await application.client.post(path, json=QUERIES, headers=headers)
    assert answer.status_code == 200, answer.text
    total = (await numbers(application, "r"))["total"]
    assert (total["groups"], total["captions"], total["mean"]) == (1, 3, pytest.approx(sum(answer.json()["rewards"]) / 3))


@pytest.mark.parametrize(
    ("path", "headers"), [("/get_reward?run_id=a/b", {}), ("/get_reward", {"X-Run-Id": "a b"}), ("/get_reward?run_id=r", {"X-Run-Id": "q"})]
)
async def test_an_odd_run_is_refused_there_too(application: Served, path: str, headers: dict[str, str]) -> None:
    answer = await application.client.post(path, json=QUERIES, headers=headers)
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "run_id")
    assert application.scorer.batches == []


async def test_what_is_left_of_a_group_joins_no_other(application: Served) -> None:
    """Three rollouts of one picture of which one caption each can be scored are three groups, not one."""
    texts = ["Write: Nice day.", *["Write: " + "x" * 9000] * 3]
    body = {"query": texts, "prompts": ["Write: "] * 4, "labels": [{"image": IMAGE}] * 4}
    for _ in range(3):
        answer = await application.client.post("/get_reward?run_id=r&refused=-5", json=body)
        assert answer.json()["rewards"][1:] == [-5] * 3
    total = (await numbers(application, "r"))["total"]
    assert (total["groups"], total["captions"], total["compared_groups"]) == (3, 3, 0)
