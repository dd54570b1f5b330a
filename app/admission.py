"""The budget of accepted and unanswered work, and each caller's share of it. Knows captions and tokens, not what they are."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from app.errors import DeadlineExceeded, Overloaded, TooManyTokens
from app.metrics import Metrics

_MAX_RETRY_AFTER_S = 30
_REMEMBERED_S = 10.0  # who asked within this time may come back, and finds its share free


@dataclass(slots=True)
class _Caller:
    """What one caller holds, and when it last asked."""

    items: int = 0
    tokens: int = 0
    asked: float = -math.inf


class Admission:
    """The budget of accepted and unanswered work, in captions and tokens. Safe across threads.

    One caller alone may fill it. Among several, whoever holds an equal share gets no more than what the others leave of theirs: who
    floods the queue is refused before those who do not. Callers are few, the names of keys; nobody can make one up.
    """

    def __init__(self, *, max_items: int, max_tokens: int, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._callers: dict[str, _Caller] = {}
        self._max_items = max_items
        self.max_tokens = max_tokens
        self._metrics = metrics
        self._lock = threading.Lock()
        self._items = 0
        self._tokens = 0
        self.tokens_per_s = 0.0  # measured by the batcher; 0 until the first batch

    def reserve(self, num_items: int, caller: str = "") -> Reservation:
        """Room for captions; tokens are added once the image header is known. Raises Overloaded."""
        with self._lock:
            own = self._callers.setdefault(caller, _Caller())
            own.asked = self._clock()
            if self._is_greedy(own):
                raise Overloaded("what is left of the queue is kept for other keys", retry_after_s=self._retry_after_s())
        self._take(num_items, 0, caller)
        return Reservation(self, num_items, caller)

    def _take(self, num_items: int, num_tokens: int, caller: str) -> None:
        with self._lock:
            if self._items + num_items > self._max_items or self._tokens + num_tokens > self.max_tokens:
                raise Overloaded("the queue is full", retry_after_s=self._retry_after_s())
            self._change(self._callers[caller], num_items, num_tokens)

    def _is_greedy(self, own: _Caller) -> bool:
        """Whether it holds its share, and others want what is free. Who holds nothing never is, however much it asks for."""
        others = [each for each in self._callers.values() if each is not own and self._is_there(each, own.asked)]
        items = [each.items for each in others], own.items, self._items, self._max_items
        tokens = [each.tokens for each in others], own.tokens, self._tokens, self.max_tokens
        return bool(others) and (_exceeds_share(*items) or _exceeds_share(*tokens))

    @staticmethod
    def _is_there(caller: _Caller, now: float) -> bool:
        return caller.items > 0 or now - caller.asked <= _REMEMBERED_S

    def _give(self, num_items: int, num_tokens: int, caller: str) -> None:
        with self._lock:
            self._change(self._callers[caller], -num_items, -num_tokens)

    def _change(self, own: _Caller, num_items: int, num_tokens: int) -> None:
        self._items += num_items
        self._tokens += num_tokens
        own.items += num_items
        own.tokens += num_tokens
        self._publish()

    def _publish(self) -> None:
        self._metrics.queue_items.set(self._items)
        self._metrics.queue_tokens.set(self._tokens)

    def _retry_after_s(self) -> int:
        """Seconds until half the queue is done, jittered so that callers do not come back as one."""
        return jittered_s(self._tokens / self.tokens_per_s / 2 if self.tokens_per_s else 1.0)


def _exceeds_share(others: Sequence[int], own: int, held: int, whole: int) -> bool:
    """Whether `own` is an equal share already, and all that is free is owed to others that hold less than theirs."""
    share = whole / (len(others) + 1)
    return own >= share and whole - held <= sum(max(0.0, share - each) for each in others)


def jittered_s(wait_s: float) -> int:
    """Whole seconds for `Retry-After`, spread so that those who are sent away together do not come back together."""
    return min(_MAX_RETRY_AFTER_S, max(1, math.ceil(wait_s * random.uniform(0.75, 1.5))))  # noqa: S311 (jitter, not a secret)


class Reservation:
    """A share of the admission budget; released once, by leaving the `with` block. Several threads may add to it."""

    def __init__(self, admission: Admission, num_items: int, caller: str) -> None:
        self._admission = admission
        self._caller = caller
        self._lock = threading.Lock()
        self._open = True
        self._num_items = num_items
        self._num_tokens = 0

    def add_tokens(self, num_tokens: int) -> None:
        """Raises Overloaded when the tokens do not fit beside those of others, TooManyTokens when they never could.

        Once released it raises DeadlineExceeded: a thread that comes late takes nothing that nobody would give back.
        """
        with self._lock:
            if not self._open:
                raise DeadlineExceeded("nobody waits for this request any more")
            if self._num_tokens + num_tokens > self._admission.max_tokens:
                raise TooManyTokens(f"the request has more than {self._admission.max_tokens} tokens; send fewer captions at a time")
            self._admission._take(0, num_tokens, self._caller)
            self._num_tokens += num_tokens

    def settle(self, bound: int, num_tokens: int) -> None:
        """Give back what an upper bound took too much, now that the true number is known.

        A group that is cut repeats its prefix and may cost more than the bound: what is missing is taken as by `add_tokens`.
        """
        if num_tokens > bound:
            self.add_tokens(num_tokens - bound)
            return
        with self._lock:
            if self._open:
                self._admission._give(0, bound - num_tokens, self._caller)
                self._num_tokens -= bound - num_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            if self._open:
                self._admission._give(self._num_items, self._num_tokens, self._caller)
            self._open = False
