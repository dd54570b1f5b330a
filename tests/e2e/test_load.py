"""Many clients at once: no answer wrong, none lost."""

from __future__ import annotations

import asyncio

import pytest

from tests.e2e.load import Tally, run_load
from tests.e2e.server import Server


def check(tally: Tally, num_requests: int) -> None:
    assert tally.requests == num_requests
    assert (tally.wrong, tally.lost) == (0, 0)
    assert tally.captions > num_requests


def test_300_mixed_requests_from_32_clients(server: Server) -> None:
    check(asyncio.run(run_load(server.url, 300, 32)), 300)


@pytest.mark.slow
def test_5000_mixed_requests_from_32_clients(server: Server) -> None:
    check(asyncio.run(run_load(server.url, 5000, 32)), 5000)


def test_a_planted_defect_is_seen() -> None:
    """The tally itself must be able to fail: a swapped pair of scores counts as wrong, a missing one as lost."""
    from tests.e2e.load import Ask, Picture, count

    ask, tally = Ask("json", Picture(b"", "id"), ("x", "y")), Tally()
    table = {("id", "x"): 1.0, ("id", "y"): 2.0}
    count(ask, [2.0, 1.0], table, tally)
    count(ask, [1.0], table, tally)
    assert (tally.wrong, tally.lost) == (2, 1)
