"""The memory of all bodies together: who gets room, that all of it comes back, and that large ones are parsed beside the loop."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from app.api.body_room import BodyRoom
from app.errors import Overloaded
from app.metrics import Metrics
from tests.fakes import UNSCORABLE, OracleScorer, Served, expected_scores, picture, serving, until

pytestmark = pytest.mark.anyio

PICTURE = picture()
IMAGE = base64.b64encode(PICTURE).decode()
BODY = json.dumps({"image": IMAGE, "captions": ["x"]}).encode().ljust(8192)
ROOM = {"max_pending_body_bytes": 4 * len(BODY), "max_body_bytes": 4 * len(BODY), "max_image_bytes": 2 * len(BODY)}
TINY_QUEUE = {"max_queue_tokens": 64, "max_batch_tokens": 64}
LARGE = 300 << 10


class Upload:
    """One request by hand: chunks as they come, and what the gauge said at every message of the answer."""

    def __init__(self, served: Served, *chunks: bytes, gone: bool = False, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        self._served = served
        self._chunks = list(chunks)
        self._gone = gone
        self._headers = headers
        self.gate = asyncio.Event()  # before the last chunk
        self.gate.set()
        self.sent: list[Any] = []
        self.held_at_send: list[float] = []

    async def receive(self) -> dict[str, Any]:
        if self._chunks:
            chunk = self._chunks.pop(0)
            if not self._chunks:
                await self.gate.wait()
            return {"type": "http.request", "body": chunk, "more_body": bool(self._chunks) or self._gone}
        if not self._gone:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        self.held_at_send.append(held(self._served))

    async def run(self, path: str = "/score", kind: bytes = b"application/json") -> None:
        headers = [(b"content-type", kind), (b"transfer-encoding", b"chunked"), *self._headers]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers, "http_version": "1.1"}
        await self._served.app(scope, self.receive, self.send)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])


def held(served: Served) -> float:
    return served.metric("http_server_body_bytes")


async def test_room_for_four_of_eight() -> None:
    """Four uploads lie there all but their last byte; of four more none is kept waiting, and the first four are answered."""
    async with serving(**ROOM) as served:
        waiting = [Upload(served, BODY[:-1], BODY[-1:]) for _ in range(4)]
        for upload in waiting:
            upload.gate.clear()
        first = [asyncio.create_task(upload.run()) for upload in waiting]
        await until(lambda: held(served) == 4 * (len(BODY) - 1))
        late = [Upload(served, BODY[:-1], BODY[-1:]) for _ in range(4)]
        await asyncio.gather(*(upload.run() for upload in late))
        assert [upload.status for upload in late] == [503] * 4
        assert all(json.loads(upload.sent[1]["body"])["error"]["code"] == "overloaded" for upload in late)
        assert {upload.headers[b"connection"] for upload in late} == {b"close"}
        assert {int(upload.headers[b"retry-after"]) for upload in late} <= {2, 3}  # spread, so that they do not come back as one
        assert held(served) == 4 * (len(BODY) - 1)
        for upload in waiting:
            upload.gate.set()
        await asyncio.gather(*first)
        assert [upload.status for upload in waiting] == [200] * 4
        assert json.loads(waiting[0].sent[1]["body"])["scores"] == expected_scores(PICTURE, ["x"])
        assert held(served) == 0
        assert served.metric("reward_rejected_total", code="overloaded") == 4


async def test_a_body_is_held_until_its_answer_has_left() -> None:
    async with serving(**ROOM) as served:
        upload = Upload(served, BODY)
        await upload.run()
        assert (upload.status, upload.held_at_send, held(served)) == (200, [len(BODY)] * 2, 0)


async def test_what_is_only_announced_takes_no_room() -> None:
    async with serving(**ROOM) as served:
        silent = [Upload(served, b"", headers=((b"content-length", b"%d" % (4 * len(BODY))),)) for _ in range(20)]
        for upload in silent:
            upload.gate.clear()
        tasks = [asyncio.create_task(upload.run()) for upload in silent]
        await until(lambda: served.metric("http_server_active_requests", http_route="/score") == 20)
        upload = Upload(served, BODY, BODY, BODY, BODY[:-1].strip().ljust(len(BODY)))
        await upload.run()
        assert upload.status == 400  # four JSON texts in one body: read whole, to its last byte
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert held(served) == 0


def with_caption(caption: str) -> bytes:
    return json.dumps({"image": IMAGE, "captions": [caption]}).encode()


OUTCOMES: dict[str, tuple[dict[str, Any], Callable[[Served], Upload], int | None]] = {
    "scored": ({}, lambda served: Upload(served, BODY), 200),
    "in chunks": ({}, lambda served: Upload(served, *(BODY[at : at + 100] for at in range(0, len(BODY), 100))), 200),
    "no JSON": ({}, lambda served: Upload(served, b"{" * 3000), 400),
    "no shape": ({}, lambda served: Upload(served, b"{}".ljust(3000)), 422),
    "a caption that cannot be scored": ({}, lambda served: Upload(served, with_caption(UNSCORABLE)), 422),
    "an unknown image": ({}, lambda served: Upload(served, BODY.replace(IMAGE.encode(), b"sha256:" + b"0" * 64)), 404),
    "too large at its last chunk": (ROOM, lambda served: Upload(served, *[BODY] * 4, b"x"), 413),
    "too late": ({"body_timeout_s": 0.01}, lambda served: Upload(served, BODY[:-1], BODY[-1:]), 408),
    "too many tokens": (TINY_QUEUE, lambda served: Upload(served, with_caption("y" * 70)), 413),
    "gone in the middle": ({}, lambda served: Upload(served, BODY[:100], gone=True), None),
    "a score that is not finite": ({"scorer": OracleScorer(lambda group, row: float("nan"))}, lambda served: Upload(served, BODY), 500),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTCOMES)
async def test_all_room_comes_back(name: str) -> None:
    flags, make, status = OUTCOMES[name]
    async with serving(**flags) as served:
        upload = make(served)
        if status == 408:
            upload.gate.clear()
        await upload.run()
        assert (upload.status if upload.sent else None) == status
        assert held(served) == 0


async def test_room_comes_back_from_a_request_that_is_cancelled() -> None:
    scorer = OracleScorer()
    scorer.gate.clear()
    async with serving(scorer=scorer) as served:
        task = asyncio.create_task(Upload(served, BODY).run())
        await until(lambda: served.metric("reward_queue_tokens") > 0)
        assert held(served) == len(BODY)
        task.cancel()
        await task
        scorer.gate.set()
        assert held(served) == 0


async def test_the_same_room_serves_any_number_of_requests() -> None:
    async with serving(**ROOM) as served:
        for _ in range(20):
            upload = Upload(served, BODY)
            await upload.run()
            assert upload.status == 200


async def test_a_share_is_given_back_once() -> None:
    metrics = Metrics()
    room = BodyRoom(10, metrics)
    with room.open() as own:
        own.take(6)
        with room.open() as other:
            other.take(4)
            with pytest.raises(Overloaded):
                other.take(1)
        own.take(4)
    with own:
        own.take(10)
    assert metrics.registry.get_sample_value("http_server_body_bytes") == 0


@contextmanager
def calls_on_this_thread() -> Iterator[set[str]]:
    """Names of the Python functions that the loop's own thread calls."""
    names: set[str] = set()

    def note(frame: Any, event: str, argument: object) -> None:
        names.add(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        yield names
    finally:
        sys.setprofile(None)


PARSERS = {"parse_json", "parse_multipart", "_form_data", "_validated", "_check_counts"}


def form(padding: int, **texts: bytes) -> bytes:
    parts = {'name="image"; filename="x.png"': PICTURE + b"\0" * padding} | {f'name="{name}"': text for name, text in texts.items()}
    body = b"".join(b"--bound\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (name.encode(), data) for name, data in parts.items())
    return body + b"--bound--\r\n"


@pytest.mark.parametrize("size", [0, LARGE])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=bound"])
async def test_a_large_body_is_not_parsed_by_the_event_loop(size: int, kind: str) -> None:
    """Small ones are: a thread would cost more than they do."""
    body = BODY.ljust(size) if kind == "application/json" else form(size, caption=b"x")
    async with serving() as served:
        with calls_on_this_thread() as names:
            upload = Upload(served, body)
            await upload.run(kind=kind.encode())
    assert upload.status == 200
    assert bool(names & PARSERS) == (size < LARGE)


@pytest.mark.parametrize("content", [form(LARGE), PICTURE + b"\0" * LARGE])
async def test_large_images_are_put_without_the_loop_parsing_them(content: bytes) -> None:
    kind = "multipart/form-data; boundary=bound" if content.startswith(b"--bound") else "image/png"
    async with serving() as served:
        with calls_on_this_thread() as names:
            answer = await served.client.put("/images", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 200
    assert not names & PARSERS


async def test_faults_of_large_bodies_are_the_same() -> None:
    async with serving() as served:
        for body, status in ((b" " * LARGE, 400), (b"{}".ljust(LARGE), 422), (b"[" + b"9" * LARGE + b"]", 400)):
            upload = Upload(served, body)
            await upload.run()
            assert upload.status == status


async def test_large_bodies_are_parsed_one_at_a_time_beside_the_loop() -> None:
    """Each parse waits for the loop to come by; on the loop itself it would wait for ever."""
    room = BodyRoom(1 << 30, Metrics())
    running, most, may_end = 0, 0, threading.Event()

    def parse() -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        came_by = may_end.wait(30)
        running -= 1
        return int(came_by)

    async def one() -> int:
        with room.open() as own:
            own.take(LARGE)
            return await own.parse(parse)

    tasks = [asyncio.create_task(one()) for _ in range(4)]
    await until(lambda: running == 1)
    may_end.set()
    assert await asyncio.gather(*tasks) == [1] * 4
    assert most == 1


async def test_a_client_that_leaves_while_its_body_is_parsed_lets_no_second_parse_begin() -> None:
    """The thread cannot be stopped: until it is through, the next body waits."""
    room, ran, may_end = BodyRoom(1 << 30, Metrics()), [], threading.Event()

    async def one(name: str) -> None:
        def parse() -> None:
            ran.append(name)
            may_end.wait(30)
            ran.append(f"{name} is through")

        with room.open() as own:
            own.take(LARGE)
            await own.parse(parse)

    leaving = asyncio.create_task(one("first"))
    await until(lambda: ran == ["first"])
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    waiting = asyncio.create_task(one("second"))
    await asyncio.sleep(0)  # to let it ask for the thread
    assert ran == ["first"]
    may_end.set()
    await waiting
    assert ran == ["first", "first is through", "second", "second is through"]
