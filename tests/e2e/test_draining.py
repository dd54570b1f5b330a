"""How a process ends: with notice, hurried, or because its device broke."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import pytest

from app.errors import DeviceBroken
from tests.e2e.server import Server, environment, started
from tests.fakes import expected_scores, picture
from tests.load.oracle_server import DIE, HANG, HUGE, STICKY

IMAGE = picture()


@contextmanager
def oracle(*flags: str, **variables: str) -> Iterator[Server]:
    """A real process whose device can be told to fail."""
    command = [sys.executable, "-m", "tests.load.serve_oracle", *flags]
    settings = {"PUNCHLINE_PORT": "0", "PUNCHLINE_DRAIN_NOTICE_S": "0", **variables}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**environment(), **settings})
    try:
        line = process.stdout.readline() if process.stdout else ""
        found = re.search(r"http://\S+", line)
        assert found, line
        yield Server(found[0], process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=60)
        if process.stdout:
            process.stdout.close()


def score(client: httpx.Client, *captions: str, timeout_ms: int = 10_000) -> httpx.Response:
    parts = [("image", ("x.png", IMAGE)), ("timeout_ms", (None, str(timeout_ms)))]
    return client.post("/score", files=[*parts, *(("caption", (None, text)) for text in captions)])


def wait_unready(client: httpx.Client) -> None:
    while client.get("/readyz").status_code == 200:
        time.sleep(0.01)


def test_without_notice_an_idle_server_does_not_wait_for_its_drain_to_end() -> None:
    """S1. With a notice, whoever balances the load has that long to hear of it, busy or not: nobody knows who is on the way."""
    with oracle(PUNCHLINE_DRAIN_S="600") as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_during_the_notice_all_is_answered_and_no_connection_kept() -> None:
    with oracle(PUNCHLINE_DRAIN_NOTICE_S="2") as server, httpx.Client(base_url=server.url, timeout=30) as client:
        assert "connection" not in score(client, "before").headers
        server.process.send_signal(signal.SIGTERM)
        wait_unready(client)
        assert client.get("/livez").status_code == 200
        answer = score(client, "during")
        assert answer.json()["scores"] == expected_scores(IMAGE, ["during"])
        assert answer.headers["connection"] == "close"
        assert server.process.wait(30) == 0


def test_an_interrupt_gives_no_notice() -> None:
    with oracle(PUNCHLINE_DRAIN_NOTICE_S="600") as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0


def test_a_second_signal_ends_the_notice_refuses_what_waits_and_finishes_what_runs() -> None:
    with (
        oracle("--a-ms", "1500", PUNCHLINE_DRAIN_NOTICE_S="600", PUNCHLINE_DEFAULT_TIMEOUT_MS="60000") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        running = pool.submit(score, client, "runs")
        while "reward_queue_items 1.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        time.sleep(0.3)  # it is on the device
        waiting = pool.submit(score, client, "waits")
        while "reward_queue_items 2.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        wait_unready(client)
        server.process.send_signal(signal.SIGTERM)
        assert waiting.result().json()["error"]["code"] == "draining"
        assert waiting.result().headers["retry-after"]
        assert running.result().json()["scores"] == expected_scores(IMAGE, ["runs"])
        assert server.process.wait(30) == 0


def test_when_the_drain_is_over_whoever_is_left_is_told() -> None:
    """A forward longer than the grace: an answer, not a cut connection, and exit code 0."""
    with (
        oracle("--a-ms", "20000", PUNCHLINE_DRAIN_S="1", PUNCHLINE_DEFAULT_TIMEOUT_MS="1000") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        stuck = pool.submit(score, client, "runs", timeout_ms=30_000)  # its own deadline comes later
        while "reward_queue_items 1.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        answer = stuck.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert server.process.wait(10) == 0


def test_work_that_nobody_waits_for_does_not_hold_up_the_end() -> None:
    """A client leaves a long forward behind; the server told to stop then does not sit until it ends."""
    with oracle("--a-ms", "30000") as server:
        with httpx.Client(base_url=server.url, timeout=0.5) as client, pytest.raises(httpx.ReadTimeout):
            score(client, "left behind")
        with httpx.Client(base_url=server.url, timeout=30) as client:
            while "reward_queue_items 0.0" not in client.get("/metrics").text:
                time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0


@pytest.mark.parametrize(
    ("fault", "status", "code"), [(STICKY, 503, "device_fault"), (DIE, 503, "device_fault"), (HANG, 504, "device_hung")]
)
def test_a_broken_device_answers_nobody_and_ends_the_process(fault: str, status: int, code: str) -> None:
    with (
        oracle("--a-ms", "300", PUNCHLINE_MAX_BATCH_S="2") as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        assert score(client, "before").json()["scores"] == expected_scores(IMAGE, ["before"])
        guilty = pool.submit(score, client, fault)
        time.sleep(0.2)
        innocent = [pool.submit(score, client, f"behind {number}") for number in range(5)]
        answer = guilty.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        for late in innocent:
            with suppress(httpx.TransportError):  # it came after the port had closed
                assert late.result().json()["error"]["code"] in {"device_fault", "device_hung"}
        assert server.process.wait(10) == DeviceBroken.exit_code


def test_a_caption_without_room_fails_alone_and_the_third_in_a_row_ends_the_process() -> None:
    with oracle() as server, httpx.Client(base_url=server.url, timeout=30) as client:
        for _ in range(2):
            assert score(client, HUGE).json()["error"]["code"] == "out_of_memory"
        assert score(client, "fits").status_code == 200
        for code in ("out_of_memory", "out_of_memory", "device_fault"):
            assert score(client, HUGE).json()["error"]["code"] == code
        assert server.process.wait(10) == DeviceBroken.exit_code


def test_the_served_demo_leaves_with_0_after_its_notice() -> None:
    with started("--drain-notice-s", "1") as server, httpx.Client(base_url=server.url) as client:
        server.process.send_signal(signal.SIGTERM)
        wait_unready(client)
        assert client.get("/readyz").json()["error"]["code"] == "not_ready"
        assert server.process.wait(30) == 0
