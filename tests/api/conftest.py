"""The application over fakes, with default settings."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.fakes import Served, serving


@pytest.fixture
async def application(anyio_backend: str) -> AsyncIterator[Served]:
    async with serving() as served:
        yield served
