"""The memory that request bodies take together, and one big one parsed at a time. Knows bytes, not what they say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

from app.admission import jittered_s
from app.errors import Overloaded
from app.metrics import Metrics

_LARGE_BYTES = 256 << 10  # a larger body takes milliseconds to parse, in which the event loop should answer others
_RETRY_S = 2.0  # to wait for room
_Result = TypeVar("_Result")


class BodyRoom:
    """Room for the bytes of all bodies that have arrived and are not answered yet. For one event loop, without a lock.

    Bytes count as they arrive, not as they are announced: a client that only says it will send much takes nothing.
    """

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._num_bytes = 0
        self._parser = ThreadPoolExecutor(1, thread_name_prefix="parse")

    def open(self) -> HeldBody:
        """The share of one request, empty."""
        return HeldBody(self)

    def _take(self, num_bytes: int) -> None:
        if self._num_bytes + num_bytes > self._max_bytes:
            self._metrics.rejected.labels(Overloaded.code).inc()
            raise Overloaded("the bodies of other requests fill the room for them", retry_after_s=jittered_s(_RETRY_S))
        self._change(num_bytes)

    def _change(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._metrics.http_body_bytes.set(self._num_bytes)


class HeldBody:
    """What the body of one request takes of the room; given back by leaving the `with` block, whatever became of the request."""

    def __init__(self, room: BodyRoom) -> None:
        self._room = room
        self._num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Room for a chunk. Raises Overloaded when there is none; what was taken before stays taken until the answer has left."""
        self._room._take(num_bytes)
        self._num_bytes += num_bytes

    async def parse(self, read: Callable[[], _Result]) -> _Result:
        """What `read` makes of the body, a large one on a thread.

        One at a time, of all requests: several would not be faster under one interpreter lock and would starve the loop together.
        """
        if self._num_bytes <= _LARGE_BYTES:
            return read()
        return await asyncio.get_running_loop().run_in_executor(self._room._parser, read)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._room._change(-self._num_bytes)
        self._num_bytes = 0
