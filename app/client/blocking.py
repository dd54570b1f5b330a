"""The client for threads: `RewardClient`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Lock
from types import TracebackType
from typing import Any, Self

import httpx
from tenacity import Retrying

from app.client.answers import Again, Comparison, GroupScores, Ranked, read_answer, read_comparison, read_groups, read_ranking
from app.client.calls import Call, Expected, KnownPictures, Terms, base_urls, unknown_again
from app.client.errors import ImageUnknown, Unanswered
from app.client.pictures import Picture, Source
from app.client.requests import Group, Limits, OnItemError, Part, Prompt, Request, parts_of, score_request, single_request
from app.client.results import joined, only_scores

BYTES = {"Content-Type": "application/octet-stream"}
KEEP_S = 60.0  # an idle connection, less than the server keeps it


class RewardClient:
    """Scores from one server or several with the same model. Safe among threads, and after a fork."""

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
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`deadline_s`: of a call, all attempts together; `attempt_s`: of one of them.

        `fingerprint`: the model that must answer; None: the one that answers first, from then on. `run_id`: the training run the
        scores are for; the server draws it at `/runs/` and this id. `model`: which of the server's; None: its first. Raises ValueError.
        """
        self._terms = Terms(base_urls(urls), api_key, deadline_s, attempt_s, limits or Limits(), run_id, model)
        self._transport = transport
        self._sleep = sleep
        self._start(fingerprint)

    def _start(self, fingerprint: str | None) -> None:
        """What belongs to this process: a forked one must share no connections, nor locks that a thread it has not may hold."""
        self._expected = Expected(fingerprint)
        self._pid = os.getpid()
        self._lock = Lock()
        self._sending: dict[tuple[str, str], Future[None]] = {}
        self._known = KnownPictures()
        self._http = httpx.Client(transport=self._transport, limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEP_S))

    @property
    def fingerprint(self) -> str | None:
        """Of the model that answers; None before the first answer."""
        return self._expected.fingerprint

    def score(self, image: Source, captions: Sequence[str], prompt: Prompt = None) -> list[float]:
        """One finite score a caption, in their order. Raises RewardError, OSError, TypeError; never a default."""
        return only_scores(self.score_groups([Group(image, captions, prompt)])[0])

    def score_groups(self, groups: Sequence[Group], *, on_item_error: OnItemError = "fail") -> list[GroupScores]:
        """Every group's scores, in their order. With "null" a caption that cannot be scored is None and says why. Raises as `score`."""
        found: list[tuple[Part, GroupScores]] = []
        for batch in self._terms.batches(groups):
            told = self._ask(score_request(batch, on_item_error))
            found += zip(batch, read_groups(told, [part.size for part in batch], may_fail=on_item_error == "null"), strict=True)
        return joined(groups, found)

    def compare(self, image: Source, a: str, b: str, prompt: Prompt = None) -> Comparison:
        """Which of two captions is preferred. Raises as `score`."""
        part = self._part(image, (a, b), prompt)
        return read_comparison(self._ask(single_request("/compare", part, {"a": a, "b": b})), part.image_id)

    def rank(self, image: Source, captions: Sequence[str], prompt: Prompt = None) -> list[Ranked]:
        """The captions, best first. Raises as `score`, Refused for more than a server takes at a time."""
        if not captions:
            return []
        part = self._part(image, captions, prompt)
        return read_ranking(self._ask(single_request("/rank", part, {"captions": part.captions})), part.captions, part.image_id)

    def _part(self, image: Source, captions: Sequence[str], prompt: Prompt) -> Part:
        (part,) = parts_of([Group(image, captions, prompt)], Limits(captions=len(captions)))
        return part

    def _ask(self, request: Request) -> dict[str, Any]:
        if self._pid != os.getpid():
            self._start(self._expected.fingerprint)
        call = self._terms.call(request)
        try:
            return Retrying(sleep=self._sleep, **call.policy())(self._attempt, call, request)
        except Again as again:
            raise call.unanswered(again) from again.why

    def _attempt(self, call: Call, request: Request) -> dict[str, Any]:
        url = call.next_url()
        try:
            return self._post(url, request, call)
        except ImageUnknown:  # its memory was full, or it is another process by now
            if not self._known.forget_all(url, request):
                raise
        try:
            return self._post(url, request, call)
        except ImageUnknown as unknown:
            raise unknown_again(request, unknown) from None

    def _post(self, url: str, request: Request, call: Call) -> dict[str, Any]:
        for picture in request.pictures:
            self._send_once(url, picture, call)
        body = request.as_json(call.left_s, self._expected.fingerprint, self._terms.model)
        told = self._exchange("POST", url + request.route, call, request.headers, body)
        return self._expected.check(told, request)

    def _send_once(self, url: str, picture: Picture, call: Call) -> None:
        """A picture's bytes, unless this server has them: one thread sends them, the others wait for that."""
        place = (url, picture.image_id)
        if picture.data is None or place in self._known:
            return
        own: Future[None] = Future()
        with self._lock:
            if place in self._known:  # sent since it was looked for
                return
            first = self._sending.setdefault(place, own)
        if first is not own:
            _awaited(first, call.left_s)
            return
        try:
            self._exchange("PUT", url + "/images", call, BYTES, picture.data)
            self._known.add(*place)
        except BaseException as error:
            own.set_exception(error if isinstance(error, Exception) else Again(Unanswered("another thread was interrupted")))
            raise
        else:
            own.set_result(None)
        finally:
            with self._lock:
                self._sending.pop(place, None)

    def _exchange(self, method: str, address: str, call: Call, headers: dict[str, str], content: bytes) -> dict[str, Any]:
        try:
            answer = self._http.request(method, address, headers=self._terms.headers | headers, timeout=call.timeout, content=content)
        except httpx.TransportError as error:
            raise Again(Unanswered(f"{address}: {type(error).__name__} {error}")) from None
        return read_answer(answer.status_code, answer.content, answer.headers.get("retry-after"))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _awaited(first: Future[None], left_s: float) -> None:
    """What another thread sends. Its failure is this one's as well."""
    try:
        first.result(left_s)
    except TimeoutError:
        raise Again(Unanswered("another thread still sends the picture")) from None
