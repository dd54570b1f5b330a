"""Clients that take their time, hold connections, or never take their answers."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import ExitStack, suppress

import pytest

from tests.fakes import OracleScorer
from tests.wire.client import captions, connect, listen, request, talk
from tests.wire.server import Address, eventually, wire

LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


def dribble(connection: socket.socket, stop: threading.Event, text: bytes) -> None:
    """One byte after the other, far faster than any limit, without end."""
    while not stop.wait(0.02):
        try:
            connection.sendall(text)
        except OSError:
            return


@pytest.mark.parametrize(
    ("begun", "more", "num_answers", "status"),
    [
        (b"", b"", 0, None),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nA: ", b"", 1, 408),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nA: ", b"x", 1, 408),
        (b"", b"\r\n", 0, None),
        (LIVEZ + b"GET /l", b"", 2, 408),
        (LIVEZ + b"GET /l", b"x", 2, 408),
        (LIVEZ, b"\r\n", 1, 200),
    ],
    ids=["nothing", "half a head", "a head without end", "line ends", "half a second head", "a second head without end", "line ends after"],
)  # fmt: skip
def test_a_head_that_does_not_come_ends_the_connection(begun: bytes, more: bytes, num_answers: int, status: int | None) -> None:
    """H5. A timer that every byte starts anew would wait for ever."""
    stop = threading.Event()
    with wire(header_timeout_s=0.3, keep_alive_s=3600) as server, connect(server.address) as connection:
        connection.sendall(begun)
        thread = threading.Thread(target=dribble, args=(connection, stop, more or b""))
        if more:
            thread.start()
        told = listen(connection, until_closed=True)
        stop.set()
        if more:
            thread.join()
        assert told.closed
        assert len(told.answers) == num_answers
        if status is not None:
            assert told.answers[-1].status == status
        if status == 408:
            assert (told.answers[-1].error["code"], told.answers[-1].error["retryable"]) == ("head_timeout", True)
        assert server.refused("head_timeout") == 1


def test_a_connection_that_was_used_may_idle_longer_than_a_head_may_take() -> None:
    with wire(header_timeout_s=0.2, keep_alive_s=3600) as server, connect(server.address) as connection:
        for _ in range(3):
            connection.sendall(LIVEZ)
            assert listen(connection).answers[0].status == 200
            time.sleep(0.5)
        assert server.refused("head_timeout") == 0


def test_what_takes_long_to_answer_is_not_cut() -> None:
    """The head's time says nothing of the answer's, nor of the body's."""
    scorer = OracleScorer()
    scorer.gate.clear()
    with wire(scorer=scorer, takes_images=False, header_timeout_s=0.2) as server, connect(server.address) as connection:
        sent = request(captions("slow"))
        connection.sendall(sent[:-5])
        time.sleep(0.4)
        connection.sendall(sent[-5:])
        time.sleep(0.4)
        scorer.gate.set()
        assert listen(connection).answers[0].status == 200


def test_five_hundred_half_heads_keep_nobody_out() -> None:
    with wire(takes_images=False, max_connections=100, header_timeout_s=60) as server, ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(connect(server.address)).sendall(b"GET /livez HTTP/1.1\r\nA: ")
        assert talk(server.address, request(captions("still here"))).answers[0].status == 200
        assert len(server.server.server_state.connections) <= 100
        assert server.refused("idle") >= 400


def test_of_too_many_connections_the_longest_idle_one_goes() -> None:
    """H22. Who is being answered stays, who idled longest goes first."""
    scorer = OracleScorer()
    with wire(scorer=scorer, takes_images=False, max_connections=3) as server, ExitStack() as stack:
        used, idle, busy = (stack.enter_context(connect(server.address)) for _ in range(3))
        eventually(lambda: len(server.server.server_state.connections) == 3, "three connected")
        scorer.gate.clear()
        busy.sendall(request(captions("busy")))
        eventually(lambda: server.served.metric("reward_queue_items") == 1, "one at work")
        used.sendall(LIVEZ)
        listen(used)
        newest = stack.enter_context(connect(server.address))
        assert idle.recv(1) == b""
        newest.sendall(LIVEZ)
        assert listen(newest).answers[0].status == 200
        used.sendall(LIVEZ)
        assert listen(used).answers[0].status == 200
        scorer.gate.set()
        assert listen(busy).answers[0].status == 200
        assert server.refused("idle") == 1


def test_where_nobody_idles_a_new_connection_is_told_to_come_back() -> None:
    scorer = OracleScorer()
    scorer.gate.clear()
    with wire(scorer=scorer, takes_images=False, max_connections=2) as server, ExitStack() as stack:
        busy = [stack.enter_context(connect(server.address)) for _ in range(2)]
        for number, connection in enumerate(busy):
            connection.sendall(request(captions(f"busy {number}")))
        eventually(lambda: server.served.metric("reward_queue_items") == 2, "two at work")
        told = talk(server.address, b"", until_closed=True)
        (answer,) = told.answers
        assert (answer.status, answer.error["code"], answer.error["retryable"]) == (503, "overloaded", True)
        assert int(answer.headers["retry-after"]) >= 1
        scorer.gate.set()
        assert [listen(connection).answers[0].status for connection in busy] == [200, 200]
        assert server.refused("too_many") == 1


LIMITED = """
import resource
import sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from tests.wire.server import wire
with wire(takes_images=False) as server:
    print(*server.address, flush=True)
    sys.stdin.read()
"""


def test_open_files_never_run_out() -> None:
    """A process that may open 200 files, and 400 that connect and say nothing: the cap follows the limit."""
    process = subprocess.Popen(
        [sys.executable, "-c", LIMITED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    try:
        host, port = process.stdout.readline().split()
        address: Address = (host, int(port))
        with ExitStack() as stack:
            for _ in range(400):
                stack.enter_context(connect(address))
            for _ in range(5):
                assert talk(address, request(captions("still here"))).answers[0].status == 200
        process.stdin.close()
        errors = process.stderr.read()
        assert process.wait(30) == 0, errors
        assert "max_connections is " in errors
        assert "out of system resource" not in errors
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_who_never_takes_an_answer_is_cut_off() -> None:
    """C6. The client asks and never reads until the server's buffers are full; memory is bounded and the connection ends."""
    with wire(write_timeout_s=0.3) as server, connect(server.address) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        question = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
        with suppress(ConnectionResetError, BrokenPipeError):
            for _ in range(10_000):
                connection.sendall(question * 20)
                time.sleep(0.01)
        eventually(lambda: not server.server.server_state.connections, "cut off")
        assert server.refused("write_timeout") == 1


def test_a_client_that_reads_slowly_but_reads_has_its_answers() -> None:
    with wire(write_timeout_s=600) as server, connect(server.address) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        time.sleep(0.3)
        assert [answer.status for answer in listen(connection, num_answers=20).answers] == [200] * 20


@pytest.mark.parametrize("ends", ["by the client", "by the server"])
def test_what_a_connection_held_is_freed_without_the_collector_of_cycles(ends: str) -> None:
    """Thousands of ended connections would otherwise lie about until a collection, in which nobody is served."""
    with wire() as server:
        gc.collect()
        gc.disable()
        try:
            with connect(server.address) as connection:
                connection.sendall(request(captions("a")) * 3)
                assert len(listen(connection, num_answers=3).answers) == 3
                held = [weakref.ref(each) for each in server.server.server_state.connections]
                held += [weakref.ref(each.cycle) for each in server.server.server_state.connections]
                assert len(held) == 2
                if ends == "by the server":
                    connection.sendall(b"no request\r\n\r\n")
                    assert listen(connection, until_closed=True).closed
            eventually(lambda: not server.server.server_state.connections, "the connection is closed")
            eventually(lambda: all(each() is None for each in held), "what it held is freed")
        finally:
            gc.enable()


def test_answers_that_nobody_takes_are_not_worked_on_far_ahead() -> None:
    """Left to itself the kernel keeps megabytes of them: all sixty would be made for somebody who reads none."""
    asked = 60
    with wire(write_timeout_s=1) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.address)
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * asked)
        eventually(lambda: server.refused("write_timeout") == 1, "the connection is given up")
        name = "http_server_request_duration_seconds_count"
        assert 0 < sum(s.value for m in server.served.metrics.registry.collect() for s in m.samples if s.name == name) < asked / 2
