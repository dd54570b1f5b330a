"""The client for event loops: `AsyncRewardClient`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import httpx
from tenacity import AsyncRetrying

from app.client.answers import Again, Comparison, GroupScores, Ranked, read_answer, read_comparison, read_groups, read_ranking
from app.client.blocking import BYTES, KEEP_S
from app.client.calls import Call, Expected, KnownPictures, Terms, base_urls, unknown_again
from app.client.errors import ImageUnknown, Unanswered
from app.client.pictures import Picture, Source
from app.client.requests import Group, Limits, OnItemError, Part, Prompt, Request, parts_of, score_request, single_request
from app.client.results import joined, only_scores


@dataclass(slots=True)
class _Local:
    """What belongs to one event loop."""

    http: httpx.AsyncClient
    room: asyncio.Semaphore
    sending: dict[tuple[str, str], asyncio.Task[None]] = field(default_factory=dict)


class AsyncRewardClient:
    """Scores from one server or several with the same model. Serves any number of event loops, and after a fork.

    Connections belong to the event loop that asked; a loop that ends should `aclose` first, or leave `async with`.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        api_key: str | None = None,
        deadline_s: float = 300.0,
        attempt_s: float = 60.0,
        fingerprint: str | None = None,
        limits: Limits | None = None,
        run_id: str | None = None,
        model: str | None = None,
        num_requests: int = 32,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """As `RewardClient`; `num_requests`: at once from one event loop, the others wait within their deadline. Raises ValueError."""
        self._terms = Terms(base_urls(urls), api_key, deadline_s, attempt_s, limits or Limits(), run_id, model)
        self._num_requests = num_requests
        self._transport = transport
        self._sleep = sleep
        self._start(fingerprint)

    def _start(self, fingerprint: str | None) -> None:
        """As of `RewardClient`."""
        self._expected = Expected(fingerprint)
        self._pid = os.getpid()
        self._known = KnownPictures()
        self._locals: WeakKeyDictionary[asyncio.AbstractEventLoop, _Local] = WeakKeyDictionary()

    def _local(self) -> _Local:
        if self._pid != os.getpid():
            self._start(self._expected.fingerprint)
        loop = asyncio.get_running_loop()
        found = self._locals.get(loop)
        if found is None:
            kept = httpx.Limits(max_connections=None, max_keepalive_connections=self._num_requests, keepalive_expiry=KEEP_S)
            http = httpx.AsyncClient(transport=self._transport, limits=kept)
            found = self._locals[loop] = _Local(http, asyncio.Semaphore(self._num_requests))
        return found

    @property
    def fingerprint(self) -> str | None:
        """Of the model that answers; None before the first answer."""
        return self._expected.fingerprint

    async def score(self, image: Source, captions: Sequence[str], prompt: Prompt = None) -> list[float]:
        """One finite score a caption, in their order. Raises RewardError, OSError, TypeError; never a default."""
        return only_scores((await self.score_groups([Group(image, captions, prompt)]))[0])

    async def score_groups(self, groups: Sequence[Group], *, on_item_error: OnItemError = "fail") -> list[GroupScores]:
        """Every group's scores, in their order, all requests at once. Options and errors as of `RewardClient.score_groups`."""
        running = [asyncio.ensure_future(self._scored(batch, on_item_error)) for batch in self._terms.batches(groups)]
        try:
            return joined(groups, [pair for pairs in await asyncio.gather(*running) for pair in pairs])
        finally:
            for task in running:  # once one has failed nobody waits for the others
                task.cancel()

    async def _scored(self, batch: Sequence[Part], on_item_error: OnItemError) -> list[tuple[Part, GroupScores]]:
        told = await self._ask(score_request(batch, on_item_error))
        found = read_groups(told, [part.size for part in batch], may_fail=on_item_error == "null")
        return list(zip(batch, found, strict=True))

    async def compare(self, image: Source, a: str, b: str, prompt: Prompt = None) -> Comparison:
        """Which of two captions is preferred. Raises as `score`."""
        (part,) = parts_of([Group(image, (a, b), prompt)], Limits(captions=2))
        return read_comparison(await self._ask(single_request("/compare", part, {"a": a, "b": b})), part.image_id)

    async def rank(self, image: Source, captions: Sequence[str], prompt: Prompt = None) -> list[Ranked]:
        """The captions, best first. Raises as `score`, Refused for more than a server takes at a time."""
        if not captions:
            return []
        (part,) = parts_of([Group(image, captions, prompt)], Limits(captions=len(captions)))
        return read_ranking(await self._ask(single_request("/rank", part, {"captions": part.captions})), part.captions, part.image_id)

    async def _ask(self, request: Request) -> dict[str, Any]:
        local = self._local()
        call = self._terms.call(request)
        try:
            async with asyncio.timeout(self._terms.deadline_s), local.room:
                return await AsyncRetrying(sleep=self._sleep, **call.policy())(self._attempt, local, call, request)
        except Again as again:
            raise call.unanswered(again) from again.why
        except TimeoutError:
            raise Unanswered(f"no scores within {self._terms.deadline_s:g} s, in attempt {call.number + 1}") from None

    async def _attempt(self, local: _Local, call: Call, request: Request) -> dict[str, Any]:
        url = call.next_url()
        try:
            return await self._post(local, url, request, call)
        except ImageUnknown:  # its memory was full, or it is another process by now
            if not self._known.forget_all(url, request):
                raise
        try:
            return await self._post(local, url, request, call)
        except ImageUnknown as unknown:
            raise unknown_again(request, unknown) from None

    async def _post(self, local: _Local, url: str, request: Request, call: Call) -> dict[str, Any]:
        for picture in request.pictures:
            await self._send_once(local, url, picture, call)
        body = request.as_json(call.left_s, self._expected.fingerprint, self._terms.model)
        told = await self._exchange(local, "POST", url + request.route, call, request.headers, body)
        return self._expected.check(told, request)

    async def _send_once(self, local: _Local, url: str, picture: Picture, call: Call) -> None:
        """A picture's bytes, unless this server has them: sent by a task of its own, which goes on when one that waits is cancelled."""
        place = (url, picture.image_id)
        if picture.data is None or place in self._known:
            return
        if place not in local.sending:
            task = local.sending[place] = asyncio.create_task(self._send(local, place, picture.data, call))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, also if nobody waits any more
        await asyncio.shield(local.sending[place])

    async def _send(self, local: _Local, place: tuple[str, str], data: bytes, call: Call) -> None:
        try:
            await self._exchange(local, "PUT", place[0] + "/images", call, BYTES, data)
            self._known.add(*place)
        finally:
            del local.sending[place]

    async def _exchange(
        self, local: _Local, method: str, address: str, call: Call, headers: dict[str, str], content: bytes
    ) -> dict[str, Any]:
        try:
            answer = await local.http.request(method, address, headers=self._terms.headers | headers, timeout=call.timeout, content=content)
        except httpx.TransportError as error:
            raise Again(Unanswered(f"{address}: {type(error).__name__} {error}")) from None
        return read_answer(answer.status_code, answer.content, answer.headers.get("retry-after"))

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
        found = self._locals.pop(asyncio.get_running_loop(), None)
        if found is not None:
            await found.http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()
