"""Both clients against the whole HTTP stack on a real port: the scores, what is sent once, threads, loops and forks."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.client import AsyncRewardClient, Group, Limits, Refused, RewardClient
from app.client.pictures import read_picture
from tests.client.both import Kind, asking, both
from tests.fakes import MAX_CAPTION_TOKENS, UNSCORABLE, expected_scores, picture
from tests.wire.server import Wire, wire

CARTOON, OTHER = picture(64, 48, seed=0), picture(64, 48, seed=1)
CAPTIONS = ["first", "second", "", "ünïcödé \U0001f427", "first"]


@pytest.fixture
def server() -> Iterator[Wire]:
    with wire() as found:
        yield found


def url_of(server: Wire) -> str:
    return "http://{}:{}".format(*server.address)


def uploads(server: Wire) -> float:
    return server.served.metric("reward_requests_total", endpoint="/images", outcome="ok")


@both
def test_scores_are_the_servers_whatever_the_form_of_the_picture(kind: Kind, server: Wire, tmp_path: Path) -> None:
    path = tmp_path / "cartoon.png"
    path.write_bytes(CARTOON)
    with asking(kind, url_of(server)) as asked:
        expected = expected_scores(CARTOON, CAPTIONS)
        for source in (path, str(path), CARTOON, bytearray(CARTOON), read_picture(CARTOON).image_id):  # type: ignore[union-attr]
            assert asked.score(source, CAPTIONS) == expected
        assert asked.score(CARTOON, CAPTIONS, "Another prompt.") == expected_scores(CARTOON, CAPTIONS, "Another prompt.") != expected
    assert uploads(server) == 1


@both
def test_a_pil_image_is_sent_without_loss(kind: Kind, server: Wire) -> None:
    image = Image.open(io.BytesIO(CARTOON)).convert("RGB")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    with asking(kind, url_of(server)) as asked:
        assert asked.score(image, CAPTIONS) == expected_scores(stream.getvalue(), CAPTIONS)


@both
@pytest.mark.parametrize("limits", [Limits(), Limits(groups=2, captions=3), Limits(groups=1, captions=1)])
def test_groups_of_any_size_come_back_whole_and_in_order(kind: Kind, limits: Limits, server: Wire) -> None:
    groups = [
        Group(CARTOON, [f"caption {number}" for number in range(700)] if limits.captions > 3 else CAPTIONS),
        Group(OTHER, []),
        Group(OTHER, CAPTIONS),
        Group(CARTOON, CAPTIONS, "Another prompt."),
        Group(OTHER, ["one"]),
    ]
    with asking(kind, url_of(server), limits=limits) as asked:
        found = asked.score_groups(groups)
        assert asked.score_groups([]) == []
        assert asked.score(CARTOON, []) == []
    expected = [expected_scores(group.image, group.captions, group.prompt) for group in groups]
    assert [list(each.scores) for each in found] == expected
    assert uploads(server) == 2


@both
def test_comparing_and_ranking(kind: Kind, server: Wire) -> None:
    a, b, c = expected_scores(CARTOON, ["x", "yy", "zzz"])
    with asking(kind, url_of(server)) as asked:
        compared = asked.compare(CARTOON, "x", "yy")
        assert (compared.score_a, compared.score_b, compared.margin) == (a, b, a - b)
        assert compared.preferred == ("a" if a > b else "b")
        ranked = asked.rank(CARTOON, ["x", "yy", "zzz"])
        assert {each.index: each.score for each in ranked} == {0: a, 1: b, 2: c}
        assert [each.score for each in ranked] == sorted([a, b, c], reverse=True)
        assert asked.rank(CARTOON, []) == []


@both
@pytest.mark.parametrize(
    ("captions", "code"),
    [(["fine", "x" * (MAX_CAPTION_TOKENS + 1)], "caption_too_long"), (["fine", "\ud800"], "invalid_unicode")],
)
def test_one_bad_caption_fails_all_or_itself(kind: Kind, captions: list[str], code: str, server: Wire) -> None:
    """Half a surrogate pair, which no JSON library of a trainer may choke on, is refused like any other text."""
    with asking(kind, url_of(server)) as asked:
        with pytest.raises(Refused, match=code):
            asked.score(CARTOON, captions)
        if code == "caption_too_long":
            (found,) = asked.score_groups([Group(CARTOON, captions)], on_item_error="null")
            assert found.scores == (*expected_scores(CARTOON, ["fine"]), None)
            assert found.errors[1] is not None
            assert code in found.errors[1]


@both
@pytest.mark.parametrize("captions", ["one text", b"bytes", [1], [None], ["a", b"b"]])
def test_captions_that_are_no_list_of_texts_are_the_callers_mistake(kind: Kind, captions: Any) -> None:
    with asking(kind, "http://nobody") as asked, pytest.raises(TypeError):
        asked.score(CARTOON, captions)


@both
@pytest.mark.parametrize(("source", "error"), [(3, TypeError), (object(), TypeError), ("no such file.png", OSError)])
def test_a_picture_that_is_none_is_the_callers_mistake(kind: Kind, source: Any, error: type[Exception]) -> None:
    with asking(kind, "http://nobody") as asked, pytest.raises(error):
        asked.score(source, ["a"])


@both
def test_a_picture_the_server_refuses(kind: Kind, server: Wire) -> None:
    with asking(kind, url_of(server)) as asked, pytest.raises(Refused, match="image"):
        asked.score(b"no picture at all", ["a"])


@both
def test_a_key_is_sent(kind: Kind) -> None:
    key = "correct-horse-battery-staple"
    with wire(api_key=key) as server:
        with asking(kind, url_of(server), api_key=key) as asked:
            assert asked.score(CARTOON, CAPTIONS) == expected_scores(CARTOON, CAPTIONS)
        with asking(kind, url_of(server)) as asked, pytest.raises(Refused, match="unauthorized"):
            asked.score(CARTOON, CAPTIONS)


@both
def test_a_server_whose_memory_is_small_is_sent_the_picture_again(kind: Kind) -> None:
    with wire(image_store_bytes=len(CARTOON) + 10, pixel_cache_bytes=0) as server, asking(kind, url_of(server)) as asked:
        for image in (CARTOON, OTHER, CARTOON):
            assert asked.score(image, CAPTIONS) == expected_scores(image, CAPTIONS)
        assert uploads(server) == 3


def test_threads_share_a_client_and_a_picture_is_sent_once(server: Wire) -> None:
    together = threading.Barrier(16)
    with RewardClient(url_of(server)) as client, ThreadPoolExecutor(16) as pool:

        def ask(number: int) -> list[float]:
            together.wait(30)
            return client.score(CARTOON, [f"caption {number}"])

        found = list(pool.map(ask, range(16)))
    assert found == [expected_scores(CARTOON, [f"caption {number}"]) for number in range(16)]
    assert uploads(server) == 1


def test_tasks_share_a_client_and_a_picture_is_sent_once(server: Wire) -> None:
    async def ask() -> list[list[float]]:
        async with AsyncRewardClient(url_of(server)) as client:
            return await asyncio.gather(*(client.score(CARTOON, [f"caption {number}"]) for number in range(64)))

    assert asyncio.run(ask()) == [expected_scores(CARTOON, [f"caption {number}"]) for number in range(64)]
    assert uploads(server) == 1


def test_one_that_is_cancelled_takes_no_other_with_it(server: Wire) -> None:
    """The first of those that wait for a picture to be sent is cancelled; the others get their scores."""

    async def ask() -> list[list[float]]:
        async with AsyncRewardClient(url_of(server)) as client:
            first = asyncio.create_task(client.score(CARTOON, ["never"]))
            others = [asyncio.create_task(client.score(CARTOON, [f"caption {number}"])) for number in range(3)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            first.cancel()
            return await asyncio.gather(*others)

    assert asyncio.run(ask()) == [expected_scores(CARTOON, [f"caption {number}"]) for number in range(3)]
    assert uploads(server) == 1


def test_one_client_serves_event_loops_one_after_the_other(server: Wire) -> None:
    """As trainers do that run a loop for each call. What it knows of sent pictures stays; connections are a loop's, and closed with it."""
    client = AsyncRewardClient(url_of(server))

    async def ask(caption: str) -> list[float]:
        async with client:
            return await client.score(CARTOON, [caption])

    for number in range(3):
        assert asyncio.run(ask(f"{number}")) == expected_scores(CARTOON, [f"{number}"])
    assert uploads(server) == 1


def test_more_requests_than_at_once_wait_for_their_turn(server: Wire) -> None:
    async def ask() -> list[list[float]]:
        async with AsyncRewardClient(url_of(server), num_requests=2) as client:
            return await asyncio.gather(*(client.score(CARTOON, [f"caption {number}"]) for number in range(20)))

    assert asyncio.run(ask()) == [expected_scores(CARTOON, [f"caption {number}"]) for number in range(20)]


FORKED = """
import asyncio, os, sys
from app.client import AsyncRewardClient, RewardClient
url, path = sys.argv[1:]
blocking, loops = RewardClient(url), AsyncRewardClient(url)
def ask(caption):
    return blocking.score(path, [caption]) + asyncio.run(loops.score(path, [caption]))
before = ask("before")
with blocking._expected._lock, loops._expected._lock:  # held by some thread at that moment, which the child has not
    child = os.fork()
    if child == 0:
        print(ask("child"), flush=True)
        os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(ask("parent"), flush=True)
"""


def test_a_forked_worker_opens_connections_of_its_own(server: Wire, tmp_path: Path) -> None:
    path = tmp_path / "cartoon.png"
    path.write_bytes(CARTOON)
    command = [sys.executable, "-c", FORKED, url_of(server), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=Path(__file__).parents[2])
    expected = [expected_scores(CARTOON, [name]) * 2 for name in ("child", "parent")]
    assert run.stdout.splitlines() == [str(each) for each in expected]


def test_the_client_loads_neither_torch_nor_the_server() -> None:
    program = "import sys, app.client; print(sorted({'torch', 'fastapi', 'pydantic', 'numpy', 'PIL', 'uvicorn'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert run.stdout.strip() == "[]"


@both
def test_what_the_fake_cannot_score_is_refused(kind: Kind, server: Wire) -> None:
    with asking(kind, url_of(server)) as asked, pytest.raises(Refused):
        asked.score(CARTOON, [f"{UNSCORABLE}"])


@both
def test_the_scores_of_a_run_are_in_its_monitors(kind: Kind, server: Wire) -> None:
    with asking(kind, url_of(server), run_id="grpo-7") as asked:
        asked.score_groups([Group(CARTOON, CAPTIONS), Group(OTHER, CAPTIONS[:2])])
        asked.compare(CARTOON, "first", "second")
    assert server.served.metric("reward_run_score_count", run="grpo-7") == len(CAPTIONS) + 2 + 2
    assert server.served.metric("reward_run_group_score_stddev_count", run="grpo-7") == 3


@both
def test_a_model_that_is_named_is_asked_with_every_route(kind: Kind, server: Wire) -> None:
    with asking(kind, url_of(server), model="fake") as asked:
        assert asked.score(CARTOON, CAPTIONS) == expected_scores(CARTOON, CAPTIONS)
        assert [asked.compare(CARTOON, "a", "b").score_a, asked.rank(CARTOON, ["a"])[0].score] == expected_scores(CARTOON, ["a", "a"])
    with asking(kind, url_of(server), model="other") as asked:
        for ask in (lambda: asked.score(CARTOON, CAPTIONS), lambda: asked.compare(CARTOON, "a", "b"), lambda: asked.rank(CARTOON, ["a"])):
            with pytest.raises(Refused) as refused:
                ask()
            assert (refused.value.status, refused.value.code, refused.value.field) == (404, "model_unknown", "model")
