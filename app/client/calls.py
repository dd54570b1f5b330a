"""One call: which servers it may ask, in which order, how long it waits between attempts, and when it gives up."""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import httpx
from tenacity import RetryCallState, retry_if_exception_type

from app.client.answers import Again, check_request
from app.client.errors import ImageUnknown, ModelChanged, Unanswered
from app.client.requests import Group, Limits, Part, Request, parts_of

MARGIN_S = 5.0  # of the transport beyond what the server was told
_CONNECT_S = 5.0  # to a server that is there it takes far less, and there may be another one to ask
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 10.0
_JITTER = (0.5, 1.0)  # of a wait of our own: those who failed together must not come back together
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_KNOWN = 100_000  # pictures of a server that are remembered as sent
_RANDOM = random.SystemRandom()  # not the module's generator, which a training run may have seeded: a retry must not change the run


def in_order(urls: Sequence[str], image_id: str | None) -> tuple[str, ...]:
    """The servers, the one that shall have this picture first: the same for every client (rendezvous hashing), spread over pictures."""
    if image_id is None:
        start = _RANDOM.randrange(len(urls))
        return (*urls[start:], *urls[:start])
    return tuple(sorted(urls, key=lambda url: hashlib.sha256(f"{url} {image_id}".encode()).digest()))


def batches_of(parts: Sequence[Part], urls: Sequence[str], limits: Limits) -> list[list[Part]]:
    """Parts that go together: their pictures are for the same server first, and they are no more than it takes at a time."""
    full: list[list[Part]] = []
    filling: dict[str, list[Part]] = {}
    for part in parts:
        server = in_order(urls, part.image_id)[0] if part.image_id else ""
        batch = filling.setdefault(server, [])
        if batch and (len(batch) == limits.groups or sum(len(each.captions) for each in (*batch, part)) > limits.captions):
            full.append(batch)
            batch = filling[server] = []
        batch.append(part)
    return [*full, *filling.values()]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a client was told, the same for all its calls."""

    urls: tuple[str, ...]
    api_key: str | None
    deadline_s: float
    attempt_s: float
    limits: Limits
    run_id: str | None = None  # the training run that the server's monitors count the scores to
    model: str | None = None  # which of the server's models is asked; None: its first

    def __post_init__(self) -> None:
        """Raises ValueError."""
        check_run_id(self.run_id)

    @property
    def headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return key if self.run_id is None else key | {"X-Run-Id": self.run_id}

    def batches(self, groups: Sequence[Group]) -> list[list[Part]]:
        """What goes into one request each. Raises as `parts_of`."""
        return batches_of(parts_of(groups, self.limits), self.urls, self.limits)

    def call(self, request: Request) -> Call:
        return Call(in_order(self.urls, request.image_id), time.monotonic() + self.deadline_s, self.attempt_s)


@dataclass(slots=True)
class Call:
    """The attempts of one call. `deadline`: by `clock`, in seconds."""

    urls: tuple[str, ...]
    deadline: float
    attempt_s: float
    clock: Callable[[], float] = time.monotonic
    number: int = -1  # of the attempt, from 0

    def next_url(self) -> str:
        """Every server once, then all over again."""
        self.number += 1
        return self.urls[self.number % len(self.urls)]

    @property
    def left_s(self) -> float:
        """For this attempt."""
        return max(0.001, min(self.attempt_s, self.deadline - self.clock()))

    @property
    def timeout(self) -> httpx.Timeout:
        """Of the transport. The server is told less, so that its own answer comes first."""
        return httpx.Timeout(self.left_s + MARGIN_S, connect=min(_CONNECT_S, self.left_s))

    def policy(self) -> dict[str, Any]:
        """For tenacity."""
        return {"retry": retry_if_exception_type(Again), "wait": self._wait_s, "stop": self._is_over, "reraise": True}

    def _wait_s(self, state: RetryCallState) -> float:
        """None before a server that was not asked yet; then what was asked for, or twice as long each round."""
        num_rounds, place = divmod(self.number + 1, len(self.urls))
        if place:
            return 0.0
        error = state.outcome.exception() if state.outcome else None
        own: float = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (num_rounds - 1)) * _RANDOM.uniform(*_JITTER)
        return max(own, (isinstance(error, Again) and error.wait_s) or 0.0)

    def _is_over(self, state: RetryCallState) -> bool:
        return self.clock() + state.upcoming_sleep >= self.deadline

    def unanswered(self, again: Again) -> Unanswered:
        """What is raised once no attempt is left."""
        return Unanswered(f"no scores within the deadline, after {self.number + 1} attempts; the last: {again.why}")


@dataclass(slots=True)
class Expected:
    """The fingerprint of the model that has to answer: given, or that of the first answer."""

    fingerprint: str | None = None
    _lock: Lock = field(default_factory=Lock)

    def check(self, told: dict[str, Any], request: Request) -> dict[str, Any]:
        """The answer, if it is this request's and this model's. Raises BadAnswer, ModelChanged."""
        check_request(told, request.request_id)
        found = told.get("model_fingerprint")
        with self._lock:
            if self.fingerprint is None and isinstance(found, str) and found:
                self.fingerprint = found
        if found != self.fingerprint:
            raise ModelChanged(f"expected model {self.fingerprint}, {found} answered")
        return told


class KnownPictures:
    """Which server was sent which picture; the oldest are forgotten, and then sent once more."""

    def __init__(self, max_known: int = _MAX_KNOWN) -> None:
        self._known: dict[tuple[str, str], None] = {}
        self._max_known = max_known
        self._lock = Lock()

    def __contains__(self, place: tuple[str, str]) -> bool:
        return place in self._known

    def add(self, url: str, image_id: str) -> None:
        with self._lock:
            self._known[url, image_id] = None
            while len(self._known) > self._max_known:
                del self._known[next(iter(self._known))]

    def forget_all(self, url: str, request: Request) -> bool:
        """The server had a picture of this request no more; whether its bytes are at hand to be sent again."""
        with self._lock:
            for picture in request.pictures:
                self._known.pop((url, picture.image_id), None)
        return any(picture.data is not None for picture in request.pictures)


def unknown_again(request: Request, unknown: ImageUnknown) -> Exception:
    """What is raised when a picture is unknown although all bytes at hand were just sent: for the rest no attempt will do."""
    return Again(unknown) if all(picture.data is not None for picture in request.pictures) else unknown


def check_run_id(run_id: str | None) -> None:
    """Raises ValueError for one that no server takes."""
    if run_id is not None and not _RUN_ID.fullmatch(run_id):
        raise ValueError(f"a run id is 1 to 64 letters, digits, dots, hyphens and underscores, a letter or digit first, not {run_id!r}")


def base_urls(given: str | Sequence[str]) -> tuple[str, ...]:
    """Checked and without a slash at their end. Raises ValueError."""
    urls = tuple(url.rstrip("/") for url in ([given] if isinstance(given, str) else given))
    if not urls or len(set(urls)) != len(urls) or not all(url.startswith(("http://", "https://")) for url in urls):
        raise ValueError(f"base URLs begin with http:// or https://, each once: {given!r}")
    return urls
