"""Disks that take nothing more, for temporary files and for the log. A server needs neither to answer."""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from app.errors import StartRefused
from app.serving import tell
from tests.e2e.server import Server, environment, started
from tests.e2e.test_serving import CARTOON
from tests.wire.server import eventually

SMALL = CARTOON.read_bytes()
pytestmark = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="the limits of another process are set as Linux does it")


def noise() -> bytes:
    """A picture of 3 MB, more than a parser of forms keeps in memory when it spools."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def ask_in_every_way(server: Server, caption: str) -> None:
    """JSON, forms of both sizes, uploads: all answered, the same picture with the same score."""
    large = noise()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        scored = [client.post("/score", json={"image": base64.b64encode(SMALL).decode(), "captions": [caption]})]
        for data in (SMALL, large):
            scored.append(client.post("/score", files=[("image", ("x.png", data)), ("caption", (None, caption))]))
            put = client.put("/images", files=[("image", ("x.png", data))])
            assert put.status_code == 200
            scored.append(client.post("/score", json={"image": put.json()["image_id"], "captions": [caption]}))
        assert [answer.status_code for answer in scored] == [200] * 5
        small, form, by_id, *of_large = (answer.json()["scores"] for answer in scored)
        assert small == form == by_id
        assert of_large[0] == of_large[1] != small


def num_lost_lines(server: Server) -> float:
    found = re.search(r"^reward_lost_log_lines_total (\S+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_a_disk_that_fills_up_stops_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D1, D2. From a moment on no file takes a byte, as on a full disk: bodies are never spooled, and lines of the log are lost.

    They are counted. With room again the log goes on.
    """
    monkeypatch.setenv("TMPDIR", str(temporary := tmp_path / "temporary"))
    temporary.mkdir()
    log = tmp_path / "log"
    with log.open("w") as stream, started(log=stream) as server:
        ask_in_every_way(server, "there is room")
        size, files = log.stat().st_size, os.listdir(temporary)
        assert size > 0
        soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, hard))
        ask_in_every_way(server, "there is none")
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        assert (log.stat().st_size, os.listdir(temporary)) == (size, files)
        assert num_lost_lines(server) >= 7
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (soft, hard))
        ask_in_every_way(server, "there is again")
        eventually(lambda: log.read_text()[size:].count(" /score 200 ") == 5, "the log goes on")
        assert server.stop() == 0


def test_a_log_that_never_takes_a_line_stops_no_answer() -> None:
    """D2. /dev/full takes nothing from the first line on; the end is as clean as ever."""
    with Path("/dev/full").open("w") as full, started(log=full) as server:
        ask_in_every_way(server, "unheard of")
        assert num_lost_lines(server) >= 7
        assert server.stop() == 0


def test_standard_output_that_takes_nothing_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """D2. The line that names the address is lost; the server is not, and what comes after is nobody's fault either."""
    full = Path("/dev/full").open("w")  # noqa: SIM115 (closing it would fail)
    with contextlib.redirect_stdout(full), caplog.at_level(logging.WARNING):
        tell("Punchline serves")
        given_up = sys.stdout
        tell("and goes on")
    assert given_up is not full
    assert [record.getMessage() for record in caplog.records] == ["standard output takes nothing more ([Errno 28] No space left on device)"]
    given_up.close()
    with contextlib.suppress(OSError):
        full.close()


def test_a_refusal_that_nobody_hears_keeps_its_exit_code() -> None:
    """D2. A supervisor tells a wrong model from a crash by it."""
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "app.cli", "serve", "--model", "./nowhere"]
        run = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=full, env=environment(), check=False)
    assert run.returncode == StartRefused.exit_code
