"""What surrounds every route: headers, request ids, keys, metrics, the last catch."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import inspect
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.body_room import BodyRoom
from app.api.middleware import CLIENT_GONE, PUBLIC_PATHS, Envelope
from app.api.pages import read_pages
from app.metrics import Metrics
from tests.fakes import FINGERPRINT, OracleScorer, Served, picture, serving, until

pytestmark = pytest.mark.anyio

KEY, SECOND = "correct-horse-battery-staple", "another-key-for-the-rotation"
PAGES = {page.path for page in read_pages()}
BODY: dict[str, Any] = {"image": base64.b64encode(picture()).decode(), "captions": ["x"]}


def all_paths(served: Served) -> list[str]:
    """Every path of the application's own table, whatever wraps its routes."""
    found: list[str] = []
    pending = list(served.app.routes)
    while pending:
        route: Any = pending.pop()
        inner = getattr(getattr(route, "original_router", None), "routes", None)
        if inner is not None:
            pending.extend(inner)
        else:
            found.append(route.path)
    return sorted(found)


ANSWERS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "score": ("POST", "/score", 200, {"json": BODY}),
    "put": ("PUT", "/images", 200, {"content": picture()}),
    "livez": ("GET", "/livez", 200, {}),
    "metrics": ("GET", "/metrics", 200, {}),
    "openapi": ("GET", "/openapi.json", 200, {}),
    "docs": ("GET", "/docs", 200, {}),
    "no route": ("GET", "/nothing", 404, {}),
    "no method": ("GET", "/score", 405, {}),
    "no JSON": ("POST", "/score", 400, {"content": b"{", "headers": {"Content-Type": "application/json"}}),
    "no media type": ("POST", "/score", 415, {"content": b"{}"}),
    "no shape": ("POST", "/score", 422, {"json": {}}),
    "no image": ("POST", "/score", 404, {"json": {**BODY, "image": "sha256:" + "0" * 64}}),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_every_answer_is_signed(application: Served, name: str) -> None:
    method, path, status, arguments = ANSWERS[name]
    answer = await application.client.request(method, path, **arguments)
    assert answer.status_code == status
    assert answer.headers["X-Model-Fingerprint"] == FINGERPRINT
    assert re.fullmatch(r"[0-9a-f]{24}", answer.headers["X-Request-Id"])
    assert re.search(r"(^|, )total;dur=\d+\.\d+$", answer.headers["Server-Timing"])
    assert not any(name.lower().startswith("access-control") for name in answer.headers)


async def test_server_timing_names_the_stages(application: Served) -> None:
    answer = await application.client.post("/score", json=BODY)
    assert re.findall(r"(\w+);dur=", answer.headers["Server-Timing"]) == ["decode", "encode", "queue", "forward", "total"]


@pytest.mark.parametrize("path", ["/nothing", "/score/", "//score", "/SCORE", "/score;x", "/x/../score", "/\0", "/docs/", "score", "", "*"])
async def test_other_paths_are_404_in_our_shape(application: Served, path: str) -> None:
    wire = Wire()
    await application.app(scope(path), wire.receive, wire.send)
    error = json.loads(wire.sent[1]["body"])["error"]
    assert (wire.status, error["code"], error["retryable"]) == (404, "not_found", False)
    assert set(error) == {"code", "message", "retryable", "request_id"}
    assert (b"x-request-id", error["request_id"].encode()) in wire.sent[0]["headers"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"])
async def test_other_methods_are_405_with_allow(application: Served, method: str) -> None:
    answer = await application.client.request(method, "/score")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["Allow"] == "POST"


async def test_head_is_405_without_a_body(application: Served) -> None:
    answer = await application.client.head("/score")
    assert (answer.status_code, answer.headers["Allow"], answer.content) == (405, "POST", b"")


@pytest.mark.parametrize("given", ["a", "A.b_c-9", "x" * 128])
async def test_a_plain_request_id_is_kept(application: Served, given: str) -> None:
    answer = await application.client.post("/score", json=BODY, headers={"X-Request-Id": given})
    assert answer.headers["X-Request-Id"] == answer.json()["request_id"] == given


@pytest.mark.parametrize(
    "given", [b"", b" ", b"x" * 129, b"x" * 10_000, b"a b", b"a\tb", b"a;b", b"a\x00b", b"a\x1b[31m", b"\xe9", b'"a"', b"a,b"]
)
async def test_an_odd_request_id_is_replaced(application: Served, given: bytes) -> None:
    answer = await application.client.post("/score", json=BODY, headers={b"X-Request-Id": given})
    assert re.fullmatch(r"[0-9a-f]{24}", answer.headers["X-Request-Id"])
    assert answer.json()["request_id"] == answer.headers["X-Request-Id"]


async def test_two_request_ids_are_replaced(application: Served) -> None:
    answer = await application.client.get("/livez", headers=[("X-Request-Id", "one"), ("X-Request-Id", "two")])
    assert re.fullmatch(r"[0-9a-f]{24}", answer.headers["X-Request-Id"])


async def test_error_bodies_carry_the_request_id(application: Served) -> None:
    answer = await application.client.post("/score", json={}, headers={"X-Request-Id": "step-7"})
    assert answer.json()["error"]["request_id"] == "step-7"


CREDENTIALS: dict[str, list[tuple[bytes, bytes]]] = {
    "none": [],
    "empty": [(b"authorization", b"")],
    "scheme only": [(b"authorization", b"Bearer")],
    "scheme and a space": [(b"authorization", b"Bearer ")],
    "wrong": [(b"authorization", b"Bearer wrong")],
    "a prefix": [(b"authorization", b"Bearer " + KEY[:-1].encode())],
    "longer": [(b"authorization", b"Bearer " + KEY.encode() + b"x")],
    "another case": [(b"authorization", b"Bearer " + KEY.upper().encode())],
    "not ASCII": [(b"authorization", b"Bearer \xff\xfe")],
    "huge": [(b"authorization", b"Bearer " + b"x" * 1_000_000)],
    "another scheme": [(b"authorization", b"Basic " + base64.b64encode(b"user:" + KEY.encode()))],
    "no scheme": [(b"authorization", KEY.encode())],
    "both keys in one": [(b"authorization", f"Bearer {KEY},{SECOND}".encode())],
    "two headers": [(b"authorization", b"Bearer " + KEY.encode())] * 2,
    "right and wrong": [(b"authorization", b"Bearer " + KEY.encode()), (b"authorization", b"Bearer wrong")],
    "another header": [(b"x-api-key", KEY.encode())],
    "a cookie": [(b"cookie", b"authorization=Bearer " + KEY.encode())],
}


@pytest.mark.parametrize("name", CREDENTIALS)
async def test_without_the_key_every_route_but_the_probes_and_pages_is_401(name: str) -> None:
    async with serving(api_key=f"{KEY},{SECOND}") as served:
        bodies = set()
        for path in [*all_paths(served), "/nothing"]:
            answer = await served.client.get(path, headers=CREDENTIALS[name])
            if path in PUBLIC_PATHS | PAGES:
                assert answer.status_code == 200
                continue
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
            bodies.add(answer.text.replace(answer.headers["X-Request-Id"], ""))
        assert len(bodies) == 1, "an answer that differs tells routes apart"
        assert served.metric("reward_errors_total", endpoint="/score", code="unauthorized") == 1


async def test_the_table_of_routes_is_the_documented_one(application: Served) -> None:
    ours = PAGES | {"/score", "/compare", "/rank", "/images", "/livez", "/readyz", "/info", "/metrics", "/selftest"}
    ours |= {"/get_reward", "/rm", "/classify", "/v1/embeddings", "/pooling", "/v1/score", "/v1/models", "/predict"}
    ours |= {"/rerank", "/v1/rerank", "/v2/rerank"}
    ours |= {"/runs", "/runs/{run_id}/statistics"}
    assert set(all_paths(application)) == ours | {"/openapi.json"}


@pytest.mark.parametrize("credential", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER  {KEY}", f"Bearer {SECOND}"])
async def test_any_of_the_keys_opens(credential: str) -> None:
    async with serving(api_key=f" {KEY} ,{SECOND}\n", headers={"Authorization": credential}) as served:
        assert (await served.client.post("/score", json=BODY)).status_code == 200
        assert (await served.client.get("/metrics")).status_code == 200


async def test_requests_are_counted_by_key_and_no_key_can_be_read_from_it() -> None:
    async with serving(api_key=f"{KEY},{SECOND}") as served:
        for key in (KEY, KEY, SECOND, "a-key-that-nobody-has"):
            await served.client.get("/info", headers={"Authorization": f"Bearer {key}"})
        names = [hashlib.sha256(key.encode()).hexdigest()[:8] for key in (KEY, SECOND)]
        assert [served.metric("http_server_requests_by_key_total", key_hash=name) for name in names] == [2, 1]
        shown = (await served.client.get("/metrics", headers={"Authorization": f"Bearer {KEY}"})).text
        assert KEY not in shown
        assert SECOND not in shown


SHOWN = {
    "the first": KEY,
    "the second": SECOND,
    "the first but its last letter": KEY[:-1] + "x",
    "the first but its first letter": "x" + KEY[1:],
    "half of the first": KEY[: len(KEY) // 2],
    "the first and more": KEY + "x",
    "one letter": "x",
    "nothing": "",
}


@pytest.mark.parametrize("name", SHOWN)
async def test_how_much_of_a_key_was_right_changes_nothing_that_takes_time(name: str) -> None:
    """A4. Counted, not timed: whatever is shown, one digest is compared with those of all keys, to the end, in constant time."""
    compared: list[tuple[bytes, bytes]] = []

    def same(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    wire, digests = Wire(), [hashlib.sha256(key.encode()).digest() for key in (KEY, SECOND)]
    app = enveloped(inner, api_keys=(KEY, SECOND), same=same)
    await app(scope("/score", (b"authorization", b"Bearer " + SHOWN[name].encode())), wire.receive, wire.send)
    assert compared == [(hashlib.sha256(SHOWN[name].encode()).digest(), digest) for digest in digests]
    assert wire.status == (200 if SHOWN[name] in (KEY, SECOND) else 401)
    assert inspect.signature(Envelope).parameters["same"].default is hmac.compare_digest


@pytest.mark.parametrize(
    "path",
    ["/score", "//score", "/score/", "/livez/../score", "/livez/", "//livez", "/LIVEZ", "/livez;", "/livez\0", "livez", "/score#/livez"],
)
@pytest.mark.parametrize("host", [b"punchline", b"a/?x=", b"punchline/livez?", b""])
async def test_no_spelling_of_a_path_opens_a_closed_route(path: str, host: bytes) -> None:
    async with serving(api_key=KEY) as served:
        wire = Wire()
        await served.app({**scope(path, (b"host", host)), "query_string": b"key=" + KEY.encode()}, wire.receive, wire.send)
        assert (wire.status, wire.num_received) == (401, 0)


async def test_the_body_of_a_stranger_is_not_read() -> None:
    async with serving(api_key=KEY) as served:
        wire = Wire()
        await served.app(scope("/score"), wire.receive, wire.send)
        assert (wire.num_received, wire.status) == (0, 401)


CHUNKED, LENGTH = (b"transfer-encoding", b"chunked"), (b"content-length", b"999999999999")
EARLY: dict[str, tuple[str, str, int, tuple[bytes, bytes]]] = {
    "no key": ("POST", "/score", 401, (b"x-no-key", b"")),
    "no route": ("POST", "/nothing", 404, (b"content-type", b"application/json")),
    "no method": ("DELETE", "/score", 405, (b"content-type", b"application/json")),
    "no media type": ("POST", "/score", 415, (b"content-type", b"text/plain")),
    "compressed": ("PUT", "/images", 415, (b"content-encoding", b"gzip")),
    "a probe": ("GET", "/livez", 200, (b"content-type", b"application/json")),
    "metrics": ("GET", "/metrics", 200, (b"content-type", b"application/json")),
}


@pytest.mark.parametrize("announced", [CHUNKED, LENGTH, (b"content-length", b"1"), (b"content-length", b"0"), None])
@pytest.mark.parametrize("name", EARLY)
async def test_an_answer_that_comes_before_its_body_closes_the_connection(name: str, announced: tuple[bytes, bytes] | None) -> None:
    """Else the server would read on for as long as the client sends, and who waits for 100 Continue has his next request read as a body."""
    method, path, status, header = EARLY[name]
    key = () if name == "no key" else ((b"authorization", b"Bearer " + KEY.encode()),)
    headers = [header, *key, *([announced] if announced else [])]
    async with serving(api_key=KEY) as served:
        wire = Wire()
        await served.app({**scope(path), "method": method, "headers": headers}, wire.receive, wire.send)
    assert (wire.status, wire.num_received) == (status, 0)
    has_body = announced is not None and announced != (b"content-length", b"0")
    assert dict(wire.sent[0]["headers"]).get(b"connection") == (b"close" if has_body else None)


READ = {"scored": (json.dumps(BODY).encode(), 200), "no JSON": (b"{", 400), "no shape": (b"{}", 422), "nothing": (b"", 400)}


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("name", READ)
async def test_an_answer_to_a_body_that_was_read_keeps_the_connection(application: Served, name: str, num_chunks: int) -> None:
    body, status = READ[name]
    size = -(-len(body) // num_chunks) or 1
    chunks = [body[at * size : (at + 1) * size] for at in range(num_chunks)]
    wire = Wire(*({"type": "http.request", "body": chunk, "more_body": at < num_chunks - 1} for at, chunk in enumerate(chunks)))
    await application.app(scope("/score", CHUNKED), wire.receive, wire.send)
    assert wire.status == status
    assert b"connection" not in dict(wire.sent[0]["headers"])


async def test_a_body_refused_in_the_middle_closes_the_connection() -> None:
    async with serving(max_body_bytes=2048, max_image_bytes=1024) as served:
        wire = Wire(*({"type": "http.request", "body": b" " * 1024, "more_body": True} for _ in range(100)))
        await served.app(scope("/score", CHUNKED), wire.receive, wire.send)
    assert (wire.status, wire.num_received) == (413, 3)
    assert dict(wire.sent[0]["headers"])[b"connection"] == b"close"


async def test_a_fault_before_the_body_was_read_closes_the_connection() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError

    wire = Wire()
    await enveloped(broken)(scope("/score", LENGTH), wire.receive, wire.send)
    assert (wire.status, dict(wire.sent[0]["headers"])[b"connection"]) == (500, b"close")


async def test_metrics_may_be_public() -> None:
    async with serving(api_key=KEY, public_metrics=True) as served:
        assert (await served.client.get("/metrics")).status_code == 200
        assert (await served.client.get("/info")).status_code == 401


def scope(path: str, *headers: tuple[bytes, bytes]) -> Scope:
    kind = (b"content-type", b"application/json")
    return {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": [kind, *headers], "http_version": "1.1"}


class Wire:
    """The server's side of one request, by hand: messages to receive, what was sent."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.messages = list(messages)
        self.num_received = 0
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        self.num_received += 1
        if not self.messages:
            await asyncio.Event().wait()
        return self.messages.pop(0)

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])


async def test_a_client_that_leaves_during_its_upload_is_cancelled_and_not_failed(application: Served) -> None:
    wire = Wire({"type": "http.request", "body": b'{"captions"', "more_body": True}, {"type": "http.disconnect"})
    await application.app(scope("/score"), wire.receive, wire.send)
    assert wire.sent == []
    assert application.metric("reward_requests_total", endpoint="/score", outcome="cancelled") == 1
    assert application.metric("reward_requests_total", endpoint="/score", outcome="failed") == 0
    assert application.metric("http_server_active_requests", http_route="/score") == 0


async def test_a_request_that_the_server_gives_up_counts_once() -> None:
    """At the end of its time it cancels what is left; whoever is still there is told to go elsewhere."""
    scorer = OracleScorer()
    scorer.gate.clear()
    async with serving(scorer=scorer) as served:
        request = asyncio.create_task(served.client.post("/score", json=BODY))
        await until(lambda: served.metric("reward_queue_tokens") > 0)
        assert served.metric("http_server_active_requests", http_route="/score") == 1
        request.cancel()
        answer = await request
        scorer.gate.set()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert served.metric("reward_requests_total", endpoint="/score", outcome="rejected") == 1
        assert served.metric("reward_errors_total", endpoint="/score", code="draining") == 1
        assert served.metric("http_server_active_requests", http_route="/score") == 0
        assert served.metric("reward_queue_items") == served.metric("reward_queue_tokens") == 0


OUTCOMES = ("ok", "client_error", "rejected", "failed", "cancelled")


async def test_outcomes_add_up_to_what_was_sent() -> None:
    scorer = OracleScorer(lambda group, row: float("nan") if row[-2] == ord("!") else 0.5)
    async with serving(scorer=scorer, api_key=KEY) as served:
        key = {"Authorization": f"Bearer {KEY}"}
        sent = [
            ("ok", await served.client.post("/score", json=BODY, headers=key)),
            ("client_error", await served.client.post("/score", json=BODY)),
            ("client_error", await served.client.get("/score", headers=key)),
            ("client_error", await served.client.post("/score", json={}, headers=key)),
            ("client_error", await served.client.post("/score", content=b"x", headers=key)),
            ("failed", await served.client.post("/score", json={**BODY, "captions": ["!"]}, headers=key)),
        ]
        for outcome in OUTCOMES:
            expected = sum(kind == outcome for kind, _ in sent)
            assert served.metric("reward_requests_total", endpoint="/score", outcome=outcome) == expected
        statuses = [answer.status_code for _, answer in sent]
        assert statuses == [200, 401, 405, 422, 415, 500]
        assert served.metric("reward_items_total", outcome="scored") == 1


async def test_metrics_name_routes_and_never_what_a_client_made_up(application: Served) -> None:
    await application.client.post("/score", json=BODY)
    for number in range(20):
        await application.client.request(f"BREW{number}", f"/made-up-{number}")
    await application.client.get("/docs")
    text = (await application.client.get("/metrics")).text
    assert "made-up" not in text
    assert "BREW" not in text
    labels = {"http_request_method": "_other", "http_route": "_unmatched", "http_response_status_code": "404"}
    assert application.metric("http_server_request_duration_seconds_count", **labels) == 20
    assert 'http_route="/docs"' in text


NAMES = (
    *("http_server_request_duration_seconds", "http_server_active_requests", "reward_requests_total", "reward_errors_total"),
    *("reward_items_total", "reward_score", "reward_group_score_stddev", "reward_nonfinite_total", "reward_queue_items"),
    *("reward_queue_oldest_age_seconds", "reward_stage_duration_seconds", "reward_batch_items", "reward_batch_tokens"),
    *("reward_batches_total", "reward_rejected_total", "reward_cache_lookups_total", "reward_cache_entries", "reward_cache_bytes"),
    *("reward_golden_last_error", "reward_ready", "reward_model_info", "process_resident_memory_bytes"),
)


async def test_metrics_are_prometheus_text_with_the_documented_names(application: Served) -> None:
    await application.client.post("/score", json=BODY)
    answer = await application.client.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert [name for name in NAMES if f"# HELP {name} " not in answer.text] == []
    assert not any(word in answer.text for word in (BODY["image"][:20], "Bearer"))


def enveloped(app: ASGIApp, *, api_keys: tuple[str, ...] = (), same: Callable[[bytes, bytes], bool] = hmac.compare_digest) -> Envelope:
    metrics = Metrics()
    return Envelope(
        app,
        fingerprint=FINGERPRINT,
        api_keys=api_keys,
        same=same,
        metrics=metrics,
        paths=frozenset({"/score"}),
        is_draining=lambda: False,
        room=BodyRoom(1 << 30, metrics),
    )


async def test_the_last_catch_answers_without_the_text_of_the_fault(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("secret at 0x7f00dead")

    wire = Wire()
    await enveloped(broken)(scope("/score"), wire.receive, wire.send)
    body = wire.sent[1]["body"].decode()
    assert wire.status == 500
    assert '"code": "internal_error"' in body
    assert not any(word in body for word in ("secret", "0x", "RuntimeError", "Traceback"))
    assert "RuntimeError" in caplog.text  # the operator's log has it


async def test_a_fault_after_the_answer_began_sends_no_second_answer() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError

    wire = Wire()
    with pytest.raises(RuntimeError):
        await enveloped(broken)(scope("/score"), wire.receive, wire.send)
    assert [message["type"] for message in wire.sent] == ["http.response.start"]


async def test_what_is_not_http_passes_through() -> None:
    seen: list[str] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    await enveloped(inner)({"type": "lifespan"}, Wire().receive, Wire().send)
    assert seen == ["lifespan"]
    assert CLIENT_GONE not in range(500, 600)


async def test_logs_carry_ids_and_times_and_no_input(application: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    caption = "a caption nobody may log"
    for captions in ([caption], [caption, 4711], [caption * 400]):
        await application.client.post("/score?key=a-secret", json={**BODY, "captions": captions}, headers={"X-Request-Id": "step-7"})
    assert caplog.text.count("step-7 /score") == 3
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("punchline"))
    assert not any(word in ours for word in ("nobody", "4711", "a-secret", BODY["image"][:16]))
