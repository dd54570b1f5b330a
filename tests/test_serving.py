"""The port a server takes, and what it tells of how it computes."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from app.artifacts import Artifact
from app.draining import bind
from app.main import running
from app.model import LoadedModel, load_model
from app.serving import attention_ways, describe, open_port, warnings
from app.settings import load_settings
from tests.tiny import VisionFamily, load_whole, write_text_only


def test_answers_are_sent_at_once() -> None:
    """asyncio switches Nagle's algorithm off only for sockets that name TCP; with it small answers wait 40 ms for an acknowledgement."""
    with closing(bind(load_settings(port=0))) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), closing(listener.accept()[0]) as connection:
            assert connection.proto == socket.IPPROTO_TCP


@pytest.mark.parametrize(
    ("host", "key", "is_warned"),
    [
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("192.0.2.7", None, True),
        ("0.0.0.0", "correct-horse-battery-staple", False),
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("127.0.0.2", None, False),
        ("a-name", None, True),
    ],
)
def test_a_port_that_others_reach_without_a_key_is_warned_of(host: str, key: str | None, is_warned: bool) -> None:
    """K3. It serves all the same, so that one line starts a container."""
    told = open_port(load_settings(host=host, api_key=key))
    assert told == [f"listening on {host} without PUNCHLINE_API_KEY: anyone who reaches this port can use it"] * is_warned


@pytest.mark.anyio
async def test_batches_that_hold_less_than_a_caption_may_have_are_warned_of(tmp_path: Path) -> None:
    root = write_text_only(tmp_path)
    async with running(load_settings(model=str(root), offline=True, num_threads=1)) as runtime:
        most = runtime.first.encoder.max_row_tokens
        assert warnings(runtime) == describe(runtime)["warnings"] == []
    async with running(load_settings(model=str(root), offline=True, num_threads=1, max_batch_tokens=most - 1)) as runtime:
        (told,) = warnings(runtime)
        assert f"may have {most:,} tokens, a batch holds {most - 1:,} (PUNCHLINE_MAX_BATCH_TOKENS)" in told
        assert describe(runtime)["warnings"] == [told]


@pytest.mark.anyio
async def test_the_card_tells_what_decides_the_last_bits(tmp_path: Path) -> None:
    root = write_text_only(tmp_path)
    async with running(load_settings(model=str(root), offline=True, deterministic=True, num_threads=1)) as runtime:
        told = describe(runtime)["runtime"]
    assert {name: told[name] for name in ("dtype", "lora", "deterministic", "compile")} == {
        "dtype": "float32",
        "lora": "merged",
        "deterministic": True,
        "compile": False,
    }
    assert told["attention"] == {"text": "cpu"}
    assert told["prepacked_layers"] == runtime.first.engine.num_prepacked > 0
    assert told["hardware"]["num_threads"] == 1


def test_attention_over_text_and_over_pictures_is_told_apart(artifact: Artifact, loaded: LoadedModel) -> None:
    assert attention_ways(loaded.model) == {"text": "cpu", "images": "cpu"}
    assert attention_ways(load_model(artifact).model.double()) == {"text": "plain", "images": "plain"}


def test_pictures_that_go_through_transformers_are_said_to(published_of: Callable[[VisionFamily], Path]) -> None:
    _, loaded = load_whole(published_of("qwen3_vl"))
    assert attention_ways(loaded.model) == {"text": "cpu", "images": "transformers sdpa"}
