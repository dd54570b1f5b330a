"""One demo server for all end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.server import Server, started


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with started() as running:
        yield running
