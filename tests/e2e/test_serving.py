"""The process: starting, refusing to start, stopping."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from app.artifacts import DEMO_PATH
from tests.e2e.server import Server, environment, started

CARTOON = sorted((DEMO_PATH / "cartoons").glob("*.png"))[0]


def punchline(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**environment(), **variables}, check=False)


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 3, nothing on stdout, the reason in the one line that is ours."""
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("punchline: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


def test_ready_means_golden_scores_matched(server: Server) -> None:
    assert httpx.get(f"{server.url}/livez").json() == {"status": "alive"}
    assert httpx.get(f"{server.url}/readyz").json() == {"status": "ready"}
    report = httpx.post(f"{server.url}/selftest").json()
    assert report["passed"]
    assert report["kind"] == "golden"
    assert report["num_scores"] >= 6


def test_info_is_honest_about_the_demo(server: Server) -> None:
    card = httpx.get(f"{server.url}/info").json()
    assert "drawn" in card["model"]["description"]
    assert "humor" in card["model"]["description"]
    assert card["model"]["assumed"] == []
    assert card["selftest"]["passed"]


def num_arrived(client: httpx.Client) -> int:
    """Scoring requests that the server is answering."""
    found = re.search(r'^http_server_active_requests\{http_route="/score"\} (\S+)$', client.get("/metrics").text, re.MULTILINE)
    return int(float(found[1])) if found else 0


def test_sigterm_answers_what_is_in_flight_and_leaves_with_0() -> None:
    with started() as server, httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor() as pool:
        assert client.get("/readyz").status_code == 200
        body = {"image": base64.b64encode(CARTOON.read_bytes()).decode(), "captions": [f"Nice day {n}." for n in range(256)]}
        answers = [pool.submit(httpx.post, f"{server.url}/score", json=body, timeout=60) for _ in range(4)]
        while num_arrived(client) + sum(answer.done() for answer in answers) < len(answers):
            pass  # who comes after the port was closed was never accepted
        assert server.stop() == 0
        statuses = [answer.result().status_code for answer in answers]
        assert set(statuses) <= {200, 503}
        assert 200 in statuses


def test_a_taken_port_is_refused_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused(punchline("serve", "--port", str(taken.getsockname()[1])), "cannot listen")


def test_an_address_of_another_machine_is_refused_in_one_line() -> None:
    refused(punchline("serve", "--port", "0", "--host", "192.0.2.1"), "cannot listen")


def test_a_typo_in_the_environment_is_refused() -> None:
    refused(punchline("serve", PUNCHLINE_MAX_BATHC="3"), "PUNCHLINE_MAX_BATHC")


def test_a_value_out_of_range_is_refused() -> None:
    refused(punchline("serve", PUNCHLINE_PORT="70000"), "PUNCHLINE_PORT")


def test_a_port_open_to_all_is_warned_of_once_and_on_the_card(tmp_path: Path) -> None:
    """K3. In the log at start, however many ask afterwards, and in `/info`."""
    log = tmp_path / "log"
    with log.open("w") as stream, started("--host", "0.0.0.0", log=stream) as server:
        for _ in range(3):
            (warning,) = httpx.get(f"{server.url}/info").json()["warnings"]
        assert server.stop() == 0
    assert "listening on 0.0.0.0 without PUNCHLINE_API_KEY" in warning
    lines = [line for line in log.read_text().splitlines() if warning in line]
    assert len(lines) == 1
    assert " WARNING " in lines[0]


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_without_a_key_that_is_required_nothing_starts(host: str) -> None:
    """K3."""
    refused(punchline("serve", "--host", host, PUNCHLINE_REQUIRE_AUTH="1"), "require_auth is set and api_key is not")


def test_a_missing_model_is_refused() -> None:
    refused(punchline("serve", "--model", "./nowhere"), "./nowhere")


@pytest.mark.parametrize(("file", "fault"), [("reward_head.safetensors", "sha256"), ("golden.json", "sha256")])
def test_a_changed_file_is_refused(tmp_path: Path, file: str, fault: str) -> None:
    broken = shutil.copytree(DEMO_PATH, tmp_path / "demo")
    data = bytearray((broken / file).read_bytes())
    data[-3] ^= 1
    (broken / file).write_bytes(data)
    refused(punchline("serve", "--model", str(broken)), file, fault)


def test_a_model_that_scores_otherwise_is_refused(tmp_path: Path) -> None:
    """Even with every hash right: the golden scores are the last word."""
    other = shutil.copytree(DEMO_PATH, tmp_path / "demo")
    config = json.loads((other / "reward_model_config.json").read_text())
    config["template"] = "{prompt}\n\nCaption: {caption}"
    (other / "reward_model_config.json").write_text(json.dumps(config))
    refused(punchline("serve", "--model", str(other)), "self-test failed")


def test_swapping_a_and_b_mirrors_the_answer_to_the_last_bit(server: Server) -> None:
    image = base64.b64encode(CARTOON.read_bytes()).decode()
    one = httpx.post(f"{server.url}/compare", json={"image": image, "a": "Nice day.", "b": "Nobody asked."}).json()
    other = httpx.post(f"{server.url}/compare", json={"image": image, "a": "Nobody asked.", "b": "Nice day."}).json()
    assert (one["scores"]["a"], one["scores"]["b"]) == (other["scores"]["b"], other["scores"]["a"])
    assert one["probability_a"] == 1 - other["probability_a"]
    assert one["margin"] == -other["margin"]
