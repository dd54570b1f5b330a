"""Signals at odd moments: while a body is on its way, while a model loads, and the one that other servers take for a reload."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from app.artifacts import CONFIG_NAME
from tests.e2e.server import Server, environment
from tests.e2e.test_draining import IMAGE, oracle, score, wait_unready
from tests.e2e.test_serving import num_arrived
from tests.fakes import expected_scores
from tests.tiny import copy_artifact
from tests.wire.client import Talk, connect, listen, parse, request
from tests.wire.server import Address, eventually

BOUNDARY = "a-line-between-parts"
FORM = (
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'.encode()
    + IMAGE
    + f'\r\n--{BOUNDARY}\r\nContent-Disposition: form-data; name="caption"\r\n\r\nuploaded\r\n--{BOUNDARY}--\r\n'.encode()
)


def address_of(server: Server) -> Address:
    url = httpx.URL(server.url)
    return url.host, url.port or 80


def is_closed(address: Address) -> bool:
    with suppress(ConnectionRefusedError), connect(address):
        return False
    return True


@contextmanager
def uploading(server: Server, client: httpx.Client, length: int) -> Iterator[socket.socket]:
    """Somebody whose head and half a form are with the server."""
    head, _, _ = (
        request(length=length).replace(b"application/json", f"multipart/form-data; boundary={BOUNDARY}".encode()).partition(b"\r\n\r\n")
    )
    with connect(address_of(server)) as connection:
        connection.sendall(head + b"\r\n\r\n" + FORM[: len(FORM) // 2])
        eventually(lambda: num_arrived(client) == 1, "half a body is there")
        yield connection


def told_once(server: Server, client: httpx.Client) -> None:
    server.process.send_signal(signal.SIGTERM)
    wait_unready(client)


def told_twice(server: Server, client: httpx.Client) -> None:
    told_once(server, client)
    server.process.send_signal(signal.SIGTERM)
    client.close()
    eventually(lambda: is_closed(address_of(server)), "the port is closed")


def told_without_notice(server: Server, client: httpx.Client) -> None:
    server.process.send_signal(signal.SIGTERM)
    client.close()
    eventually(lambda: is_closed(address_of(server)), "the port is closed")


@pytest.mark.parametrize(
    ("tell", "notice_s"),
    [(told_once, "2"), (told_twice, "600"), (told_without_notice, "0")],
    ids=["in the notice", "after a second signal", "after the port closed"],
)
def test_a_body_that_is_whole_in_time_is_scored(tell: Callable[[Server, httpx.Client], None], notice_s: str) -> None:
    """S3. Half of it was there at the signal; its request was accepted and is answered, as the last on its connection."""
    with (
        oracle(PUNCHLINE_DRAIN_NOTICE_S=notice_s) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
        uploading(server, client, len(FORM)) as connection,
    ):
        tell(server, client)
        connection.sendall(FORM[len(FORM) // 2 :])
        answered(listen(connection, until_closed=True), expected_scores(IMAGE, ["uploaded"]))
        assert server.process.wait(30) == 0


def answered(told: Talk, scores: list[float]) -> None:
    (answer,) = told.answers
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert f'"scores": {scores}'.encode() in answer.body


@pytest.mark.parametrize("still_sends", [False, True], ids=["that stopped", "that goes on"])
def test_a_body_that_is_not_whole_in_time_is_told_so(still_sends: bool) -> None:
    """S3. The drain ends first: 503 that can be read to its end, not a reset, whatever is still on its way; exit code 0."""
    stop = threading.Event()
    with (
        oracle(PUNCHLINE_DRAIN_S="1", PUNCHLINE_DEFAULT_TIMEOUT_MS="1000") as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
        uploading(server, client, 30 << 20) as connection,
    ):
        sending = threading.Thread(target=send_on, args=(connection, stop))
        if still_sends:
            sending.start()
        server.process.send_signal(signal.SIGTERM)
        received = read_all(connection)
        stop.set()
        if still_sends:
            sending.join()
        (answer,) = received.answers
        assert (answer.status, answer.error["code"], answer.error["retryable"]) == (503, "draining", True)
        assert int(answer.headers["retry-after"]) >= 1
        assert server.process.wait(30) == 0


def send_on(connection: socket.socket, stop: threading.Event) -> None:
    with suppress(OSError):
        while not stop.wait(0.02):
            connection.sendall(b" " * 1000)


def read_all(connection: socket.socket) -> Talk:
    """Like `listen`, but a reset is an error."""
    found = Talk()
    while data := connection.recv(65536):
        found.received += data
    found.answers = parse(found.received)
    return found


STAGES = {
    "its configuration": CONFIG_NAME,
    "the configuration of its base": "../base/config.json",
    "the weights of its base": "../base/more.safetensors",
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_server_that_loads_leaves_at_once(published: Path, tmp_path: Path, stage: str) -> None:
    """S4. Nobody was accepted yet, so there is nothing to drain: the signal itself ends the process, with no handler in between.

    A file that is a pipe without a writer makes a load that would never end; that it can be opened tells where the load is.
    """
    root = copy_artifact(published, tmp_path)
    pipe = root / STAGES[stage]
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "app.cli", "serve", "--model", str(root), "--port", "0", "--offline"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment())
    writers: list[int] = []
    try:
        eventually(lambda: is_read(pipe, writers) or process.poll() is not None, "the server reads it")
        assert writers, "the server left by itself"
        process.send_signal(signal.SIGHUP)  # S11: of which it takes no notice
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
        assert process.stdout
        assert process.stdout.read() == b"", "it never said that it serves"
    finally:
        process.kill()
        process.communicate()
        for writer in writers:
            os.close(writer)


def is_read(pipe: Path, writers: list[int]) -> bool:
    """Whether somebody waits for what is written there; then this end stays open, for closing it would end the waiting."""
    with suppress(OSError):
        writers.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    return bool(writers)


@pytest.mark.parametrize(("moment", "notice_s"), [("while it serves", "0"), ("in its notice", "600")])
def test_a_hangup_reloads_nothing(moment: str, notice_s: str, capfd: pytest.CaptureFixture[str]) -> None:
    """S11. Whoever hopes for a reload is told in the log that there is none; same model, same answers, and the process goes on."""
    heard: list[str] = []

    def num_told() -> int:
        heard.append(capfd.readouterr().err)
        return "".join(heard).count("SIGHUP: nothing is reloaded; restart to change the model or the settings")

    with oracle(PUNCHLINE_DRAIN_NOTICE_S=notice_s) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        if moment == "in its notice":
            told_once(server, client)
        before = score(client, "before")
        for number in range(3):
            server.process.send_signal(signal.SIGHUP)
            eventually(lambda number=number: num_told() > number, "the log says so")
        after = score(client, "after")
        assert after.json()["scores"] == expected_scores(IMAGE, ["after"])
        assert before.headers["x-model-fingerprint"] == after.headers["x-model-fingerprint"]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
