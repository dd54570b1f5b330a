"""The last check of a start: a golden item through the port. Before it is right nobody is told that the server is ready."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.draining import DrainingServer, bind
from app.errors import ArtifactInvalid
from app.main import Runtime, running
from app.proof import address_of, judge, prove_over_http
from app.serving import config_of
from app.settings import Settings
from app.startcheck import Scored
from tests.planted import make_artifact

pytestmark = pytest.mark.anyio
KEY = "a-key-of-letters-for-the-test"
SIGNED = {"x-model-fingerprint": "here"}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("proof"))


@asynccontextmanager
async def runtime_of(artifact: Path, **settings: Any) -> AsyncIterator[Runtime]:
    async with running(Settings(model=str(artifact), offline=True, port=0, canary_s=0, **settings)) as runtime:
        runtime.awaits_proof = True
        yield runtime


async def served_until_proved(runtime: Runtime) -> list[socket.socket]:
    """Serve, and stop once the server says its address; returns what it was told. Raises what the proof raises."""
    told: list[socket.socket] = []

    def announce(taken: socket.socket) -> None:
        assert runtime.ready
        told.append(taken)
        server.should_exit = True

    server = DrainingServer(
        config_of(runtime),
        runtime.batcher,
        notice_s=0,
        drain_s=5,
        begin=runtime.begin_drain,
        announce=announce,
        prove=lambda taken: prove_over_http(runtime, taken),
    )
    with bind(runtime.settings) as listener:
        async with asyncio.timeout(60):
            await server.serve(sockets=[listener])
    return told


@pytest.mark.parametrize("settings", [{}, {"api_key": KEY}, {"max_captions": 1}, {"score_cache_bytes": 0}], ids=str)
async def test_a_right_server_is_ready_once_the_item_came_back(artifact: Path, settings: dict[str, Any]) -> None:
    async with runtime_of(artifact, **settings) as runtime:
        assert not runtime.ready
        assert len(await served_until_proved(runtime)) == 1
        finding = runtime.first.findings[-1]
        assert (finding.check, finding.passed) == ("D15 http", True)
        assert finding.message.startswith("1 golden" if settings.get("max_captions") == 1 else "3 golden")


async def test_a_server_that_answers_something_else_over_http_is_refused(artifact: Path) -> None:
    async with runtime_of(artifact) as runtime:
        runtime.first.selftest.scored = tuple(
            Scored(tuple(score + 1e-3 for score in item.expected), item.found) for item in runtime.first.selftest.scored
        )
        with pytest.raises(ArtifactInvalid, match=r"check D15 http: 3 golden scores over HTTP, largest difference 1\.0\de-03"):
            await served_until_proved(runtime)
        assert not runtime.ready


async def test_a_golden_item_that_the_settings_refuse_is_not_sent(artifact: Path) -> None:
    async with runtime_of(artifact, max_caption_bytes=16, max_prompt_bytes=16) as runtime:
        runtime.first.selftest.asked[runtime.first.smallest_case].captions[:] = ["far longer than sixteen bytes"] * 3
        await served_until_proved(runtime)
        assert runtime.first.findings[-1].message == "not run: the settings refuse a golden item of this size over HTTP"


async def test_nobody_listens(artifact: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with runtime_of(artifact) as runtime:
            with pytest.raises(ArtifactInvalid, match=r"does not answer on http://127\.0\.0\.1:\d+ \(ConnectError\)"):
                await prove_over_http(runtime, closed)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (httpx.Response(200, headers=SIGNED, json={"scores": [1.0, 2.0]}), None),
        (httpx.Response(200, headers=SIGNED, json={"scores": [1.0, 2.00009]}), None),
        (httpx.Response(200, headers=SIGNED, json={"scores": [1.0, 2.0002]}), "largest difference 2.00e-04"),
        (httpx.Response(200, headers=SIGNED, json={"scores": [2.0, 1.0]}), "largest difference 1.00e+00"),
        (httpx.Response(200, headers=SIGNED, json={"scores": [1.0]}), "2 golden captions, answered with 1 scores"),
        (httpx.Response(200, headers=SIGNED, json={"scores": [1.0, None]}), "or with something else"),
        (httpx.Response(200, headers={"x-model-fingerprint": "there"}, json={"scores": [1.0, 2.0]}), "signed by another model"),
        (httpx.Response(200, headers=SIGNED, content=b'{"scores": [1.0, NaN]}'), "2 golden scores"),
        (httpx.Response(200, headers=SIGNED, content=b'{"scores": [NaN, 2.0]}'), "2 golden scores"),
        (httpx.Response(200, content=b"<html>"), "signed by another model"),
        (httpx.Response(503, headers=SIGNED, json={"error": {"code": "overloaded"}}), "answered with 503"),
    ],
)  # fmt: skip
def test_answers_and_what_is_wrong_with_them(answer: httpx.Response, words: str | None) -> None:
    finding = judge(answer, [1.0, 2.0], 1e-4, "here")
    assert finding.passed == (words is None)
    assert words is None or words in finding.message


def test_where_a_server_is_reached_from_its_own_machine() -> None:
    with socket.socket() as everywhere:
        everywhere.bind(("0.0.0.0", 0))
        assert address_of(everywhere) == f"http://127.0.0.1:{everywhere.getsockname()[1]}"
