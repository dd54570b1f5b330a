"""What the state routes show of a running server: the card of the loaded model, readiness, the self-test."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from app.selftest import SelfTestReport


@dataclass(frozen=True, slots=True)
class Card:
    """Given to the routes by the composition root; the callables look at the live process."""

    name: str  # as `/v1/models` tells it
    fingerprint: str
    temperature: float
    registry: CollectorRegistry
    describe: Callable[[], dict[str, Any]]
    is_ready: Callable[[], bool]
    is_alive: Callable[[], bool]
    is_draining: Callable[[], bool]
    run_selftest: Callable[[], Awaitable[SelfTestReport]]

    @property
    def ready(self) -> bool:
        return self.is_ready()

    @property
    def alive(self) -> bool:
        return self.is_alive()

    def as_dict(self) -> dict[str, Any]:
        return self.describe()
