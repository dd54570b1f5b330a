"""Clients that go before their answer: nothing is computed for them that can still be left, and nobody else notices."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.fakes import OracleScorer, Served, expected_scores, picture, serving, until

pytestmark = pytest.mark.anyio
IMAGE = picture()


class Visit:
    """One request over bare ASGI, whose client can leave at any moment."""

    def __init__(self, app: FastAPI, path: str, body: bytes, *, method: str = "POST", content_type: str = "application/json") -> None:
        self._left = asyncio.Event()
        self._body: list[bytes] = [body]
        self.sent: list[dict[str, Any]] = []
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())],
            "server": ("punchline", 80),
            "client": ("127.0.0.1", 1),
            "state": {},
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    def leave(self) -> None:
        self._left.set()

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


def asking(*captions: str) -> bytes:
    return json.dumps({"image": base64.b64encode(IMAGE).decode(), "captions": list(captions)}).encode()


def num_waiting(served: Served) -> float:
    return served.metric("reward_queue_items")


async def test_whoever_leaves_while_queued_is_not_computed() -> None:
    scorer = OracleScorer()
    scorer.gate.clear()
    async with serving(scorer=scorer) as served:
        first = asyncio.ensure_future(score(served, "first"))
        await until(lambda: scorer.num_begun == 1)
        leaving = [Visit(served.app, "/score", asking(*(f"{number}-{index}" for index in range(10)))) for number in range(6)]
        await until(lambda: num_waiting(served) == 61)
        for visit in leaving:
            visit.leave()
        await asyncio.gather(*(visit.task for visit in leaving))
        assert num_waiting(served) == 1
        scorer.gate.set()
        assert await first == expected_scores(IMAGE, ["first"])
        assert await score(served, "last") == expected_scores(IMAGE, ["last"])
        assert [visit.sent for visit in leaving] == [[]] * 6
        assert served.metric("reward_requests_total", endpoint="/score", outcome="cancelled") == 6
        assert served.metric("reward_items_total", outcome="scored") == 2
        assert served.metric("reward_wasted_items_total") == 0
    assert sum(len(group.rows) for batch in scorer.batches for group in batch) == 2


async def test_whoever_leaves_during_the_forward_is_counted_and_disturbs_nobody() -> None:
    scorer = OracleScorer()
    scorer.gate.clear()
    async with serving(scorer=scorer) as served:
        visit = Visit(served.app, "/score", asking("a", "b"))
        await until(lambda: scorer.num_begun == 1)
        other = asyncio.ensure_future(score(served, "other"))
        await until(lambda: num_waiting(served) == 3)
        visit.leave()
        await visit.task
        scorer.gate.set()
        assert await other == expected_scores(IMAGE, ["other"])
        await until(lambda: served.metric("reward_wasted_items_total") == 2)
        assert num_waiting(served) == 0


async def test_an_answer_that_is_there_in_time_is_sent() -> None:
    async with serving() as served:
        visit = Visit(served.app, "/score", asking("a"))
        await visit.task
        assert visit.sent[0]["status"] == 200
        assert json.loads(visit.sent[1]["body"])["scores"] == expected_scores(IMAGE, ["a"])


async def test_an_error_is_the_same_as_without_the_watch() -> None:
    async with serving() as served:
        visit = Visit(served.app, "/score", asking())
        await visit.task
        assert visit.sent[0]["status"] == 422


async def score(served: Served, *captions: str) -> list[float]:
    answer: httpx.Response = await served.client.post("/score", content=asking(*captions), headers={"Content-Type": "application/json"})
    return list(answer.json()["scores"])
