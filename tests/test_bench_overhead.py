"""The client in a process of its own against a small server of each kind: that it times, tells what went wrong, and never stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from app.bench import caller
from app.bench.overhead import CallerProcess, calling, summarise
from app.contracts import Scores
from app.errors import ScoringFailed


class Answers(BaseHTTPRequestHandler):
    """What the body asks for: a status, or no answer at all. Notes connections and keys."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[int, str | None]] = []  # noqa: RUF012 (the server makes the handlers; a test empties it)

    def do_POST(self) -> None:
        self.seen.append((self.client_address[1], self.headers["Authorization"]))
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked.get("hang up"):
            self.close_connection = True
            return
        usage = {"tokens": 9, "computed_tokens": 5, "cached_tokens": 4}
        told: dict[str, Any] = {"scores": [0.5, -1.0], "usage": usage}
        if asked["status"] != 200:
            told = {"error": {"message": "no such thing"}}
        body = json.dumps(told).encode()
        self.send_response(asked["status"])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Answers.seen.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def is_gone(process: CallerProcess) -> bool:
    return process.pid is not None and process.returncode is not None


def test_seconds_and_scores_over_one_connection_with_the_key(url: str) -> None:
    with calling(url, {"Authorization": "Bearer key"}, 30) as process:
        found = [process.ask({"status": 200}) for _ in range(3)]
    assert all(seconds > 0 for seconds, _ in found)
    assert {scores for _, scores in found} == {Scores((0.5, -1.0), 9, 5, 4)}
    assert [key for _, key in Answers.seen] == ["Bearer key"] * 3
    assert len({port for port, _ in Answers.seen}) == 1
    assert is_gone(process)


def test_what_the_server_refuses_ends_it_in_one_line(url: str) -> None:
    with calling(url, {}, 30) as process, pytest.raises(ScoringFailed, match=r"^the server answered 503: no such thing$"):
        process.ask({"status": 503})
    assert is_gone(process)


def test_a_connection_that_breaks_is_told(url: str) -> None:
    with calling(url, {}, 30) as process, pytest.raises(ScoringFailed, match=r"the bench's client could not ask .*RemoteDisconnected"):
        process.ask({"hang up": True})
    assert is_gone(process)


def test_a_server_that_is_not_there_is_told() -> None:
    with calling("http://127.0.0.1:9", {}, 30) as process, pytest.raises(ScoringFailed, match="ConnectionRefusedError"):
        process.ask({"status": 200})


def test_a_client_that_dies_is_told(url: str) -> None:
    with calling(url, {}, 30) as process:
        process.ask({"status": 200})
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ScoringFailed, match="ended by itself, exit code -9"):
            process.ask({"status": 200})
    assert is_gone(process)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ScoringFailed("x")])
def test_no_client_is_left_behind(url: str, error: Any) -> None:
    found: list[CallerProcess] = []

    def interrupted() -> None:
        with calling(url, {}, 30) as process:
            found.append(process)
            process.ask({"status": 200})
            assert os.getpgid(process.pid) != os.getpgid(0)  # Ctrl-C on a terminal reaches us alone
            raise error

    with pytest.raises((KeyboardInterrupt, ScoringFailed)):
        interrupted()
    (process,) = found
    assert is_gone(process)
    assert process.returncode == 0


def test_the_client_ends_with_whoever_asks() -> None:
    """A parent that is killed says nothing: the end of its pipe is all there is."""
    for given in ("", json.dumps({"host": "127.0.0.1", "port": 9, "path": "/", "headers": {}, "timeout_s": 1}) + "\n"):
        done = subprocess.run([sys.executable, "-I", caller.__file__], input=given, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_client_is_lean() -> None:
    """Nothing but the standard library: it must be small beside the server it times."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code, caller.__file__], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "numpy", "httpx", "app"} & set(done.stdout.split())


def scores(num_computed: int) -> Scores:
    return Scores((0.0,), 100, num_computed)


def test_overhead_is_a_difference_of_pairs() -> None:
    """3, 1 and 2 ms more than 10, 20 and 30 ms."""
    served = [(seconds, scores(50)) for seconds in (0.013, 0.021, 0.032)]
    found = summarise("demo", served, [(seconds, scores(50)) for seconds in (0.010, 0.020, 0.030)])
    assert found.num_repeats == 3
    assert [found.p50_ms, found.p99_ms, found.scorer_p50_ms] == pytest.approx([2.0, 2.98, 20.0])


def test_unequal_work_has_no_difference() -> None:
    with pytest.raises(ScoringFailed, match="different numbers of tokens"):
        summarise("demo", [(0.013, scores(50))], [(0.010, scores(300))])
