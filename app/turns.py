"""Who is next where only so many may be at once: callers in equal shares, each in the order it came."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Of one event loop. A free place goes to the caller with the fewest in hand, among equals to the one that has waited longest."""

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._in_hand: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by caller, none of them empty

    @asynccontextmanager
    async def of(self, caller: str) -> AsyncIterator[None]:
        """A place for one, given back at the end."""
        if self._in_hand.total() < self._num_places:  # then nobody waits
            self._in_hand[caller] += 1
        else:
            await self._wait(caller)
        try:
            yield
        finally:
            self._give_back(caller)

    async def _wait(self, caller: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._remove(caller, turn)
            else:  # the place came at the same moment
                self._give_back(caller)
            raise

    def _give_back(self, caller: str) -> None:
        self._in_hand[caller] -= 1
        if not self._in_hand[caller]:
            del self._in_hand[caller]
        while self._waiting:
            following = min(self._waiting, key=lambda each: self._in_hand[each])
            queue = self._waiting.pop(following)
            turn = queue.popleft()
            if queue:  # behind the callers with as many in hand
                self._waiting[following] = queue
            if not turn.done():
                self._in_hand[following] += 1
                turn.set_result(None)
                return

    def _remove(self, caller: str, turn: asyncio.Future[None]) -> None:
        queue = self._waiting.get(caller, deque())
        if turn in queue:
            queue.remove(turn)
        if not queue:
            self._waiting.pop(caller, None)
