"""The whole HTTP stack around several models: over oracles, whose scores tell which of them answered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from app.admission import Admission
from app.api import create_app
from app.api.card import Card, ModelCard, Models
from app.artifacts import RewardModelConfig
from app.batching import Batcher
from app.caches import ByteBoundedCache
from app.contracts import EncodedGroup, EncodedImage, Ids, Scores
from app.images import image_limits
from app.lanes import Lane, LanesScorer
from app.metrics import Metrics
from app.monitors import RunMonitors
from app.selftest import SelfTestReport
from app.service import ScoringService
from app.settings import Settings
from app.tallies import Expected
from tests.fakes import FakeEncoder, OracleScorer, expected_scores, oracle_score, sample

SALT = 16.0  # between the scores of one model and the next; an oracle's lie between 0 and 1


@dataclass(slots=True)
class Salted(OracleScorer):
    """An oracle whose scores no other model gives; 48 bits and a small whole number are exact in JSON."""

    salt: float = 0.0
    fails: type[Exception] | None = None
    num_cleared: int = 0

    def __post_init__(self) -> None:
        OracleScorer.__post_init__(self)
        self.answer = self._answer

    def _answer(self, group: EncodedGroup, row: Ids) -> float:
        return oracle_score(group, row) + self.salt

    def score(self, prepared: tuple[EncodedGroup, ...]) -> list[Scores]:
        if self.fails is not None:
            raise self.fails("no more")
        return OracleScorer.score(self, prepared)

    def make_room(self) -> None:
        self.num_cleared += 1


@dataclass(frozen=True, slots=True)
class Several:
    """A server of several models, and a client that speaks to it."""

    client: httpx.AsyncClient
    scorers: dict[str, Salted]
    encoders: dict[str, FakeEncoder]
    metrics: Metrics
    models: Models
    reports: dict[str, SelfTestReport]  # of the self-tests; tests change them

    def metric(self, name: str, **labels: str) -> float:
        return sample(self.metrics, name, **labels)

    def wanted(self, model: str, image: bytes | None, captions: Sequence[str], prompt: str | None = None) -> list[float]:
        return [score + self.scorers[model].salt for score in expected_scores(image, captions, prompt)]


def fingerprint_of(model: str) -> str:
    return model.encode().hex().ljust(64, "0")[:64]


@asynccontextmanager
async def serving_several(
    names: Sequence[str] = ("first", "second", "org/third"),
    *,
    blind: Sequence[str] = (),
    expected: dict[str, Expected | None] | None = None,
    **flags: Any,
) -> AsyncIterator[Several]:
    """The real lanes, batcher, services and routes. `blind`: models that take no image."""
    settings, metrics = Settings(**flags), Metrics()
    scorers = {name: Salted(salt=SALT * number) for number, name in enumerate(names)}
    encoders = {name: FakeEncoder(takes_images=name not in blind) for name in names}
    reports = {name: SelfTestReport(True, "golden", 2, 0.0, 1e-4, "2 golden scores") for name in names}
    admission = Admission(max_items=settings.max_queue_items, max_tokens=settings.max_queue_tokens, metrics=metrics)
    batcher = Batcher(LanesScorer(scorers), max_batch_tokens=settings.max_batch_tokens, admission=admission, metrics=metrics)
    about = {name: (expected or {}).get(name) for name in names}
    monitors = RunMonitors(settings.max_runs, about[names[0]], metrics, further={name: about[name] for name in names[1:]})
    store = ByteBoundedCache[bytes]("images", settings.image_store_bytes, len, metrics)
    with ThreadPoolExecutor(2) as pool:
        async with batcher:
            cards = []
            for name in names:
                service = ScoringService(
                    config=RewardModelConfig(base_model_name="fake", score_head_shape=(1, 8)),
                    encoder=encoders[name],
                    batcher=Lane(batcher, name),
                    admission=admission,
                    limits=image_limits(settings),
                    image_store=store,
                    pixel_cache=ByteBoundedCache[EncodedImage]("pixels", 1 << 20, lambda image: image.num_bytes, metrics, name),
                    pool=pool,
                    max_batch_tokens=settings.max_batch_tokens,
                    metrics=metrics,
                    monitors=monitors,
                    model=name,
                )
                cards.append(ModelCard(name, fingerprint_of(name), 1.0, service, _report(reports, name)))
            models = Models(cards)
            card = Card(models, metrics.registry, dict, lambda: True, lambda: batcher.alive, lambda: False)
            transport = httpx.ASGITransport(create_app(settings, card, metrics))
            async with httpx.AsyncClient(transport=transport, base_url="http://punchline") as client:
                yield Several(client, scorers, encoders, metrics, models, reports)


def _report(reports: dict[str, SelfTestReport], name: str) -> Any:
    async def run() -> SelfTestReport:
        return reports[name]

    return run
