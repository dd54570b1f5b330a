"""Both clients behind one face, so that every test holds for either; and a server that answers from a script."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import httpx
import pytest

from app.client import AsyncRewardClient, RewardClient

Kind = Literal["threads", "loops"]
Step = Callable[[dict[str, Any]], httpx.Response | dict[str, Any]]
FINGERPRINT = "f" * 64
both = pytest.mark.parametrize("kind", ["threads", "loops"])


class Asked:
    """A client whose calls are plain functions, and which sleeps no longer than a note takes."""

    def __init__(self, kind: Kind, urls: str | Sequence[str], **options: Any) -> None:
        self.slept: list[float] = []
        self._runner = asyncio.Runner() if kind == "loops" else None
        if self._runner is None:
            self.client: Any = RewardClient(urls, sleep=self.slept.append, **options)
        else:
            self.client = AsyncRewardClient(urls, sleep=self._sleep, **options)

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            found = getattr(self.client, name)(*arguments, **options)
            return self._runner.run(found) if self._runner else found

        return call

    def end(self) -> None:
        if self._runner is None:
            self.client.close()
        else:
            self._runner.run(self.client.aclose())
            self._runner.close()


@contextmanager
def asking(kind: Kind, urls: str | Sequence[str] = "http://rewards", **options: Any) -> Iterator[Asked]:
    asked = Asked(kind, urls, **options)
    try:
        yield asked
    finally:
        asked.end()


class Script(httpx.MockTransport):
    """A server that scores a caption by its length. What it says to a POST is changed by the steps in turn, the last for ever."""

    def __init__(self, *steps: Step) -> None:
        super().__init__(self._answer)
        self.steps = list(steps) or [right]
        self.asked: list[httpx.Request] = []

    @property
    def posts(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.asked if request.method == "POST"]

    @property
    def uploads(self) -> list[str]:
        """The servers that were sent a picture."""
        return [request.url.host for request in self.asked if request.method == "PUT"]

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        if request.method == "PUT":
            name = "sha256:" + hashlib.sha256(request.content).hexdigest()
            return httpx.Response(200, json={"image_id": name})
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        found = step(answer_to(json.loads(request.content), request.headers["x-request-id"]))
        return found if isinstance(found, httpx.Response) else httpx.Response(200, content=json.dumps(found))


def answer_to(asked: dict[str, Any], request_id: str) -> dict[str, Any]:
    groups = [
        {
            "id": group["id"],
            "scores": [float(len(caption)) for caption in group["captions"]],
            "image_id": group.get("image"),
            "usage": {},
        }
        for group in asked["groups"]
    ]
    return {"model_fingerprint": FINGERPRINT, "request_id": request_id, "groups": groups}


def right(told: dict[str, Any]) -> dict[str, Any]:
    return told


def refusing(status: int, code: str | None = None, *, retryable: bool = False, **headers: str) -> Step:
    """An error in the server's shape, or without a code what a proxy says."""
    body = f"<html>{status}</html>" if code is None else json.dumps({"error": {"code": code, "message": "no", "retryable": retryable}})
    return lambda _: httpx.Response(status, content=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


def broken(error: Exception) -> Step:
    def step(_: dict[str, Any]) -> dict[str, Any]:
        raise error

    return step
