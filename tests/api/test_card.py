"""The card looks at the live process each time it is asked."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from app.api.card import Card, ModelCard, Models
from app.selftest import SelfTestReport


async def _run() -> SelfTestReport:
    return SelfTestReport(True, "golden", 1, 0.0, 1e-4, "one golden score")


@pytest.mark.anyio
async def test_the_card_asks_the_process_every_time() -> None:
    state = {"ready": False, "alive": True}
    card = Card(
        models=Models([ModelCard("demo", "f", 1.0, object(), _run)]),  # type: ignore[arg-type]
        registry=CollectorRegistry(),
        describe=lambda: dict(state),
        is_ready=lambda: state["ready"],
        is_alive=lambda: state["alive"],
        is_draining=lambda: False,
    )
    assert (card.ready, card.alive, card.as_dict()) == (False, True, {"ready": False, "alive": True})
    state["ready"], state["alive"] = True, False
    assert (card.ready, card.alive, card.as_dict()) == (True, False, {"ready": True, "alive": False})
    assert (await card.models.first.run_selftest()).passed
