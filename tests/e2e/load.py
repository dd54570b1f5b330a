"""Many clients, mixed requests, every answer compared with a table computed beforehand, one forward a caption.

python -m tests.e2e.load --requests 5000 --clients 32 [--url http://127.0.0.1:8000]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from app.artifacts import DEMO_PATH, open_artifact
from app.contracts import Group
from app.encoding import load_encoder
from app.images import ImageLimits, decode_image, image_id
from app.model import load_model
from app.scoring import score_plain
from tests.e2e.server import started

TOLERANCE = 1e-4
WORDS = "the penguin cat robot is in an office with its umbrella again and nobody on this beach asked why 🐧 naïve".split()  # noqa: SIM905
LIMITS = ImageLimits(max_bytes=10 << 20, max_pixels=16_000_000, min_side=16, max_aspect=100, formats=("PNG",))


@dataclass(frozen=True)
class Picture:
    data: bytes
    image_id: str


@dataclass
class Tally:
    """What happened to every caption that was sent."""

    requests: int = 0
    captions: int = 0
    wrong: int = 0
    lost: int = 0
    retried: int = 0
    worst: float = 0.0
    latencies_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ask:
    """One request to send: a way to ask, a picture, captions."""

    kind: str
    picture: Picture
    captions: tuple[str, ...]


Table = dict[tuple[str, str], float]


def make_table(paths: Sequence[Path], num_captions: int, seed: int) -> tuple[list[Picture], list[str], Table]:
    """Pictures, captions, and the score of each of their pairs by the slow twin."""
    chance = random.Random(seed)
    captions = sorted({" ".join(chance.choices(WORDS, k=chance.randint(1, 14))) for _ in range(num_captions)})
    artifact = open_artifact("demo")
    model, encoder = load_model(artifact, dtype="float32").model, load_encoder(artifact)
    pictures, table = [], {}
    for data in (path.read_bytes() for path in paths):
        image = encoder.encode_image(decode_image(data, LIMITS, exif_transpose=False))
        group, _ = encoder.encode(Group(tuple(captions), None, image))
        if group is None:
            raise RuntimeError("no caption can be scored")
        (scores,) = score_plain(model, [group])
        pictures.append(Picture(data, image_id(data)))
        table |= {(image_id(data), caption): value for caption, value in zip(captions, scores.values, strict=True)}
    return pictures, captions, table


def make_asks(pictures: Sequence[Picture], captions: Sequence[str], num_requests: int, seed: int) -> list[Ask]:
    """A mix of ways and sizes: mostly small, some of 64 captions."""
    chance = random.Random(seed)
    sizes = [1, 1, 2, 4, 8, 8, 16, 64]
    kinds = ["json", "multipart", "id", "groups", "compare"]
    asks = []
    for _ in range(num_requests):
        kind = chance.choice(kinds)
        size = 2 if kind == "compare" else chance.choice(sizes)
        asks.append(Ask(kind, chance.choice(pictures), tuple(chance.choices(captions, k=size))))
    return asks


async def send(client: httpx.AsyncClient, ask: Ask) -> tuple[int, list[float]]:
    """Status and scores of one request; retries 503 as a trainer would."""
    image = base64.b64encode(ask.picture.data).decode()
    captions = list(ask.captions)
    if ask.kind == "multipart":
        files = [("image", ("x.png", ask.picture.data)), *(("caption", (None, text.encode())) for text in captions)]
        answer = await client.post("/score", files=files)
    elif ask.kind == "compare":
        answer = await client.post("/compare", json={"image": image, "a": captions[0], "b": captions[1]})
    elif ask.kind == "groups":
        half = max(1, len(captions) // 2)
        parts = [part for part in (captions[:half], captions[half:]) if part]
        answer = await client.post("/score", json={"groups": [{"image": image, "captions": part} for part in parts]})
    else:
        name = ask.picture.image_id if ask.kind == "id" else image
        answer = await client.post("/score", json={"image": name, "captions": captions})
    return answer.status_code, _scores(answer.json(), ask.kind) if answer.status_code == 200 else []


def _scores(body: dict, kind: str) -> list[float]:
    if kind == "compare":
        return [body["scores"]["a"], body["scores"]["b"]]
    if kind == "groups":
        return [score for group in body["groups"] for score in group["scores"]]
    return body["scores"]


async def run_client(client: httpx.AsyncClient, asks: list[Ask], table: Table, tally: Tally) -> None:
    """Take requests from the common list until it is empty."""
    while asks:
        ask = asks.pop()
        began = time.perf_counter()
        status, scores = await send(client, ask)
        while status == 503:
            tally.retried += 1
            await asyncio.sleep(0.5)
            status, scores = await send(client, ask)
        tally.latencies_s.append(time.perf_counter() - began)
        count(ask, scores, table, tally)


def count(ask: Ask, scores: Sequence[float], table: Table, tally: Tally) -> None:
    """Compare an answer with the table, caption by caption."""
    tally.requests += 1
    tally.captions += len(ask.captions)
    tally.lost += abs(len(ask.captions) - len(scores))
    for caption, score in zip(ask.captions, scores, strict=False):
        error = abs(score - table[ask.picture.image_id, caption])
        tally.worst = max(tally.worst, error)
        tally.wrong += error > TOLERANCE


async def run_load(url: str, num_requests: int, num_clients: int, seed: int = 0) -> Tally:
    """The whole load against one server. Pictures are sent once beforehand, so that ids are known."""
    pictures, captions, table = make_table(sorted((DEMO_PATH / "cartoons").glob("*.png")), 200, seed)
    asks = make_asks(pictures, captions, num_requests, seed)
    tally = Tally()
    limits = httpx.Limits(max_connections=num_clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        for picture in pictures:
            (await client.put("/images", content=picture.data)).raise_for_status()
        await asyncio.gather(*(run_client(client, asks, table, tally) for _ in range(num_clients)))
    return tally


def report(tally: Tally, seconds: float) -> str:
    """The figures, in one line a kind."""
    ordered = sorted(tally.latencies_s)
    p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    return (
        f"{tally.requests} requests, {tally.captions} captions: {tally.wrong} wrong, {tally.lost} lost, {tally.retried} retries after 503\n"
        f"largest difference {tally.worst:.1e} (allowed {TOLERANCE:.0e}); 95 % bound on wrong captions {3 / max(tally.captions, 1):.1e}\n"
        f"{tally.captions / seconds:.0f} captions/s, latency p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms, {seconds:.0f} s in all"
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--url")
    arguments.add_argument("--requests", type=int, default=5000)
    arguments.add_argument("--clients", type=int, default=32)
    given = arguments.parse_args()
    if given.url:
        tally, seconds = timed(given.url, given.requests, given.clients)
    else:
        with started() as server:
            tally, seconds = timed(server.url, given.requests, given.clients)
    print(report(tally, seconds))
    if tally.wrong or tally.lost or tally.requests != given.requests:
        raise SystemExit(1)


def timed(url: str, num_requests: int, num_clients: int) -> tuple[Tally, float]:
    began = time.perf_counter()
    tally = asyncio.run(run_load(url, num_requests, num_clients))
    return tally, time.perf_counter() - began


if __name__ == "__main__":
    main()
