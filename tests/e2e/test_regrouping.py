"""What requests cost that come one caption at a time, counted by /metrics, not by a clock."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Sequence

import httpx
import numpy as np
import pytest
from PIL import Image

from app.artifacts import open_artifact
from app.contracts import EncodedGroup, Group
from app.encoding import load_encoder
from app.images import decode_image
from app.model import load_model
from app.scoring import score_plain
from tests.e2e.server import Server, started
from tests.tiny import LIMITS

CAPTIONS = tuple(f"Caption number {number} says what the other {number % 7} do not." for number in range(64))
MAX_COST = 1.15  # of one group of 64


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


async def post(client: httpx.AsyncClient, image: bytes, captions: tuple[str, ...]) -> list[float]:
    parts = [("caption", (None, caption)) for caption in captions]
    answer = await client.post("/score", files=[("image", ("picture.png", image)), *parts])
    assert answer.status_code == 200, answer.text
    return list(answer.json()["scores"])


async def computed(client: httpx.AsyncClient) -> float:
    found = re.search(r'^reward_tokens_total\{kind="computed",model="[^"]*"\} (\S+)$', (await client.get("/metrics")).text, re.MULTILINE)
    return float(found[1]) if found else 0.0


async def cost_of_a_group_and_of_singles(url: str) -> tuple[float, float, list[float]]:
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=64)) as client:
        before = await computed(client)
        await post(client, picture(1), CAPTIONS)
        between = await computed(client)
        scores = await asyncio.gather(*(post(client, picture(2), (caption,)) for caption in CAPTIONS))
        after = await computed(client)
    return between - before, after - between, [score for own in scores for score in own]


def test_64_requests_of_one_caption_of_a_new_image_cost_about_a_group_of_64(server: Server) -> None:
    group, singles, scores = asyncio.run(cost_of_a_group_and_of_singles(server.url))
    assert singles <= MAX_COST * group
    expected = plain_scores(picture(2))
    assert scores == pytest.approx(expected, abs=1e-4)


def test_deterministic_scores_are_bit_equal_in_any_company() -> None:
    """Nothing is answered from kept scores; the second server meets the captions one by one, the first all at once."""
    flags = ("--deterministic", "--score-cache-bytes", "0")
    with started(*flags) as server, started(*flags) as another:
        together = asyncio.run(scores_of(server.url, [CAPTIONS]))
        alone = asyncio.run(scores_of(another.url, [(caption,) for caption in reversed(CAPTIONS)]))
        again = asyncio.run(scores_of(server.url, [(caption,) for caption in CAPTIONS]))
    assert together == alone[::-1] == again


async def scores_of(url: str, groups: Sequence[tuple[str, ...]]) -> list[float]:
    """All groups at once, about one picture."""
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=64)) as client:
        found = await asyncio.gather(*(post(client, picture(3), group) for group in groups))
    return [score for own in found for score in own]


def plain_scores(image: bytes) -> list[float]:
    artifact = open_artifact("demo")
    encoder = load_encoder(artifact)
    encoded = encoder.encode_image(decode_image(image, LIMITS, exif_transpose=False))
    group, _ = encoder.encode(Group(CAPTIONS, None, encoded))
    assert isinstance(group, EncodedGroup)
    (scores,) = score_plain(load_model(artifact).model, [group])
    return list(scores.values)
