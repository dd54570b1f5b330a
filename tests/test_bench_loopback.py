"""The server in a thread: it starts, refuses and answers as the one in a process of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import SecretStr

from app.bench.loopback import Client, Loopback, serving
from app.bench.workload import Workload
from app.encoding import load_encoder
from app.errors import ArtifactInvalid, ScoringFailed
from app.geometry import write_artifact
from app.settings import Settings
from tests.test_geometry import TINY
from tests.tiny import LIMITS


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    artifact: Path = write_artifact(TINY, tmp_path_factory.mktemp("loopback") / "artifact")
    key = SecretStr("a key of enough length".replace(" ", "-"))
    with serving(Settings(model=str(artifact), device="cpu", dtype="float32", num_threads=1, api_key=key)) as found:
        yield found


def test_bytes_and_id_score_alike_with_the_key_of_the_settings(loopback: Loopback) -> None:
    request = Workload(load_encoder(loopback.runtime.first.artifact), LIMITS).request(3)
    with Client(loopback) as client:
        scores, image_id = client.send_bytes(request)
        again = client.send_id(image_id, request)
    assert len(scores.values) == 3
    assert again.values == scores.values
    assert again.num_computed_tokens == 0
    assert 0 < scores.num_computed_tokens < scores.num_tokens


def test_what_the_server_refuses_is_told(loopback: Loopback) -> None:
    request = Workload(load_encoder(loopback.runtime.first.artifact), LIMITS, seed=1).request(1)
    with Client(loopback) as client, pytest.raises(ScoringFailed, match="answered 404: no image with this id"):
        client.send_id("sha256:" + "0" * 64, request)


def test_the_start_was_watched(loopback: Loopback) -> None:
    assert loopback.startup.seconds > 0
    assert loopback.startup.peak is None or loopback.startup.peak.weights_bytes > 0
    assert loopback.runtime.ready


def test_the_callers_thread_computes_as_the_servers_do(loopback: Loopback) -> None:
    assert torch.get_num_threads() == loopback.runtime.settings.num_threads == 1


def test_nobody_else_uses_the_servers_parts_while_nothing_is_asked(tmp_path: Path) -> None:
    """The canary would look a dozen times meanwhile, on the engine and the processors of whoever times a direct call."""
    artifact = write_artifact(TINY, tmp_path / "artifact")
    with serving(Settings(model=str(artifact), device="cpu", dtype="float32", canary_s=0.02)) as found:
        registry = found.runtime.metrics.registry
        before = registry.get_sample_value("reward_batches_total", {"outcome": "ok"})
        time.sleep(1)
        assert before
        assert registry.get_sample_value("reward_batches_total", {"outcome": "ok"}) == before


def test_a_refused_start_is_raised_and_leaves_no_thread(tmp_path: Path) -> None:
    before = {thread for thread in threading.enumerate() if thread.name == "loopback server"}
    with pytest.raises(ArtifactInvalid, match="neither a directory nor a Hub id"), serving(Settings(model=str(tmp_path / "nowhere"))):
        pytest.fail("it started")
    assert {thread for thread in threading.enumerate() if thread.name == "loopback server"} == before
