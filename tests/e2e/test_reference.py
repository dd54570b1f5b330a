"""The served scores against a plain script that knows only transformers, peft and torch."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from app.artifacts import DEMO_PATH
from tests.e2e.server import Server

SCRIPT = Path(__file__).parents[1] / "reference.py"
CARTOON = sorted((DEMO_PATH / "cartoons").glob("*.png"))[0]
CAPTIONS = ["It says it is here about the iceberg.", "Nice day.", "Nobody asked. 企鵝 🐧", ""]
NUM_CONCURRENT = 64


@pytest.fixture(scope="module")
def expected() -> list[float]:
    command = [sys.executable, str(SCRIPT), str(DEMO_PATH), str(CARTOON), *CAPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd="/")
    scores: list[float] = json.loads(done.stdout)["scores"]
    return scores


def json_body() -> dict:
    return {"image": base64.b64encode(CARTOON.read_bytes()).decode(), "captions": CAPTIONS}


def form_parts() -> list:
    return [("image", (CARTOON.name, CARTOON.read_bytes())), *(("caption", (None, text.encode())) for text in CAPTIONS)]


def test_the_script_imports_nothing_of_ours() -> None:
    assert "app" not in {line.split()[1].split(".")[0] for line in SCRIPT.read_text().splitlines() if line.startswith(("import ", "from "))}


def test_json_and_multipart_alone(server: Server, expected: list[float]) -> None:
    for answer in (httpx.post(f"{server.url}/score", json=json_body()), httpx.post(f"{server.url}/score", files=form_parts())):
        assert answer.status_code == 200
        assert answer.json()["scores"] == pytest.approx(expected, abs=1e-4)


def test_among_64_concurrent_requests(server: Server, expected: list[float]) -> None:
    answers = asyncio.run(concurrently(server.url))
    assert len(answers) == NUM_CONCURRENT
    for scores in answers:
        assert scores == pytest.approx(expected, abs=1e-4)


async def concurrently(url: str) -> list[list[float]]:
    limits = httpx.Limits(max_connections=NUM_CONCURRENT)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        ways = [{"json": json_body()}, {"files": form_parts()}]
        answers = await asyncio.gather(*(client.post("/score", **ways[number % 2]) for number in range(NUM_CONCURRENT)))
    return [answer.json()["scores"] for answer in answers]
