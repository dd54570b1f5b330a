"""What the routes are given of a running server: the models that requests name, and what the state routes show of the process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from app.errors import ModelUnknown
from app.metrics import UNKNOWN_MODEL
from app.selftest import SelfTestReport
from app.service import ScoringService


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model that answers."""

    name: str  # as requests give it and `/v1/models` tells it
    fingerprint: str
    temperature: float
    service: ScoringService
    run_selftest: Callable[[], Awaitable[SelfTestReport]]


class Models:
    """The models of a server; the first answers requests that name none."""

    def __init__(self, models: Sequence[ModelCard]) -> None:
        self._by_name = {model.name: model for model in models}
        self.first = models[0]

    def __iter__(self) -> Iterator[ModelCard]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def named(self, name: str | None, num_captions: int = 0) -> ModelCard:
        """The model a request wants. Raises ModelUnknown, which counts the captions as refused."""
        if name is None:
            return self.first
        with self.first.service.refusing(num_captions, UNKNOWN_MODEL):
            if name not in self._by_name:
                raise ModelUnknown("no model of this name is served; GET /v1/models lists those that are")
        return self._by_name[name]

    @property
    def seeing(self) -> ModelCard:
        """The first that takes images; the first where none does."""
        return next((model for model in self if model.service.takes_images), self.first)


@dataclass(frozen=True, slots=True)
class Card:
    """Given to the routes by the composition root; the callables look at the live process."""

    models: Models
    registry: CollectorRegistry
    describe: Callable[[], dict[str, Any]]
    is_ready: Callable[[], bool]
    is_alive: Callable[[], bool]
    is_draining: Callable[[], bool]

    @property
    def ready(self) -> bool:
        return self.is_ready()

    @property
    def alive(self) -> bool:
        return self.is_alive()

    def as_dict(self) -> dict[str, Any]:
        return self.describe()
