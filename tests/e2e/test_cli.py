"""The command line: the same numbers from a local model and from a server."""

from __future__ import annotations

import json

import pytest

from app.artifacts import DEMO_PATH
from tests.e2e.server import Server
from tests.e2e.test_serving import punchline

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
