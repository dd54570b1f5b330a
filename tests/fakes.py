"""Hand-written fakes behind the two protocols, and the whole HTTP stack around them. No torch, milliseconds a request."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI
from PIL import Image

from app.admission import Admission
from app.api import create_app
from app.api.card import Card, ModelCard, Models
from app.artifacts import RewardModelConfig
from app.batching import Batcher
from app.caches import ByteBoundedCache
from app.contracts import EncodedGroup, EncodedImage, Explanation, Group, Ids, RgbImage, Scores
from app.dialling import Dialler
from app.errors import ApiError, ItemRejected
from app.fetching import Fetcher, fetcher_of
from app.images import image_limits
from app.metrics import Metrics
from app.monitors import RunMonitors
from app.selftest import SelfTestReport
from app.service import ScoringService
from app.settings import Settings
from app.tallies import Expected

FINGERPRINT = "f" * 64
IMAGE_PAD, PROMPT_END, CAPTION_END = 256, 257, 258
MAX_CAPTION_TOKENS = 80
UNSCORABLE = "cannot be scored"  # a caption with these words is refused as one item
DEFAULT_PROMPT = "Say something funny."
Answer = Callable[[EncodedGroup, Ids], float]


def oracle_score(group: EncodedGroup, row: Ids) -> float:
    """A score nobody could guess: the first 6 bytes of SHA-256(image id, token ids) as a fraction. Exact in JSON."""
    name = group.image.image_id if group.image else ""
    digest = hashlib.sha256(name.encode() + row.tobytes()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


@dataclass(slots=True)
class OracleScorer:
    """Implements `Scorer`. Keeps the batches it has scored; waits for `gate` before each, when it has begun it."""

    answer: Answer = oracle_score
    batches: list[tuple[EncodedGroup, ...]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    num_begun: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    def prepare(self, groups: Sequence[EncodedGroup]) -> tuple[EncodedGroup, ...]:
        return tuple(groups)

    def score(self, prepared: tuple[EncodedGroup, ...]) -> list[Scores]:
        self.num_begun += 1
        self.gate.wait(30)
        self.batches.append(prepared)
        return [self._scores(group) for group in prepared]

    def _scores(self, group: EncodedGroup) -> Scores:
        values = tuple(self.answer(group, row) for row in group.rows)
        return Scores(values, sum(len(row) for row in group.rows), group.num_tokens)


class FakeEncoder:
    """Implements `GroupEncoder`: an id a byte, an image token for every 32 x 32 pixels."""

    def __init__(self, *, takes_images: bool = True) -> None:
        self._takes_images = takes_images

    @property
    def takes_images(self) -> bool:
        return self._takes_images

    def image_tokens(self, width: int, height: int) -> int:
        return -(-width // 32) * -(-height // 32)

    def max_tokens(self, num_image_tokens: int, prompt: str | None, captions: Sequence[str]) -> int:
        shared = num_image_tokens + len((prompt or DEFAULT_PROMPT).encode()) + 1
        return shared + sum(min(len(caption.encode()), MAX_CAPTION_TOKENS) + 1 for caption in captions)

    def encode_image(self, image: RgbImage) -> EncodedImage:
        grid = (1, -(-image.height // 32), -(-image.width // 32))
        patches = np.full((grid[1] * grid[2], 1), image.pixels.mean(), dtype=np.float32)
        return EncodedImage(image.image_id, patches, grid, grid[1] * grid[2])

    def explain(self, pieces: Sequence[EncodedGroup]) -> Explanation:
        rows = [row for piece in pieces for row in piece.rows]
        image = pieces[0].image
        return Explanation(
            chats=["".join(chr(number) for number in row if number < IMAGE_PAD) for row in rows],
            tokens=[len(row) for row in rows],
            pooled_index=[len(row) - 1 for row in rows],
            prefix_tokens=pieces[0].num_prefix,
            image_tokens=image.num_tokens if image else 0,
            image_grid=list(image.grid_thw) if image else None,
        )

    def encode(self, group: Group) -> tuple[EncodedGroup | None, list[ApiError | None]]:
        errors = [_caption_error(index, caption) for index, caption in enumerate(group.captions)]
        prompt = (group.prompt or DEFAULT_PROMPT).encode()
        prefix = [*([IMAGE_PAD] * (group.image.num_tokens if group.image else 0)), *prompt, PROMPT_END]
        captions = [caption for caption, error in zip(group.captions, errors, strict=True) if error is None]
        if not captions:
            return None, errors
        rows = tuple(np.array([*prefix, *caption.encode(), CAPTION_END], dtype=np.int64) for caption in captions)
        key = (group.image.image_id if group.image else "", hashlib.sha256(prompt).digest())
        return EncodedGroup(key, group.image, rows, len(prefix)), errors


def _caption_error(index: int, caption: str) -> ApiError | None:
    if len(caption.encode()) > MAX_CAPTION_TOKENS:
        return ItemRejected(f"the caption is longer than {MAX_CAPTION_TOKENS} tokens", code="caption_too_long", index=index)
    return ItemRejected("the caption cannot be scored", index=index) if UNSCORABLE in caption else None


def picture(width: int = 64, height: int = 48, seed: int = 0, kind: str = "PNG") -> bytes:
    """A small encoded picture; another seed gives another."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(blocks).resize((width, height), Image.Resampling.BILINEAR).save(stream, kind)
    return stream.getvalue()


def expected_scores(image: bytes | None, captions: Sequence[str], prompt: str | None = None) -> list[float]:
    """What the oracle says of these captions, without the stack."""
    encoder, encoded = FakeEncoder(), None
    if image is not None:
        with Image.open(io.BytesIO(image)) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        encoded = encoder.encode_image(RgbImage("sha256:" + hashlib.sha256(image).hexdigest(), pixels))
    group, _ = encoder.encode(Group(tuple(captions), prompt, encoded))
    return [oracle_score(group, row) for row in group.rows] if group else []


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks and threads run until something is so."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came to be so")


@dataclass(slots=True)
class FakeState:
    """What the card of a fake server says; tests change it."""

    ready: bool = True
    alive: bool = True
    draining: bool = False
    report: SelfTestReport = field(default_factory=lambda: SelfTestReport(True, "golden", 2, 0.0, 1e-4, "2 golden scores"))


@dataclass(frozen=True, slots=True)
class Served:
    """A running application over fakes, and a client that speaks to it without a socket."""

    app: FastAPI
    client: httpx.AsyncClient
    scorer: OracleScorer
    metrics: Metrics
    settings: Settings
    state: FakeState
    batcher: Batcher

    def metric(self, name: str, **labels: str) -> float:
        return sample(self.metrics, name, **labels)


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    """A metric's value, over all models unless one is named; 0 for labels never used."""
    summed = {"model"} - labels.keys()
    found = (each for family in metrics.registry.collect() for each in family.samples if each.name == name)
    return sum(each.value for each in found if {label: value for label, value in each.labels.items() if label not in summed} == labels)


@asynccontextmanager
async def serving(
    *,
    scorer: OracleScorer | None = None,
    encoder: FakeEncoder | None = None,
    takes_images: bool = True,
    headers: dict[str, str] | None = None,
    expected: Expected | None = None,
    dialler: Dialler | None = None,
    **flags: Any,
) -> AsyncIterator[Served]:
    """The real service, batcher and HTTP layer over the fakes, with settings from `flags`."""
    settings, metrics, state, scorer = Settings(**flags), Metrics(), FakeState(), scorer or OracleScorer()
    admission = Admission(max_items=settings.max_queue_items, max_tokens=settings.max_queue_tokens, metrics=metrics)
    batcher = Batcher(scorer, max_batch_tokens=settings.max_batch_tokens, admission=admission, metrics=metrics)
    with ThreadPoolExecutor(2) as pool:
        async with batcher:
            encoder = encoder or FakeEncoder(takes_images=takes_images)
            fetcher = fetcher_of(settings, metrics, dialler)
            service = service_of(settings, metrics, encoder, batcher, admission, pool, expected, fetcher)
            app = create_app(settings, _card(settings, metrics, state, service), metrics)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://punchline", headers=headers) as client:
                yield Served(app, client, scorer, metrics, settings, state, batcher)


def service_of(
    settings: Settings,
    metrics: Metrics,
    encoder: FakeEncoder,
    batcher: Batcher,
    admission: Admission,
    pool: ThreadPoolExecutor,
    expected: Expected | None = None,
    fetcher: Fetcher | None = None,
) -> ScoringService:
    """The real service over a fake encoder."""
    return ScoringService(
        config=RewardModelConfig(base_model_name="fake", score_head_shape=(1, 8)),
        encoder=encoder,
        batcher=batcher,
        admission=admission,
        limits=image_limits(settings),
        image_store=ByteBoundedCache[bytes]("images", settings.image_store_bytes, len, metrics),
        pixel_cache=ByteBoundedCache[EncodedImage]("pixels", settings.pixel_cache_bytes, lambda image: image.num_bytes, metrics),
        pool=pool,
        max_batch_tokens=settings.max_batch_tokens,
        metrics=metrics,
        monitors=RunMonitors(settings.max_runs, expected, metrics),
        fetcher=fetcher,
    )


def _card(settings: Settings, metrics: Metrics, state: FakeState, service: ScoringService) -> Card:
    async def run_selftest() -> SelfTestReport:
        return state.report

    return Card(
        models=Models([ModelCard("fake", FINGERPRINT, 1.0, service, run_selftest)]),
        registry=metrics.registry,
        describe=lambda: {"model": {"fingerprint": FINGERPRINT, "takes_images": service.takes_images}, "settings": settings.redacted()},
        is_ready=lambda: state.ready,
        is_alive=lambda: state.alive,
        is_draining=lambda: state.draining,
    )
