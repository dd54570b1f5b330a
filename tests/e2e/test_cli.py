"""The command line: the same numbers from a local model and from a server."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from app.artifacts import CONFIG_NAME, DEMO_PATH
from app.errors import ApiError
from app.remote import remote_info
from app.settings import Settings
from tests.e2e.server import Server, started
from tests.e2e.test_serving import punchline
from tests.tiny import edit_json

CARTOON = str(sorted((DEMO_PATH / "cartoons").glob("*.png"))[0])


def ask(*arguments: str) -> dict:
    done = punchline(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_score_locally_and_remotely(server: Server) -> None:
    local = ask("score", CARTOON, "Nice day.", "Nobody asked.")
    remote = ask("score", CARTOON, "Nice day.", "Nobody asked.", "--url", server.url)
    assert local["scores"] == pytest.approx(remote["scores"], abs=1e-4)
    assert local["model_fingerprint"] == remote["model_fingerprint"]


def test_compare_locally_and_remotely(server: Server) -> None:
    local = ask("compare", CARTOON, "Nice day.", "Nobody asked.")
    remote = ask("compare", CARTOON, "Nice day.", "Nobody asked.", "--url", server.url)
    assert local["preferred"] == remote["preferred"]
    assert local["probability_a"] == pytest.approx(remote["probability_a"], abs=1e-4)


def test_the_table_ranks_with_the_artifacts_own_temperature(tmp_path: Path) -> None:
    """At an enormous temperature every caption wins against the best as often as not."""
    root = shutil.copytree(DEMO_PATH, tmp_path / "model")
    edit_json(root / CONFIG_NAME, calibration={"temperature": 1e9})
    local = punchline("score", CARTOON, "Nice day.", "Nobody asked.", "--model", str(root))
    with started("--model", str(root)) as server:
        remote = punchline("score", CARTOON, "Nice day.", "Nobody asked.", "--url", server.url)
    for done in (local, remote):
        assert done.stdout.count(" 0.500 ") == 2, done.stderr


@contextmanager
def answering(status: int, content: bytes) -> Iterator[str]:
    """A server that says the same to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *parts: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (200, b"\xff\xfe\x00{", "answered something else than JSON"),
        (200, b"[1]", "answered HTTP 200 and something else than a JSON object"),
        (502, b'["bad gateway"]', "answered HTTP 502 and something else than a JSON object"),
        (500, b'{"error": "oops"}', "HTTP 500"),
    ],
)
def test_whatever_a_server_answers_is_an_error_of_ours(status: int, content: bytes, words: str) -> None:
    with answering(status, content) as url, pytest.raises(ApiError, match=words) as raised:
        remote_info(url, None)
    assert "\n" not in raised.value.message


def test_tables_show_captions_as_plain_text(server: Server) -> None:
    done = punchline("score", CARTOON, "[red]x[/red]", "a\x1b[31mb", "--url", server.url)
    assert done.returncode == 0
    assert "[red]x[/red]" in done.stdout
    assert "\x1b[31mb" not in done.stdout


def test_info_of_an_artifact_and_of_a_server(server: Server) -> None:
    assert ask("info", "demo")["base_model_name"] == "./base"
    assert ask("info", "--url", server.url)["ready"] is True


def test_selftest(server: Server) -> None:
    assert ask("selftest")["passed"]
    assert ask("selftest", "--url", server.url)["passed"]


def test_a_server_that_is_not_there_is_one_line() -> None:
    done = punchline("score", CARTOON, "x", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.strip() == "punchline: unreachable: http://127.0.0.1:9 does not answer (ConnectError)"


def test_a_wrong_usage_is_shown_with_exit_code_2() -> None:
    for arguments in (("score", "nowhere.png", "x"), ("score", CARTOON, "x", "--no-such-option")):
        done = punchline(*arguments)
        assert done.returncode == 2
        assert "Error" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_refused_caption_is_one_line(server: Server) -> None:
    done = punchline("score", CARTOON, "x" * 500, "--url", server.url)
    assert done.returncode == 1
    assert "caption_too_long" in done.stderr
    assert "captions[0]" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("score", CARTOON, "a", "--model", "newyorker"),
        ("compare", CARTOON, "a", "b", "--base-model", "x"),
        ("info", "demo"),
        ("selftest", "--model", "demo"),
    ],
)
def test_a_server_is_asked_for_no_other_model_than_its_own(arguments: tuple[str, ...]) -> None:
    done = punchline(*arguments, "--url", "http://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--url asks a running server" in " ".join(done.stderr.split())


def test_an_address_without_its_scheme_says_so() -> None:
    done = punchline("info", "--url", "127.0.0.1:8000")
    assert (done.returncode, done.stdout) == (1, "")
    assert "begins with http://" in done.stderr


def test_help_shows_every_variable_and_default_in_a_narrow_terminal() -> None:
    shown = "".join(punchline("serve", "--help", COLUMNS="80").stdout.split())
    for name, field in Settings.model_fields.items():
        assert f"(PUNCHLINE_{name.upper()})" in shown
        assert field.default is None or f"[default:{field.default}]" in shown, name
