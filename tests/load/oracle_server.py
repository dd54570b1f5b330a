"""The real HTTP layer, service, scorer and batch loop on a port, over the oracle device: `python -m tests.load.serve_oracle`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from starlette.types import ASGIApp

from app.admission import Admission
from app.api import create_app
from app.api.card import Card, ModelCard, Models
from app.batching import Batcher
from app.connections import guarded_config
from app.draining import DrainingServer, bind
from app.errors import DeviceBroken
from app.metrics import Metrics
from app.selftest import SelfTestReport
from app.service import ScoringService
from app.settings import Settings, load_settings
from tests.fakes import FakeEncoder, FakeState, service_of
from tests.load.oracle_device import DIE, FAULTS, HANG, HUGE, NAN, RAISE, SHORT, STICKY, Cost, FaultPlan, build_device
from tests.load.plants import IN_HTTP, SERVER_PLANTS, ForgetfulCounter, PlantedHttp
from tests.load.truth import fingerprint_of

__all__ = ["DIE", "FAULTS", "HANG", "HUGE", "NAN", "RAISE", "SHORT", "STICKY", "Ordered"]


@dataclass(frozen=True, slots=True)
class Ordered:
    """What a server is told beside its settings."""

    cost: Cost
    plan: FaultPlan = field(default_factory=FaultPlan)
    model: str = ""  # its scores and its fingerprint depend on it
    signs_as: str | None = None  # another name for the fingerprint: a lie
    plant: str | None = None
    journal: Path | None = None  # where each caption that comes to the device is noted with its moment

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.model if self.signs_as is None else self.signs_as)


async def serve(ordered: Ordered) -> None:
    """Until told to stop, as `punchline serve` would. Raises DeviceBroken."""
    with ExitStack() as stack:
        journal = stack.enter_context(ordered.journal.open("w", encoding="utf-8")) if ordered.journal else None
        await _serve(ordered, journal)


async def _serve(ordered: Ordered, journal: TextIO | None) -> None:
    settings, metrics, state = load_settings(), Metrics(), FakeState()
    if ordered.plant == "skip-counter":
        metrics.requests = ForgetfulCounter(metrics.requests, 50)  # type: ignore[assignment]
    listener = bind(settings)
    admission = Admission(max_items=settings.max_queue_items, max_tokens=settings.max_queue_tokens, metrics=metrics)
    batcher = Batcher(
        build_device(settings, metrics, ordered.model, ordered.cost, ordered.plan, ordered.plant, journal),
        max_batch_tokens=settings.max_batch_tokens,
        admission=admission,
        metrics=metrics,
        max_batch_s=settings.max_batch_s or 60.0,
    )
    with ThreadPoolExecutor(settings.num_encode_threads) as pool:
        async with batcher:
            service = service_of(settings, metrics, FakeEncoder(), batcher, admission, pool)
            app: ASGIApp = create_app(settings, _card(settings, metrics, state, batcher, service, ordered), metrics)
            app = PlantedHttp(app, ordered.plant) if ordered.plant in IN_HTTP else app
            server = _server(app, settings, metrics, batcher, state, ordered)
            await server.serve(sockets=[listener])
            if server.fault is not None:
                raise server.fault


def _card(settings: Settings, metrics: Metrics, state: FakeState, batcher: Batcher, service: ScoringService, ordered: Ordered) -> Card:
    async def run_selftest() -> SelfTestReport:
        return state.report

    return Card(
        models=Models([ModelCard("oracle", ordered.fingerprint, 1.0, service, run_selftest)]),
        registry=metrics.registry,
        describe=lambda: {"settings": settings.redacted()},
        is_ready=lambda: batcher.alive and not state.draining,
        is_alive=lambda: batcher.alive,
        is_draining=lambda: state.draining,
    )


def _server(app: ASGIApp, settings: Settings, metrics: Metrics, batcher: Batcher, state: FakeState, ordered: Ordered) -> DrainingServer:
    is_cut = ordered.plant == "cut-at-signal"  # a server that closes everything as soon as it is told to stop

    def begin() -> None:
        state.draining = True
        if is_cut:
            for connection in list(server.server_state.connections):
                connection.transport.abort()

    server = DrainingServer(
        guarded_config(app, settings, metrics, ordered.fingerprint),
        batcher,
        notice_s=0.0 if is_cut else settings.drain_notice_s,
        drain_s=settings.drain_s,
        begin=begin,
        announce=lambda taken: print(f"oracle on http://127.0.0.1:{taken.getsockname()[1]}", flush=True),
    )
    return server


def read_flags() -> Ordered:
    """What the command line asks for."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--a-ms", type=float, default=0.0, help="milliseconds a batch")
    arguments.add_argument("--b-ms", type=float, default=0.0, help="milliseconds a caption")
    arguments.add_argument("--model", default="", help="name behind scores and fingerprint")
    arguments.add_argument("--signs-as", help="name behind the fingerprint, if it lies")
    arguments.add_argument("--faults", type=float, default=0.0, help="share of the batches that fail once")
    arguments.add_argument("--seed", type=int, default=0, help="of these faults")
    arguments.add_argument("--plant", choices=SERVER_PLANTS, help="a defect to be found")
    arguments.add_argument("--journal", type=Path, help="a file to note in when each caption came to the device")
    given = arguments.parse_args()
    cost = Cost(given.a_ms / 1000, given.b_ms / 1000)
    return Ordered(cost, FaultPlan(given.seed, given.faults), given.model, given.signs_as, given.plant, given.journal)


def main() -> None:
    from app.cli import leave

    ordered = read_flags()
    logging.basicConfig(level="CRITICAL" if ordered.plan.share else "WARNING", stream=sys.stderr)
    try:
        asyncio.run(serve(ordered))
    except DeviceBroken as error:
        print(f"oracle: {error}", file=sys.stderr)
        leave(DeviceBroken.exit_code)
